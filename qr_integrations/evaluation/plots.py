"""Pictures of what was measured."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from qr_integrations.errors import MissingExtra
from qr_integrations.evaluation.biases import BINS, Bias
from qr_integrations.evaluation.measuring import ORDERS
from qr_integrations.evaluation.statistics import Estimate
from qr_integrations.evaluation.summary import Report

# told apart without colour vision too (Okabe and Ito)
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
NUM_COLOURS = len(_COLOURS)
_LONGEST_NAME = 48  # characters of a system's name


def plot_heads(
    grid: Float[np.ndarray, "layers heads"], chosen: set[tuple[int, int]], path: str | Path, *, title: str, label: str
) -> None:
    """A heat map of all heads, the chosen ones framed, as an image file.

    Args:
        grid: a score per head; NaN stays white.
        chosen: ``(layer, head)`` pairs.
        path: its ending says which format, for instance ``.png``.
        title: stands above.
        label: what a score is.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    layers, heads = grid.shape
    figure = new_figure((max(4.0, min(16.0, 1.8 + 0.32 * heads)), max(3.0, min(16.0, 1.4 + 0.3 * layers))))
    from matplotlib.patches import Rectangle  # after new_figure, which says so where matplotlib is missing

    axis = figure.subplots()
    image = axis.imshow(grid, cmap="viridis", aspect="auto", origin="lower", interpolation="nearest")
    for layer, head in chosen:
        axis.add_patch(Rectangle((head - 0.5, layer - 0.5), 1, 1, fill=False, edgecolor="#D55E00", linewidth=1.8))
    axis.set(xlabel="head", ylabel="layer", title=title)
    axis.locator_params(integer=True)
    figure.colorbar(image, label=label)
    figure.savefig(path, bbox_inches="tight")


def plot_quality(report: Report, path: str | Path) -> None:
    """Every system's quality by the first metric in each order, with intervals."""
    metric, orders = report.metrics[0], list(report.systems[0].quality)
    figure = new_figure((7.0, 1.2 + 0.45 * len(report.systems)))
    axis = figure.subplots()
    for number, order in enumerate(orders):
        found = [system.quality[order][metric] for system in report.systems]
        places = np.arange(len(found)) + (number - (len(orders) - 1) / 2) * 0.25
        means, spread = means_and_spread(found)
        axis.errorbar(means, places, xerr=spread, fmt="o", capsize=3, color=colour_of(number), label=ORDERS[order])
    axis.set_yticks(range(len(report.systems)), [_shortened(system.name) for system in report.systems])
    axis.set(xlabel=f"{metric}, mean and 95 % interval", ylim=(-0.6, len(report.systems) - 0.4))
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.3)
    legend_beside(figure)
    figure.savefig(path, bbox_inches="tight")


def plot_biases(report: Report, path: str | Path) -> None:
    """The rank that irrelevant documents get, by their place in the prompt and by their length."""
    figure = new_figure((9.0, 3.6))
    for axis, kind, ends in zip(
        figure.subplots(1, 2, sharey=True),
        ("position", "length"),
        (("first\nplaces", "last\nplaces"), ("shortest", "longest")),
        strict=True,
    ):
        for number, system in enumerate(report.systems):
            bias: Bias | None = getattr(system, kind)
            if bias is not None:
                curve = [math.nan if rank is None else rank for rank in bias.curve]
                axis.plot(range(BINS), curve, marker="o", color=colour_of(number), label=_shortened(system.name))
        axis.axhline(0.5, color="grey", linewidth=0.8)
        axis.set_xticks([0, BINS - 1], ends)
        axis.set(title=kind)
        axis.grid(axis="y", alpha=0.3)
    figure.axes[0].set_ylabel("mean rank of irrelevant\ndocuments, 1 is the top")
    legend_beside(figure)
    figure.savefig(path, bbox_inches="tight")


def plot_pareto(report: Report, path: str | Path) -> None:
    """Quality against time for numbers of heads and exit layers; what nothing beats is joined by a line."""
    figure = new_figure((7.0, 4.2))
    axis = figure.subplots()
    for number, count in enumerate(sorted({point.heads for point in report.sweep})):
        some = [point for point in report.sweep if point.heads == count]
        seconds, found = [1000 * point.seconds for point in some], [point.shuffled.mean for point in some]
        label = f"{count} heads" if count > 1 else "1 head"
        rings = {"marker": "o", "fillstyle": "none", "linestyle": "", "markersize": 5 + 2 * number}
        axis.plot(seconds, found, color=colour_of(number), label=label, **rings)
    best = sorted((point for point in report.sweep if point.best), key=lambda point: (point.seconds, point.heads))
    axis.plot([1000 * p.seconds for p in best], [p.shuffled.mean for p in best], color="grey", zorder=0)
    for point in best:
        axis.annotate(
            f"layer {point.top_layer}",
            (1000 * point.seconds, point.shuffled.mean),
            textcoords="offset points",
            xytext=(6, -10),
            fontsize="small",
        )
    axis.set(xlabel="milliseconds to rank a new list", ylabel=f"{report.metrics[0]}, shuffled")
    axis.margins(x=0.1)
    axis.grid(alpha=0.3)
    legend_beside(figure)
    figure.savefig(path, bbox_inches="tight")


def plot_lengths(report: Report, path: str | Path) -> None:
    """Recall against length, one line per system: any piece of evidence, and all of it."""
    figure = new_figure((9.0, 3.6))
    for axis, kind in zip(figure.subplots(1, 2, sharey=True), ("any", "all"), strict=True):
        for number, name in enumerate(dict.fromkeys(point.system for point in report.lengths)):
            some = [point for point in report.lengths if point.system == name]
            found: list[Estimate] = [getattr(point, f"recall_{kind}") for point in some]
            lengths, colour = [point.num_tokens for point in some], colour_of(number)
            axis.plot(lengths, [one.mean for one in found], marker="o", color=colour, label=_shortened(name))
            axis.fill_between(lengths, [one.low for one in found], [one.high for one in found], color=colour, alpha=0.1)
        axis.set(xlabel="tokens", title=f"{kind} evidence found", ylim=(-0.02, 1.02))
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel(f"recall@{report.lengths[0].at}")
    legend_beside(figure)
    figure.savefig(path, bbox_inches="tight")


def require_matplotlib() -> None:
    """Pictures can be drawn.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    new_figure((1.0, 1.0))


def new_figure(size: tuple[float, float]) -> Any:
    """An empty matplotlib figure of this width and height in inches.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("a plot", "plots") from error
    return Figure(figsize=size, dpi=120)


def means_and_spread(
    estimates: Iterable[Estimate],
) -> tuple[Float[np.ndarray, "estimates"], Float[np.ndarray, "2 estimates"]]:
    """Means, and how far their intervals reach below and above them; of one estimate or more."""
    means, lows, highs = np.array([[one.mean, one.low, one.high] for one in estimates]).T
    return means, np.maximum(0.0, [means - lows, highs - means])  # rounding alone can put a mean outside


def legend_beside(figure: Any) -> None:
    """What is drawn in any of the axes, once, where it hides none of it."""
    named: dict[str, Any] = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    last = figure.axes[-1]
    last.legend(named.values(), named, frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1.0))


def colour_of(number: int) -> str:
    """The colour of the system, or whatever is told apart, with this number."""
    return _COLOURS[number % len(_COLOURS)]


def _shortened(name: str) -> str:
    """The end of a long name, which of paths is what tells them apart; without mathematics between dollar signs."""
    end = name if len(name) <= _LONGEST_NAME else f"...{name[3 - _LONGEST_NAME :]}"
    return end.replace("$", r"\$")
