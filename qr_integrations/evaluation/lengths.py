"""Recall against length: the same questions asked of longer and longer chats or books."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from qr_integrations.evaluation.long_context import LongContext, make_books, make_chats
from qr_integrations.evaluation.measuring import RETRIEVED, Progress, quality, run_systems
from qr_integrations.evaluation.statistics import Estimate, interval
from qr_integrations.evaluation.systems import System
from qr_integrations.types import JudgedList

RECALL_AT = 5


@dataclass(frozen=True, slots=True)
class LengthPoint:
    """A system at a length.

    Attributes:
        system: its name.
        num_tokens: of the chats or books.
        documents: turns or chapters of one, the mean.
        at: how many ranks count.
        recall_any, recall_all: how often one, or every piece of evidence is among them.
    """

    system: str
    num_tokens: int
    documents: float
    at: int
    recall_any: Estimate
    recall_all: Estimate


def recall_by_length(
    make_systems: Callable[[Sequence[JudgedList]], Sequence[System]],
    lists: Sequence[JudgedList],
    settings: Sequence[LongContext],
    *,
    kind: Literal["chat", "book"] = "chat",
    at: int = RECALL_AT,
    progress: Progress | None = None,
) -> list[LengthPoint]:
    """How often every system finds the evidence in generated chats or books of several lengths.

    Args:
        make_systems: makes them for the lists that they will be measured on.
        lists: questions and passages to make chats or books of.
        settings: one for each length.
        kind: what is made. Turns or chapters are read in their order.
        at: how many ranks count.
        progress: called with the lengths done and all of them.

    Raises:
        InputError: too few or too short passages for a length; said before anything is measured.
    """
    make = make_chats if kind == "chat" else make_books
    points: list[LengthPoint] = []
    metrics = [f"Success@{at}", f"All@{at}"]
    for number, (one, made) in enumerate([(one, make(lists, one)) for one in settings]):
        systems = make_systems(made)
        found = quality(run_systems(systems, made, seeds=()), made, metrics)[RETRIEVED]
        size = float(np.mean([len(judged.documents) for judged in made]))
        for system in systems:
            of_any, of_all = (interval(found[system.name][metric]) for metric in metrics)
            points.append(LengthPoint(system.name, one.num_tokens, size, at, of_any, of_all))
        if progress:
            progress(number + 1, len(settings))
    return points
