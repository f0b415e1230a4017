"""Which rectangle of a picture is cut out: the authors' boxes, and what has to hold for any map."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

GOLDEN = Path(__file__).parents[1] / "golden" / "vision"
CASES = json.loads((GOLDEN / "vicrop_box.json").read_text(encoding="utf-8"))["cases"]
MAPS = np.load(GOLDEN / "vicrop_box_maps.npz")
FINITE = [case for case in CASES if np.isfinite(MAPS[case["id"]]).all()]
PUBLISHED = [case for case in FINITE if not case["warnings"]]
EMPTY_WINDOWS = [case for case in FINITE if case["warnings"]]
NOT_FINITE = [case for case in CASES if case not in FINITE]
RATIOS = (1, 1.2, 1.4, 1.6, 1.8, 2)


def of(cases: list[dict[str, Any]]) -> Any:
    assert cases
    return pytest.mark.parametrize("case", cases, ids=lambda case: f"{case['id']}-{case['kind']}")


def search(values: np.ndarray, size: tuple[int, int], base: int) -> Any:
    from qr_integrations.cropping import search_box

    return search_box(values, size, base)


def find(values: np.ndarray, covers: tuple[float, ...], size: tuple[int, int], base: int = 336, **options: Any) -> Any:
    from qr_integrations.cropping import ImportanceMap, find_box

    return find_box(ImportanceMap(values, tuple(map(float, covers)), size, method="test"), base, **options)


def draw(seed: int, lowest: int = 1) -> tuple[np.ndarray, tuple[int, int], int]:
    """A map, a picture and a base, all of any size."""
    random = np.random.default_rng(seed)
    rows, columns = random.integers(lowest, 33, 2)
    width, height = (int(side) for side in random.integers(1, 3000, 2))
    return random.random((rows, columns)), (width, height), int(random.integers(2, 500))


def brute_force(values: np.ndarray, size: tuple[int, int], base: int) -> list[tuple[int, int, float]]:
    """Column, row and score of the best window of every size, by adding up every window."""
    height, width = values.shape
    found = []
    for ratio in RATIOS:
        n, m = window_shape(values.shape, size, base * ratio)
        if (n, m) == (width, height):
            break
        sums = {
            (x, y): float(values[y : y + m, x : x + n].sum())
            for x in range(width - n + 1)
            for y in range(height - m + 1)
        }
        x, y = max(sums, key=lambda place: sums[place])
        neighbours = [sums[at] for at in ((x - 1, y), (x + 1, y), (x, y - 1), (x, y + 1)) if at in sums]
        found.append((x, y, (sums[x, y] - sum(neighbours) / len(neighbours)) / (n * m)))
    return found


def window_shape(shape: tuple[int, ...], size: tuple[int, int], side: float) -> tuple[int, int]:
    n, m = int(side / (size[0] / shape[1])), int(side / (size[1] / shape[0]))
    return max(1, min(n, shape[1])), max(1, min(m, shape[0]))


@of(PUBLISHED)
def test_the_published_box(case: dict[str, Any]) -> None:
    values, size = MAPS[case["id"]], tuple(case["image_size_wh"])
    found = search(values, size, case["bbox_size"])
    assert list(found.box.as_tuple()) == case["box"]
    assert found.whole == case["whole_image_shortcut"]
    if found.whole:
        assert found.box.as_tuple() == (0, 0, *size)
        return
    assert found.ratio == RATIOS[case["ratio_index"]]
    assert list(found.scores.values()) == pytest.approx(
        case["differences"], rel=1e-5, abs=1e-6 * float(np.abs(values).max())
    )


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((300, 1000), (0, 165, 300, 501)),
        ((640, 480), (205, 72, 541, 408)),
        ((337, 336), (1, 0, 337, 336)),
        ((336, 336), None),
        ((200, 200), None),
        ((336, 2000), (0, 665, 336, 1001)),
        ((3000, 100), (2207, 0, 2543, 100)),
    ],
)
def test_a_bright_spot_in_pictures_of_all_shapes(size: tuple[int, int], box: tuple[int, ...] | None) -> None:
    values = np.full((24, 24), 1e-3)
    values[10:12, 18:20] = 1
    found = search(values, size, 336)
    assert found.whole == (box is None)
    assert found.box.as_tuple() == (box or (0, 0, *size))


@pytest.mark.parametrize("seed", range(24))
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("levels", [2, 5, 10**6])
def test_windows_and_scores_are_those_of_adding_up_every_window(seed: int, dtype: type, levels: int) -> None:
    """Where there are few levels many windows hold the same, and rounding decides."""
    values, size, base = draw(seed)
    values = (np.floor(values * levels) * 0.1).astype(dtype)
    expected = brute_force(values, size, base)
    found = search(values, size, base)
    assert list(found.scores.values()) == [score for *_, score in expected]
    assert found.whole == (not expected)
    if expected:
        best = max(range(len(expected)), key=lambda i: expected[i][2])
        assert found.ratio == RATIOS[best]
        left, top = corner(values.shape, size, base * RATIOS[best], *expected[best][:2])
        assert (found.box.left, found.box.top) == (left, top)


def corner(shape: tuple[int, ...], size: tuple[int, int], side: float, x: int, y: int) -> tuple[int, int]:
    """Left and top of a crop around a window."""
    n, m = window_shape(shape, size, side)
    cell_width, cell_height, half = size[0] / shape[1], size[1] / shape[0], int(side // 2)
    centre_x, centre_y = int(x * cell_width + cell_width * n / 2), int(y * cell_height + cell_height * m / 2)
    return (
        max(0, min(max(centre_x, half), size[0] - half) - half),
        max(0, min(max(centre_y, half), size[1] - half) - half),
    )


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e-30, -0.7])
def test_of_equal_windows_the_top_left_one_wins(value: float) -> None:
    found = search(np.full((37, 41), value), (1000, 1000), 336)
    assert found.box.as_tuple() == (0, 0, 336, 336)
    assert found.sharpness == 0 and found.ratio == 1


@pytest.mark.parametrize("seed", range(40))
def test_the_box_lies_in_the_picture_and_has_a_listed_side(seed: int) -> None:
    values, (width, height), base = draw(seed)
    found = search(values, (width, height), base)
    box = found.box
    assert 0 <= box.left < box.right <= width and 0 <= box.top < box.bottom <= height
    assert all(type(edge) is int for edge in box.as_tuple())
    if not found.whole:
        sides = {2 * int(base * ratio // 2) for ratio in RATIOS}
        assert box.width in sides or box.width == width
        assert box.height in sides or box.height == height


@pytest.mark.parametrize("row", [0, 7, 16])
@pytest.mark.parametrize("column", [0, 5, 16])
def test_a_bright_square_of_the_windows_size_is_covered(row: int, column: int) -> None:
    values = np.random.default_rng(row + column).random((24, 24)) * 0.01
    values[row : row + 8, column : column + 8] += 1
    box = search(values, (1000, 1000), 336).box
    cell = 1000 / 24
    across = min(box.right, (column + 8) * cell) - max(box.left, column * cell)
    down = min(box.bottom, (row + 8) * cell) - max(box.top, row * cell)
    assert across * down >= 0.9 * (8 * cell) ** 2


@pytest.mark.parametrize("seed", range(12))
def test_turning_map_and_picture_over_turns_the_box_over(seed: int) -> None:
    values, (width, height), base = draw(seed, lowest=4)
    one, other = search(values, (width, height), base).box, search(values.T, (height, width), base).box
    assert (one.left, one.top, one.right, one.bottom) == (other.top, other.left, other.bottom, other.right)


@pytest.mark.parametrize("factor", [1e-9, 0.3, 7, 1e12])
def test_the_scale_of_a_map_does_not_matter(factor: float) -> None:
    for seed in range(6):
        values, size, base = draw(seed)
        one, other = search(values, size, base), search(values * factor, size, base)
        assert one.box == other.box
        assert other.sharpness == pytest.approx(one.sharpness * factor, rel=1e-6)


@of(EMPTY_WINDOWS)
def test_a_cell_larger_than_the_base_does_not_collapse_the_search(case: dict[str, Any]) -> None:
    """The authors' code returns the top left corner here. What counts is the cell that stands out."""
    values, (width, height) = MAPS[case["id"]], case["image_size_wh"]
    found = search(values, (width, height), case["bbox_size"])
    row, column = np.unravel_index(values.argmax(), values.shape)
    x, y = (column + 0.5) * width / values.shape[1], (row + 0.5) * height / values.shape[0]
    assert found.box.left <= x <= found.box.right and found.box.top <= y <= found.box.bottom
    assert math.isfinite(found.sharpness)


def test_a_picture_of_ten_thousand_pixels_does_not_collapse_the_search() -> None:
    values = np.zeros((24, 24))
    values[12, 20] = 1
    box = search(values, (10_000, 500), 336).box
    assert box.left <= 20.5 * 10_000 / 24 <= box.right


@of(NOT_FINITE)
def test_nan_and_infinity_are_refused(case: dict[str, Any]) -> None:
    from qr_integrations.errors import ScoreError

    with pytest.raises(ScoreError, match="NaN or infinite: load the model"):
        search(MAPS[case["id"]], tuple(case["image_size_wh"]), case["bbox_size"])


@pytest.mark.parametrize("base", [0, 1, -336])
def test_a_base_without_pixels_is_refused(base: int) -> None:
    from qr_integrations.errors import InputError

    with pytest.raises(InputError, match="at least 2"):
        search(np.eye(4), (640, 480), base)


# ---- where the map lies on the picture


@pytest.mark.parametrize("size", [(900, 900), (1500, 500), (500, 1500)])
def test_a_map_of_the_centre_square_is_put_there(size: tuple[int, int]) -> None:
    width, height = size
    side = min(size)
    left, top = (width - side) / 2, (height - side) / 2
    for row in range(0, 24, 5):
        for column in range(0, 24, 5):
            values = np.full((24, 24), 1e-3)
            values[row, column] = 1
            box = find(values, (left, top, left + side, top + side), size, base=120).box
            x, y = left + (column + 0.5) * side / 24, top + (row + 0.5) * side / 24
            assert box.left <= x <= box.right and box.top <= y <= box.bottom
            assert (box.left, box.top) >= (0, 0) and box.right <= width and box.bottom <= height


def test_the_published_geometry_misses_what_the_true_one_finds() -> None:
    values = np.full((24, 24), 1e-3)
    values[12, 0] = 1  # the left edge of the centre square, 500 pixels from the picture's
    covers, size = (500, 0, 1000, 500), (1500, 500)
    true, published = (find(values, covers, size, base=120, geometry=name).box for name in ("true", "published"))
    assert true.left <= 510 <= true.right
    assert published.right < 500
    assert published == search(values, size, 120).box


def test_a_box_may_reach_beyond_what_the_map_covers() -> None:
    values = np.full((24, 24), 1e-3)
    values[12, 0] = 1
    box = find(values, (500, 0, 1000, 500), (1500, 500), base=200).box
    assert box.left < 500 and box.width == 2 * (box.width // 2) >= 200


def test_cells_in_the_padding_do_not_win() -> None:
    values = np.full((24, 24), 1e-3)
    values[0, 3] = 5  # above the picture, which is padded to a square
    values[12, 20] = 1
    box = find(values, (0, -400, 1200, 800), (1200, 400), base=120).box
    assert box.left <= 20.5 * 50 <= box.right and 0 <= box.top < box.bottom <= 400


def test_a_map_of_the_whole_picture_needs_no_geometry() -> None:
    for seed in range(10):
        values, size, base = draw(seed)
        assert find(values, (0, 0, *size), size, base) == search(values, size, base)


def test_no_crop_where_the_smallest_window_holds_all_that_the_model_saw() -> None:
    found = find(np.eye(24), (850, 0, 1150, 300), (2000, 300))
    assert found.whole and found.box.as_tuple() == (0, 0, 2000, 300) and not found.scores
