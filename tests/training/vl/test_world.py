"""The drawn world: the same seed gives the same picture, labels agree with pixels, small drawings with large ones."""

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

RESOLUTION, PATCH = 140, 14


def scene_of(seed: int, **options: Any) -> Any:
    from training.vl.world import draw_scene

    return draw_scene(random.Random(seed), **options)


def view_of(scene: Any, region: Any = None) -> Any:
    from training.vl.render import View

    return View(scene, region or scene.frame, RESOLUTION)


def processed(image: Any) -> np.ndarray:
    from training.vl.model import Sizes, build_processor

    return build_processor(Sizes()).image_processor(image, return_tensors="np")["pixel_values"][0]


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


@pytest.mark.parametrize("cropped", [False, True])
def test_a_small_drawing_is_what_the_processor_makes_of_the_large_one(cropped: bool) -> None:
    from training.vl.render import render
    from training.vl.views import to_pixel_values
    from training.vl.world import crop_around

    for seed in range(6):
        scene = scene_of(seed)
        region = crop_around(scene, scene.things[-1].box, 2.0) if cropped else scene.frame
        fast = to_pixel_values([view_of(scene, region).pixels()])[0].numpy()
        slow = processed(render(scene).crop(region))
        assert np.abs(fast - slow).mean() < 0.06, seed
        assert np.quantile(np.abs(fast - slow), 0.9) < 0.12, seed


def test_patch_labels_agree_with_the_pixels() -> None:
    from training.vl.render import patch_labels
    from training.vl.world import COLOURS, KINDS

    checked = 0
    for seed in range(80):
        scene = scene_of(seed, first=[0.5])
        view = view_of(scene)
        labels, pixels = patch_labels(view, PATCH), view.pixels().astype(float)
        for thing in scene.things:
            if thing.kind not in ("box", "sign", "ball") or view.size(thing) < 3 * PATCH:
                continue
            left, top, right, bottom = view.place(thing.box)
            x, y = (left + right) / 2, top + 0.1 * (bottom - top)  # above the mark
            assert np.abs(pixels[int(y), int(x)] - COLOURS[thing.colour]).max() < 40
            inside = int((top + bottom) / 2 // PATCH) * (RESOLUTION // PATCH) + int(x // PATCH)
            assert labels.kind[inside] == 1 + KINDS.index(thing.kind)
            assert labels.colour[inside] == list(COLOURS).index(thing.colour)
            checked += 1
        assert labels.centre.sum() <= len(scene.things)
    assert checked > 15


def test_marks_too_small_to_read_have_no_label() -> None:
    from training.vl.render import IGNORED, patch_labels
    from training.vl.world import MARKS, resized

    marked = (s for s in (scene_of(n, first=[0.6]) for n in range(100)) if s.things[0].mark)
    scene = next(marked)
    scene = replace(scene, things=scene.things[:1])
    large, small = (patch_labels(view_of(resized(scene, 0, share)), PATCH) for share in (0.6, 0.03))
    assert 1 + MARKS.index(scene.things[0].mark) in large.mark
    assert set(small.mark) == {IGNORED}
    assert (small.kind > 0).sum() == 1


def test_a_crop_makes_a_small_thing_large() -> None:
    from training.vl.world import crop_around, resized

    scene = resized(scene_of(5, first=[0.6]), 0, 0.08)
    crop = view_of(scene, crop_around(scene, scene.things[0].box))
    assert view_of(scene).size(scene.things[0]) < 12 < 60 < crop.size(scene.things[0])
    assert crop.shows(scene.things[0]) == 1


def test_the_distance_to_the_next_colour_is_larger_than_its_variation() -> None:
    from training.vl.world import COLOURS

    values = np.array(list(COLOURS.values()), float)
    apart = np.abs(values[:, None] - values[None]).max(-1) + 999 * np.eye(len(values))
    assert apart.min() > 2 * 28
