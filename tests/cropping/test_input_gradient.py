"""pure-grad: pixels that move the answer, at edges, per cell."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qr_integrations.backend import Backend
from qr_integrations.backend.picture_reading import find_pictures
from qr_integrations.cropping.asking import GENERIC
from qr_integrations.cropping.high_pass import high_pass_mask
from qr_integrations.cropping.input_gradient import InputGradient, in_cells
from qr_integrations.errors import InputError
from qr_integrations.evaluation.drawn_world import held_out_scene, render, resized
from qr_integrations.types import Grid, Message
from tests.backend.found_pictures import TALL, WIDE, noise
from tests.backend.seeing import OTHER, QUESTION, backend, pictures, seen


def cells_of(mask: np.ndarray, rows: int, columns: int) -> np.ndarray:
    height, width = mask.shape
    return mask.reshape(rows, height // rows, columns, width // columns).mean((1, 3))


def test_the_mean_of_each_cell() -> None:
    pixels = torch.arange(24.0).view(4, 6)
    assert in_cells(pixels, Grid(2, 3)).tolist() == [[3.5, 5.5, 7.5], [15.5, 17.5, 19.5]]


@pytest.mark.parametrize("name", ["llava", "gemma3", "paligemma", "mistral3"])
def test_against_itself_the_generic_question_leaves_the_edges(name: str) -> None:
    opened, (picture,) = backend(name), [noise((112, 112), 3)]
    found = InputGradient(opened).importance(picture, GENERIC)
    side = opened.lay_out([Message.user(picture, GENERIC)]).inputs["pixel_values"].shape[-1]
    edges = high_pass_mask(picture, (side, side))
    np.testing.assert_allclose(found.values, cells_of(edges, *found.values.shape), rtol=1e-4)
    assert found.method == "input_gradient"


def test_even_areas_hold_nothing() -> None:
    picture = Image.new("RGB", (112, 112), (90, 90, 90))
    picture.paste(noise((56, 112), 1), (56, 0))
    values = InputGradient(backend("llava")).importance(picture, QUESTION).values
    assert not values[:, 0].any() and values[:, 2:].all()


def test_the_question_is_compared_with_the_generic_one() -> None:
    opened, (picture,) = backend("llava"), pictures(1)
    one = InputGradient(opened).importance(picture, QUESTION)
    assert one.is_informative and one.values.min() >= 0
    for other in (InputGradient(opened, generic=OTHER), InputGradient(opened, instruction="left")):
        assert np.abs(one.values - other.importance(picture, QUESTION).values).max() > 0.01


def test_edges_are_looked_for_in_what_the_model_sees() -> None:
    """LLaVA's processor cuts out the centre: as published, the edges are those of the whole, squashed."""
    opened = backend("llava")
    picture = Image.new("RGB", (336, 112), (90, 90, 90))
    picture.paste(noise((56, 112), 1), (140, 0))  # half of the centre square, and a sixth of the picture
    true = InputGradient(opened).importance(picture, GENERIC)
    published = InputGradient(opened, geometry="published").importance(picture, GENERIC)
    assert true.covers == published.covers == (112.0, 0.0, 224.0, 112.0)
    seen_part = picture.crop((112, 0, 224, 112))
    np.testing.assert_allclose(true.values, cells_of(high_pass_mask(seen_part, (56, 56)), 4, 4), rtol=1e-4)
    np.testing.assert_allclose(published.values, cells_of(high_pass_mask(picture, (56, 56)), 4, 4), rtol=1e-4)
    assert not np.array_equal(true.values, published.values)


@pytest.mark.parametrize("name", ["llava", "mistral3", "pixtral", "instructblip"])
def test_each_picture_has_a_map_of_its_own(name: str) -> None:
    opened = backend(name)
    found = InputGradient(opened).of_conversation(seen(2)).maps
    assert [one.image_size for one in found] == [WIDE, TALL]
    where = find_pictures(opened, opened.lay_out(seen(2)))
    if name != "instructblip":
        assert [one.values.shape for one in found] == [(one.grid.rows, one.grid.columns) for one in where]
    assert all(one.is_informative for one in found)


@pytest.mark.parametrize("name", ["mistral3", "pixtral"])
def test_what_pads_a_picture_is_not_in_its_map(name: str) -> None:
    """Beside a wide picture the processor pads a tall one at the right."""
    opened, tall = backend(name), noise(TALL, 1)
    alone, beside = (
        InputGradient(opened).of_conversation([Message.user(*shown, GENERIC)]).maps[-1]
        for shown in ([tall], [noise(WIDE, 0), tall])
    )
    np.testing.assert_allclose(beside.values, alone.values, rtol=1e-4)  # against itself: the edges of the tall one


def test_tiles_are_refused() -> None:
    with pytest.raises(InputError, match="relative or gradient"):
        InputGradient(backend("qwen2_vl")).importance(pictures(1)[0], QUESTION)


def test_half_precision_finds_the_same_places(qr_mini_vl: Any) -> None:
    """The gradients of a confident answer are smaller than the smallest half-precision number."""
    half = Backend(
        copy.deepcopy(qr_mini_vl.model).to(torch.float16), qr_mini_vl.tokenizer, processor=qr_mini_vl.processor
    )
    picture = render(resized(held_out_scene(3), 0, 0.1))
    maps = [
        InputGradient(backend).importance(picture, "What is on the ball?").values.ravel()
        for backend in (qr_mini_vl, half)
    ]
    assert np.corrcoef(maps)[0, 1] > 0.98
