"""The drawn world: the same seed gives the same picture, things lie apart, what comes together is learnable."""

import random
from typing import Any

import numpy as np

RESOLUTION = 140


def scene_of(seed: int, **options: Any) -> Any:
    from qr_integrations.evaluation.drawn_world.world import draw_scene

    return draw_scene(random.Random(seed), **options)


def view_of(scene: Any, region: Any = None) -> Any:
    from qr_integrations.evaluation.drawn_world.views import View

    return View(scene, region or scene.frame, RESOLUTION)


def test_the_same_seed_gives_the_same_picture_and_another_seed_another() -> None:
    first, again, other = (view_of(scene_of(seed)).pixels() for seed in (1, 1, 2))
    assert (first == again).all()
    assert first.shape != other.shape or (first != other).any()


def test_boxes_lie_in_the_picture_apart_from_each_other_and_names_are_unique() -> None:
    for seed in range(300):
        scene = scene_of(seed)
        taken = np.zeros((scene.height, scene.width), int)
        for thing in scene.things:
            left, top, right, bottom = thing.box
            assert 0 <= left < right <= scene.width and 0 <= top < bottom <= scene.height
            taken[top:bottom, left:right] += 1
        assert scene.things and taken.max() == 1
        assert len({thing.name for thing in scene.things}) == len(scene.things)


def test_partners_come_together_far_more_often_than_others() -> None:
    kinds = [{thing.kind for thing in scene_of(seed).things} for seed in range(1500)]
    with_star = [there for there in kinds if "star" in there and len(there) > 1]
    moon, tent = (sum(kind in there for there in with_star) / len(with_star) for kind in ("moon", "tent"))
    assert moon > 0.6 > 0.4 > tent


def test_sizes_reach_from_most_of_the_picture_to_a_few_pixels() -> None:
    things = [(t.size / s.long_side, t.size) for s in map(scene_of, range(400)) for t in s.things]
    assert max(share for share, _ in things) > 0.6
    assert min(size for _, size in things) < 12


def test_a_crop_makes_a_small_thing_large() -> None:
    from qr_integrations.evaluation.drawn_world.world import crop_around, resized

    scene = resized(scene_of(5, first=[0.6]), 0, 0.08)
    crop = view_of(scene, crop_around(scene, scene.things[0].box))
    assert view_of(scene).size(scene.things[0]) < 12 < 60 < crop.size(scene.things[0])
    assert crop.shows(scene.things[0]) == 1


def test_the_distance_to_the_next_colour_is_larger_than_its_variation() -> None:
    from qr_integrations.evaluation.drawn_world.world import COLOURS

    values = np.array(list(COLOURS.values()), float)
    apart = np.abs(values[:, None] - values[None]).max(-1) + 999 * np.eye(len(values))
    assert apart.min() > 2 * 28
