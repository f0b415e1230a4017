"""Where in a picture a model looked: a grid of numbers, and the part of the picture that the grid covers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image, ImageDraw

from qr_integrations.errors import InputError, ScoreError
from qr_integrations.types import Box

_ROUNDING = 1e-4  # of the largest value; two passes over the same prompt differ by less
_SLIVER = 1e-6  # of a cell; a cell with less of the picture than that has none of it
_TINT, _FRAME, _OPACITY = (255, 80, 0), (0, 200, 255), 0.7


@dataclass(frozen=True, slots=True, eq=False)
class ImportanceMap:
    """How important each part of a picture is for an answer.

    Attributes:
        values: one number per cell, row by row. No unit; larger is more important, and only their order and
            proportion mean something. May be negative.
        covers: left, top, right and bottom of the part of the picture that the cells cover evenly, in pixels. A model
            that sees a centre square has a smaller part than the picture; one that pads has a larger one.
        image_size: width and height of the picture in pixels.
        method: what computed the values.

    Raises:
        InputError: no cells, or cells that cover nothing of the picture.
        ScoreError: a value is NaN or infinite.
    """

    values: Float[np.ndarray, "rows columns"]
    covers: tuple[float, float, float, float]
    image_size: tuple[int, int]
    method: str

    def __post_init__(self) -> None:
        left, top, right, bottom = self.covers
        width, height = self.image_size
        if self.values.ndim != 2 or not self.values.size:
            raise InputError(f"a map of shape {self.values.shape} has no cells: pass rows x columns, at least 1 x 1")
        if not all(math.isfinite(edge) for edge in self.covers) or not (
            max(left, 0) < min(right, width) and max(top, 0) < min(bottom, height)
        ):
            raise InputError(
                f"({left}, {top}, {right}, {bottom}) is no part of a picture of {width} x {height} pixels: "
                "pass left, top, right, bottom of what the map covers"
            )
        if bad := int((~np.isfinite(self.values)).sum()):
            raise ScoreError(
                f"{bad} of {self.values.size} cells of the map {self.method!r} are NaN or infinite: "
                "load the model with dtype float32 or bfloat16"
            )

    @property
    def is_informative(self) -> bool:
        """False if all values are equal up to rounding: such a map says nothing about where to look."""
        return float(np.ptp(self.values)) > _ROUNDING * float(np.abs(self.values).max())

    @property
    def cell_size(self) -> tuple[float, float]:
        """Width and height of one cell in pixels."""
        left, top, right, bottom = self.covers
        rows, columns = self.values.shape
        return (right - left) / columns, (bottom - top) / rows

    def within_picture(self) -> "ImportanceMap":
        """The same map without the rows and columns that lie entirely outside the picture."""
        (left, top, _, _), (cell_width, cell_height) = self.covers, self.cell_size
        rows, columns = self.values.shape
        x = _seen(left, cell_width, columns, self.image_size[0])
        y = _seen(top, cell_height, rows, self.image_size[1])
        if (x.start, x.stop, y.start, y.stop) == (0, columns, 0, rows):
            return self
        covers = (
            left + x.start * cell_width,
            top + y.start * cell_height,
            left + x.stop * cell_width,
            top + y.stop * cell_height,
        )
        return replace(self, values=self.values[y, x], covers=covers)

    def on_picture(self, size: tuple[int, int] | None = None) -> Float[np.ndarray, "height width"]:
        """The map at every pixel: bilinear between the centres of the cells, float32, NaN where no cell lies.

        Args:
            size: width and height to show the picture at; None takes those of the picture.
        """
        width, height = size or self.image_size
        x_scale, y_scale = width / self.image_size[0], height / self.image_size[1]
        left, top, right, bottom = self.covers
        rows, columns = self.values.shape
        of_row, no_row = _bilinear_weights(rows, top * y_scale, bottom * y_scale, height)
        of_column, no_column = _bilinear_weights(columns, left * x_scale, right * x_scale, width)
        pixels = of_row @ self.values.astype(np.float32) @ of_column.T
        pixels[no_row], pixels[:, no_column] = np.nan, np.nan
        return pixels

    def heat_map(self, image: Image.Image, box: Box | None = None) -> Image.Image:
        """The picture, tinted where it matters.

        Args:
            image: the picture, or a smaller or larger copy of it.
            box: a rectangle to draw, in pixels of the picture that the map was made for.
        """
        low, high = float(self.values.min()), float(self.values.max())
        spread = high - low if self.is_informative else math.inf
        opacity = np.nan_to_num((self.on_picture(image.size) - low) / spread).clip(0, 1) * _OPACITY
        picture = image.convert("RGB")
        tint = Image.new("RGB", picture.size, _TINT)
        shown = Image.composite(tint, picture, Image.fromarray(np.uint8(np.rint(opacity * 255))))
        if box is not None:
            _draw(shown, box, self.image_size)
        return shown

    @classmethod
    def average(cls, maps: Sequence["ImportanceMap"]) -> "ImportanceMap":
        """The mean of maps of one picture, such as those of several layers.

        Raises:
            InputError: no maps, or maps of different grids or pictures.
        """
        if not maps:
            raise InputError("no maps to average: pass at least one")
        first = maps[0]
        if any(
            (one.values.shape, one.covers, one.image_size) != (first.values.shape, first.covers, first.image_size)
            for one in maps
        ):
            raise InputError("the maps differ in grid, covered part or picture: average maps of one picture and model")
        method = " + ".join(dict.fromkeys(one.method for one in maps))
        return replace(first, values=np.mean([one.values for one in maps], axis=0), method=method)


def _seen(start: float, cell: float, count: int, pixels: int) -> slice:
    """The cells that have a part of the picture."""
    first = math.floor(-start / cell + _SLIVER)
    last = math.ceil((pixels - start) / cell - _SLIVER)
    return slice(max(0, first), min(count, last))


def _bilinear_weights(
    count: int, start: float, stop: float, pixels: int
) -> tuple[Float[np.ndarray, "pixels count"], Bool[np.ndarray, "pixels"]]:
    """Along one side, the share of every cell in every pixel, and which pixels lie outside ``[start, stop)``."""
    centres = np.arange(pixels) + 0.5
    places = (centres - start) / (stop - start) * count - 0.5
    distances = np.abs(places.clip(0, count - 1)[:, None] - np.arange(count))
    weights = np.maximum(0, 1 - distances).astype(np.float32)
    return weights, (centres < start) | (centres >= stop)


def _draw(picture: Image.Image, box: Box, image_size: tuple[int, int]) -> None:
    x, y = picture.width / image_size[0], picture.height / image_size[1]
    left, top, right, bottom = box.as_tuple()
    corners = (left * x, top * y, max(left * x, right * x - 1), max(top * y, bottom * y - 1))
    thickness = max(1, round(min(picture.size) / 150))
    ImageDraw.Draw(picture).rectangle(corners, outline=_FRAME, width=thickness)
