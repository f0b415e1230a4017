"""Pictures of what the layers of a vision tower see and know."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from qr_integrations.encoding.layer_probes import LayerProbes
from qr_integrations.encoding.layers import LayerSimilarity
from qr_integrations.evaluation.plots import colour_of, legend_beside, new_figure

_FRAME = "#D55E00"


def plot_similarity(similarity: LayerSimilarity, path: str | Path, groups: Sequence[range] = ()) -> None:
    """A heat map of the similarity of each two layers, the groups framed.

    Args:
        similarity: of the layers.
        path: its ending says which format, for instance ``.png``.
        groups: of `group_layers`.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    size = len(similarity.matrix)
    side = max(4.0, min(12.0, 2.0 + 0.2 * size))
    figure = new_figure((side + 1.0, side))
    from matplotlib.patches import Rectangle  # after new_figure, which says so where matplotlib is missing

    axis = figure.subplots()
    lowest = min(0.0, float(similarity.matrix.min()))
    image = axis.imshow(similarity.matrix, cmap="viridis", vmin=lowest, vmax=1.0, origin="lower")
    for group in groups:
        corner, extent = group[0] - 0.5, len(group)
        axis.add_patch(Rectangle((corner, corner), extent, extent, fill=False, edgecolor=_FRAME, linewidth=1.8))
    axis.set(xlabel="layer, 0: embeddings", ylabel="layer", title=f"{similarity.num_pictures} pictures")
    axis.locator_params(integer=True)
    figure.colorbar(image, label=f"mean cosine ({similarity.compare})")
    figure.savefig(path, bbox_inches="tight")


def plot_probes(probes: Mapping[str, LayerProbes], path: str | Path) -> None:
    """Accuracy by layer with its interval, one line for each skill; dotted: what guessing gives.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    figure = new_figure((7.0, 4.2))
    axis = figure.subplots()
    for number, (skill, found) in enumerate(probes.items()):
        layers, colour = np.arange(len(found.accuracy)), colour_of(number)
        axis.plot(layers, found.accuracy, marker="o", markersize=4, color=colour, label=skill)
        axis.fill_between(layers, found.low, found.high, color=colour, alpha=0.1)
        axis.axhline(found.guess, color=colour, linewidth=0.8, linestyle=":")
    axis.set(xlabel="layer, 0: embeddings", ylabel="right answers", ylim=(-0.02, 1.02))
    axis.locator_params(axis="x", integer=True)
    axis.grid(alpha=0.3)
    legend_beside(figure)
    figure.savefig(path, bbox_inches="tight")
