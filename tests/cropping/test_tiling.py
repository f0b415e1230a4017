"""Large pictures in tiles: the authors' cuts, and a rule that works for every picture."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

GOLDEN = Path(__file__).parents[1] / "golden" / "vision"
CASES = json.loads((GOLDEN / "vicrop_split.json").read_text(encoding="utf-8"))["cases"]
SIZES = [
    (1, 1),
    (640, 480),
    (1024, 1024),
    (1025, 1024),
    (1400, 1000),
    (400, 1500),
    (700, 3000),
    (5000, 1024),
    (3001, 9),
]


def tile(size: tuple[int, int], **options: Any) -> Any:
    from qr_integrations.cropping import tile_picture

    return tile_picture(size, **options)


def maps_of(tiling: Any, values: Any = None, shape: tuple[int, int] = (2, 3)) -> list[Any]:
    """A map per tile; without values, tile t holds 100 t + (0, 1, 2, ...)."""
    from qr_integrations.cropping import ImportanceMap

    maps = []
    for number, box in enumerate(tiling.boxes):
        counted = 100.0 * number + np.arange(shape[0] * shape[1], dtype=float).reshape(shape)
        of_tile = counted if values is None else values[number]
        maps.append(
            ImportanceMap(of_tile, (0.0, 0.0, float(box.width), float(box.height)), (box.width, box.height), "t")
        )
    return maps


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_the_published_cuts(case: dict[str, Any]) -> None:
    from qr_integrations.cropping import merge_maps
    from qr_integrations.errors import InputError

    size, limit = tuple(case["image_size_wh"]), case["res_threshold"]
    if "exception" in case:
        with pytest.raises(InputError, match="too narrow: leave out published"):
            tile(size, limit=limit, published=True)
        return
    tiling = tile(size, limit=limit, published=True)
    assert (tiling.grid.rows, tiling.grid.columns) == (case["vertical_split"], case["horizontal_split"])
    assert [list(box.as_tuple()) for box in tiling.boxes] == case["boxes"]
    if "merged" in case:
        merged = merge_maps(tiling, maps_of(tiling), geometry="published")
        assert merged.values.tolist() == case["merged"] and merged.image_size == size


@pytest.mark.parametrize("size", [*SIZES, *[(height, width) for width, height in SIZES]])
def test_tiles_cover_every_pixel_once(size: tuple[int, int]) -> None:
    tiling = tile(size)
    hits = np.zeros((size[1], size[0]), dtype=int)
    for box in tiling.boxes:
        assert box.left >= 0 and box.right <= size[0] and box.top >= 0 and box.bottom <= size[1]
        assert box.width <= 1024 and box.height <= 1024
        hits[box.top : box.bottom, box.left : box.right] += 1
    assert (hits == 1).all()
    assert len(tiling.boxes) == tiling.grid.rows * tiling.grid.columns
    assert np.ptp([box.width for box in tiling.boxes]) <= 1 and np.ptp([box.height for box in tiling.boxes]) <= 1


@pytest.mark.parametrize("size", [(400, 1500), (1920, 1080), (3000, 1000), (1000, 1900), (4000, 3000)])
def test_tiles_are_about_square(size: tuple[int, int]) -> None:
    box = tile(size).boxes[0]
    assert 2 / 3 <= box.width / box.height <= 3 / 2


@pytest.mark.parametrize(
    ("size", "count"), [((16_000, 1), 16), ((1, 900), 16), ((800, 50), 16), ((750, 50), 15), ((20_000, 40), 20)]
)
def test_narrow_pictures_are_cut_into_few_tiles(size: tuple[int, int], count: int) -> None:
    """More than 16 along a side only where tiles would be larger than the limit."""
    assert len(tile(size).boxes) == count


def test_turning_the_picture_turns_the_tiles() -> None:
    for width, height in SIZES:
        one, other = tile((width, height)).grid, tile((height, width)).grid
        assert (one.rows, one.columns) == (other.columns, other.rows)


@pytest.mark.parametrize(("size", "limit"), [((0, 5), 10), ((5, 0), 10), ((5, 5), 0)])
def test_nothing_to_cut(size: tuple[int, int], limit: int) -> None:
    from qr_integrations.errors import InputError

    with pytest.raises(InputError, match="at least 1"):
        tile(size, limit=limit)


def test_one_tile_is_the_plain_map() -> None:
    from qr_integrations.cropping import find_box, merge_maps

    tiling = tile((800, 700))
    (plain,) = maps_of(tiling, [np.random.default_rng(0).random((24, 24))])
    merged = merge_maps(tiling, [plain])
    assert merged.covers == plain.covers and (merged.values == plain.values).all()
    assert find_box(merged, 200) == find_box(plain, 200)


@pytest.mark.parametrize("size", [(2000, 1000), (400, 1500), (2500, 2500)])
def test_a_marker_in_a_tile_is_found_there(size: tuple[int, int]) -> None:
    from qr_integrations.cropping import find_box, merge_maps

    tiling = tile(size)
    for marked, box in enumerate(tiling.boxes):
        values = [np.full((24, 24), 1e-3) for _ in tiling.boxes]
        values[marked][20, 4] = 1
        found = find_box(merge_maps(tiling, maps_of(tiling, values)), 100).box
        x, y = box.left + 4.5 * box.width / 24, box.top + 20.5 * box.height / 24
        assert found.left <= x <= found.right and found.top <= y <= found.bottom


def test_maps_of_centre_squares_lie_where_they_were_seen() -> None:
    """Each tile is 600 x 400, the model sees its middle 400 x 400 in 4 x 4 cells of 100 pixels."""
    from qr_integrations.cropping import ImportanceMap, Tiling, merge_maps
    from qr_integrations.types import Box, Grid

    tiling = Tiling((Box(0, 0, 600, 400), Box(600, 0, 1200, 400)), Grid(1, 2), (1200, 400))
    values = np.arange(16.0).reshape(4, 4)
    maps = [ImportanceMap(values + 100 * i, (100.0, 0.0, 500.0, 400.0), (600, 400), "t") for i in range(2)]
    merged = merge_maps(tiling, maps)
    # Cells of 150 x 100 pixels, their centres at 75, 225, 375, 525: left of the square, in its second and third cell.
    assert merged.values[0].tolist() == [0, 1, 2, 3, 100, 101, 102, 103]
    maps = [ImportanceMap(values, (250.0, 0.0, 350.0, 400.0), (600, 400), "t") for _ in range(2)]
    assert merge_maps(tiling, maps).values[1].tolist() == [4, 4, 7, 7, 4, 4, 7, 7]
    assert merge_maps(tiling, maps, geometry="published").values[1].tolist() == [4, 5, 6, 7, 4, 5, 6, 7]


def test_maps_that_do_not_fit_the_tiles() -> None:
    from qr_integrations.cropping import merge_maps
    from qr_integrations.errors import InputError

    tiling = tile((2001, 1000))
    maps = maps_of(tiling)
    with pytest.raises(InputError, match="1 maps for 2 tiles: pass one map per tile"):
        merge_maps(tiling, maps[:1])
    with pytest.raises(InputError, match="1001 x 1000 pixels for a tile of 1000 x 1000: pass the maps in the order"):
        merge_maps(tiling, maps[::-1])
    with pytest.raises(InputError, match="different grids"):
        merge_maps(tiling, [maps[0], maps_of(tiling, shape=(3, 3))[1]])
