"""Exact match: whether greedy decoding writes the answer and nothing else; and how well the heads rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random

import torch
from transformers import LlamaForCausalLM

from ..branches import Reader, calibrated
from ..evaluate import Heads, document_scores, gain, mean, pick
from ..tokenizer import PromptPieces
from .facts import Asked, FactWriter, Lesson
from .passages import Real
from .prompts import AnswerPrompts, Packed, ranking_batch
from .reading import read_answers

SIZES = (2, 5, 10, 20)


@torch.no_grad()
def exact(model: LlamaForCausalLM, packed: Packed) -> list[bool]:
    """For each question whether greedy decoding gives its answer: then every token is the likeliest after the last."""
    right = read_answers(model, packed)[0].argmax(-1) == packed.targets
    return [bool(right[packed.question == number].all()) for number in range(int(packed.question.max()) + 1)]


def exact_match(model: LlamaForCausalLM, prompts: AnswerPrompts, lessons: Sequence[Lesson], block: bool) -> float:
    """Share of all questions answered."""
    return mean([one for lesson in lessons for one in exact(model, prompts.pack([lesson], [block]))])


def fact_lessons(writer: FactWriter, size: int, count: int, seed: int = 7) -> list[Lesson]:
    """Test lessons of `size` documents, four questions each."""
    rng = Random(f"{seed}-{size}")
    return [writer.draw(size, 4, rng) for _ in range(count)]


def real_lessons(questions: Sequence[Real], size: int) -> list[Lesson]:
    """Each question with its passage among `size`, the others drawn by chance; every accepted answer is asked for."""
    rng, lessons = Random(3), []
    for text, passage, answers in questions:
        others = rng.sample([one for _, one, _ in questions if one.text != passage.text], size - 1)
        place = rng.randrange(size)
        asked = [Asked(text, answer, place) for answer in dict.fromkeys(answers)]
        lessons.append(Lesson([*others[:place], passage, *others[place:]], asked))
    return lessons


def any_match(model: LlamaForCausalLM, prompts: AnswerPrompts, lessons: Sequence[Lesson], block: bool) -> float:
    """Share of the lessons in which one of the answers is given."""
    return mean([float(any(exact(model, prompts.pack([lesson], [block])))) for lesson in lessons])


@torch.no_grad()
def ranked(model: LlamaForCausalLM, pieces: PromptPieces, lesson: Lesson, heads: Heads) -> list[list[float]]:
    """The score of every document, for every question."""
    batch = ranking_batch(pieces, lesson)
    tokens = calibrated(Reader(model)(batch, None, model.config.num_hidden_layers))
    rows = [document_scores(pick(tokens[:, :, row], heads), batch.owner) for row in range(len(lesson.asked))]
    return [row.tolist() for row in rows]


def ranking_of_facts(model: LlamaForCausalLM, pieces: PromptPieces, lessons: Sequence[Lesson], heads: Heads) -> float:
    """Mean nDCG@10 of the document that answers."""
    return mean(
        [
            gain(scores, asked.gold)
            for lesson in lessons
            for scores, asked in zip(ranked(model, pieces, lesson, heads), lesson.asked, strict=True)
        ]
    )


def kept_only(
    model: LlamaForCausalLM, pieces: PromptPieces, lessons: Sequence[Lesson], heads: Heads, keep: int
) -> list[Lesson]:
    """A lesson for each question with the `keep` documents that rank first, in their order; without a gold one too."""
    kept = []
    for lesson in lessons:
        for scores, asked in zip(ranked(model, pieces, lesson, heads), lesson.asked, strict=True):
            best = sorted(sorted(range(len(scores)), key=lambda place: -scores[place])[:keep])
            place = best.index(asked.gold) if asked.gold in best else 0
            kept.append(Lesson([lesson.documents[p] for p in best], [replace(asked, gold=place)]))
    return kept
