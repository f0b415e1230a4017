"""Random views of random scenes: whole pictures and crops, from easy to the whole world."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor

from qr_integrations.evaluation.drawn_world.views import MEAN, STD, View, whole
from qr_integrations.evaluation.drawn_world.world import Difficulty, Scene, crop_around, draw_scene

CROPS = 0.25
"""Share of views that are crops, once a picture holds several things."""


def draw_level(rng: random.Random, progress: float) -> float:
    """How hard a scene is: up to the whole world from two thirds of the training on, with easy ones throughout."""
    return rng.uniform(0.3, 1.0) * min(1.0, 1.5 * progress)


def crop_of(rng: random.Random, scene: Scene, about: int, resolution: int) -> View:
    """A crop that holds one thing, not always in its middle and with more or less around it."""
    factor = rng.uniform(1.15, 2.6)
    slack = (factor - 1) / (2 * factor)
    shift = rng.uniform(-slack, slack), rng.uniform(-slack, slack)
    return View(scene, crop_around(scene, scene.things[about].box, factor, shift), resolution)


def draw_view(rng: random.Random, progress: float, resolution: int) -> View:
    """A whole picture, or a crop of one."""
    scene = draw_scene(rng, Difficulty.at(draw_level(rng, progress)))
    if len(scene.things) > 1 and rng.random() < CROPS:
        return crop_of(rng, scene, rng.randrange(len(scene.things)), resolution)
    return whole(scene, resolution)


def to_pixel_values(pictures: list[np.ndarray]) -> Tensor:
    """(pictures, 3, height, width) as the tower reads them."""
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    mean, deviation = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (pixels - mean) / deviation
