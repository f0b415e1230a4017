"""The pixels that a cell is said to cover are those that its token is made of.

Which cell shows a marker is asked of the processor's output and of the tower's features, never of our own formula.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel

from qr_integrations.backend.picture_families import picture_family
from qr_integrations.backend.picture_geometry import PictureTokens, processed_area
from qr_integrations.errors import UnsupportedModelError
from qr_integrations.types import Grid
from tests.backend.found_pictures import WIDE, features, find, image_token
from tests.backend.tiny_vlms import FAMILIES, image_processor, prompt, tiny

CELL = dict.fromkeys(FAMILIES, 28) | dict.fromkeys(
    ("llava", "pixtral", "llava_next", "llava_onevision", "paligemma"), 14
)
CELL |= {"qwen3_vl": 32}  # pixels of the tower's input
WITH_PLACES = [name for name in FAMILIES if name not in ("instructblip", "mqt_llava")]
SHAPES = {"1:1": (120, 120), "3:1": (360, 120), "1:3": (120, 360)}
MARKER = (0.635, 0.37)  # its centre, as shares of width and height: in the centre square, and not between two cells


def blind_to_neighbours(model: PreTrainedModel) -> PreTrainedModel:
    """Let each patch of the tower see itself only: what attention adds is nothing."""
    for name, module in model.named_modules():
        path, _, last = name.rpartition(".")
        leaves_attention = last in ("out_proj", "o_proj", "proj", "projection_layer") and isinstance(module, nn.Linear)
        if leaves_attention and ("vision" in path or "visual" in path):
            module.weight.zero_()
    return model


@cache
def blind(name: str) -> Any:
    return blind_to_neighbours(tiny(name)[0])


def gray(size: tuple[int, int], marked: tuple[int, int] | None = None) -> Image.Image:
    picture = Image.new("RGB", size, (122, 116, 104))  # what LLaVA's processors pad with
    if marked is not None:
        picture.paste((255, 255, 255), (marked[0] - 2, marked[1] - 2, marked[0] + 2, marked[1] + 2))
    return picture


def view(name: str, inputs: Mapping[str, Tensor]) -> Tensor:
    """What the tower sees of the only picture, in the view that the grid is about: ``[3, H, W]``."""
    pixels = inputs["pixel_values"]
    if name.startswith("qwen"):
        _, rows, columns = inputs["image_grid_thw"][0].tolist()
        patch = CELL[name] // 2
        blocks = pixels.view(rows // 2, columns // 2, 2, 2, 3, 2, patch, patch)[:, :, :, :, :, 0]
        return blocks.permute(4, 0, 2, 5, 1, 3, 6).reshape(3, rows * patch, columns * patch)
    if name in ("llava_next", "llava_onevision"):
        return pixels[0, 0]
    return pixels[0, -1] if name in ("idefics3", "smolvlm") else pixels[-1]


def brightest(name: str, seen: Tensor, grid: Grid) -> tuple[int, int]:
    """Row and column of the cell in which the tower's input is brightest."""
    cell = CELL[name]
    cells = seen[:, : grid.rows * cell, : grid.columns * cell].mean(0)
    means = cells.view(grid.rows, cell, grid.columns, cell).mean((1, 3))
    return divmod(int(means.argmax()), grid.columns)


def cell_of(picture: PictureTokens, x: float, y: float) -> tuple[int, int]:
    left, top, right, bottom = picture.covers
    across, down = (x - left) / (right - left), (y - top) / (bottom - top)
    return int(down * picture.grid.rows // 1), int(across * picture.grid.columns // 1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", WITH_PLACES)
def test_a_marker_lights_up_the_cell_that_covers_it(name: str, shape: str) -> None:
    width, height = SHAPES[shape]
    x, y = int(MARKER[0] * width), int(MARKER[1] * height)
    _, family, inputs, (picture,) = find(name, gray((width, height), (x, y)), "what is in the picture ?")
    row, column = cell_of(picture, x, y)
    assert (row, column) == brightest(name, view(name, inputs), picture.grid)

    plain = find(name, gray((width, height)), "what is in the picture ?")[2]
    with_marker, without = (features(blind(name), family.select(i, [picture], 0, 1)) for i in (inputs, plain))
    placeholders = (inputs["input_ids"][0] == image_token(name)).nonzero()[:, 0].tolist()
    assert len(with_marker) == len(placeholders)
    change = (with_marker - without).norm(dim=-1)[[placeholders.index(place) for place in picture.positions]]
    assert int(change.argmax()) == row * picture.grid.columns + column
    assert change.sort().values[-1] > 3 * change.sort().values[-2]


@pytest.mark.parametrize("size", [(360, 120), (120, 360), (300, 100)])
def test_what_is_cut_off_is_not_covered(size: tuple[int, int]) -> None:
    _, _, inputs, (picture,) = find("llava", gray(size, (10, 10)))
    row, column = cell_of(picture, 10, 10)
    assert min(row, column) < 0
    assert view("llava", inputs).flatten(1).std(-1).max() < 1e-6  # the tower does not see the marker either


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [(0.05, 0.05), (0.55, 0.9), MARKER])
def test_padded_pictures_are_covered_with_their_padding(shape: str, share: tuple[float, float]) -> None:
    model, processor = tiny("llava")
    square = {"height": 56, "width": 56}
    processor.image_processor = image_processor(
        "llava", "LlavaImageProcessorPil", size=square, crop_size=square, do_pad=True, do_center_crop=False
    )
    (width, height), (x, y) = SHAPES[shape], share
    x, y = max(3, int(x * width)), max(3, int(y * height))
    inputs = prompt(processor, gray((width, height), (x, y)))
    (picture,) = picture_family(model.config).locate(model.config, processor, inputs, [(width, height)])
    left, top, right, bottom = picture.covers
    assert right - left == bottom - top == max(width, height)
    assert cell_of(picture, x, y) == brightest("llava", view("llava", inputs), picture.grid)


def test_pictures_that_are_not_tiled_are_padded() -> None:
    """LLaVA-OneVision shows several pictures of one prompt without tiles."""
    marked = gray((360, 120), (234, 14))
    _, _, inputs, pictures = find("llava_onevision", marked, gray((120, 120)), together=True)
    assert inputs["batch_num_images"].tolist() == [2]
    assert cell_of(pictures[0], 234, 14) == brightest("llava_onevision", inputs["pixel_values"][0, 0], Grid(4, 4))
    assert [picture.stop - picture.start for picture in pictures] == [17, 17]  # 16 patches and the end of a line


@pytest.mark.parametrize(
    ("settings", "covers"),
    [
        (dict(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 28}), (125.0, 0.0, 175.0, 100.0)),
        (dict(size={"shortest_edge": 112}, crop_size={"height": 56, "width": 56}), (125.0, 25.0, 175.0, 75.0)),
        (dict(size={"height": 50, "width": 100}, crop_size={"height": 50, "width": 50}), (75.0, 0.0, 225.0, 100.0)),
        (dict(do_resize=False, crop_size={"height": 120, "width": 400}), (-50.0, -10.0, 350.0, 110.0)),
        (dict(do_center_crop=False), (0.0, 0.0, 300.0, 100.0)),
    ],
)
def test_areas_follow_the_image_processors_settings(settings: dict[str, Any], covers: tuple[float, ...]) -> None:
    assert processed_area(image_processor("llava", "LlavaImageProcessorPil", **settings), WIDE) == covers


def test_a_resize_that_is_not_known_is_refused() -> None:
    images = image_processor("llava", "LlavaImageProcessorPil", size={"max_height": 40, "max_width": 40})
    with pytest.raises(UnsupportedModelError, match=r"max_height.*shortest_edge"):
        processed_area(images, WIDE)


def test_pixels_that_fill_no_patch_are_not_covered() -> None:
    (picture,) = find("llava_onevision", gray((120, 120)))[3]
    assert picture.covers == (0.0, 0.0, 112.0, 112.0)  # 4 patches of 14 pixels out of 60


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("size", [(300, 100), (100, 300), (64, 64)])
def test_merged_patches_form_the_grid(name: str, size: tuple[int, int]) -> None:
    model, _, inputs, (picture,) = find(name, gray(size))
    _, rows, columns = inputs["image_grid_thw"][0].tolist()
    assert picture.grid == Grid(rows // 2, columns // 2)
    assert (picture.grid.rows < picture.grid.columns) == (size[0] > size[1])
    height, width = (model.base_model.get_rope_index(**no_pixels(inputs))[0][i, 0] for i in (1, 2))
    origin = picture.positions[0]
    for cell, place in enumerate(picture.positions):
        row, column = divmod(cell, picture.grid.columns)
        assert (height[place] - height[origin], width[place] - width[origin]) == (row, column)


def no_pixels(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: inputs[name] for name in ("input_ids", "mm_token_type_ids", "image_grid_thw")}
