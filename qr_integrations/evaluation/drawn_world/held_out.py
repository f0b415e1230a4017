"""Scenes that the training of the bundled model never draws, and what is asked about them and counted in captions."""

from collections.abc import Sequence
from dataclasses import replace

from qr_integrations.evaluation.drawn_world.questions import ASKERS, Question, ask_count, ask_presence, named_things
from qr_integrations.evaluation.drawn_world.world import (
    CARRIERS,
    LARGEST,
    PARTNERS,
    Difficulty,
    Scene,
    Thing,
    draw_scene,
    seeded,
)

SHARES = (0.6, 0.4, 0.2, 0.1, 0.05, 0.03)
"""Longest side of the thing that is asked about, as a share of the picture's longest side."""
HELD_OUT = "held out"


def held_out_scene(number: int) -> Scene:
    """A scene that training never draws; its first thing is large, and carries a mark in three of four scenes."""
    rng = seeded(HELD_OUT, number)
    wanted = (*CARRIERS, "sign") if number % 4 else None
    while True:
        scene = draw_scene(rng, Difficulty(most=5, largest=0.3), first=[LARGEST])
        first = scene.things[0]
        if wanted is None or (first.kind in wanted and first.mark):
            return scene


def questions_about_first(number: int, scene: Scene) -> list[Question]:
    """All skills that a scene's first thing allows, the same whatever its size; presence with yes and no."""
    rng = seeded(HELD_OUT, "questions", number)
    asked = [asker(rng, scene, 0) for asker in ASKERS[1:]] + [ask_presence(rng, scene, 0) for _ in range(3)]
    asked.append(ask_count(rng, scene))
    return list({q.text: q for q in asked if q is not None}.values())


def without_partner(scene: Scene) -> Scene:
    """The scene without the partner of its largest thing: a picture that invites to invent it."""
    partner = PARTNERS.get(scene.things[0].kind)
    kept = tuple(thing for thing in scene.things if thing.kind != partner)
    return replace(scene, things=kept)


def caption_scene(number: int) -> Scene:
    """A scene that training never draws, without the partner of its largest thing."""
    return without_partner(draw_scene(seeded(HELD_OUT, "caption", number)))


def caption_counts(caption: str, things: Sequence[Thing]) -> dict[str, int]:
    """How many kinds a caption names, how many of them are not there, and how many of those are usual partners.

    Example:
        >>> ball = Thing("ball", "red", None, (0, 0, 50, 50))
        >>> caption_counts("a picture of a red ball and a blue box", [ball])
        {'named': 2, 'invented': 1, 'expected': 1, 'there': 1, 'found': 1}
    """
    named = {kind for _, kind in named_things(caption)}
    there = {thing.kind for thing in things}
    invented = named - there
    expected = {kind for kind in invented if PARTNERS.get(kind) in there}
    counts = (len(named), len(invented), len(expected), len(there), len(named & there))
    return dict(zip(("named", "invented", "expected", "there", "found"), counts, strict=True))
