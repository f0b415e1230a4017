"""Deformable attention against its definition, place by place."""

import math
from typing import Any

import pytest
import torch


def bilinear(grid: torch.Tensor, x: float, y: float) -> torch.Tensor:
    """The value at column x and row y, counted from the middle of the first cell; nothing outside of the grid."""
    found = torch.zeros(grid.shape[-1])
    left, top = math.floor(x), math.floor(y)
    for column in (left, left + 1):
        for row in (top, top + 1):
            if 0 <= row < len(grid) and 0 <= column < len(grid):
                found = found + (1 - abs(x - column)) * (1 - abs(y - row)) * grid[row, column]
    return found


def by_definition(module: Any, queries: torch.Tensor, levels: torch.Tensor, side: int) -> torch.Tensor:
    heads, places = module.num_heads, 4
    many, count, width = queries.shape
    shape = (many, count, heads, module.num_levels, places)
    offsets = module.sampling_offsets(queries).view(*shape, 2)
    weights = module.attention_weights(queries).view(*shape[:3], -1).softmax(-1).view(shape)
    values = module.value_proj(levels).view(many, module.num_levels, side, side, heads, -1)
    found = torch.zeros(many, count, heads, width // heads)
    for b in range(many):
        for n in range(count):
            row, column = divmod(n, side)
            for h in range(heads):
                for level in range(module.num_levels):
                    for p in range(places):
                        x, y = (offsets[b, n, h, level, p] + torch.tensor([column, row])).tolist()
                        read = bilinear(values[b, level, :, :, h], x, y)
                        found[b, n, h] += weights[b, n, h, level, p] * read
    return module.output_proj(found.flatten(2))


@torch.no_grad()
def test_places_are_read_bilinearly_and_are_zero_outside() -> None:
    from qr_integrations.encoding.deformable import DeformableAttention

    torch.manual_seed(0)
    module = DeformableAttention(8, 3, 2)
    for layer in (module.sampling_offsets, module.attention_weights):
        layer.weight.normal_(0, 0.5)
    queries, levels = torch.randn(2, 9, 8), torch.randn(2, 3, 9, 8)
    torch.testing.assert_close(module(queries, levels), by_definition(module, queries, levels, 3), atol=1e-5, rtol=1e-4)


def test_heads_begin_by_looking_in_directions_of_their_own() -> None:
    from qr_integrations.encoding.deformable import DeformableAttention

    bias = DeformableAttention(32, 2, 16).sampling_offsets.bias.view(16, 2, 4, 2)
    assert torch.equal(bias[:, 0], bias[:, 1])
    torch.testing.assert_close(bias[:, 0].abs().amax(-1), torch.arange(1.0, 5).expand(16, 4))
    assert len({tuple(row) for row in bias[:, 0, 0].tolist()}) == 16


def test_patches_that_form_no_square_are_refused() -> None:
    from qr_integrations.encoding.deformable import DeformableAttention, Fuser
    from qr_integrations.errors import InputError

    with pytest.raises(InputError, match="728 patches"):
        Fuser(16, 1)(torch.zeros(1, 728, 16), torch.zeros(1, 1, 728, 16))
    with pytest.raises(InputError, match="divisor"):
        DeformableAttention(9, 1, 2)
