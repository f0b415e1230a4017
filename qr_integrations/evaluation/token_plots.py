"""Accuracy against the number of visual tokens, a line per method."""

from collections.abc import Mapping, Sequence
from math import ceil, log2
from pathlib import Path
from typing import Any

from qr_integrations.evaluation.pictures import ALL, NONE, SKILL, SystemAccuracy
from qr_integrations.evaluation.plots import NUM_COLOURS, colour_of, legend_beside, new_figure
from qr_integrations.evaluation.token_accuracy import GUESS, KNOWN

_ACROSS = 4  # panels beside each other
_MARKERS = "osv^DPX*"
_DASHES = ("-", "--")  # methods outnumber the colours


def plot_tokens(systems: Sequence[SystemAccuracy], methods: Mapping[str, Sequence[str]], path: str | Path) -> None:
    """Accuracy over the skills that the model has, with bands of 95 %.

    Args:
        systems: with those that read all tokens and that look at nothing.
        methods: method -> its systems.
        path: its ending says which format.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    figure = new_figure((7.5, 4.6))
    axis = figure.subplots()
    _draw(axis, systems, methods, ALL, KNOWN, band=True)
    axis.set(
        xlabel="visual tokens that a layer reads, mean",
        ylabel=f"right answers, {KNOWN}",
    )
    legend_beside(figure)
    figure.savefig(path, bbox_inches="tight")


def plot_skills(
    systems: Sequence[SystemAccuracy],
    methods: Mapping[str, Sequence[str]],
    at_chance: Sequence[str],
    path: str | Path,
) -> None:
    """The same for each skill, in panels; skills at chance say so.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    skills = list(systems[0].accuracy[SKILL])
    across = min(_ACROSS, len(skills))
    figure = new_figure((2.6 * across, 2.5 * ceil(len(skills) / across)))
    panels = figure.subplots(ceil(len(skills) / across), across, sharex=True, sharey=True, squeeze=False)
    for axis, skill in zip(panels.flat, skills, strict=False):
        _draw(axis, systems, methods, SKILL, skill, band=False)
        axis.set_title(f"{skill} (at chance)" if skill in at_chance else skill, fontsize="medium")
    for axis in panels.flat[len(skills) :]:
        axis.set_axis_off()
    figure.supxlabel("visual tokens that a layer reads, mean", fontsize="medium")
    figure.supylabel("right answers", fontsize="medium")
    figure.subplots_adjust(left=0.09, bottom=0.14, hspace=0.3)
    legend_beside(figure)
    figure.savefig(path, bbox_inches="tight")


def _draw(
    axis: Any,
    systems: Sequence[SystemAccuracy],
    methods: Mapping[str, Sequence[str]],
    kind: str,
    name: str,
    *,
    band: bool,
) -> None:
    named = {one.name: one for one in systems}
    for number, (method, names) in enumerate(methods.items()):
        some = sorted((named[one] for one in names), key=lambda one: one.visual_tokens or 0.0)
        read = [one.visual_tokens for one in some]
        found = [one.accuracy[kind][name] for one in some]
        style = {"color": colour_of(number), "marker": _MARKERS[number % len(_MARKERS)], "markersize": 4}
        style["linestyle"] = _DASHES[number // NUM_COLOURS % len(_DASHES)]
        axis.plot(read, [one.mean for one in found], label=method, linewidth=1.2, **style)
        if band:
            lows, highs = [one.low for one in found], [one.high for one in found]
            axis.fill_between(read, lows, highs, color=colour_of(number), alpha=0.08)
    whole = named[NONE]
    point = {"color": "black", "marker": "*", "markersize": 9, "linestyle": "", "zorder": 3}
    axis.plot([whole.visual_tokens], [whole.accuracy[kind][name].mean], label="all tokens", **point)
    axis.axhline(named[GUESS].accuracy[kind][name].mean, color="grey", linewidth=0.8, linestyle=":", label=GUESS)
    axis.set_xscale("log")
    doublings = [2**power for power in range(1, int(log2(max(2.0, *_read(systems)))) + 1)]
    axis.set_xticks(doublings, [str(count) for count in doublings])
    axis.minorticks_off()
    axis.set(ylim=(-0.02, 1.02))
    axis.grid(alpha=0.3)


def _read(systems: Sequence[SystemAccuracy]) -> list[float]:
    return [one.visual_tokens for one in systems if one.visual_tokens is not None]
