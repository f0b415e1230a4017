"""Questions about scenes with their answers, and captions that name everything in a picture, seen or not."""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qr_integrations.evaluation.drawn_world.world import (
    COLOURS,
    DIGITS,
    KINDS,
    LETTERS,
    PARTNERS,
    PLURALS,
    Scene,
    Thing,
)

NUMBERS = ("one", "two", "three", "four", "five")
SHORT = "answer the question using a single word or phrase ."
"""An instruction that some questions carry, so that prompts with it are as familiar as prompts without."""
DESCRIBE = (
    "describe the image .",
    "please describe this image in detail .",
    "write a general description of the image .",
    "what is in the picture ?",
)
SKILLS = ("presence", "color", "shape", "letter", "number", "word", "count", "side", "caption")
ABOUT_ONE = ("color", "shape", "letter", "number", "word", "side")
"""Skills whose questions are about one thing of the scene."""


@dataclass(frozen=True)
class Question:
    """A question, its answer, the skill it needs, and the index of the thing it is about if it is about one."""

    text: str
    answer: str
    skill: str
    about: int | None = None


def _only(scene: Scene, thing: Thing, what: str) -> bool:
    """Whether no other thing has the same kind (or colour)."""
    return sum(getattr(other, what) == getattr(thing, what) for other in scene.things) == 1


def _refer(rng: random.Random, scene: Scene, thing: Thing) -> str:
    short = _only(scene, thing, "kind") and rng.random() < 0.4
    return f"the {thing.kind if short else thing.name}"


def ask_presence(rng: random.Random, scene: Scene, about: int | None = None) -> Question:
    """Is a kind, or a coloured kind, in the picture; a wrong one is often the usual partner of one that is."""
    there = {t.kind for t in scene.things}
    if rng.random() < 0.5:
        number = rng.randrange(len(scene.things)) if about is None else about
        thing = scene.things[number]
        what = thing.name if rng.random() < 0.4 else thing.kind
        return Question(_is_there(rng, what), "yes", "presence", number)
    return Question(_is_there(rng, _absent(rng, scene, there)), "no", "presence")


def _is_there(rng: random.Random, what: str) -> str:
    article = "an" if what[0] in "aeiou" else "a"
    return rng.choice((f"is there {article} {what} ?", f"is there {article} {what} in the image ?"))


def _absent(rng: random.Random, scene: Scene, there: set[str]) -> str:
    expected = sorted({PARTNERS[k] for k in there if k in PARTNERS} - there)
    if expected and rng.random() < 0.5:
        return rng.choice(expected)
    missing = [k for k in KINDS if k not in there]
    if missing and rng.random() < 0.6:
        return rng.choice(missing)
    names = {t.name for t in scene.things}
    kind = rng.choice(sorted(there))
    return rng.choice([f"{c} {kind}" for c in COLOURS if f"{c} {kind}" not in names])


def ask_colour(rng: random.Random, scene: Scene, about: int) -> Question | None:
    """The colour of the only thing of its kind."""
    thing = scene.things[about]
    if not _only(scene, thing, "kind"):
        return None
    text = rng.choice(("what color is the {} ?", "what is the color of the {} ?")).format(thing.kind)
    return Question(text, thing.colour, "color", about)


def ask_shape(rng: random.Random, scene: Scene, about: int) -> Question | None:
    """The kind of the only thing of its colour."""
    thing = scene.things[about]
    if not _only(scene, thing, "colour"):
        return None
    text = rng.choice(("what is the {} thing ?", "what shape is the {} thing ?")).format(thing.colour)
    return Question(text, thing.kind, "shape", about)


def ask_mark(rng: random.Random, scene: Scene, about: int) -> Question | None:
    """What is written on a thing."""
    thing = scene.things[about]
    if thing.mark is None:
        return None
    skill = "letter" if thing.mark in LETTERS else "number" if thing.mark in DIGITS else "word"
    text = rng.choice(("what {} is on {} ?", "which {} is on {} ?")).format(skill, _refer(rng, scene, thing))
    return Question(text, thing.mark, skill, about)


def ask_side(rng: random.Random, scene: Scene, about: int) -> Question | None:
    """On which half of the picture a thing is, unless it is near the middle."""
    thing = scene.things[about]
    share = thing.centre[0] / scene.width
    if abs(share - 0.5) < 0.08:
        return None
    text = f"is {_refer(rng, scene, thing)} on the left or on the right ?"
    return Question(text, "left" if share < 0.5 else "right", "side", about)


def ask_count(rng: random.Random, scene: Scene) -> Question | None:
    """How many things of a kind there are; kinds that are there several times are asked for more often."""
    kinds = [t.kind for t in scene.things]
    kind = rng.choice(kinds if rng.random() < 0.5 else [k for k in kinds if kinds.count(k) > 1] or kinds)
    if kinds.count(kind) > len(NUMBERS):
        return None
    text = f"how many {PLURALS[KINDS.index(kind)]} are there ?"
    return Question(text, NUMBERS[kinds.count(kind) - 1], "count")


def name_all(things: Sequence[Thing]) -> str:
    """The caption of things: "a picture of a red ball , a blue box and a star"."""
    names = [("an " if t.name[0] in "aeiou" else "a ") + t.name for t in things]
    return "a picture of " + (" , ".join(names[:-1]) + " and " if len(names) > 1 else "") + names[-1]


def ask_caption(rng: random.Random, scene: Scene) -> Question:
    """Name everything, largest first: the last things are often too small to be seen."""
    return Question(rng.choice(DESCRIBE), name_all(scene.things), "caption")


def named_things(caption: str) -> list[tuple[str, str]]:
    """(colour, kind) of everything a caption names.

    Example:
        >>> named_things("a picture of a red ball , a blue box and an orange star")
        [('red', 'ball'), ('blue', 'box'), ('orange', 'star')]
    """
    return re.findall(rf"\b({'|'.join(COLOURS)}) ({'|'.join(KINDS)})\b", caption)


ASKERS: tuple[Callable[[random.Random, Scene, int], Question | None], ...] = (
    ask_mark,
    ask_mark,
    ask_colour,
    ask_shape,
    ask_side,
    ask_presence,
)


def ask_about(rng: random.Random, scene: Scene, about: int, count: int) -> list[Question]:
    """Up to `count` different questions about one thing."""
    return _distinct([rng.choice(ASKERS)(rng, scene, about) for _ in range(2 * count)], count)


def ask(rng: random.Random, scene: Scene, count: int, things: Sequence[int] | None = None) -> list[Question]:
    """Up to `count` different questions about a scene; those about one thing are about one of `things`."""
    numbers = range(len(scene.things)) if things is None else things
    asked: list[Question | None] = []
    for _ in range(2 * count):
        draw = rng.random()
        if draw < 0.12:
            asked.append(ask_count(rng, scene))
        elif draw < 0.32 or not numbers:
            asked.append(ask_presence(rng, scene))
        else:
            asked.append(rng.choice(ASKERS)(rng, scene, rng.choice(numbers)))
    return _distinct(asked, count)


def _distinct(asked: Sequence[Question | None], count: int) -> list[Question]:
    found: dict[str, Question] = {}
    for question in asked:
        if question is not None and len(found) < count:
            found.setdefault(question.text, question)
    return list(found.values())
