"""The training loop: listwise ranking by calibrated attention; resumes where it stopped."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from .branches import Batch, Reader, calibrated, one_hot_owners
from .evaluate import Heads, Measured
from .init import RANKED
from .lists import ListMaker

RANKED_HEADS: Heads = [(layer, head) for layer, count in RANKED.items() for head in range(count)]


@dataclass(frozen=True)
class Plan:
    """How long, and with what."""

    steps: int = 3000
    seconds: float = 3600.0
    rate: float = 3e-4
    embedding_rate: float = 5e-4
    questions: int = 16
    check_every: int = 300
    seed: int = 0

    def size(self, done: float, draw: float) -> int:
        """Documents in a list: short ones first, 8 to 30 in the middle, some of 60 near the end."""
        top = 12 + 20 * min(1.0, 2 * done)
        if done > 0.6 and draw > 0.96:
            return 60
        return int(5 + (top - 5) * draw)


class Temperatures(nn.Module):
    """Learned factors that turn attention mass into logits: all ranked heads, and each layer by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.full((1 + len(RANKED),), math.log(60.0)))

    def forward(self, masses: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy of (layers, heads, B, D) calibrated masses; single layers, for early exit, count 0.3."""
        layers = [masses[layer, :count].sum(0) for layer, count in RANKED.items()]
        targets = targets / targets.sum()
        loss = -(targets * (self.log[0].exp() * sum(layers)).log_softmax(-1)).sum()
        for factor, layer in zip(self.log[1:].exp(), layers, strict=True):
            loss = loss - 0.3 * (targets * (factor * layer).log_softmax(-1)).sum()
        return loss


class Trainer:
    """Model, temperatures, optimiser and lists, saved together."""

    def __init__(self, model: LlamaForCausalLM, lists: ListMaker, plan: Plan, folder: Path) -> None:
        self.model, self.lists, self.plan, self.folder = model, lists, plan, folder
        self.temperatures = Temperatures()
        table = model.model.embed_tokens.weight
        others = [p for p in model.parameters() if p is not table]
        groups = [
            {"params": [table], "lr": plan.embedding_rate, "weight_decay": 0.0},
            {"params": others, "lr": plan.rate, "weight_decay": 0.01},
            {"params": list(self.temperatures.parameters()), "lr": 1e-2, "weight_decay": 0.0},
        ]
        self.optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.98))
        self.base = [plan.embedding_rate, plan.rate, 1e-2]
        self.step, self.best, self.spent = 0, -1.0, 0.0

    def done(self) -> float:
        """How much of the plan is over, by steps or by time spent, whichever is further."""
        return min(1.0, max(self.step / self.plan.steps, self.spent / self.plan.seconds))

    def rate(self) -> float:
        """Warm-up over 60 steps, then a cosine down to 3 %."""
        return min(1.0, (self.step + 1) / 60) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * self.done())))

    def ranking_loss(self, batch: Batch, targets: Tensor) -> Tensor:
        """Loss of one list with all its questions."""
        with torch.autocast("cpu", torch.bfloat16):
            masses = Reader(self.model)(batch, one_hot_owners(batch), max(RANKED) + 1)
        return self.temperatures(calibrated(masses), targets)

    def one_step(self) -> float:
        """One list with its questions; returns the loss."""
        rng, plan, started = self.lists.rng, self.plan, time.time()
        for group, base in zip(self.optimiser.param_groups, self.base, strict=True):
            group["lr"] = base * self.rate()
        if rng.random() < 0.08:
            loss = self.ranking_loss(*self.lists.draw_foreign(rng.randint(4, 8), plan.questions))
        else:
            loss = self.ranking_loss(*self.lists.draw(plan.size(self.done(), rng.random()), plan.questions))
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.step += 1
        self.spent += time.time() - started
        return float(loss.detach())

    def save(self, name: str) -> None:
        """Writes everything needed to go on, replacing the file in one move."""
        state = {
            "model": self.model.state_dict(),
            "temperatures": self.temperatures.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "best": self.best,
            "spent": self.spent,
            "rng": self.lists.rng.getstate(),
        }
        torch.save(state, self.folder / f"{name}.tmp")
        (self.folder / f"{name}.tmp").replace(self.folder / f"{name}.pt")

    def load(self, name: str) -> bool:
        """Goes on from a saved state if there is one."""
        path = self.folder / f"{name}.pt"
        if not path.exists():
            return False
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.temperatures.load_state_dict(state["temperatures"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.best, self.spent = state["step"], state["best"], state["spent"]
        self.lists.rng.setstate(state["rng"])
        return True

    def average(self) -> None:
        """Leaves the mean of the best and the last weights in the model.

        The later weights know the training questions better, the earlier ones unseen ones; on lines 1100-1199 their
        mean ranked as well as the better of the two (0.918 against 0.915 and 0.909, differences within the noise).
        """
        best, last = (torch.load(self.folder / f"{n}.pt", weights_only=True)["model"] for n in ("best", "last"))
        self.model.load_state_dict({name: (best[name] + last[name]) / 2 for name in last})

    def run(self, check: Measured) -> None:
        """Trains to the plan's end; keeps the checkpoint that ranks the held-out training questions best."""
        losses: list[float] = []
        while self.done() < 1:
            losses.append(self.one_step())
            if self.step % self.plan.check_every == 0 or self.done() >= 1:
                self._report(check, losses)
                losses = []

    def _report(self, check: Measured, losses: list[float]) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            check.measure(self.model)
        quality = check.ndcg(RANKED_HEADS)
        line = {
            "step": self.step,
            "ranking_loss": round(sum(losses) / len(losses), 4),
            "ndcg@10": round(quality, 4),
            "layers": {n: round(check.ndcg([h for h in RANKED_HEADS if h[0] == n]), 4) for n in RANKED},
            "factors": [round(f, 1) for f in self.temperatures.log.detach().exp().tolist()],
            "seconds": round(self.spent),
        }
        with (self.folder / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")
        print(line, flush=True)
        if quality > self.best:
            self.best = quality
            self.save("best")
        self.save("last")
