"""Systems run over judged lists, in the order retrieved and in shuffled ones, and what came of every list.

A measurement keeps every score, so that all figures of a report come from the same runs.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
from jaxtyping import Float

from qr_integrations.errors import InputError, MissingExtra, ScoreError
from qr_integrations.evaluation.systems import System
from qr_integrations.types import JudgedList

RETRIEVED, SHUFFLED = "retrieved", "shuffled"
ORDERS = {RETRIEVED: "as retrieved", SHUFFLED: "shuffled"}  # for people
METRICS = ("nDCG@10", "R@5", "RR")
Progress = Callable[[int, int], None]
_ALL = "All@"
_TRIAL = {"0": {"a": 1, "b": 0}}, {"0": {"a": 1.0, "b": 0.5}}  # judgments and a ranking


@dataclass(frozen=True, slots=True)
class Run:
    """One system on one list in one order.

    Attributes:
        system: its name.
        number: of the list.
        seed: of the order; None for the order in which the documents were retrieved.
        order: documents of the list in the order in which the system got them.
        scores: one per document, in the list's own order.
        seconds: what the scoring took.
    """

    system: str
    number: int
    seed: int | None
    order: tuple[int, ...]
    scores: tuple[float, ...]
    seconds: float

    @property
    def ranking(self) -> list[int]:
        """Documents, best first; ties keep the order in which the system got them."""
        return sorted(self.order, key=lambda document: -self.scores[document])


def run_systems(
    systems: Sequence[System],
    lists: Sequence[JudgedList],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    progress: Progress | None = None,
) -> list[Run]:
    """Every system on every list: as retrieved, and shuffled once per seed.

    A system whose scores cannot depend on the order scores each list once; its runs differ in how ties fall.

    Raises:
        InputError: no lists, one without documents or without anything relevant, or two systems of the same name.
        ScoreError: a system gave a score that is not finite, or not one for each document; names system and list.
    """
    check_lists(lists)
    names = [system.name for system in systems]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"two systems are named {twice[0]!r}: give each a name of its own")
    runs: list[Run] = []
    for number, judged in enumerate(lists):
        for system in systems:
            runs += _runs(system, number, judged, orders_of(number, judged, seeds))
        if progress:
            progress(number + 1, len(lists))
    return runs


def check_lists(lists: Sequence[JudgedList]) -> None:
    """Every list has documents, and something to find.

    Raises:
        InputError: names the first that has not.
    """
    if not lists:
        raise InputError("no lists to measure on: pass at least one JudgedList")
    for number, judged in enumerate(lists):
        if not judged.documents or not any(grade > 0 for grade in (*judged.relevance.values(), *judged.missed)):
            raise InputError(
                f"list #{number} ({judged.query!r}) has {len(judged.documents)} documents, and none is known to be "
                "relevant: leave it out, or judge it"
            )


def orders_of(number: int, judged: JudgedList, seeds: Sequence[int]) -> list[tuple[int | None, list[int]]]:
    """The orders in which list #`number` is read: as retrieved, then shuffled once per seed."""
    orders: list[tuple[int | None, list[int]]] = [(None, list(range(len(judged.documents))))]
    for seed in seeds:
        shuffled = list(range(len(judged.documents)))
        Random(f"{seed}-{number}").shuffle(shuffled)
        orders.append((seed, shuffled))
    return orders


def _runs(system: System, number: int, judged: JudgedList, orders: Sequence[tuple[int | None, list[int]]]) -> list[Run]:
    runs: list[Run] = []
    for seed, order in orders:
        if runs and not system.reads_order:
            scores, seconds = runs[0].scores, runs[0].seconds
        else:
            scores, seconds = _scores(system, number, judged, order)
        runs.append(Run(system.name, number, seed, tuple(order), scores, seconds))
    return runs


def _scores(system: System, number: int, judged: JudgedList, order: Sequence[int]) -> tuple[tuple[float, ...], float]:
    start = time.perf_counter()
    found = system.score(judged.query, [judged.documents[document] for document in order])
    seconds = time.perf_counter() - start
    told = f"for the {len(order)} documents of list #{number} ({judged.query!r})"
    if len(found) != len(order):
        raise ScoreError(f"{system.name} gave {len(found)} scores {told}: a system gives one for each")
    if not all(math.isfinite(score) for score in found):
        raise ScoreError(
            f"{system.name} gave scores that are not finite {told}: look at that list, or load the model with "
            "dtype='float32'"
        )
    by_document = dict(zip(order, found, strict=True))
    return tuple(float(by_document[document]) for document in range(len(order))), seconds


Quality = Mapping[str, Mapping[str, Mapping[str, Float[np.ndarray, "lists"]]]]
"""order -> system -> metric -> one value per list; for shuffled orders the mean over the seeds."""


def quality(runs: Sequence[Run], lists: Sequence[JudgedList], metrics: Sequence[str] = METRICS) -> Quality:
    """What every run is worth, by the measures of ir-measures.

    Ranks are handed over as they are, so no library's way to break ties plays a part. Relevant documents that were not
    retrieved count among those to be found.

    Args:
        runs: from `run_systems`.
        lists: the same ones.
        metrics: as ir-measures writes them, for instance ``nDCG@10``, ``R@5``, ``RR@10``, ``Success@5`` (any relevant
            document among the first 5); and ``All@5``: every relevant one is.

    Raises:
        InputError: no such metric.
        MissingExtra: ir-measures is not installed.
    """
    check_metrics(metrics)
    library = _ir_measures()
    measures = {metric: _measure(metric) for metric in metrics}
    judgments = [library.Qrel(*judged) for i, one in enumerate(lists) for judged in _qrels(str(i), one)]
    judge = library.evaluator(set(measures.values()), judgments)  # knows the judgments, whatever the run
    by_kind: dict[tuple[str, int | None], list[Run]] = {}
    for run in runs:
        by_kind.setdefault((run.system, run.seed), []).append(run)
    sums: dict[str, dict[str, dict[str, Any]]] = {}
    seeds = len({run.seed for run in runs} - {None})
    for (system, seed), some in by_kind.items():
        found = sums.setdefault(RETRIEVED if seed is None else SHUFFLED, {}).setdefault(system, {})
        for metric, values in _measured(some, judge, measures).items():
            found[metric] = found.get(metric, 0.0) + values / (1 if seed is None else seeds)
    return sums


def _qrels(identity: str, judged: JudgedList) -> list[tuple[str, str, int]]:
    known = [(identity, str(document), grade) for document, grade in judged.relevance.items()]
    return known + [(identity, f"missed-{i}", grade) for i, grade in enumerate(judged.missed)]


def check_metrics(metrics: Sequence[str]) -> None:
    """All of them can be computed.

    Raises:
        InputError: there is no such metric, or it needs a cutoff, a setting or a program that is not there.
        MissingExtra: ir-measures is not installed.
    """
    calculate = _ir_measures().iter_calc
    for metric in metrics:
        try:
            measure = _measure(metric)
            if measure.params.get("cutoff", 1) < 1:  # trec_eval would end the whole process
                raise ValueError("the cutoff is below 1")
            if not any(found.measure == measure for found in calculate([measure], *_TRIAL)):
                raise ValueError("it is not computed")
        except Exception as error:  # of many kinds, one for each way to misspell
            why = " ".join(str(error).split())
            raise InputError(
                f"{metric!r} cannot be measured ({why}): write nDCG@10, R@5, RR@10, Success@5, All@5, AP or P@1"
            ) from error


def _measured(runs: Sequence[Run], judge: Any, measures: Mapping[str, Any]) -> dict[str, Float[np.ndarray, "lists"]]:
    """One value per metric and list."""
    scored = _ir_measures().ScoredDoc
    ranked = [
        scored(str(run.number), str(document), -float(rank))
        for run in runs
        for rank, document in enumerate(run.ranking)
    ]
    values = {metric: np.zeros(len(runs)) for metric in measures}
    place = {str(run.number): i for i, run in enumerate(runs)}
    for found in judge.iter_calc(ranked):
        for metric, measure in measures.items():
            if measure == found.measure:
                whole = metric.startswith(_ALL)
                values[metric][place[found.query_id]] = float(found.value > 1 - 1e-9) if whole else found.value
    return values


def _measure(metric: str) -> Any:
    """The measure of ir-measures; that of ``All@k`` is the recall, which is 1 where all are found."""
    name = f"R@{metric.removeprefix(_ALL)}" if metric.startswith(_ALL) else metric
    return _ir_measures().parse_measure(name)


def _ir_measures() -> Any:
    try:
        import ir_measures
    except ImportError as error:
        raise MissingExtra("measuring quality", "eval") from error
    return ir_measures
