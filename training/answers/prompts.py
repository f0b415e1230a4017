"""The package's answer prompt as tokens: several lists of documents in one pass, and many questions over each list.

What may see what is a mask: lists do not see each other, questions do not, and in the block layout documents do not.

Legend: T tokens, R rows that predict a token of an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ..branches import Batch, make_batch
from ..tokenizer import NULL_QUERY, OPENING, PromptPieces
from .facts import Lesson

TASK = "Please answer the following question based on the information in the paragraphs above.\n\nQuery:"


@dataclass
class Packed:
    """Lists put one after the other.

    Attributes:
        ids: the tokens, T.
        positions: their positions, T.
        mask: ``[T, T]`` True where a token sees another.
        rows: rows whose logits are read, R.
        targets: the token that each of them should predict, R.
        question: which question each row belongs to, R.
        sources: ``[R, T]`` True where the predicted token stands as part of the answer in the document that answers.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    rows: Tensor
    targets: Tensor
    question: Tensor
    sources: Tensor


@dataclass
class _Columns:
    """What is known of every token; -1 stands for none."""

    ids: list[int] = field(default_factory=list)
    position: list[int] = field(default_factory=list)
    lesson: list[int] = field(default_factory=list)
    block: list[int] = field(default_factory=list)
    branch: list[int] = field(default_factory=list)
    hidden: list[bool] = field(default_factory=list)
    behind: list[bool] = field(default_factory=list)

    def add(
        self, ids: Sequence[int], start: int, lesson: int, block: int = -1, branch: int = -1, hidden: bool = False,
        behind: bool = False,
    ) -> int:  # fmt: skip
        """Appends tokens at positions from `start`; returns the next position."""
        count = len(ids)
        self.ids += ids
        self.position += range(start, start + count)
        self.lesson += [lesson] * count
        self.block += [block] * count
        self.branch += [branch] * count
        self.hidden += [hidden] * count
        self.behind += [behind] * count
        return start + count

    def mask(self) -> Tensor:
        """``[T, T]`` what sees what."""
        count = len(self.ids)
        lesson, block, branch = (torch.tensor(c) for c in (self.lesson, self.block, self.branch))
        seen = torch.ones(count, count, dtype=torch.bool).tril() & (lesson[:, None] == lesson)
        seen &= (block < 0) | (block[:, None] < 0) | (block[:, None] == block)
        seen &= (branch < 0) | (branch[:, None] == branch)
        return seen & ~(torch.tensor(self.behind)[:, None] & torch.tensor(self.hidden))


@dataclass
class _Answers:
    """What is known of every row that predicts."""

    rows: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    question: list[int] = field(default_factory=list)
    sources: list[list[int]] = field(default_factory=list)

    def add(self, first: int, answer: Sequence[int], end: Sequence[int], found: Sequence[int]) -> int:
        """Rows from `first` that predict an answer, which stands at `found`; returns the question's number."""
        number = self.question[-1] + 1 if self.question else 0
        self.rows += range(first, first + len(answer) + len(end))
        self.targets += [*answer, *end]
        self.question += [number] * (len(answer) + len(end))
        self.sources += [[start + step for start in found] for step in range(len(answer))] + [[] for _ in end]
        return number


def ranking_batch(pieces: PromptPieces, lesson: Lesson) -> Batch:
    """The documents and questions of a lesson as a ranking list, with the null query."""
    prefix = pieces.prefix([pieces.ids(document.body) for document in lesson.documents])
    branches = [pieces.branch(text) for text in (*(asked.text for asked in lesson.asked), NULL_QUERY)]
    return make_batch(prefix, branches, pieces.tokenizer.pad_token_id)


class AnswerPrompts:
    """Packs lessons for one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self._head = self.ids(f"<|bos|><|user|>\n{OPENING}")
        self._gap, self._task = self.ids("\n\n"), self.ids(TASK)
        self._closing, self._end = self.ids("<|end|>\n<|assistant|>\n"), self.ids("<|end|>")
        self._numbers = [self.ids(f"[{number}]") for number in range(101)]

    def ids(self, text: str) -> list[int]:
        """Token ids of a piece, nothing added."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def pack(
        self, lessons: Sequence[Lesson], blocks: Sequence[bool], rng: Random | None = None, hide: float = 0.0
    ) -> Packed:
        """All lessons in one pass.

        Args:
            lessons: documents and questions.
            blocks: for each lesson, whether its documents do not see each other.
            rng: where chance comes from; only for `hide`.
            hide: share of the other documents that questions do not see: a model reads all, then keeps some.
        """
        columns, answers = _Columns(), _Answers()
        for number, (lesson, block) in enumerate(zip(lessons, blocks, strict=True)):
            end, spans = self._documents(columns, number, lesson, block, rng, hide)
            end = columns.add(self._task, end, number, behind=True)
            for asked in lesson.asked:
                answer, before = self.ids(asked.answer), self.ids(asked.text) + self._closing
                first = len(columns.ids) + len(before) - 1
                branch = answers.add(first, answer, self._end, _find(columns.ids, answer, spans[asked.gold]))
                columns.add(before + answer, end, number, branch=branch, behind=True)
        sources = torch.zeros(len(answers.rows), len(columns.ids), dtype=torch.bool)
        for row, places in zip(sources, answers.sources, strict=True):
            row[places] = True
        return Packed(
            torch.tensor(columns.ids),
            torch.tensor(columns.position),
            columns.mask(),
            torch.tensor(answers.rows),
            torch.tensor(answers.targets),
            torch.tensor(answers.question),
            sources,
        )

    def _documents(
        self, columns: _Columns, number: int, lesson: Lesson, block: bool, rng: Random | None, hide: float
    ) -> tuple[int, list[tuple[int, int]]]:
        """Everything in front of the task; returns the position that follows, and where each document stands."""
        golds = {asked.gold for asked in lesson.asked}
        spans = []
        start = longest = columns.add(self._head + self._gap, 0, number)
        for place, document in enumerate(lesson.documents):
            hidden = rng is not None and place not in golds and rng.random() < hide
            ids = self._numbers[1 if block else place + 1] + self.ids(document.body) + self._gap
            begins = start if block else longest
            ends = columns.add(ids, begins, number, block=place if block else -1, hidden=hidden)
            longest = max(longest, ends)
            spans.append((len(columns.ids) - len(ids), len(columns.ids)))
        return longest, spans


def _find(ids: Sequence[int], part: Sequence[int], span: tuple[int, int]) -> list[int]:
    """Where `part` begins inside `span`."""
    starts = range(span[0], span[1] - len(part) + 1)
    return [start for start in starts if ids[start : start + len(part)] == part]
