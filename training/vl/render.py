"""Draws scenes with Pillow, at their own size or smaller, whole or a part, and says what covers each patch.

A scene drawn smaller is the scene scaled down, not another picture: training draws at twice the model's resolution what
users' pictures hold at up to 1344 pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .world import COLOURS, KINDS, MARKS, Box, Scene, Thing

SPRITE = 256
GROUND = 64
"""Side of the square noise that is stretched over the picture."""
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation of CLIP's input."""
PADDING = (int(MEAN[0] * 255), int(MEAN[1] * 255), int(MEAN[2] * 255))
DARK_INK = ("white", "yellow", "orange")
IGNORED = -100
READABLE = 5.0
"""A mark lower than this many pixels of the model's input carries no label."""


def _star() -> list[tuple[float, float]]:
    radii = [0.5 if i % 2 == 0 else 0.21 for i in range(10)]
    turns = [math.pi * (i / 5 - 0.5) for i in range(10)]
    return [(0.5 + r * math.cos(t), 0.53 + r * math.sin(t)) for r, t in zip(radii, turns, strict=True)]


def _heart() -> list[tuple[float, float]]:
    turns = [2 * math.pi * i / 80 for i in range(80)]
    rows = [13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) for t in turns]
    return [(0.5 + math.sin(t) ** 3 / 2, 0.42 - row / 30) for t, row in zip(turns, rows, strict=True)]


@cache
def shape_mask(kind: str) -> Image.Image:
    """The silhouette of a kind, 256 pixels square, drawn four times as large and scaled down for smooth edges."""
    side = 4 * SPRITE
    image = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(image)
    whole = (0, 0, side - 1, side - 1)
    polygons = {"tent": [(0.5, 0.0), (1.0, 1.0), (0.0, 1.0)], "star": _star(), "heart": _heart()}
    if kind in polygons:
        draw.polygon([(x * side, y * side) for x, y in polygons[kind]], fill=255)
    elif kind in ("box", "sign"):
        draw.rectangle(whole, fill=255)
    elif kind == "cross":
        draw.rectangle((0.34 * side, 0, 0.66 * side, side), fill=255)
        draw.rectangle((0, 0.34 * side, side, 0.66 * side), fill=255)
    else:
        draw.ellipse(whole, fill=255)
        if kind == "ring":
            draw.ellipse((0.27 * side, 0.27 * side, 0.73 * side, 0.73 * side), fill=0)
        if kind == "moon":
            draw.ellipse((0.36 * side, 0.06 * side, 1.16 * side, 0.86 * side), fill=0)
    return image.resize((SPRITE, SPRITE), Image.Resampling.BOX)


@cache
def mark_mask(mark: str) -> Image.Image:
    """The ink of a letter, digit or word in capitals, cut to its edges."""
    font = ImageFont.load_default(size=160)
    left, top, right, bottom = (round(v) for v in font.getbbox(mark.upper(), stroke_width=6))
    image = Image.new("L", (right - left, bottom - top), 0)
    ImageDraw.Draw(image).text((-left, -top), mark.upper(), fill=255, font=font, stroke_width=6)
    return image


def mark_box(thing: Thing) -> tuple[float, float, float, float]:
    """Where the mark stands on a thing, in source pixels."""
    mask = mark_mask(thing.mark or "o")
    width, height = thing.box[2] - thing.box[0], thing.box[3] - thing.box[1]
    share = (0.86, 0.8) if thing.kind == "sign" else (0.5, 0.5) if thing.kind == "heart" else (0.62, 0.62)
    factor = min(share[0] * width / mask.width, share[1] * height / mask.height)
    x, y = thing.centre
    half_width, half_height = factor * mask.width / 2, factor * mask.height / 2
    return x - half_width, y - half_height, x + half_width, y + half_height


def ground_texture(seed: int) -> Image.Image:
    """64 x 64 pixels of muted noise: a base colour, blotches of three sizes, and sometimes stripes."""
    rng = np.random.default_rng(seed)
    base = rng.uniform(70, 185) + rng.normal(0, 9, 3)
    noise = np.zeros((GROUND, GROUND), np.float32)
    for cells, strength in ((4, 12.0), (16, 8.0), (64, 7.0)):
        blotches = rng.normal(0, strength * rng.uniform(0.3, 1.3), (cells, cells)).astype(np.float32)
        noise += np.repeat(np.repeat(blotches, GROUND // cells, 0), GROUND // cells, 1)
    if rng.random() < 0.3:
        rows, columns = np.mgrid[:GROUND, :GROUND]
        turn = rng.uniform(0, math.pi)
        waves = np.sin((rows * math.sin(turn) + columns * math.cos(turn)) * rng.uniform(0.3, 1.5))
        noise += rng.uniform(4, 14) * waves
    tint = 1 + rng.normal(0, 0.15, 3)
    pixels = base + noise[..., None] * tint
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _paste(image: Image.Image, mask: Image.Image, colour: tuple[int, ...], place: Sequence[float]) -> None:
    """Stretches a mask over a box given in pixels of the image and fills it with a colour."""
    left, top, right, bottom = (round(v) for v in place)
    if right <= 0 or bottom <= 0 or left >= image.width or top >= image.height:
        return
    size = max(1, right - left), max(1, bottom - top)
    image.paste(colour, (left, top), mask.resize(size, Image.Resampling.BILINEAR))


def _tinted(thing: Thing, seed: int) -> tuple[int, ...]:
    shift = np.random.default_rng([seed, *thing.box]).integers(-14, 15, 3)
    return tuple(int(v) for v in np.clip(np.array(COLOURS[thing.colour]) + shift, 0, 255))


def render(scene: Scene, region: Box | None = None, scale: float = 1.0) -> Image.Image:
    """Draws a scene, or the part of it in `region`, at `scale` times the source resolution."""
    left, top, right, bottom = region or scene.frame
    size = max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale))
    across, down = GROUND / scene.width, GROUND / scene.height
    part = (left * across, top * down, right * across, bottom * down)
    image = ground_texture(scene.ground).resize(size, Image.Resampling.BICUBIC, box=part)
    for thing in scene.things:
        places: list[tuple[Image.Image, tuple[int, ...], Sequence[float]]] = [
            (shape_mask(thing.kind), _tinted(thing, scene.ground), thing.box)
        ]
        if thing.mark:
            ink = (15, 15, 15) if thing.colour in DARK_INK else (250, 250, 250)
            places.append((mark_mask(thing.mark), ink, mark_box(thing)))
        for mask, colour, box in places:
            moved = [(v - o) * scale for v, o in zip(box, (left, top, left, top), strict=True)]
            _paste(image, mask, colour, moved)
    return image


@dataclass(frozen=True)
class View:
    """A scene, or a part of it, as the model sees it: padded to a square and scaled to `resolution` pixels."""

    scene: Scene
    region: Box
    resolution: int

    @property
    def scale(self) -> float:
        """Pixels of the model's input per source pixel."""
        return self.resolution / max(self.region[2] - self.region[0], self.region[3] - self.region[1])

    def place(self, box: Sequence[float]) -> tuple[float, float, float, float]:
        """A box in source pixels, in pixels of the model's input."""
        width, height = self.region[2] - self.region[0], self.region[3] - self.region[1]
        pad = (max(width, height) - width) // 2, (max(width, height) - height) // 2
        x, y = self.region[0] - pad[0], self.region[1] - pad[1]
        return tuple((v - o) * self.scale for v, o in zip(box, (x, y, x, y), strict=True))  # type: ignore[return-value]

    def shows(self, thing: Thing) -> float:
        """The share of a thing's box that is inside the view."""
        region, box = self.region, thing.box
        width = max(0, min(box[2], region[2]) - max(box[0], region[0]))
        height = max(0, min(box[3], region[3]) - max(box[1], region[1]))
        return width * height / ((box[2] - box[0]) * (box[3] - box[1]))

    def size(self, thing: Thing) -> float:
        """Longest side of a thing in pixels of the model's input."""
        return thing.size * self.scale

    def mark_size(self, thing: Thing) -> float:
        """Height of a thing's mark in pixels of the model's input."""
        box = mark_box(thing)
        return (box[3] - box[1]) * self.scale

    def pixels(self) -> np.ndarray:
        """(resolution, resolution, 3) bytes, drawn at about twice the resolution: what the processor makes, faster."""
        image = pad_to_square(render(self.scene, self.region, min(1.0, 2 * self.scale)))
        return np.asarray(image.resize((self.resolution, self.resolution), Image.Resampling.BICUBIC))


def pad_to_square(image: Image.Image) -> Image.Image:
    """The picture in the middle of a square of the mean colour."""
    side = max(image.size)
    if image.width == image.height:
        return image
    square = Image.new("RGB", (side, side), PADDING)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


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
