"""Training on answers and on ranking at once; stopped and started again, it goes on where it was."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from ..branches import Batch, Reader, calibrated, one_hot_owners
from ..init import RANKED
from ..lists import ListMaker
from ..train import Temperatures
from .evaluate import exact_match
from .facts import FactWriter, Lesson
from .passages import PassageReader
from .prompts import AnswerPrompts, ranking_batch
from .reading import read_answers


@dataclass(frozen=True)
class Plan:
    """How long, and with what.

    Attributes:
        seconds: time of all steps together.
        rate: learning rate of everything but the embedding table.
        table_rate: that of the table.
        table_eps: Adam's, large enough that tokens which neither the documents nor the answers hold stay in place.
        tokens: about how many a step on facts has.
        questions: most questions over one list.
        ranking: share of the steps that rank.
        real: share of the steps on answers that read real passages, once half of the time is over.
        hide: share of the documents without answers that questions do not see, in three steps of ten.
        pointing: weight of the loss that makes heads look at the answer.
        save_every, check_every: seconds.
        seed: of everything that is drawn.
    """

    seconds: float = 2400.0
    rate: float = 1e-3
    table_rate: float = 3e-4
    table_eps: float = 1e-5
    tokens: int = 700
    questions: int = 16
    ranking: float = 0.2
    real: float = 0.25
    hide: float = 0.3
    pointing: float = 0.5
    save_every: float = 300.0
    check_every: float = 100.0
    seed: int = 0

    def size(self, done: float, rng: Random) -> int:
        """Documents in a list: 2 to 4 first, later up to 20."""
        largest = 4 + int(16 * min(1.0, max(0.0, 3 * done - 0.1)))
        return rng.randint(2, max(4, int(rng.random() ** 0.7 * (largest + 1))))


@dataclass(frozen=True)
class Material:
    """What lessons and lists are drawn from."""

    facts: FactWriter
    passages: PassageReader
    lists: ListMaker


class Trainer:
    """Model, optimiser, and the state of what is drawn, saved together."""

    def __init__(
        self, model: LlamaForCausalLM, prompts: AnswerPrompts, material: Material, plan: Plan, folder: Path
    ) -> None:
        self.model, self.prompts, self.material, self.plan, self.folder = model, prompts, material, plan, folder
        self.temperatures, self.rng = Temperatures(), Random(plan.seed)
        table = model.model.embed_tokens.weight
        groups: list[dict[str, Any]] = [
            {"params": [table], "lr": plan.table_rate, "weight_decay": 0.0, "eps": plan.table_eps},
            {"params": [p for p in model.parameters() if p is not table], "lr": plan.rate, "weight_decay": 0.01},
            {"params": list(self.temperatures.parameters()), "lr": 1e-2, "weight_decay": 0.0},
        ]
        self.base = [group["lr"] for group in groups]
        self.optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
        self.step, self.spent, self.tokens = 0, 0.0, 0

    def done(self) -> float:
        """How much of the plan's time is over."""
        return min(1.0, self.spent / self.plan.seconds)

    def rate(self) -> float:
        """Warm-up over 100 steps, then a cosine down to 3 %."""
        return min(1.0, (self.step + 1) / 100) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * self.done())))

    def lessons(self) -> list[Lesson]:
        """Lists of facts, about `Plan.tokens` tokens together, or one of passages."""
        rng, plan, drawn, tokens = self.rng, self.plan, [], 0
        if rng.random() < plan.real * min(1.0, 0.1 + 2 * self.done()):
            return [self.material.passages.draw(rng.randint(2, 3 + int(6 * self.done())), plan.questions, rng)]
        while tokens < plan.tokens:
            drawn.append(self.material.facts.draw(plan.size(self.done(), rng), plan.questions, rng))
            tokens += 60 + 25 * len(drawn[-1].documents) + 18 * len(drawn[-1].asked)
        return drawn

    def answer_loss(self) -> Tensor:
        """Cross entropy of the answers' tokens and of where the pointing heads look; half of the lists are blocks."""
        rng, lessons = self.rng, self.lessons()
        hide = self.plan.hide if rng.random() < 0.3 else 0.0
        packed = self.prompts.pack(lessons, [rng.random() < 0.5 for _ in lessons], rng, hide)
        self.tokens += len(packed.ids)
        logits, weights = read_answers(self.model, packed)
        mass = (weights * packed.sources).sum(-1)[:, packed.sources.any(-1)]
        return F.cross_entropy(logits.float(), packed.targets) - self.plan.pointing * (mass + 1e-6).log().mean()

    def ranking_loss(self) -> Tensor:
        """The loss that `qr-mini` was trained with, on its lists or on facts."""
        batch, targets = self._list()
        self.tokens += len(batch.prefix) + batch.branches.numel()
        with torch.autocast("cpu", torch.bfloat16):
            masses = Reader(self.model)(batch, one_hot_owners(batch), max(RANKED) + 1)
        return self.temperatures(calibrated(masses), targets)

    def _list(self) -> tuple[Batch, Tensor]:
        rng, lists, questions = self.rng, self.material.lists, self.plan.questions
        kind = rng.random()
        if kind < 0.35:
            lesson = self.material.facts.draw(rng.randint(5, 20), questions, rng)
            targets = F.one_hot(torch.tensor([asked.gold for asked in lesson.asked]), len(lesson.documents))
            return ranking_batch(lists.pieces, lesson), targets.float()
        if kind < 0.4:
            return lists.draw_foreign(rng.randint(4, 8), questions)
        return lists.draw(rng.randint(5, 20), questions)

    def one_step(self) -> tuple[str, float]:
        """One step on answers or on ranking; its kind and its loss."""
        started = time.time()
        for group, base in zip(self.optimiser.param_groups, self.base, strict=True):
            group["lr"] = base * self.rate()
        kind = "ranking" if self.rng.random() < self.plan.ranking else "answers"
        loss = self.ranking_loss() if kind == "ranking" else self.answer_loss()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.step += 1
        self.spent += time.time() - started
        return kind, float(loss.detach())

    def save(self) -> None:
        """Writes everything needed to go on, replacing the file in one move."""
        state = {
            "model": self.model.state_dict(),
            "temperatures": self.temperatures.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "numbers": (self.step, self.spent, self.tokens),
            "rng": (self.rng.getstate(), self.material.lists.rng.getstate()),
        }
        torch.save(state, self.folder / "last.tmp")
        (self.folder / "last.tmp").replace(self.folder / "last.pt")

    def load(self) -> None:
        """Goes on from a saved state if there is one."""
        if not (self.folder / "last.pt").exists():
            return
        state = torch.load(self.folder / "last.pt", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.temperatures.load_state_dict(state["temperatures"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.spent, self.tokens = state["numbers"]
        self.rng.setstate(state["rng"][0])
        self.material.lists.rng.setstate(state["rng"][1])

    def run(self, checks: dict[str, tuple[list[Lesson], bool]]) -> None:
        """Trains to the plan's end; measures `checks` (lessons, and whether as blocks) on the way."""
        losses: dict[str, list[float]] = {"ranking": [], "answers": []}
        saved = checked = self.spent
        while self.done() < 1:
            kind, loss = self.one_step()
            losses[kind].append(loss)
            if self.spent - checked > self.plan.check_every or self.done() >= 1:
                self._report(checks, losses)
                checked, losses = self.spent, {"ranking": [], "answers": []}
            if self.spent - saved > self.plan.save_every or self.done() >= 1:
                self.save()
                saved = self.spent

    def _report(self, checks: dict[str, tuple[list[Lesson], bool]], losses: dict[str, list[float]]) -> None:
        line: dict[str, float] = {"step": self.step, "seconds": round(self.spent), "tokens": self.tokens}
        line |= {kind: round(sum(values) / max(1, len(values)), 4) for kind, values in losses.items()}
        for name, (lessons, block) in checks.items():
            line[name] = round(exact_match(self.model, self.prompts, lessons, block), 3)
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")
        print(line, flush=True)
