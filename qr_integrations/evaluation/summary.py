"""From runs to the figures of a report."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from qr_integrations.errors import InputError
from qr_integrations.evaluation.biases import Bias, length_bias, position_bias
from qr_integrations.evaluation.lengths import LengthPoint
from qr_integrations.evaluation.measuring import RETRIEVED, Quality, Run
from qr_integrations.evaluation.statistics import Estimate, difference, interval
from qr_integrations.evaluation.sweeps import SweepPoint
from qr_integrations.types import JudgedList


@dataclass(frozen=True, slots=True)
class Summary:
    """One system.

    Attributes:
        name: as it was asked for.
        quality: order -> metric -> mean with its interval.
        against: order -> how much better than the baseline by the first metric; empty for the baseline.
        position, length: biases, where shuffled orders were measured and tell.
        seconds: of one list, the median.
    """

    name: str
    quality: Mapping[str, Mapping[str, Estimate]]
    against: Mapping[str, Estimate]
    position: Bias | None
    length: Bias | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Report:
    """All that was measured.

    Attributes:
        facts: what, on what, with what: names and values in the order in which they are told.
        metrics: the first is the one that systems are compared by.
        baseline: the system that the others are compared with.
        systems: in the order in which they were asked for.
        sweep: numbers of heads and exit layers, if asked for.
        lengths: recall against length, if asked for.
    """

    facts: Mapping[str, Any]
    metrics: Sequence[str]
    baseline: str
    systems: Sequence[Summary]
    sweep: Sequence[SweepPoint] = ()
    lengths: Sequence[LengthPoint] = field(default=())

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def summarise(
    runs: Sequence[Run], lists: Sequence[JudgedList], measured: Quality, metrics: Sequence[str], baseline: str
) -> list[Summary]:
    """Means, intervals, tests and biases of every system.

    Args:
        runs: from `run_systems`.
        lists: the same ones.
        measured: from `quality`.
        metrics: the first is the one to compare by.
        baseline: a system among those measured.

    Raises:
        InputError: there is no such baseline.
    """
    systems = list(measured[RETRIEVED])
    if baseline not in systems:
        raise InputError(f"the baseline {baseline!r} is not measured: pass one of {', '.join(systems)}")
    summaries = []
    for name in systems:
        own = [run for run in runs if run.system == name]
        summaries.append(
            Summary(
                name,
                {
                    order: {metric: interval(found[name][metric]) for metric in metrics}
                    for order, found in measured.items()
                },
                {
                    order: difference(found[name][metrics[0]], found[baseline][metrics[0]])
                    for order, found in measured.items()
                    if name != baseline
                },
                position_bias(own, lists),
                length_bias(own, lists),
                median(run.seconds for run in own),
            )
        )
    return summaries
