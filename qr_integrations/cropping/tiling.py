"""Large pictures in tiles: each is looked at by itself, then the importance maps are put together (ViCrop, `_high`)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Float

from qr_integrations.cropping.boxes import Geometry
from qr_integrations.cropping.importance import ImportanceMap
from qr_integrations.errors import InputError
from qr_integrations.types import Box, Grid

LIMIT = 1024  # pixels
_MANY = 16  # of a narrow picture: more parts only where the limit asks for them, as each costs the model one pass


@dataclass(frozen=True, slots=True)
class Tiling:
    """A picture cut into tiles.

    Attributes:
        boxes: the tiles row by row, in pixels of the picture. Those of the published rule may reach beyond it.
        grid: rows and columns of tiles.
        image_size: width and height of the picture in pixels.
    """

    boxes: tuple[Box, ...]
    grid: Grid
    image_size: tuple[int, int]


def tile_picture(image_size: tuple[int, int], *, limit: int = LIMIT, published: bool = False) -> Tiling:
    """Cut a picture into about square tiles, at most `limit` pixels wide and high.

    The shorter side is cut into as few parts as the limit allows, the longer one into parts of about that size,
    into 16 of them unless the limit asks for more. The tiles cover the picture, stay inside it, and differ by at most a
    pixel. A long picture is cut even if it is small:
    some models see only the centre square. Every tile costs the model one pass.

    Args:
        image_size: width and height of the picture in pixels.
        limit: the largest side of a tile in pixels.
        published: cut as the authors do: only the height decides whether to cut, tiles may be wider than `limit`, and
            the last ones may reach beyond the picture, where Pillow's ``crop`` pads with black.

    Raises:
        InputError: no pixels, a limit below 1, or a picture too narrow for the published rule.

    Example:
        >>> tile_picture((2000, 1000)).boxes
        (Box(left=0, top=0, right=1000, bottom=1000), Box(left=1000, top=0, right=2000, bottom=1000))
    """
    width, height = image_size
    if min(width, height, limit) < 1:
        raise InputError(f"{width} x {height} pixels in tiles of {limit}: pass a picture and a limit of at least 1")
    if published:
        return _published_tiling(width, height, limit)
    shorter, longer = sorted(image_size)
    few = math.ceil(shorter / limit)
    many = max(math.ceil(longer / limit), min(_MANY, round(few * longer / shorter)))
    columns, rows = (many, few) if width >= height else (few, many)
    lefts = [width * column // columns for column in range(columns + 1)]
    tops = [height * row // rows for row in range(rows + 1)]
    return _tiling(lefts, tops, image_size)


def merge_maps(tiling: Tiling, maps: Sequence[ImportanceMap], *, geometry: Geometry = "true") -> ImportanceMap:
    """One map of the whole picture from the maps of its tiles. Values stay as they are, nothing is normalised.

    Args:
        tiling: how the picture was cut.
        maps: one per tile in the order of the tiles, all of one shape, each in pixels of its tile.
        geometry: ``"true"`` puts cells where they lie in their tile; parts of a tile that its map does not cover take
            the nearest cell. ``"published"`` takes every map to cover its whole tile.

    Raises:
        InputError: maps of another number, shape or size than the tiles ask for.
    """
    if len(maps) != len(tiling.boxes):
        raise InputError(f"{len(maps)} maps for {len(tiling.boxes)} tiles: pass one map per tile")
    if len({one.values.shape for one in maps}) > 1:
        raise InputError("the maps have different grids: read all tiles with the same model and processor settings")
    for box, one in zip(tiling.boxes, maps, strict=True):
        if one.image_size != (box.width, box.height):
            raise InputError(
                f"a map of {one.image_size[0]} x {one.image_size[1]} pixels for a tile of {box.width} x {box.height}: "
                "pass the maps in the order of the tiles"
            )
    values = [one.values if geometry == "published" else _on_whole_tile(one) for one in maps]
    columns = tiling.grid.columns
    rows = [np.concatenate(values[i : i + columns], axis=1) for i in range(0, len(values), columns)]
    last = tiling.boxes[-1]
    covers = (0.0, 0.0, float(last.right), float(last.bottom))
    return ImportanceMap(np.concatenate(rows), covers, tiling.image_size, maps[0].method)


def _published_tiling(width: int, height: int, limit: int) -> Tiling:
    rows = math.ceil(height / limit)
    if not (columns := int(rows * width / height)):
        raise InputError(
            f"the published rule cannot cut {width} x {height} pixels, which are too narrow: leave out published=True"
        )
    tile_width, tile_height = math.ceil(width / columns), math.ceil(height / rows)
    lefts = [tile_width * column for column in range(columns + 1)]
    tops = [tile_height * row for row in range(rows + 1)]
    return _tiling(lefts, tops, (width, height))


def _tiling(lefts: list[int], tops: list[int], image_size: tuple[int, int]) -> Tiling:
    rows, columns = list(pairwise(tops)), list(pairwise(lefts))
    boxes = tuple(Box(left, top, right, bottom) for top, bottom in rows for left, right in columns)
    return Tiling(boxes, Grid(len(rows), len(columns)), image_size)


def _on_whole_tile(tile: ImportanceMap) -> Float[np.ndarray, "rows columns"]:
    """As many cells as the map has, spread over the whole tile, each with the value of the nearest cell."""
    left, top, right, bottom = tile.covers
    rows, columns = tile.values.shape
    y = _nearest(rows, top, bottom, tile.image_size[1])
    x = _nearest(columns, left, right, tile.image_size[0])
    return tile.values[np.ix_(y, x)]


def _nearest(count: int, start: float, stop: float, pixels: int) -> list[int]:
    centres = [(i + 0.5) * pixels / count for i in range(count)]
    return [min(max(int((centre - start) / (stop - start) * count), 0), count - 1) for centre in centres]
