"""What else than relevance moves a score: the place of a document in the prompt, and its length."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from qr_integrations.evaluation.bm25 import document_text
from qr_integrations.evaluation.measuring import Run
from qr_integrations.evaluation.statistics import Estimate, interval, mean_ranks
from qr_integrations.types import JudgedList

BINS = 5
_LEAST = 3  # documents of which a correlation is worth something


@dataclass(frozen=True, slots=True)
class Bias:
    """How scores of documents that are not relevant go with something that should not matter.

    Attributes:
        correlation: Spearman's, within each list, mean over the lists; 0 is no bias, below 0 the first places or the
            shorter documents are preferred.
        curve: the mean rank that a fifth of the documents gets, from the first fifth (first places, or shortest
            documents) to the last: 1 if they always stood at the top, 0 at the bottom, 0.5 without bias; None where no
            document fell into that fifth.
        lists: how many lists could tell.
    """

    correlation: Estimate
    curve: tuple[float | None, ...]
    lists: int


def position_bias(runs: Sequence[Run], lists: Sequence[JudgedList]) -> Bias | None:
    """Score against place, in shuffled orders: there, place has nothing to do with relevance.

    None where no list has enough documents, or all their scores are equal.
    """
    return _bias(runs, lists, lambda run, judged: np.argsort(run.order).astype(float))


def length_bias(runs: Sequence[Run], lists: Sequence[JudgedList]) -> Bias | None:
    """Score against length in characters, title included; in shuffled orders.

    None where no list has enough documents, or all are equally long.
    """
    return _bias(runs, lists, lambda run, judged: np.array([float(len(document_text(d))) for d in judged.documents]))


def _bias(
    runs: Sequence[Run], lists: Sequence[JudgedList], feature: Callable[[Run, JudgedList], np.ndarray]
) -> Bias | None:
    rank = mean_ranks()
    by_list: dict[int, list[float]] = {}
    total, count = np.zeros(BINS), np.zeros(BINS)
    for run in runs:
        judged = lists[run.number]
        others = [d for d in range(len(judged.documents)) if judged.relevance.get(d, 0) <= 0]
        if run.seed is None or len(others) < _LEAST:
            continue
        moved, scores = rank(feature(run, judged)[others]), rank(np.asarray(run.scores)[others])
        if np.ptp(moved) == 0 or np.ptp(scores) == 0:
            continue
        by_list.setdefault(run.number, []).append(float(np.corrcoef(moved, scores)[0, 1]))
        bins = np.minimum(((moved - 1) * BINS / len(others)).astype(int), BINS - 1)
        total += np.bincount(bins, weights=(scores - 1) / (len(others) - 1), minlength=BINS)
        count += np.bincount(bins, minlength=BINS)
    if not by_list:
        return None
    correlations = np.array([np.mean(values) for values in by_list.values()])
    curve = tuple(float(rank) / n if n else None for rank, n in zip(total, count.tolist(), strict=True))
    return Bias(interval(correlations), curve, len(by_list))
