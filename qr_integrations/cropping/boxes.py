"""The rectangle of a picture to look at again (ViCrop, arXiv 2502.17422).

A window slides over the importance map. Its score is how much more importance it holds than the windows one cell
further, per cell: high where the window just fits what matters. Windows of several sizes compete.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Float

from qr_integrations.cropping.importance import ImportanceMap
from qr_integrations.errors import InputError
from qr_integrations.types import Box

RATIOS = (1.0, 1.2, 1.4, 1.6, 1.8, 2.0)
Geometry = Literal["true", "published"]


@dataclass(frozen=True, slots=True)
class FoundBox:
    """The rectangle that a search chose.

    Attributes:
        box: in pixels of the picture, inside it. All of the picture if `whole`.
        ratio: its side over the base side, before it was fitted into the picture.
        sharpness: its score, importance per cell; 0 if `whole`.
        scores: ratio -> the score of the best window of that size; sizes that hold the whole map are left out.
        whole: the smallest window holds the whole map, so a crop would show nothing closer.
    """

    box: Box
    ratio: float
    sharpness: float
    scores: Mapping[float, float]
    whole: bool


@dataclass(frozen=True, slots=True)
class _Window:
    """A window on the map in cells, and its score."""

    ratio: float
    column: int
    row: int
    columns: int
    rows: int
    sharpness: float


def search_box(values: Float[np.ndarray, "rows columns"], image_size: tuple[int, int], base: int) -> FoundBox:
    """The published search: the map is taken to cover the whole picture evenly.

    Args:
        values: the importance map.
        image_size: width and height of the picture in pixels.
        base: side of the smallest crop in pixels, as a rule the side of what the vision tower reads.

    Raises:
        InputError: an empty map or a base below 2.
        ScoreError: a value is NaN or infinite.

    Example:
        >>> import numpy as np
        >>> values = np.zeros((24, 24))
        >>> values[10:14, 18:22] = 1
        >>> search_box(values, (2000, 2000), base=336).box
        Box(left=1498, top=831, right=1834, bottom=1167)
    """
    covers = (0.0, 0.0, float(image_size[0]), float(image_size[1]))
    return find_box(ImportanceMap(values, covers, image_size, method="values"), base)


def find_box(importance: ImportanceMap, base: int, *, geometry: Geometry = "true") -> FoundBox:
    """The rectangle of the picture in which the map is most important.

    Sides are twice the whole part of half the base times a ratio, less where the picture is smaller. Of equal windows
    the leftmost wins, then the topmost, then the smallest: a map of equal values gives the top left corner.

    Args:
        importance: the map.
        base: side of the smallest crop in pixels, as a rule the side of what the vision tower reads.
        geometry: ``"true"`` searches the part of the picture that the map covers; the box may reach further.
            ``"published"`` takes the map to cover the whole picture, whatever the model saw of it.

    Raises:
        InputError: a base below 2.

    Where we differ from the authors' code (saccharomycetes/mllms_know): a window has at least one cell. In theirs it
    has none where a cell is larger than the base, and the crop is the top left corner whatever the map says.
    """
    if base < 2:
        raise InputError(f"base is {base}: pass the side of the smallest crop in pixels, at least 2")
    width, height = importance.image_size
    if geometry == "published":
        seen = replace(importance, covers=(0.0, 0.0, float(width), float(height)))
    else:
        seen = importance.within_picture()
    windows = _best_windows(seen, base)
    if not windows:
        return FoundBox(Box(0, 0, width, height), RATIOS[0], 0.0, {}, whole=True)
    best = max(windows, key=lambda window: window.sharpness)
    scores = {window.ratio: window.sharpness for window in windows}
    return FoundBox(_crop(best, seen, base), best.ratio, best.sharpness, scores, whole=False)


def _best_windows(importance: ImportanceMap, base: int) -> list[_Window]:
    """The best window of every size; none if the smallest holds the whole map."""
    finder = _WindowFinder(importance.values)
    cell_width, cell_height = importance.cell_size
    height, width = importance.values.shape
    windows = []
    for ratio in RATIOS:
        columns = max(1, min(int(base * ratio / cell_width), width))
        rows = max(1, min(int(base * ratio / cell_height), height))
        if (rows, columns) == (height, width):
            break
        row, column = finder.best(rows, columns)
        sharpness = finder.rise(row, column, rows, columns) / (rows * columns)
        windows.append(_Window(ratio, column, row, columns, rows, sharpness))
    return windows


class _WindowFinder:
    """Finds windows by the sums in them.

    An integral image gives all sums at once, up to rounding. The few windows that may be the best are added up cell by
    cell in the map's own precision, as the authors do: where windows hold the same, their rounding decides.
    """

    def __init__(self, values: Float[np.ndarray, "rows columns"]) -> None:
        self._values = np.ascontiguousarray(values, dtype=np.promote_types(values.dtype, np.float32))
        self._integral = np.pad(self._values.cumsum(0, dtype=np.float64).cumsum(1), ((1, 0), (1, 0)))
        rounding = float(np.finfo(self._values.dtype).eps) * sum(values.shape)
        self._doubt = 4 * rounding * float(np.abs(self._values).sum(dtype=np.float64))

    def best(self, rows: int, columns: int) -> tuple[int, int]:
        """Top row and left column of the window with the largest sum; of equal ones the leftmost, then the topmost."""
        below, above = self._integral[rows:], self._integral[:-rows]
        sums = below[:, columns:] - above[:, columns:] - below[:, :-columns] + above[:, :-columns]
        by_column = sums.T
        places = np.argwhere(by_column >= by_column.max() - self._doubt)
        near = [(int(row), int(column)) for column, row in places]
        return max(near, key=lambda place: self._sum(place[0], place[1], rows, columns))

    def rise(self, row: int, column: int, rows: int, columns: int) -> float:
        """By how much the sum in a window exceeds the mean of those one cell to the left, right, above and below."""
        last_row, last_column = self._values.shape[0] - rows, self._values.shape[1] - columns
        places = ((row, column - 1), (row, column + 1), (row - 1, column), (row + 1, column))
        neighbours = [self._sum(y, x, rows, columns) for y, x in places if 0 <= y <= last_row and 0 <= x <= last_column]
        return self._sum(row, column, rows, columns) - sum(neighbours) / len(neighbours)

    def _sum(self, row: int, column: int, rows: int, columns: int) -> float:
        return float(self._values[row : row + rows, column : column + columns].sum())


def _crop(window: _Window, importance: ImportanceMap, base: int) -> Box:
    """A square around the window's centre, moved into the picture and cut where the picture is smaller."""
    (left, top, _, _), (cell_width, cell_height) = importance.covers, importance.cell_size
    width, height = importance.image_size
    half = int(base * window.ratio // 2)
    x = int(left + (window.column * cell_width + cell_width * window.columns / 2))
    y = int(top + (window.row * cell_height + cell_height * window.rows / 2))
    x, y = min(max(x, half), width - half), min(max(y, half), height - half)
    return Box(max(0, x - half), max(0, y - half), min(width, x + half), min(height, y + half))
