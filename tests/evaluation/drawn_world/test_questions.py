"""Questions about drawn scenes: their answers are true of the scene."""

import random
from typing import Any


def drawn(seed: int) -> tuple[random.Random, Any]:
    from qr_integrations.evaluation.drawn_world.world import draw_scene

    rng = random.Random(seed)
    return rng, draw_scene(rng)


def truth(scene: Any, question: Any) -> str:
    """The answer, worked out from the words of the question."""
    from qr_integrations.evaluation.drawn_world.questions import NUMBERS
    from qr_integrations.evaluation.drawn_world.world import COLOURS, KINDS, PLURALS

    words = question.text.split()
    colours, kinds = [w for w in words if w in COLOURS], [w for w in words if w in KINDS]
    if question.skill == "count":
        kind = next(KINDS[PLURALS.index(w)] for w in words if w in PLURALS)
        return NUMBERS[sum(t.kind == kind for t in scene.things) - 1]
    meant = [t for t in scene.things if (not colours or t.colour in colours) and (not kinds or t.kind in kinds)]
    if question.skill == "presence":
        return "yes" if meant else "no"
    assert len(meant) == 1, question
    (thing,) = meant
    side = "left" if thing.centre[0] < scene.width / 2 else "right"
    by_skill = {"color": thing.colour, "shape": thing.kind, "side": side}
    return by_skill.get(question.skill, thing.mark)


def test_answers_are_true() -> None:
    from qr_integrations.evaluation.drawn_world.questions import SKILLS, ask, ask_caption, named_things

    asked = set()
    for seed in range(300):
        rng, scene = drawn(seed)
        for question in ask(rng, scene, 8):
            assert question.answer == truth(scene, question), question
            asked.add(question.skill)
        caption = ask_caption(rng, scene)
        assert named_things(caption.answer) == [(t.colour, t.kind) for t in scene.things]
    assert asked | {"caption"} == set(SKILLS)


def test_yes_and_no_are_equally_frequent() -> None:
    from qr_integrations.evaluation.drawn_world.questions import ask_presence

    answers = [ask_presence(*drawn(seed)).answer for seed in range(600)]
    assert 0.42 < answers.count("yes") / len(answers) < 0.58
