"""Deformable attention over several layers of a tower: each patch looks at a few learned places of each layer.

Source: MMFuser (arXiv 2410.11829) as the fusion code of arXiv 2503.06063 uses it. Plain torch; places are read
bilinearly and are zero outside of the picture.

Legend: B pictures, N patches, V width, L levels, H heads, P places.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import grid_sample

from qr_integrations.errors import InputError

HEADS, PLACES = 16, 4
_NORM_EPS = 1e-6


class DeformableAttention(nn.Module):
    """Each query reads `PLACES` places of each level and head, around its own, and weighs them.

    Args:
        width: V, a multiple of `num_heads`.
        num_levels: L.
        num_heads: H.
    """

    def __init__(self, width: int, num_levels: int, num_heads: int = HEADS) -> None:
        super().__init__()
        if width % num_heads:
            raise InputError(f"a width of {width} cannot be cut into {num_heads} heads: pass a divisor of it")
        self.num_levels, self.num_heads = num_levels, num_heads
        self.sampling_offsets = nn.Linear(width, num_heads * num_levels * PLACES * 2)
        self.attention_weights = nn.Linear(width, num_heads * num_levels * PLACES)
        self.value_proj = nn.Linear(width, width)
        self.output_proj = nn.Linear(width, width)
        self._start()

    @torch.no_grad()
    def _start(self) -> None:
        """Each head looks in a direction of its own, each place one step further; all places weigh the same."""
        angles = torch.arange(self.num_heads, dtype=torch.float32) * (2.0 * math.pi / self.num_heads)
        directions = torch.stack([angles.cos(), angles.sin()], dim=-1)
        directions = directions / directions.abs().max(-1, keepdim=True).values
        steps = torch.arange(1, PLACES + 1, dtype=torch.float32)
        offsets = directions[:, None, None, :] * steps[:, None]
        self.sampling_offsets.bias.copy_(offsets.expand(-1, self.num_levels, -1, -1).flatten())
        for layer in (self.sampling_offsets, self.attention_weights):
            layer.weight.zero_()
        self.attention_weights.bias.zero_()
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            layer.bias.zero_()

    def forward(self, queries: Float[Tensor, "B N V"], levels: Float[Tensor, "B L N V"]) -> Float[Tensor, "B N V"]:
        """What each query takes from the levels; all of them have the queries' square grid."""
        side = side_of(queries.shape[1])
        many, count = queries.shape[:2]
        shape = (many, count, self.num_heads, self.num_levels, PLACES)
        offsets = self.sampling_offsets(queries).float().view(*shape, 2)
        weights = self.attention_weights(queries).float().view(*shape[:3], -1).softmax(-1).view(shape)
        centres = (torch.arange(side, device=queries.device, dtype=torch.float32) + 0.5) / side
        rows, columns = torch.meshgrid(centres, centres, indexing="ij")
        own = torch.stack([columns, rows], dim=-1).view(1, count, 1, 1, 1, 2)
        grid = 2 * (own + offsets / side) - 1
        values = self.value_proj(levels).float().unflatten(-1, (self.num_heads, -1))
        read = _read(values, grid, weights, side)
        return self.output_proj(read.to(queries.dtype))


def _read(values: Tensor, grid: Tensor, weights: Tensor, side: int) -> Tensor:
    """Weighted sums of the values ``[B L N H v]`` at the places ``[B N H L P 2]``: ``[B N V]``, in fp32."""
    many, levels, count, heads, per_head = values.shape
    maps = values.permute(0, 3, 1, 4, 2).reshape(many * heads * levels, per_head, side, side)
    places = grid.permute(0, 2, 3, 1, 4, 5).reshape(many * heads * levels, count, PLACES, 2)
    with torch.autocast(values.device.type, enabled=False):
        sampled = grid_sample(maps, places, mode="bilinear", padding_mode="zeros", align_corners=False)
        sampled = sampled.view(many, heads, levels, per_head, count, PLACES)
        return torch.einsum("bhlvnp,bnhlp->bnhv", sampled, weights).flatten(2)


class Fuser(nn.Module):
    """Patches of the final layer, with what they find in other layers; at the start they are left as they are.

    Args:
        width: V.
        num_levels: of other layers.
    """

    def __init__(self, width: int, num_levels: int) -> None:
        super().__init__()
        heads = math.gcd(width, HEADS)
        self.cross_attn = DeformableAttention(width, num_levels, heads)
        self.self_attn = DeformableAttention(width, 1, heads)
        self.query_norm, self.feat_norm, self.norm1 = (nn.LayerNorm(width, eps=_NORM_EPS) for _ in range(3))
        self.gamma1, self.gamma2 = (nn.Parameter(torch.zeros(width)) for _ in range(2))

    def forward(self, patches: Float[Tensor, "B N V"], levels: Float[Tensor, "B L N V"]) -> Float[Tensor, "B N V"]:
        """The patches, fused."""
        found = self.cross_attn(self.query_norm(patches), self.feat_norm(levels))
        spread = self.self_attn(normed := self.norm1(found), normed[:, None])
        return patches + self.gamma1 * (found + self.gamma2 * spread)


def side_of(patches: int) -> int:
    """Rows and columns of a square grid.

    Raises:
        InputError: the patches form no square.
    """
    side = math.isqrt(patches)
    if side * side != patches:
        raise InputError(f"{patches} patches form no square grid: use a tower of square pictures, or external_direct")
    return side
