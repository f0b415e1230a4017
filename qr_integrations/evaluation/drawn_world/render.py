"""Draws scenes with Pillow, at their own size or smaller, whole or a part.

A scene drawn smaller is the scene scaled down, not another picture.
"""

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from qr_integrations.evaluation.drawn_world.world import COLOURS, Corners, Scene, Thing

SPRITE = 256
GROUND = 64
"""Side of the square noise that is stretched over the picture."""
DARK_INK = ("white", "yellow", "orange")


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


def render(scene: Scene, region: Corners | None = None, scale: float = 1.0) -> Image.Image:
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
