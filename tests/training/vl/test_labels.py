"""What covers a patch: labels agree with the pixels, and small drawings with what the processor makes of large ones."""

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

RESOLUTION, PATCH = 140, 14


def scene_of(seed: int, **options: Any) -> Any:
    from qr_integrations.evaluation.drawn_world.world import draw_scene

    return draw_scene(random.Random(seed), **options)


def view_of(scene: Any, region: Any = None) -> Any:
    from qr_integrations.evaluation.drawn_world.views import View

    return View(scene, region or scene.frame, RESOLUTION)


def processed(image: Any) -> np.ndarray:
    from training.vl.model import Sizes, build_processor

    return build_processor(Sizes()).image_processor(image, return_tensors="np")["pixel_values"][0]


@pytest.mark.parametrize("cropped", [False, True])
def test_a_small_drawing_is_what_the_processor_makes_of_the_large_one(cropped: bool) -> None:
    from qr_integrations.evaluation.drawn_world.render import render
    from qr_integrations.evaluation.drawn_world.world import crop_around
    from training.vl.views import to_pixel_values

    for seed in range(6):
        scene = scene_of(seed)
        region = crop_around(scene, scene.things[-1].box, 2.0) if cropped else scene.frame
        fast = to_pixel_values([view_of(scene, region).pixels()])[0].numpy()
        slow = processed(render(scene).crop(region))
        assert np.abs(fast - slow).mean() < 0.06, seed
        assert np.quantile(np.abs(fast - slow), 0.9) < 0.12, seed


def test_patch_labels_agree_with_the_pixels() -> None:
    from qr_integrations.evaluation.drawn_world.world import COLOURS, KINDS
    from training.vl.labels import patch_labels

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
    from qr_integrations.evaluation.drawn_world.world import MARKS, resized
    from training.vl.labels import IGNORED, patch_labels

    marked = (s for s in (scene_of(n, first=[0.6]) for n in range(100)) if s.things[0].mark)
    scene = next(marked)
    scene = replace(scene, things=scene.things[:1])
    large, small = (patch_labels(view_of(resized(scene, 0, share)), PATCH) for share in (0.6, 0.03))
    assert 1 + MARKS.index(scene.things[0].mark) in large.mark
    assert set(small.mark) == {IGNORED}
    assert (small.kind > 0).sum() == 1
