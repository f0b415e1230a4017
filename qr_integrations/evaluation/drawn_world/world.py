"""A world of coloured things on textured ground: what a picture shows, drawn at random from a seed.

Some kinds usually come together and most kinds have a usual colour, so whoever has seen enough pictures can guess what
is too small to be seen. All boxes are in source pixels: (left, top, right, bottom).
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

Corners = tuple[int, int, int, int]
"""(left, top, right, bottom) in pixels."""

KINDS = ("ball", "box", "tent", "star", "ring", "cross", "heart", "moon", "sign")
PLURALS = ("balls", "boxes", "tents", "stars", "rings", "crosses", "hearts", "moons", "signs")
COLOURS = {
    "red": (215, 30, 35),
    "green": (30, 150, 50),
    "blue": (40, 75, 215),
    "yellow": (240, 215, 40),
    "orange": (240, 130, 20),
    "purple": (135, 45, 165),
    "white": (245, 245, 245),
    "black": (18, 18, 18),
}
LETTERS = ("e", "h", "l", "o", "t", "x")
DIGITS = ("2", "4", "7", "8")
WORDS = ("stop", "exit", "cafe", "milk", "zoo", "park")
MARKS = LETTERS + DIGITS + WORDS
CARRIERS = ("ball", "box", "heart")
"""Kinds that may carry a letter or a digit; a sign always carries a word."""
PARTNERS = {"ball": "box", "box": "ball", "star": "moon", "moon": "star", "heart": "ring", "ring": "heart"}
PARTNERS |= {"tent": "cross", "cross": "tent"}
"""Kinds that usually come together."""
TOGETHER = 0.8
"""How often the partner of a thing is in the picture because the thing is."""
USUAL_COLOUR = {"heart": "red", "moon": "yellow", "tent": "green", "ball": "blue", "ring": "orange", "box": "purple"}
USUAL = 0.4
"""How often a kind has its usual colour; else all colours are equally likely."""
LONG_SIDES = (224, 336, 448, 672, 896, 1120, 1344)
ASPECTS = (1.0, 4 / 3, 3 / 4, 3 / 2, 2 / 3, 16 / 9)
SIGN_HEIGHT = 0.5
"""Height of a sign divided by its width; all other kinds are as high as they are wide."""
SMALLEST, LARGEST = 0.03, 0.7
"""Longest side of a thing as a share of the picture's longest side, in the whole world."""


@dataclass(frozen=True)
class Thing:
    """One thing: its kind and colour, the letter, digit or word on it, and its box."""

    kind: str
    colour: str
    mark: str | None
    box: Corners

    @property
    def name(self) -> str:
        """Colour and kind, unique in a scene."""
        return f"{self.colour} {self.kind}"

    @property
    def size(self) -> int:
        """Longest side in source pixels."""
        return max(self.box[2] - self.box[0], self.box[3] - self.box[1])

    @property
    def centre(self) -> tuple[float, float]:
        """(x, y) in source pixels."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True)
class Scene:
    """A picture before it is drawn: its size, the seed of its ground, and the things on it, largest first."""

    width: int
    height: int
    ground: int
    things: tuple[Thing, ...]

    @property
    def long_side(self) -> int:
        """The longest side in source pixels."""
        return max(self.width, self.height)

    @property
    def frame(self) -> Corners:
        """The box of the whole picture."""
        return 0, 0, self.width, self.height


@dataclass(frozen=True)
class Difficulty:
    """How many things a scene has, and how large they are as a share of the picture's longest side."""

    most: int = 7
    smallest: float = SMALLEST
    largest: float = LARGEST

    @staticmethod
    def at(level: float) -> "Difficulty":
        """From one large thing (level 0) to the whole world (level 1)."""
        smallest = math.exp((1 - level) * math.log(0.5) + level * math.log(SMALLEST))
        return Difficulty(1 + round(6 * level), smallest, (1 - level) * 0.9 + level * LARGEST)


def seeded(*parts: object) -> random.Random:
    """A generator that depends on its name only, so that whatever was drawn with it can be drawn again."""
    return random.Random("/".join(map(str, parts)))


def _draw_kinds(rng: random.Random, count: int) -> list[str]:
    kinds: list[str] = []
    while len(kinds) < count:
        kind = rng.choice(KINDS)
        again = rng.randint(1, 3) if rng.random() < 0.25 else 1
        kinds += [kind] * again
        partner = PARTNERS.get(kind)
        if partner and partner not in kinds and rng.random() < TOGETHER:
            kinds.append(partner)
    return kinds[:count]


def _draw_colour(rng: random.Random, kind: str, taken: set[tuple[str, str]]) -> str:
    usual = USUAL_COLOUR.get(kind)
    if usual and (kind, usual) not in taken and rng.random() < USUAL:
        return usual
    return rng.choice([c for c in COLOURS if (kind, c) not in taken])


def _draw_mark(rng: random.Random, kind: str) -> str | None:
    if kind == "sign":
        return rng.choice(WORDS)
    if kind not in CARRIERS or rng.random() < 0.2:
        return None
    return rng.choice(LETTERS if rng.random() < 0.6 else DIGITS)


def _extent(kind: str, size: int) -> tuple[int, int]:
    return size, max(4, round(size * SIGN_HEIGHT)) if kind == "sign" else size


def _apart(box: Corners, others: Sequence[Corners], gap: int) -> bool:
    return all(
        box[2] + gap <= o[0] or o[2] + gap <= box[0] or box[3] + gap <= o[1] or o[3] + gap <= box[1] for o in others
    )


def _place(
    rng: random.Random, kind: str, size: int, frame: tuple[int, int], taken: Sequence[Corners]
) -> Corners | None:
    """A free place for a thing, which shrinks while none is found; None if even its smallest form has no place."""
    for attempt in range(24):
        width, height = _extent(kind, max(6, round(size * 0.93**attempt)))
        if width > frame[0] or height > frame[1]:
            continue
        left, top = rng.randint(0, frame[0] - width), rng.randint(0, frame[1] - height)
        box = (left, top, left + width, top + height)
        if _apart(box, taken, gap=max(frame) // 100):
            return box
    return None


def draw_frame(rng: random.Random) -> tuple[int, int]:
    """Width and height of a picture in pixels; a third are squares."""
    side, aspect = rng.choice(LONG_SIDES), rng.choice(ASPECTS) if rng.random() < 0.8 else 1.0
    return (side, round(side / aspect)) if aspect >= 1 else (round(side * aspect), side)


def draw_scene(rng: random.Random, difficulty: Difficulty | None = None, first: Sequence[float] = ()) -> Scene:
    """A scene of the world; `first` gives the shares of the picture that the first things take."""
    difficulty = difficulty or Difficulty()
    frame = draw_frame(rng)
    kinds = _draw_kinds(rng, max(len(first), rng.randint(1, difficulty.most)))
    low, high = math.log(difficulty.smallest), math.log(difficulty.largest)
    shares = [*first, *(math.exp(rng.uniform(low, high)) for _ in kinds[len(first) :])]
    things: list[Thing] = []
    for kind, share in sorted(zip(kinds, shares, strict=True), key=lambda pair: -pair[1]):
        size = max(6, round(min(share * max(frame), 0.95 * min(frame))))
        box = _place(rng, kind, size, frame, [t.box for t in things])
        if box:
            colour = _draw_colour(rng, kind, {(t.kind, t.colour) for t in things})
            things.append(Thing(kind, colour, _draw_mark(rng, kind), box))
    ordered = tuple(sorted(things, key=lambda thing: -thing.size))
    return Scene(frame[0], frame[1], rng.getrandbits(32), ordered)


def resized(scene: Scene, index: int, share: float) -> Scene:
    """The same scene with one thing shrunk about its centre to a share of the longest side.

    Example:
        >>> scene = draw_scene(random.Random(3), first=[0.5])
        >>> small = resized(scene, 0, 0.1)
        >>> round(small.things[0].size / small.long_side, 1)
        0.1
    """
    thing = scene.things[index]
    width, height = _extent(thing.kind, max(4, min(thing.size, round(share * scene.long_side))))
    left, top = round(thing.centre[0] - width / 2), round(thing.centre[1] - height / 2)
    small = replace(thing, box=(left, top, left + width, top + height))
    return replace(scene, things=(*scene.things[:index], small, *scene.things[index + 1 :]))


def crop_around(scene: Scene, box: Corners, factor: float = 1.6, shift: tuple[float, float] = (0.0, 0.0)) -> Corners:
    """A square of `factor` times the box's longest side around it, moved by shares of its side, inside the picture."""
    side = max(factor * max(box[2] - box[0], box[3] - box[1]), 16)
    width, height = min(round(side), scene.width), min(round(side), scene.height)
    left = round((box[0] + box[2]) / 2 + shift[0] * side - width / 2)
    top = round((box[1] + box[3]) / 2 + shift[1] * side - height / 2)
    left, top = min(max(0, left), scene.width - width), min(max(0, top), scene.height - height)
    return left, top, left + width, top + height
