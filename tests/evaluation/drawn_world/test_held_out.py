"""Held-out scenes: the same questions at every size, and what is counted in a caption."""

import hashlib
import json


def test_an_invented_partner_is_counted() -> None:
    from qr_integrations.evaluation.drawn_world.held_out import caption_counts
    from qr_integrations.evaluation.drawn_world.world import Thing

    ball, star = (Thing(kind, "red", None, (0, 0, 9, 9)) for kind in ("ball", "star"))
    counts = caption_counts("a picture of a red ball , a blue box and a white heart", [ball, star])
    assert counts == {"named": 3, "invented": 2, "expected": 1, "there": 2, "found": 1}


def test_held_out_scenes_ask_the_same_at_every_size() -> None:
    from qr_integrations.evaluation.drawn_world.held_out import SHARES, held_out_scene, questions_about_first
    from qr_integrations.evaluation.drawn_world.world import resized

    for number in range(8):
        scene = held_out_scene(number)
        assert questions_about_first(number, scene) == questions_about_first(number, scene)
        for share in SHARES:
            small = resized(scene, 0, share)
            assert small.things[1:] == scene.things[1:]
            assert small.things[0].name == scene.things[0].name
            assert small.things[0].size <= max(4, share * scene.long_side + 1)


def test_the_held_out_scenes_and_questions_are_those_that_were_reported() -> None:
    from qr_integrations.evaluation.drawn_world.held_out import caption_scene, held_out_scene, questions_about_first

    drawn = [(held_out_scene(n), questions_about_first(n, held_out_scene(n)), caption_scene(n)) for n in range(20)]
    things = [[(s.width, s.height, s.ground, [vars(t) for t in s.things]) for s in (a, b)] for a, _, b in drawn]
    asked = [(q.text, q.answer, q.skill, q.about) for _, questions, _ in drawn for q in questions]
    digest = hashlib.sha256(json.dumps([things, asked]).encode()).hexdigest()
    assert digest[:16] == "c0468753959abe66"
