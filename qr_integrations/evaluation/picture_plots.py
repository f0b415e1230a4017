"""Pictures of what was measured on pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from qr_integrations.evaluation.pictures import SIZE, SystemAccuracy
from qr_integrations.evaluation.plots import colour_of, legend_beside, means_and_spread, new_figure
from qr_integrations.evaluation.statistics import Estimate

_APART = 0.025  # of a size, so that no system hides another


def plot_by_size(systems: Sequence[SystemAccuracy], path: str | Path) -> None:
    """Accuracy against the size of what is asked about, one line per system; one bar per system without sizes.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    if SIZE not in systems[0].accuracy:
        plot_estimates({"accuracy": {system.name: system.accuracy["all"]["all"] for system in systems}}, path)
        return
    figure = new_figure((7.0, 4.2))
    axis = figure.subplots()
    for number, system in enumerate(systems):
        found = system.accuracy[SIZE]
        sizes, colour = [100 * float(name) for name in found], colour_of(number)
        means, spread = means_and_spread(found.values())
        beside = np.array(sizes) * (1 + _APART * (number - len(systems) / 2))
        axis.errorbar(beside, means, yerr=spread, marker="o", capsize=2, linewidth=1, color=colour, label=system.name)
    axis.set_xscale("log")
    axis.set_xticks(sizes, [f"{size:g}" for size in sizes])
    axis.minorticks_off()
    axis.set(
        xlabel="longest side of what is asked about, % of the picture's", ylabel="right answers", ylim=(-0.02, 1.02)
    )
    axis.grid(alpha=0.3)
    legend_beside(figure)
    figure.savefig(path, bbox_inches="tight")


def plot_estimates(panels: Mapping[str, Mapping[str, Estimate]], path: str | Path) -> None:
    """Means with their intervals: a panel for each metric, a row for each system.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    names = list(dict.fromkeys(name for found in panels.values() for name in found))
    figure = new_figure((1.5 + 2.6 * len(panels), 1.2 + 0.4 * len(names)))
    for axis, (metric, found) in zip(
        figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels.items(), strict=True
    ):
        if found:
            means, spread = means_and_spread(found.values())
            places = [names.index(name) for name in found]
            axis.errorbar(means, places, xerr=spread, fmt="o", capsize=3, color=colour_of(0))
        axis.set(xlabel=metric, ylim=(-0.6, len(names) - 0.4))
        axis.grid(axis="x", alpha=0.3)
    figure.axes[0].set_yticks(range(len(names)), names)
    figure.axes[0].invert_yaxis()
    figure.savefig(path, bbox_inches="tight")
