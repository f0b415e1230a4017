"""Trains every way to fuse layers of qr-mini-vl's tower, all alike, and compares them.

python -m training.vl.fusion --out FOLDER [--cells all] [--steps 200]

A cell is a set of layers and a strategy of arXiv 2503.06063, or one layer alone. All cells see the same questions in
the same order, start from the same language model with a new projector, and learn for the same number of steps. The
tower stays as it is, so what its layers make of the pictures is computed once. OUT/cells.jsonl holds a line for each
finished cell; the same command goes on where it stopped, and prints the tables.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from qr_integrations.bundled import bundled_path
from qr_integrations.encoding.fusion import fuse, pictures_at, save_fusion
from qr_integrations.encoding.fusion_layers import SETS, FusionSpec
from qr_integrations.errors import InputError
from qr_integrations.evaluation.drawn_world.held_out import SHARES
from qr_integrations.evaluation.statistics import Estimate, difference, interval

from .evaluate import MANY, held_out_examples, split_hits
from .export import load_exported
from .model import Sizes
from .optimisers import Group
from .packing import Example, Packed, Packer, answer_logits, packed_batch
from .tower import TowerBatch
from .train import Parts, Stage, Trainer

BASELINE = "layer own"
STRATEGIES = ("external_direct", "linear", "external_modular", "internal_direct", "internal_modular")
ALONE = (2, 4, 6, 8, 10, 12)
WARM_UP = 0.1
"""Share of a cell's steps."""


def all_cells() -> dict[str, FusionSpec]:
    """Every cell by name, the most telling first. External fusion of "double" is that of "triple"."""
    cells = {BASELINE: FusionSpec("none"), **{f"layer {v}": FusionSpec("none", final=v) for v in ALONE}}
    for strategy in STRATEGIES:
        sets = [name for name in SETS[1:] if name != "double" or strategy.startswith("internal")]
        cells |= {f"{strategy} {name}": FusionSpec(name, strategy) for name in sets}
    cells["linear none"] = FusionSpec("none", "linear")
    return cells


@dataclass(frozen=True)
class Lesson:
    """Questions, and what each layer of the tower makes of their pictures: (layers + 1, pictures, patches, width)."""

    packed: Packed
    states: Tensor


class Lessons:
    """Batches by name, made once and kept.

    Args:
        model: whose tower reads the pictures.
    """

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        self.tower, self.kept = model.model.vision_tower.requires_grad_(False), dict[Any, Lesson]()

    @torch.no_grad()
    def get(self, name: Any, make: Callable[[], Packed]) -> Lesson:
        """The lesson of that name; `make` draws its pictures when it is first asked for."""
        if name not in self.kept:
            packed = make()
            with torch.autocast("cpu", torch.bfloat16):
                states = self.tower(packed.pixel_values, output_hidden_states=True, return_dict=True).hidden_states
            layers = torch.stack([state[:, 1:].bfloat16() for state in states])
            self.kept[name] = Lesson(replace(packed, pixel_values=packed.pixel_values[:0]), layers)
        return self.kept[name]


def lesson_logits(model: LlavaForConditionalGeneration, lesson: Lesson) -> Tensor:
    """Logits of the answers' tokens, as a fused model gives them."""
    projector, packed = model.model.multi_modal_projector, lesson.packed
    read = torch.cat([lesson.states[layer] for layer in projector.layers.read], dim=-1).float()
    with pictures_at(model, packed.input_ids == model.config.image_token_id, projector(read)) as tokens:
        return answer_logits(model, packed, tokens)


class FusionTrainer(Trainer):
    """One cell: the fusion, and slower the language model."""

    def __init__(self, parts: Parts, stage: Stage, folder: Path, lessons: Lessons) -> None:
        super().__init__(parts, stage, folder)
        self.lessons = lessons

    def groups(self) -> list[Group]:
        """The fusion, and the language model."""
        inner = self.parts.model.model
        return [(self.stage.rate, [inner.multi_modal_projector]), (self.stage.tower_rate, [inner.language_model])]

    def factor(self) -> float:
        """The learning rate's factor: a warm-up as short as the cell, then a straight line down to 2 %."""
        done = self.progress(self.step)
        return min(1.0, (self.step + 1) / max(1.0, WARM_UP * self.stage.steps)) * (1 - 0.98 * done)

    def batches(self, step: int) -> tuple[TowerBatch | None, Packed | None]:
        """Nothing in advance: all cells share their lessons."""
        return None, None

    def losses(self, dense: TowerBatch | None, packed: Packed | None) -> Tensor:
        """The loss of the answers."""
        stage, packer = self.stage, self.packer
        draw = partial(packed_batch, packer, "fusion", self.step, 0.8, stage.pictures, stage.pairs)
        lesson = self.lessons.get(self.step, draw)
        return self.noted_loss(lesson_logits(self.parts.model, lesson), lesson.packed)


Right = dict[str, dict[str, list[list[int]]]]
"""Skill, then size, to rows of scene, right answers, answers."""


@torch.no_grad()
def right_by_scene(model: LlavaForConditionalGeneration, packer: Packer, lessons: Lessons, scenes: int) -> Right:
    """What the model answers right in scenes held out."""
    found: Right = {}
    for share in SHARES:
        examples = held_out_examples(packer, scenes, share)
        for start in range(0, scenes, MANY):
            some = examples[start : start + MANY]
            lesson = lessons.get(("held out", share, start), partial(packer.pack, some))
            hits = split_hits(packer, some, lesson.packed, lesson_logits(model, lesson))
            for number, (example, right) in enumerate(zip(some, hits, strict=True), start):
                for skill, mine in by_skill(example, right).items():
                    row = [number, sum(mine), len(mine)]
                    found.setdefault(skill, {}).setdefault(f"{share:.2f}", []).append(row)
    return found


def by_skill(example: Example, right: Sequence[bool]) -> dict[str, list[bool]]:
    """The answers to an example's questions, by what they ask for."""
    found: dict[str, list[bool]] = {}
    for question, hit in zip(example.questions, right, strict=True):
        found.setdefault(question.skill, []).append(hit)
    return found


class Course:
    """All cells in one folder.

    Args:
        folder: for lines, checkpoints and fused models.
        base: of the model to start from.
        steps, pictures: of a cell, and in each of its steps.
        scenes: held out, to measure on.

    Raises:
        InputError: the folder holds cells with other numbers, which cannot be compared.
    """

    def __init__(self, folder: Path, base: Path, steps: int, pictures: int, scenes: int) -> None:
        self.folder, self.base, self.scenes = folder, base, scenes
        self.stage = Stage("", steps=steps, pictures=pictures, rate=1e-3, tower_rate=3e-4)
        self.numbers = {"steps": steps, "pictures": pictures, "scenes": scenes}
        for line in self.lines():
            others = {name: line[name] for name, own in self.numbers.items() if line.get(name, own) != own}
            if others:
                raise InputError(f"{self.path} holds cells with {others}: pass the same, or another folder")
        model, self.processor = load_exported(base)
        self.lessons = Lessons(model)
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def path(self) -> Path:
        """One JSON line for each finished cell."""
        return self.folder / "cells.jsonl"

    def lines(self) -> list[dict[str, Any]]:
        """What is finished."""
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def trainer(self, name: str, spec: FusionSpec) -> FusionTrainer:
        """A cell before training."""
        model = fuse(load_exported(self.base)[0], spec)
        model.set_attn_implementation("eager")
        tower = model.config.vision_config
        parts = Parts(
            model.train(), torch.nn.Identity(), self.processor.tokenizer, Sizes(tower.image_size, tower.patch_size)
        )
        return FusionTrainer(parts, replace(self.stage, name=name.replace(" ", "-")), self.folder, self.lessons)

    def run(self, name: str, spec: FusionSpec) -> None:
        """One cell, from where it stopped to its line."""
        if name in {line["cell"] for line in self.lines()}:
            return
        begun = time.monotonic()
        trainer = self.trainer(name, spec)
        trainer.load()
        trainer.run()
        model = trainer.parts.model
        save_fusion(model, self.folder / trainer.stage.name, language_model=True)
        right = right_by_scene(model.eval(), trainer.packer, self.lessons, self.scenes)
        line = {"cell": name, "spec": spec.as_dict(), **self.numbers, "train_seconds": round(trainer.spent)}
        line |= {"loss": final_loss(self.folder / "log.jsonl", trainer.stage.name), "right": right}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        trainer.path.unlink()
        print(f"{name}: {scene_means(line).mean():.4f} after {time.monotonic() - begun:.0f} s", flush=True)


def final_loss(log: Path, stage: str) -> float | None:
    """The loss of the last stretch of a stage that was logged."""
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return next((line["answer_loss"] for line in reversed(lines) if line["stage"] == stage), None)


def scene_means(line: dict[str, Any], skill: str | None = None, shares: Sequence[float] = SHARES) -> np.ndarray:
    """Share of right answers in each scene, over all skills and sizes or some; scenes without any are left out."""
    sums: dict[int, list[int]] = {}
    for name, sizes in line["right"].items():
        if skill in (None, name):
            for share in shares:
                for number, right, asked in sizes.get(f"{share:.2f}", []):
                    total = sums.setdefault(number, [0, 0])
                    total[0] += right
                    total[1] += asked
    return np.array([right / asked for _, (right, asked) in sorted(sums.items())])


def _shown(estimate: Estimate) -> str:
    return f"{100 * estimate.mean:.1f} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def tables(lines: Sequence[dict[str, Any]]) -> str:
    """Right answers by set and strategy, each cell against the baseline, and by layer and skill; in percent."""
    by_cell = {line["cell"]: line for line in lines}
    text = ["| layers | " + " | ".join(STRATEGIES) + " |", "|---" * (len(STRATEGIES) + 1) + "|"]
    for name in SETS[1:]:
        found = [by_cell.get(f"{strategy} {name}") for strategy in STRATEGIES]
        text.append(f"| {name} | " + " | ".join(_shown(interval(scene_means(c))) if c else "" for c in found) + " |")
    text += ["", *_against_baseline(by_cell), "", *_by_skill(lines)]
    return "\n".join(text)


def _against_baseline(by_cell: dict[str, dict[str, Any]]) -> list[str]:
    base = by_cell.get(BASELINE)
    text = ["| cell | right | more than the baseline | p | last loss |", "|---|---|---|---|---|"]
    for name, line in by_cell.items():
        mine = scene_means(line)
        gain = difference(mine, scene_means(base)) if base and name != BASELINE else None
        more, p = (_shown(gain), f"{gain.p:.4f}") if gain else ("", "")
        text.append(f"| {name} | {_shown(interval(mine))} | {more} | {p} | {line['loss']} |")
    return text


def _by_skill(lines: Sequence[dict[str, Any]]) -> list[str]:
    skills = sorted({skill for line in lines for skill in line["right"]})
    text = ["| cell | " + " | ".join(skills) + " |", "|---" * (len(skills) + 1) + "|"]
    for line in lines:
        shown = [_shown(interval(scene_means(line, skill))) for skill in skills]
        text.append(f"| {line['cell']} | " + " | ".join(shown) + " |")
    return text


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for lines, tables and fused models")
    parser.add_argument(
        "--base", type=Path, default=bundled_path("qr-mini-vl"), help="folder of the model to start from"
    )
    parser.add_argument("--cells", nargs="+", default=["all"], help="names as printed, or beginnings of them")
    parser.add_argument("--steps", type=int, default=200, help="of each cell")
    parser.add_argument("--pictures", type=int, default=8, help="in each step")
    parser.add_argument("--scenes", type=int, default=120, help="held out, to measure on")
    parser.add_argument("--hours", type=float, default=float("inf"), help="no further cell is begun after that time")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    options = parser.parse_args()
    cells = all_cells()
    for beginning in options.cells:
        if beginning != "all" and not any(name.startswith(beginning) for name in cells):
            parser.error(f"no cell begins with {beginning!r}: write one of {', '.join(cells)}")
    torch.set_num_threads(options.threads)
    course = Course(options.out, options.base, options.steps, options.pictures, options.scenes)
    last = time.monotonic() + 3600 * options.hours
    for name, spec in cells.items():
        wanted = "all" in options.cells or any(name.startswith(beginning) for beginning in options.cells)
        if wanted and time.monotonic() < last:
            course.run(name, spec)
    (options.out / "tables.md").write_text(text := tables(course.lines()) + "\n", encoding="utf-8")
    print(text, flush=True)


if __name__ == "__main__":
    main()
