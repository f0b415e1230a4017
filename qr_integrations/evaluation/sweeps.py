"""How many heads, and how deep: quality against time.

Legend: K heads, N documents.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np

from qr_integrations.backend import Backend
from qr_integrations.errors import InputError
from qr_integrations.evaluation.measuring import (
    METRICS,
    RETRIEVED,
    SHUFFLED,
    Progress,
    Quality,
    Run,
    check_lists,
    check_metrics,
    orders_of,
    quality,
)
from qr_integrations.evaluation.statistics import Estimate, interval
from qr_integrations.retrieval import QRHeadReranker
from qr_integrations.retrieval.heads import Head
from qr_integrations.types import JudgedList

_TIMED = 5  # lists


@dataclass(frozen=True, slots=True)
class SweepPoint:
    """The best heads up to a layer.

    Attributes:
        top_layer: the last layer that one of them is in; no layer above it runs.
        heads: how many, taken from the best.
        shuffled, retrieved: the metric in both orders.
        seconds: of ranking one list that was not read before, the median.
        share: of the time that all layers take.
        best: no other point is as good, with no more layers, and better, with fewer layers, or with fewer heads.
    """

    top_layer: int
    heads: int
    shuffled: Estimate
    retrieved: Estimate
    seconds: float
    share: float
    best: bool = False


def sweep_heads(
    backend: Backend,
    ranked: Sequence[Head],
    lists: Sequence[JudgedList],
    *,
    counts: Sequence[int] = (1, 2, 4, 8, 16, 32),
    depths: Sequence[int] | None = None,
    seeds: Sequence[int] = (0,),
    metric: str = METRICS[0],
    progress: Progress | None = None,
) -> list[SweepPoint]:
    """Quality and time for every number of heads and every exit layer, from one pass per list and order.

    Args:
        backend: the model.
        ranked: its heads, best first, for instance `Detection.ranked()`; found on other questions than `lists`.
        lists: what is measured on.
        counts: how many heads to try; more than there are means all.
        depths: the last layers that heads are taken from; None takes up to eight, evenly spread over those that hold
            heads. Where the best heads up to a layer all lie in lower ones, it adds no point of its own.
        seeds: of the shuffled orders.
        metric: as ir-measures writes it.
        progress: called with lists done and lists in all.

    Raises:
        InputError: no heads up to any of the depths, no number of heads or seed to try, no lists, or a list that does
            not fit into one prompt (a `WindowError`).
        HeadError: the model does not have one of the heads.
    """
    if not seeds or not counts or min(counts) < 1:
        raise InputError("seeds and counts of heads are needed, counts from 1: pass at least one of each")
    if depths is None:
        layers = sorted({layer for layer, _ in ranked})
        depths = sorted({layers[round(i * (len(layers) - 1) / 7)] for i in range(8)}) if layers else []
    ranked = [head for head in ranked if head[0] <= max(depths, default=-1)]
    if not (choices := _choices(ranked, counts, depths)):
        raise InputError("no heads to choose from: pass the model's heads, best first, and depths that hold some")
    measured = _measure(backend, ranked, choices, lists, seeds, metric, progress)
    seconds = _seconds(backend, [[ranked[place] for place in places] for places in choices.values()], lists)
    points = [
        SweepPoint(
            top_layer=depth,
            heads=count,
            shuffled=interval(measured[SHUFFLED][_name(depth, count)][metric]),
            retrieved=interval(measured[RETRIEVED][_name(depth, count)][metric]),
            seconds=seconds[depth],
            share=seconds[depth] / seconds[max(seconds)],
        )
        for depth, count in choices
    ]
    return [replace(point, best=not any(_beats(other, point) for other in points)) for point in points]


def _choices(ranked: Sequence[Head], counts: Sequence[int], depths: Sequence[int]) -> dict[tuple[int, int], list[int]]:
    """(last layer, count) -> places of the heads, sorted; heads that are the best up to two depths stand once."""
    choices = {}
    for depth in depths:
        allowed = [place for place, head in enumerate(ranked) if head[0] <= depth]
        for chosen in (allowed[:count] for count in counts):
            if chosen:
                choices[max(ranked[place][0] for place in chosen), len(chosen)] = chosen
    return dict(sorted(choices.items()))


def _measure(
    backend: Backend,
    ranked: Sequence[Head],
    choices: Mapping[tuple[int, int], list[int]],
    lists: Sequence[JudgedList],
    seeds: Sequence[int],
    metric: str,
    progress: Progress | None,
) -> Quality:
    """All choices on all lists; the heads of all of them are read together."""
    check_lists(lists)
    check_metrics([metric])
    reranker = QRHeadReranker(backend, heads=ranked, truncation="head", keep_prefixes=0)
    runs: list[Run] = []
    for number, judged in enumerate(lists):
        for seed, order in orders_of(number, judged, seeds):
            documents = [judged.documents[document] for document in order]
            scores_SN = reranker.score_subsets(judged.query, documents, list(choices.values())).numpy()
            by_document_SN = scores_SN[:, np.argsort(order)]
            runs += [
                Run(_name(depth, count), number, seed, tuple(order), tuple(scores_N.tolist()), 0.0)
                for (depth, count), scores_N in zip(choices, by_document_SN, strict=True)
            ]
        if progress:
            progress(number + 1, len(lists))
    return quality(runs, lists, [metric])


def _name(depth: int, count: int) -> str:
    return f"{count} heads up to layer {depth}"


def _seconds(backend: Backend, choices: Sequence[Sequence[Head]], lists: Sequence[JudgedList]) -> dict[int, float]:
    """Last layer -> seconds to rank a new list, the median over a few; for all layers of the model too.

    Where several choices end in a layer, the last of them is timed. The lists take turns with the layers, so that a
    slow minute of the machine is shared by all; the first turn warms up.
    """
    deepest = max(backend.attention_layers)
    by_layer = {deepest: [(deepest, 0)], **{max(layer for layer, _ in heads): heads for heads in choices}}
    rerankers = {
        layer: QRHeadReranker(backend, heads=heads, truncation="head", keep_prefixes=0)
        for layer, heads in by_layer.items()
    }
    times: dict[int, list[float]] = {layer: [] for layer in rerankers}
    for judged in [lists[0], *lists[:_TIMED]]:
        for layer, reranker in rerankers.items():
            start = time.perf_counter()
            reranker.rank(judged.query, judged.documents)
            times[layer].append(time.perf_counter() - start)
    return {layer: median(some[1:]) for layer, some in times.items()}


def _beats(one: SweepPoint, other: SweepPoint) -> bool:
    """At least as good and as early, and better, earlier or with fewer heads."""
    good, early = one.shuffled.mean - other.shuffled.mean, other.top_layer - one.top_layer
    return good >= 0 and early >= 0 and (good > 0 or early > 0 or one.heads < other.heads)
