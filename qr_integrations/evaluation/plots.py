"""Pictures of what was measured."""

from pathlib import Path

import numpy as np
from jaxtyping import Float

from qr_integrations.errors import MissingExtra


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
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle
    except ImportError as error:
        raise MissingExtra("a heat map", "plots") from error
    layers, heads = grid.shape
    figure = Figure(figsize=(max(4.0, min(16.0, 1.8 + 0.32 * heads)), max(3.0, min(16.0, 1.4 + 0.3 * layers))), dpi=120)
    axis = figure.subplots()
    image = axis.imshow(grid, cmap="viridis", aspect="auto", origin="lower", interpolation="nearest")
    for layer, head in chosen:
        axis.add_patch(Rectangle((head - 0.5, layer - 0.5), 1, 1, fill=False, edgecolor="#D55E00", linewidth=1.8))
    axis.set(xlabel="head", ylabel="layer", title=title)
    axis.locator_params(integer=True)
    figure.colorbar(image, label=label)
    figure.savefig(path, bbox_inches="tight")
