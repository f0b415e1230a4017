"""Importance maps: what they refuse, what they cover, and how they are shown."""

import math
from typing import Any

import numpy as np
import pytest
from PIL import Image


def importance(values: Any, covers: tuple[float, ...] = (0, 0, 40, 20), size: tuple[int, int] = (40, 20)) -> Any:
    from qr_integrations.cropping import ImportanceMap

    return ImportanceMap(np.asarray(values, dtype=np.float32), tuple(map(float, covers)), size, method="test")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_a_number_is_refused(value: float) -> None:
    from qr_integrations.errors import ScoreError

    with pytest.raises(ScoreError, match=r"1 of 4 cells of the map 'test' .*: load the model with dtype"):
        importance([[1, 2], [value, 3]])


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_a_map_without_cells_is_refused(shape: tuple[int, int]) -> None:
    from qr_integrations.errors import InputError

    with pytest.raises(InputError, match="at least 1 x 1"):
        importance(np.zeros(shape))


@pytest.mark.usefixtures("unchecked")
def test_a_row_of_numbers_is_no_map() -> None:
    from qr_integrations.errors import InputError

    with pytest.raises(InputError, match="pass rows x columns"):
        importance([1.0, 2.0])


@pytest.mark.parametrize(
    "covers", [(0, 0, 0, 20), (40, 0, 80, 20), (0, -20, 40, 0), (9, 0, 3, 20), (0, 0, math.nan, 2)]
)
def test_a_map_of_nothing_is_refused(covers: tuple[float, ...]) -> None:
    from qr_integrations.errors import InputError

    with pytest.raises(InputError, match="is no part of a picture of 40 x 20 pixels: pass left"):
        importance([[1, 2]], covers)


@pytest.mark.parametrize(
    ("values", "says_something"),
    [
        ([[1, 1], [1, 1]], False),
        ([[1, 1 + 2e-6], [1 - 1e-6, 1]], False),
        ([[0, 0], [0, 0]], False),
        ([[3]], False),
        ([[1, 1.01], [1, 1]], True),
        ([[0, 1e-12], [0, 0]], True),
        ([[-1, -2], [-1, -1]], True),
    ],
)
def test_equal_values_say_nothing(values: Any, says_something: bool) -> None:
    assert importance(values).is_informative is says_something


def test_cells_outside_the_picture_are_dropped() -> None:
    values = np.arange(24.0).reshape(4, 6)
    kept = importance(values, (-10, -25, 50, 15)).within_picture()  # cells of 10 x 10
    assert kept.values.tolist() == values[2:, 1:5].tolist()
    assert kept.covers == (0, -5, 40, 15)
    assert kept.cell_size == (10, 10)


def test_a_map_inside_the_picture_stays_whole() -> None:
    inside = importance(np.eye(3), (0.3, 0, 33.4, 20))
    assert inside.within_picture() is inside
    assert inside.cell_size == pytest.approx((33.1 / 3, 20 / 3))


def test_cell_borders_that_meet_the_pictures_up_to_rounding() -> None:
    third = 40 / 3
    kept = importance(np.eye(5), (-third, 0, 40 + third * (1 + 1e-12), 20)).within_picture()
    assert kept.values.shape == (5, 3)


def test_every_pixel_has_its_importance() -> None:
    pixels = importance([[0, 1, 2, 3], [10, 11, 12, 13]]).on_picture()
    assert pixels.shape == (20, 40) and pixels.dtype == np.float32
    assert pixels[0, 0] == 0 and pixels[-1, -1] == 13  # beyond the centres of the outer cells nothing changes
    assert pixels[:5, 14:16].mean() == pytest.approx(1)  # the centre of a cell
    assert pixels[9:11, 19:21].mean() == pytest.approx(6.5)  # half way between four cells
    assert (np.diff(pixels, axis=1) >= 0).all() and (np.diff(pixels, axis=0) >= 0).all()


def test_pixels_that_the_model_did_not_see_have_none() -> None:
    pixels = importance([[1, 2], [3, 4]], (10, 0, 30, 20)).on_picture()
    assert np.isnan(pixels[:, :10]).all() and np.isnan(pixels[:, 30:]).all()
    assert np.isfinite(pixels[:, 10:30]).all()
    half = importance([[1, 2], [3, 4]], (10, 0, 30, 20)).on_picture((20, 10))
    assert np.isfinite(half[:, 5:15]).all() and np.isnan(half).sum() == 100


def test_a_heat_map_is_tinted_where_it_matters() -> None:
    picture = Image.new("L", (40, 20), 128)
    values = np.zeros((4, 8))
    values[1, 6] = 1  # pixels 30 to 35, 5 to 10
    shown = np.asarray(importance(values).heat_map(picture), dtype=int)
    assert shown.shape == (20, 40, 3)
    redness = shown[..., 0] - shown[..., 2]
    y, x = np.unravel_index(redness.argmax(), redness.shape)
    assert 30 <= x < 35 and 5 <= y < 10
    assert (shown[:, :20] == 128).all()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "1"])
def test_a_map_that_says_nothing_tints_nothing(mode: str) -> None:
    picture = Image.new(mode, (40, 20), 1)
    shown = importance(np.ones((2, 2)), (10, 0, 30, 20)).heat_map(picture)
    assert shown.mode == "RGB" and shown.tobytes() == picture.convert("RGB").tobytes()


def test_a_box_is_drawn_on_a_copy_of_any_size() -> None:
    from qr_integrations.types import Box

    picture = Image.new("RGB", (400, 200))
    shown = np.asarray(importance(np.ones((2, 2))).heat_map(picture, Box(4, 5, 20, 15)))
    y, x = np.nonzero(shown.any(axis=-1))
    assert (x.min(), y.min(), x.max(), y.max()) == (40, 50, 199, 149)
    assert not shown[60:140, 50:190].any() and np.asarray(picture).max() == 0


def test_the_mean_of_several_layers() -> None:
    from dataclasses import replace

    from qr_integrations.cropping import ImportanceMap

    one, other = importance([[1, 2]]), replace(importance([[3, 6]]), method="other")
    mean = ImportanceMap.average([one, one, other])
    assert mean.values.tolist() == [[pytest.approx(5 / 3), pytest.approx(10 / 3)]]
    assert (mean.covers, mean.image_size, mean.method) == (one.covers, one.image_size, "test + other")


def test_maps_of_different_things_have_no_mean() -> None:
    from qr_integrations.cropping import ImportanceMap
    from qr_integrations.errors import InputError

    one = importance([[1, 2]])
    for other in (importance([[1], [2]]), importance([[1, 2]], (0, 0, 20, 20)), importance([[1, 2]], size=(50, 20))):
        with pytest.raises(InputError, match="average maps of one picture"):
            ImportanceMap.average([one, other])
    with pytest.raises(InputError, match="pass at least one"):
        ImportanceMap.average([])
