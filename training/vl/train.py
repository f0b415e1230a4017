"""The training loop of all stages: each goes on where it stopped, and the next one starts from its end."""

from __future__ import annotations

import json
import math
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from .labels import IGNORED
from .model import Sizes
from .optimisers import Group, Optimisers
from .packing import Packed, Packer, answer_logits, answer_loss, packed_batch
from .tower import DenseHeads, TowerBatch, read_tower, tower_accuracy, tower_batch, tower_losses

WARM_UP = 100
REPORT_EVERY = 100
SAVE_SECONDS = 120.0


@dataclass(frozen=True)
class Stage:
    """What is trained, how long (steps or seconds of this stage, whichever is over first), and how fast."""

    name: str
    steps: int
    seconds: float = math.inf
    pictures: int = 32
    rate: float = 2e-3
    tower_rate: float = 2e-3
    pairs: float = 0.0


@dataclass
class Parts:
    """What the stages share: the model, what is trained beside it, the tokenizer and the sizes.

    Beside the model stand the tower's own readers, or a fusion of its layers.
    """

    model: LlavaForConditionalGeneration
    heads: nn.Module
    tokenizer: PreTrainedTokenizerFast
    sizes: Sizes

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def state(self) -> dict[str, Tensor]:
        """All weights by name, copied, so that tied ones may be saved."""
        named = {**_prefixed("model.", self.model), **_prefixed("heads.", self.heads)}
        return {name: value.detach().clone() for name, value in named.items()}

    def load_state(self, saved: dict[str, Tensor]) -> None:
        """Takes over weights that `state` gave."""
        for prefix, module in (("model.", self.model), ("heads.", self.heads)):
            own = {name.removeprefix(prefix): v for name, v in saved.items() if name.startswith(prefix)}
            module.load_state_dict(own)


def _prefixed(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in module.state_dict().items()}


class Trainer:
    """One stage: its parameters, its optimiser, its batches."""

    def __init__(self, parts: Parts, stage: Stage, folder: Path, workers: int = 1) -> None:
        self.parts, self.stage, self.folder, self.workers = parts, stage, folder, workers
        self.packer = Packer(parts.tokenizer, parts.sizes)
        self.step, self.spent, self.sums, self.saved_at = 0, 0.0, dict[str, list[float]](), 0.0
        groups = self.groups()
        for module in (parts.model, parts.heads):
            module.requires_grad_(False)
        for _, modules in groups:
            for module in modules:
                module.requires_grad_(True)
        self.optimisers = Optimisers(groups)

    def groups(self) -> list[Group]:
        """What learns in this stage, and how fast."""
        inner, stage = self.parts.model.model, self.stage
        tower, language = [inner.vision_tower, self.parts.heads], [inner.multi_modal_projector, inner.language_model]
        choices: dict[str, list[Group]] = {
            "tower": [(stage.tower_rate, tower)],
            "language": [(stage.rate, language)],
            "both": [(stage.rate, language), (stage.tower_rate, tower)],
        }
        return choices[stage.name]

    @property
    def path(self) -> Path:
        """The stage's one file: weights, optimiser, and where it stands as JSON in the header."""
        return self.folder / f"{self.stage.name}.safetensors"

    def progress(self, step: int) -> float:
        """How much of the stage is over at a step, from 0 to 1."""
        return min(1.0, max(step / self.stage.steps, self.spent / self.stage.seconds))

    def factor(self) -> float:
        """The learning rate's factor: warm-up, then a cosine down to 2 %."""
        cosine = 0.5 * (1 + math.cos(math.pi * self.progress(self.step)))
        return min(1.0, (self.step + 1) / WARM_UP) * (0.02 + 0.98 * cosine)

    def batches(self, step: int) -> tuple[TowerBatch | None, Packed | None]:
        """Dense labels for the tower, questions for the language model, both in the last stage; made in advance."""
        stage, sizes = self.stage, self.parts.sizes
        level = 1.0 if stage.name == "both" else self.progress(step)
        dense, packed = None, None
        if stage.name != "language":
            dense = tower_batch(stage.name, step, level, stage.pictures, sizes.resolution, sizes.patch)
        if stage.name != "tower":
            packed = packed_batch(self.packer, f"{stage.name} questions", step, level, stage.pictures, stage.pairs)
        return dense, packed

    def losses(self, dense: TowerBatch | None, packed: Packed | None) -> Tensor:
        """The loss of a step; what is worth reporting is noted on the way."""
        model, total = self.parts.model, torch.zeros((), device=self.parts.device)
        if dense is not None:
            assert isinstance(self.parts.heads, DenseHeads)
            logits = read_tower(model.model.vision_tower, self.parts.heads, dense.pixel_values)
            parts = tower_losses(logits, dense.labels)
            self._note(
                **{f"{k}_loss": float(v.detach()) for k, v in parts.items()}, **tower_accuracy(logits, dense.labels)
            )
            total = total + sum(parts.values())
        if packed is not None:
            total = total + self.noted_loss(answer_logits(model, packed), packed)
        return total

    def noted_loss(self, answers: Tensor, packed: Packed) -> Tensor:
        """The loss of the answers; it and the share of right words are reported."""
        loss = answer_loss(answers, packed)
        targets = packed.targets[packed.targets != IGNORED]
        words = (packed.weights[packed.targets != IGNORED] == 1.0) & (targets != self.packer.end)
        right = (answers.argmax(-1) == targets)[words]
        self._note(answer_loss=float(loss.detach()), answer_right=float(right.float().mean()))
        return loss

    def _note(self, **values: float) -> None:
        for name, value in values.items():
            if not math.isnan(value):
                self.sums.setdefault(name, []).append(value)

    def one_step(self, dense: TowerBatch | None, packed: Packed | None) -> None:
        """Forward, backward, update."""
        device = self.parts.device
        with torch.autocast(device.type, torch.bfloat16):
            loss = self.losses(dense and dense.to(device), packed and packed.to(device))
        loss.backward()
        self.optimisers.update(self.factor())

    def run(self, steps: int | None = None) -> bool:
        """Trains to the end of the stage, or for so many steps; returns whether the stage is over."""
        last = math.inf if steps is None else self.step + steps
        coming: deque[Future[tuple[TowerBatch | None, Packed | None]]] = deque()
        with ThreadPoolExecutor(self.workers) as pool:
            while self.progress(self.step) < 1 and self.step < last:
                started = time.monotonic()
                while len(coming) <= self.workers:
                    coming.append(pool.submit(self.batches, self.step + len(coming)))
                self.one_step(*coming.popleft().result())
                self.step += 1
                self.spent += time.monotonic() - started
                self._keep()
            pool.shutdown(cancel_futures=True)
        self.save()
        return self.progress(self.step) >= 1

    def _keep(self) -> None:
        if self.step % REPORT_EVERY == 0:
            means = {name: round(sum(v) / len(v), 4) for name, v in self.sums.items()}
            line = {"stage": self.stage.name, "step": self.step, "seconds": round(self.spent), **means}
            with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)
            self.sums = {}
        if self.spent - self.saved_at > SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Writes everything needed to go on, replacing the file in one move."""
        state = json.dumps({"step": self.step, "spent": self.spent})
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        save_file({**self.parts.state(), **self.optimisers.state()}, temporary, metadata={"state": state})
        temporary.replace(self.path)
        self.saved_at = self.spent

    def load(self) -> bool:
        """Goes on from the stage's file if there is one."""
        if not self.path.exists():
            return False
        with safe_open(self.path, "pt", device=str(self.parts.device)) as file:
            state = json.loads(file.metadata()["state"])
            saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self.parts.load_state({k: v for k, v in saved.items() if not k.startswith("optimiser.")})
        self.optimisers.load_state(saved)
        self.step, self.spent = state["step"], state["spent"]
        self.saved_at = self.spent
        return True
