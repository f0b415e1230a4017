"""What covers each patch of a view: what the tower learns to tell."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qr_integrations.evaluation.drawn_world.views import View
from qr_integrations.evaluation.drawn_world.world import COLOURS, KINDS, MARKS

IGNORED = -100
READABLE = 5.0
"""A mark lower than this many pixels of the model's input carries no label."""


@dataclass(frozen=True)
class PatchLabels:
    """What covers each patch; 0 is ground, or no mark. All are (patches,), except `present`, (kinds x colours,)."""

    kind: np.ndarray
    colour: np.ndarray
    mark: np.ndarray
    centre: np.ndarray
    present: np.ndarray


def patch_labels(view: View, patch: int) -> PatchLabels:
    """Labels of the patches in reading order: a thing owns the patches it covers by 30 %, and the one of its centre.

    Colour and mark are `IGNORED` on the ground; so are marks too small to be read.
    """
    side = view.resolution // patch
    kind, centre = np.zeros((side, side), np.int64), np.zeros((side, side), np.float32)
    colour, mark = np.full((side, side), IGNORED), np.full((side, side), IGNORED)
    present = np.zeros((len(KINDS), len(COLOURS)), np.float32)
    starts = np.arange(side) * patch
    for thing in view.scene.things:
        if view.shows(thing) < 0.25:
            continue
        left, top, right, bottom = view.place(thing.box)
        across = (np.minimum(starts + patch, right) - np.maximum(starts, left)).clip(0) / patch
        down = (np.minimum(starts + patch, bottom) - np.maximum(starts, top)).clip(0) / patch
        owned = np.outer(down, across) > 0.3
        row, column = (min(side - 1, max(0, int(v / patch))) for v in ((top + bottom) / 2, (left + right) / 2))
        owned[row, column] = True
        centre[row, column] = 1
        number = KINDS.index(thing.kind), list(COLOURS).index(thing.colour)
        kind[owned], colour[owned] = number[0] + 1, number[1]
        readable = thing.mark is None or view.mark_size(thing) >= READABLE
        mark[owned] = (1 + MARKS.index(thing.mark) if thing.mark else 0) if readable else IGNORED
        present[number] = 1
    return PatchLabels(kind.ravel(), colour.ravel(), mark.ravel(), centre.ravel(), present.ravel())
