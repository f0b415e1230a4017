"""Where pictures stand in a prompt, which grids their tokens form, and which pixels each grid covers.

One function for each way in which vision-language models lay pictures out. All of them take the model's config, its
processor, what the processor made of one prompt, and the pictures' sizes as (width, height); all return one
`PictureTokens` for each picture, in the order of the prompt.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from qr_integrations.errors import InputError, UnsupportedModelError
from qr_integrations.types import Grid

Area = tuple[float, float, float, float]
"""Left, top, right, bottom in a picture's own pixels; beyond the picture where the processor pads."""
Size = tuple[int, int]
"""Width and height in pixels."""


@dataclass(frozen=True, slots=True)
class PictureTokens:
    """The tokens of one picture in a prompt.

    Attributes:
        positions: the tokens of the grid's cells, row by row; ``grid.rows * grid.columns`` of them.
        grid: the cells of one view of the picture. Where a model gets several views, the one that shows all of it.
        covers: the pixels that the grid covers, all of its cells being equally large.
        start, stop: all tokens of the picture: other views, ends of lines and markers too. A prompt may be cut at
            `stop`, which is the first token after them.
        tiles: how many entries of ``pixel_values`` are this picture's: views, or patches where each is an entry.
    """

    positions: tuple[int, ...]
    grid: Grid
    covers: Area
    start: int
    stop: int
    tiles: int = 1


@dataclass(frozen=True, slots=True)
class _Layout:
    """A picture before it is found in the prompt: its placeholders, and the one at which its grid begins."""

    tokens: int
    offset: int
    grid: Grid
    covers: Area
    tiles: int = 1


def locate_patches(
    config: Any, processor: Any, inputs: Mapping[str, Any], sizes: Sequence[Size]
) -> list[PictureTokens]:
    """One view of each picture, cut or padded as the image processor says; every patch is a token.

    Raises:
        InputError: the prompt holds other pictures than those of `sizes`.
        UnsupportedModelError: the image processor resizes in a way that is not known here.
    """
    if "image_sizes" in inputs:
        return locate_lines(config, processor, inputs, sizes)
    height, width = inputs["pixel_values"].shape[-2:]
    grid = _patches(config, height, width)
    cells = grid.rows * grid.columns
    class_token = int(len(_placeholders(config, inputs)) > cells * len(sizes))  # some checkpoints pass it on
    areas = [_trimmed(processed_area(processor.image_processor, size), config, grid, height, width) for size in sizes]
    return _place(config, inputs, [_Layout(cells + class_token, class_token, grid, area) for area in areas])


def locate_squashed(
    config: Any, processor: Any, inputs: Mapping[str, Any], sizes: Sequence[Size]
) -> list[PictureTokens]:
    """One view of each picture, all of it squashed into a square; the tokens form a square too.

    Raises:
        InputError: the prompt holds other pictures than those of `sizes`, or crops of them besides.
    """
    pixels = inputs["pixel_values"]
    if len(pixels) != len(sizes):
        raise InputError(
            f"{len(sizes)} sizes are given, and the processor made {len(pixels)} views: pass the sizes of all "
            "pictures, and let it make one view of each (do_pan_and_scan=False)"
        )
    tokens = len(_placeholders(config, inputs)) // max(1, len(sizes))
    grid = _square(tokens)
    layouts = [_Layout(tokens, 0, grid, _squashed(config, size, pixels)) for size in sizes]
    return _place(config, inputs, layouts, *_markers(config, "boi_token_id", "eoi_token_id"))


def locate_base(config: Any, processor: Any, inputs: Mapping[str, Any], sizes: Sequence[Size]) -> list[PictureTokens]:
    """A view of the whole picture first, then its tiles at a higher resolution, each line of them with an end.

    The grid is that of the first view. Where several pictures share a prompt, some processors make no tiles and pad
    each picture to a square; ``batch_num_images`` tells.

    Raises:
        InputError: the prompt holds other pictures than those of `sizes`.
    """
    tiled = _is_tiled(inputs)
    height, width = inputs["pixel_values"].shape[-2:]
    grid = _patches(config, height, width)
    layouts = []
    for size in sizes:
        tokens, tiles = _anyres_tokens(config, size, grid) if tiled else (grid.rows * grid.columns + 1, 1)
        area = _trimmed(_whole(size) if tiled else _padded(size), config, grid, height, width)
        layouts.append(_Layout(tokens, 0, grid, area, tiles))
    return _place(config, inputs, layouts)


def locate_merged(config: Any, processor: Any, inputs: Mapping[str, Any], sizes: Sequence[Size]) -> list[PictureTokens]:
    """Pictures near their own resolution; a token is a square of merged patches, ``image_grid_thw`` counts them.

    Raises:
        InputError: the prompt holds other pictures than those of `sizes`.
    """
    merge = config.vision_config.spatial_merge_size
    counted = inputs["image_grid_thw"]
    _check_count(len(counted), sizes)
    layouts = []
    for (_, rows, columns), size in zip(counted, sizes, strict=True):
        grid = Grid(int(rows) // merge, int(columns) // merge)
        layouts.append(_Layout(grid.rows * grid.columns, 0, grid, _whole(size), int(rows * columns)))
    return _place(config, inputs, layouts, *_markers(config, "vision_start_token_id", "vision_end_token_id"))


def locate_lines(config: Any, processor: Any, inputs: Mapping[str, Any], sizes: Sequence[Size]) -> list[PictureTokens]:
    """Pictures near their own resolution, with a token at the end of each line; ``image_sizes`` are those seen.

    Raises:
        InputError: the prompt holds other pictures than those of `sizes`.
    """
    cell = _number(config.vision_config.patch_size) * getattr(config, "spatial_merge_size", 1)
    seen = inputs["image_sizes"]
    _check_count(len(seen), sizes)
    layouts = []
    for (height, width), (right, bottom) in zip(seen, sizes, strict=True):
        grid = Grid(int(height) // cell, int(width) // cell)
        area = (0.0, 0.0, right * grid.columns * cell / int(width), bottom * grid.rows * cell / int(height))
        layouts.append(_Layout(grid.rows * grid.columns, 0, grid, area))
    return _place(config, inputs, layouts, closing={processor.image_break_token_id, processor.image_end_token_id})


def locate_thumbnail(
    config: Any, processor: Any, inputs: Mapping[str, Any], sizes: Sequence[Size]
) -> list[PictureTokens]:
    """Tiles first and a view of the whole picture last, all between two markers; a small picture has one tile.

    Raises:
        InputError: the prompt holds other pictures than those of `sizes`.
    """
    pixels = inputs["pixel_values"]
    cells = len(_placeholders(config, inputs)) // len(pixels)
    runs = _runs(config, inputs)
    _check_count(len(runs), sizes)
    layouts = []
    for (start, stop), size in zip(runs, sizes, strict=True):
        tokens = stop - start
        area = _squashed(config, size, pixels)
        layouts.append(_Layout(tokens, tokens - cells, _square(cells), area, tokens // cells))
    return _place(config, inputs, layouts, {processor.start_image_token_id}, {processor.end_image_token_id})


def locate_global_tile(
    config: Any, processor: Any, inputs: Mapping[str, Any], sizes: Sequence[Size]
) -> list[PictureTokens]:
    """Tiles first, each behind a marker that names its place, and a view of the whole picture last.

    Raises:
        InputError: the prompt holds other pictures than those of `sizes`.
    """
    ids = inputs["input_ids"][0].tolist()
    name = getattr(processor, "global_image_token", None) or processor.global_image_tag
    tag = processor.tokenizer(name, add_special_tokens=False)["input_ids"]
    fake = processor.tokenizer.convert_tokens_to_ids(processor.fake_image_token)
    runs = _runs(config, inputs)
    last = [number for number, (start, _) in enumerate(runs) if ids[start - len(tag) : start] == tag]
    _check_count(len(last), sizes)
    pictures, done = [], 0
    for number, size in zip(last, sizes, strict=True):
        (first, _), (start, stop) = runs[done], runs[number]
        opening = max(place for place in range(first) if ids[place] == fake)
        closing = stop + (ids[stop : stop + 1] == [fake])
        area, tiles = _squashed(config, size, inputs["pixel_values"]), number + 1 - done
        grid = _square(stop - start)
        pictures.append(PictureTokens(tuple(range(start, stop)), grid, area, opening, closing, tiles))
        done = number + 1
    return pictures


def locate_queries(
    config: Any, processor: Any, inputs: Mapping[str, Any], sizes: Sequence[Size]
) -> list[PictureTokens]:
    """A fixed number of slots for each picture, filled by queries that look at all of it.

    A slot has no place in the picture: the grid is one row of slots, and which pixels each has read stands in the
    queries' own cross-attention to the patches.

    Raises:
        InputError: the prompt holds other pictures than those of `sizes`.
    """
    slots = config.num_query_tokens
    return _place(config, inputs, [_Layout(slots, 0, Grid(1, slots), _whole(size)) for size in sizes])


def locate_pooled(config: Any, processor: Any, inputs: Mapping[str, Any], sizes: Sequence[Size]) -> list[PictureTokens]:
    """As many slots for each picture as were asked for, filled by queries that look at all of one view of it.

    Raises:
        InputError: the prompt holds other pictures than those of `sizes`.
        UnsupportedModelError: the image processor resizes in a way that is not known here.
    """
    _check_count(len(inputs["pixel_values"]) if "pixel_values" in inputs else 0, sizes)
    if not sizes:
        return []
    height, width = inputs["pixel_values"].shape[-2:]
    slots, patches = len(_placeholders(config, inputs)) // len(sizes), _patches(config, height, width)
    areas = [
        _trimmed(processed_area(processor.image_processor, size), config, patches, height, width) for size in sizes
    ]
    return _place(config, inputs, [_Layout(slots, 0, Grid(1, slots), area) for area in areas])


def processed_area(image_processor: Any, size: Size) -> Area:
    """What an image processor keeps of a picture that it pads, resizes and cuts, in the picture's own pixels.

    Raises:
        UnsupportedModelError: it resizes in a way that is not known here.
    """
    pads = image_processor.do_pad and hasattr(image_processor, "pad_to_square")
    left, top, right, bottom = _padded(size) if pads else _whole(size)
    width, height = right - left, bottom - top
    if not image_processor.do_center_crop:
        return left, top, right, bottom
    across, down = _resized(image_processor, int(width), int(height))
    crop = image_processor.crop_size
    left += (across - crop["width"]) // 2 * width / across
    top += (down - crop["height"]) // 2 * height / down
    return left, top, left + crop["width"] * width / across, top + crop["height"] * height / down


def _resized(image_processor: Any, width: int, height: int) -> Size:
    if not image_processor.do_resize:
        return width, height
    size = dict(image_processor.size)
    if set(size) == {"height", "width"}:
        return size["width"], size["height"]
    if set(size) == {"shortest_edge"}:
        short, long = size["shortest_edge"], int(size["shortest_edge"] * max(width, height) / min(width, height))
        return (short, long) if width <= height else (long, short)
    raise UnsupportedModelError(
        f"pictures are resized to {size}, and where their tokens lie is then not known: set the image processor's "
        "`size` to a shortest_edge, or to a height and a width"
    )


def _whole(size: Size) -> Area:
    return 0.0, 0.0, float(size[0]), float(size[1])


def _padded(size: Size) -> Area:
    side = max(size)
    left, top = (side - size[0]) // 2, (side - size[1]) // 2
    return float(-left), float(-top), float(side - left), float(side - top)


def _trimmed(area: Area, config: Any, grid: Grid, height: int, width: int) -> Area:
    """Without the pixels at the right and at the bottom that do not fill a patch, and which the tower leaves out."""
    patch = _number(config.vision_config.patch_size)
    left, top, right, bottom = area
    across, down = grid.columns * patch / width, grid.rows * patch / height
    return left, top, left + (right - left) * across, top + (bottom - top) * down


def _squashed(config: Any, size: Size, pixels: Tensor) -> Area:
    height, width = pixels.shape[-2:]
    return _trimmed(_whole(size), config, _patches(config, height, width), height, width)


def _patches(config: Any, height: int, width: int) -> Grid:
    patch = _number(config.vision_config.patch_size)
    return Grid(height // patch, width // patch)


def _number(side: Any) -> int:
    """A side in pixels, which some configs state once and others for both directions."""
    return int(side if isinstance(side, int | float) else side[0])


def _square(cells: int) -> Grid:
    side = math.isqrt(cells)
    if side * side != cells:
        raise InputError(f"a picture has {cells} tokens, which form no square: pass what the model's processor made")
    return Grid(side, side)


def _is_tiled(inputs: Mapping[str, Any]) -> bool:
    counts = inputs.get("batch_num_images")
    return counts is None or int(counts[0]) == 1


def _anyres_tokens(config: Any, size: Size, base: Grid) -> tuple[int, int]:
    """Placeholders and views of a picture that is read whole and in tiles."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

    width, height = size
    side = _number(config.vision_config.image_size)
    down, across = get_anyres_image_grid_shape((height, width), config.image_grid_pinpoints, side)
    patches = torch.empty(1, down * base.rows, across * base.columns, device="meta")
    rows, columns = unpad_image(patches, (height, width)).shape[1:]
    if limit := getattr(config, "vision_aspect_ratio", "").removeprefix("anyres_max_"):
        ratio = math.sqrt(rows * columns / (int(limit) * base.rows**2))
        if ratio > 1.1:  # the model shrinks what is much more than the limit, and only that
            rows, columns = int(rows // ratio), int(columns // ratio)
    return base.rows * base.columns + rows * (columns + 1), down * across + 1


def _placeholders(config: Any, inputs: Mapping[str, Any]) -> list[int]:
    found: list[int] = (inputs["input_ids"][0] == config.image_token_id).nonzero()[:, 0].tolist()
    return found


def _runs(config: Any, inputs: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Placeholders that stand side by side, as half-open ranges."""
    places = _placeholders(config, inputs)
    starts = [place for i, place in enumerate(places) if i == 0 or places[i - 1] != place - 1]
    stops = [place + 1 for i, place in enumerate(places) if i == len(places) - 1 or places[i + 1] != place + 1]
    return list(zip(starts, stops, strict=True))


def _markers(config: Any, *names: str) -> list[set[int]]:
    return [{getattr(config, name)} if hasattr(config, name) else set() for name in names]


def _check_count(found: int, sizes: Sequence[Size]) -> None:
    if found != len(sizes):
        raise InputError(
            f"the prompt holds {found} pictures, and {len(sizes)} sizes are given: pass what the processor made of one "
            "prompt, and the sizes of all its pictures"
        )


def _place(
    config: Any,
    inputs: Mapping[str, Any],
    layouts: Sequence[_Layout],
    opening: Collection[int] = (),
    closing: Collection[int] = (),
) -> list[PictureTokens]:
    """Give each picture its placeholders, and the marker before and after them."""
    ids, places = inputs["input_ids"][0].tolist(), _placeholders(config, inputs)
    if (expected := sum(layout.tokens for layout in layouts)) != len(places):
        raise InputError(
            f"the prompt holds {len(places)} picture tokens, its pictures make {expected}: pass what the processor "
            "made of one prompt, and the sizes of all its pictures"
        )
    pictures = []
    for end, layout in zip(accumulate(layout.tokens for layout in layouts), layouts, strict=True):
        own = places[end - layout.tokens : end]
        start, stop = own[0], own[-1] + 1
        start -= start > 0 and ids[start - 1] in opening
        stop += stop < len(ids) and ids[stop] in closing
        cells = own[layout.offset : layout.offset + layout.grid.rows * layout.grid.columns]
        pictures.append(PictureTokens(tuple(cells), layout.grid, layout.covers, start, stop, layout.tiles))
    return pictures
