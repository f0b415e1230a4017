"""Which placeholder of a batch shows which cell of which view: one function for each way of laying pictures out.

All take the model and what the processor made of one or more prompts.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qr_integrations.backend.visual_tokens import NOT_VISUAL, VisualPlaces


def _one_view_each(counts: Sequence[int], device: torch.device) -> VisualPlaces:
    """Pictures of so many tokens, one after the other."""
    sizes = torch.tensor(list(counts), dtype=torch.long, device=device)
    picture = torch.arange(len(sizes), device=device).repeat_interleave(sizes)
    first = sizes.cumsum(0) - sizes
    cell = torch.arange(len(picture), device=device) - first[picture]
    return VisualPlaces(picture, picture, cell)


def _num_placeholders(model: Any, inputs: Mapping[str, Tensor]) -> int:
    return int((inputs["input_ids"] == model.config.image_token_id).sum())


def places_of_equals(model: Any, inputs: Mapping[str, Tensor]) -> VisualPlaces:
    """As many tokens for every entry of ``pixel_values``: pictures, or tiles, which then count as pictures."""
    if "pixel_values" not in inputs:
        return _one_view_each([], inputs["input_ids"].device)
    if "image_sizes" in inputs:
        return places_of_lines(model, inputs)
    entries = inputs["pixel_values"]
    number = len(entries) if entries.dim() == 4 else int(entries.flatten(2).abs().amax(-1).gt(0).sum())
    share = _num_placeholders(model, inputs) // max(1, number)
    return _one_view_each([share] * number, inputs["input_ids"].device)


def places_of_lines(model: Any, inputs: Mapping[str, Tensor]) -> VisualPlaces:
    """Pictures of their own sizes, a token for each patch or square of merged patches (Pixtral, Mistral 3)."""
    side = model.config.vision_config.patch_size * getattr(model.config, "spatial_merge_size", 1)
    sizes = inputs["image_sizes"] if "image_sizes" in inputs else torch.zeros(0, 2, dtype=torch.long)
    return _one_view_each((sizes // side).prod(-1).tolist(), inputs["input_ids"].device)


def places_of_merged(model: Any, inputs: Mapping[str, Tensor]) -> VisualPlaces:
    """``image_grid_thw`` counts patches, of which a square becomes a token (Qwen2-VL, Qwen2.5-VL)."""
    merged = model.config.vision_config.spatial_merge_size**2
    grids = inputs["image_grid_thw"] if "image_grid_thw" in inputs else torch.zeros(0, 3, dtype=torch.long)
    return _one_view_each((grids.prod(-1) // merged).tolist(), inputs["input_ids"].device)


def places_of_anyres(model: Any, inputs: Mapping[str, Tensor]) -> VisualPlaces:
    """A view of all of the picture, then a larger one in tiles, unpadded, each line with an end (LLaVA-NeXT).

    Found by sending numbers in the place of features through the model's own packing.
    """
    device = inputs["input_ids"].device
    if "pixel_values" not in inputs:
        return _one_view_each([], device)
    vision, sizes = model.config.vision_config, inputs["image_sizes"]
    cells = (vision.image_size // vision.patch_size) ** 2
    counts = _tiles_of(model, sizes)
    total = sum(counts)
    numbers = torch.arange(1, total * cells + 1, dtype=torch.float64, device=device).view(total, cells, 1)
    packed, _ = model.base_model.pack_image_features(
        list(numbers.split(counts)),
        sizes,
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        image_newline=torch.zeros(1, dtype=torch.float64, device=device),
    )
    number = torch.cat([one[:, 0] for one in packed]).round().long() - 1
    picture = torch.cat([torch.full((len(one),), i, device=device) for i, one in enumerate(packed)])
    shown = number >= 0
    view, cell = number // cells, number % cells
    return VisualPlaces(picture, view.masked_fill(~shown, NOT_VISUAL), cell.masked_fill(~shown, NOT_VISUAL))


def _tiles_of(model: Any, sizes: Tensor) -> list[int]:
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    pinpoints, side = model.config.image_grid_pinpoints, model.config.vision_config.image_size
    return [int(image_size_to_num_patches(size, pinpoints, side)) for size in sizes]
