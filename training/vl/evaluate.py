"""What the model can see: every skill at controlled sizes, whole and cropped, and what its captions invent."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from qr_integrations.evaluation.drawn_world.held_out import (
    SHARES,
    caption_counts,
    caption_scene,
    held_out_scene,
    questions_about_first,
)
from qr_integrations.evaluation.drawn_world.questions import DESCRIBE, Question, named_things
from qr_integrations.evaluation.drawn_world.views import View, whole
from qr_integrations.evaluation.drawn_world.world import Scene, crop_around, resized

from .labels import IGNORED
from .packing import Example, Packed, Packer, answer_logits

MANY = 8
"""Sequences in one pass."""

Table = dict[str, dict[str, float]]
"""Skill, then size as "0.10", to the share of right answers."""


def split_hits(packer: Packer, examples: Sequence[Example], batch: Packed, logits: Tensor) -> list[list[bool]]:
    """Whether each question of each example is answered right, word by word, by the logits of their batch."""
    hits = logits.argmax(-1) == batch.targets[batch.targets != IGNORED]
    results: list[list[bool]] = []
    place = 0
    for example in examples:
        results.append([])
        for question in example.questions:
            length = len(packer.question_ids(question)[1])
            results[-1].append(bool(hits[place : place + length].all()))
            place += length
    return results


@torch.no_grad()
def right_answers(
    model: LlavaForConditionalGeneration, packer: Packer, examples: Sequence[Example]
) -> list[list[bool]]:
    """Whether each question of each example is answered right, word by word, as greedy decoding would."""
    results: list[list[bool]] = []
    for start in range(0, len(examples), MANY):
        some = examples[start : start + MANY]
        batch = packer.pack(some).to(model.device)
        results += split_hits(packer, some, batch, answer_logits(model, batch))
    return results


def held_out_examples(packer: Packer, scenes: int, share: float, cropped: bool = False) -> list[Example]:
    """Scenes held out whose first thing has a share of the picture, and what is asked about it."""
    examples = []
    for number in range(scenes):
        scene = held_out_scene(number)
        questions = questions_about_first(number, scene)
        views = oracle_views(resized(scene, 0, share), packer.sizes.resolution)
        examples.append(Example(views if cropped else views[:1], tuple(questions)))
    return examples


def oracle_views(scene: Scene, resolution: int) -> tuple[View, View]:
    """The whole picture and a crop around its first thing."""
    return whole(scene, resolution), View(scene, crop_around(scene, scene.things[0].box), resolution)


def skill_table(model: LlavaForConditionalGeneration, packer: Packer, scenes: int, cropped: bool = False) -> Table:
    """Share of right answers by skill and size; with `cropped`, the whole picture and the oracle crop are shown."""
    hits: dict[str, dict[str, list[bool]]] = {}
    for share in SHARES:
        examples = held_out_examples(packer, scenes, share, cropped)
        for example, right in zip(examples, right_answers(model, packer, examples), strict=True):
            for question, hit in zip(example.questions, right, strict=True):
                hits.setdefault(question.skill, {}).setdefault(f"{share:.2f}", []).append(hit)
    return {skill: {size: round(sum(h) / len(h), 3) for size, h in sizes.items()} for skill, sizes in hits.items()}


@torch.no_grad()
def write_captions(model: LlavaForConditionalGeneration, packer: Packer, scenes: Sequence[Scene]) -> list[str]:
    """Greedy captions of whole pictures."""
    tokenizer, captions = packer.tokenizer, []
    question = Question(DESCRIBE[0], "", "caption")
    for start in range(0, len(scenes), MANY):
        views = [Example((whole(s, packer.sizes.resolution),), (question,)) for s in scenes[start : start + MANY]]
        batch = packer.pack(views).to(model.device)
        ids = model.generate(
            input_ids=batch.input_ids,
            attention_mask=torch.ones_like(batch.input_ids),
            pixel_values=batch.pixel_values.to(model.dtype),
            max_new_tokens=48,
            do_sample=False,
        )
        captions += tokenizer.batch_decode(ids[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    return captions


def caption_table(model: LlavaForConditionalGeneration, packer: Packer, scenes: int) -> dict[str, float]:
    """Invented kinds as a share of named ones, how many of those were to be expected, and recall of large things."""
    drawn = [caption_scene(number) for number in range(scenes)]
    totals: dict[str, int] = {}
    seen, large = 0, 0
    for scene, caption in zip(drawn, write_captions(model, packer, drawn), strict=True):
        for name, value in caption_counts(caption, scene.things).items():
            totals[name] = totals.get(name, 0) + value
        visible = {thing.kind for thing in scene.things if thing.size > 0.15 * scene.long_side}
        large += len(visible)
        seen += len(visible & {kind for _, kind in named_things(caption)})
    return {
        "invented": round(totals["invented"] / max(1, totals["named"]), 3),
        "expected": round(totals["expected"] / max(1, totals["invented"]), 3),
        "recall": round(totals["found"] / totals["there"], 3),
        "recall_large": round(seen / max(1, large), 3),
    }


def format_table(title: str, table: Table) -> str:
    """A table in Markdown: one row for each skill, one column for each size."""
    lines = [f"| {title} | " + " | ".join(f"{share:.2f}" for share in SHARES) + " |", "|---" * (len(SHARES) + 1) + "|"]
    for skill, sizes in sorted(table.items()):
        lines.append(
            f"| {skill} | " + " | ".join(f"{sizes.get(f'{share:.2f}', float('nan')):.2f}" for share in SHARES) + " |"
        )
    return "\n".join(lines)
