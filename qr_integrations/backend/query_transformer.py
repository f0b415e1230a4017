"""The matryoshka query transformer: a picture in as many tokens as one likes, the first of them the most telling.

Source: MQT (arXiv 2405.19315) and its code, github.com/gordonhu608/MQT-LLaVA at 92c35d0. Parameters have the names of
the published checkpoints (``model.query_abstractor.*``).

Legend: B pictures, N patches, M queries, m tokens asked for, H heads, V the tower's width, D the language model's.
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import interpolate, linear

from qr_integrations.errors import InputError

_NORM_EPS = 1e-6
_POOL_FIRST = 32  # up to so many tokens it is cheaper to pool the patches before they are multiplied with the values


def sine_cosine_table(width: int, side: int) -> Float[Tensor, "cells width"]:
    """Places of a square grid, row by row: sines and cosines of the column in the first half, of the row in the second.

    Args:
        width: of a row of the table, a multiple of 4.
        side: rows and columns of the grid.
    """
    rates = 1.0 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    steps = torch.arange(side, dtype=torch.float64)
    angles = steps[:, None] * rates
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns, rows = line[None].expand(side, -1, -1), line[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], dim=2).reshape(side * side, width).float()


def stretch_table(table: Float[Tensor, "cells width"], side: int) -> Float[Tensor, "stretched width"]:
    """A square table of places for another number of rows and columns, bicubic, in fp32."""
    own = math.isqrt(len(table))
    if own == side:
        return table.float()
    grid = table.float().reshape(1, own, own, -1).permute(0, 3, 1, 2)
    stretched = interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return stretched.permute(0, 2, 3, 1).reshape(side * side, -1)


class QueryTransformer(nn.Module):
    """Learned queries pool a tower's patches; the first m of them alone give the first m tokens.

    Keys are made of places only and queries of parameters only, so the attention is the same for all pictures. Without
    gradients it is therefore computed once and kept: a picture then costs a pooling with a constant and two products.
    `plain` is the published computation, and what is trained.

    Args:
        width: V, of the tower's patches; a multiple of 4 and of `num_heads`.
        num_heads: H, 16 in the published checkpoint.
        out_width: D.
        num_queries: M, a square; 256 in the published checkpoint.
        num_patches: N, a square; 576 in the published checkpoint.
    """

    def __init__(self, width: int, num_heads: int, out_width: int, num_queries: int = 256, num_patches: int = 576):
        super().__init__()
        self.side = _side_of(num_patches, "patches")
        own = _side_of(num_queries, "queries")
        self.num_queries, self.num_patches = num_queries, num_patches
        self.register_buffer("pos_embed", sine_cosine_table(width, own))  # never learns
        self.pos_embed: Tensor
        self.query = nn.Parameter(torch.empty(num_queries, width))
        self.attn = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.ln_q, self.ln_k, self.ln_v = (nn.LayerNorm(width, eps=_NORM_EPS) for _ in range(3))
        self.proj = nn.Parameter(torch.empty(width, out_width))
        nn.init.trunc_normal_(self.query, std=0.02)
        nn.init.normal_(self.proj, std=width**-0.5)
        self._kept: tuple[Any, tuple[Tensor, Tensor, Tensor]] | None = None

    def check_num_tokens(self, num_tokens: int | None) -> int:
        """How many tokens are made: all M for None.

        Raises:
            InputError: not a whole number from 1 to M.
        """
        if num_tokens is None:
            return self.num_queries
        if isinstance(num_tokens, bool) or not isinstance(num_tokens, int) or not 1 <= num_tokens <= self.num_queries:
            raise InputError(
                f"num_tokens={num_tokens!r} cannot be made out of {self.num_queries} queries: pass 1 to "
                f"{self.num_queries}"
            )
        return num_tokens

    def forward(self, patches: Float[Tensor, "B N V"], num_tokens: int | None = None) -> Float[Tensor, "B m D"]:
        """The first `num_tokens` tokens of each picture, all M for None.

        Raises:
            InputError: another number of patches than N, or of tokens than 1 to M.
        """
        count = self.check_num_tokens(num_tokens)
        if patches.shape[1] != self.num_patches:
            raise InputError(
                f"{patches.shape[1]} patches do not fit a query transformer made for {self.num_patches}: pass pictures "
                "at the resolution it was trained with"
            )
        if torch.is_grad_enabled() and self.training:
            return self.plain(patches, count)
        return self._pooled(patches, count)

    def plain(self, patches: Float[Tensor, "B N V"], num_tokens: int) -> Float[Tensor, "B m D"]:
        """The published computation: three norms, one attention, one projection."""
        queries, keys = self._queries_and_keys(num_tokens, patches.dtype)
        many = len(patches)
        pooled, _ = self.attn(
            queries.expand(many, -1, -1), keys.expand(many, -1, -1), self.ln_v(patches), need_weights=False
        )
        return pooled @ self.proj

    def attention(self) -> Float[Tensor, "H M N"]:
        """How much each query takes from each patch, whatever the picture; rows sum to 1."""
        queries, keys = self._queries_and_keys(self.num_queries, torch.float32)
        weight_q, weight_k, _ = self.attn.in_proj_weight.float().chunk(3)
        bias_q, bias_k, _ = self.attn.in_proj_bias.float().chunk(3)
        heads = self.attn.num_heads
        q = linear(queries, weight_q, bias_q).unflatten(-1, (heads, -1)).transpose(0, 1)
        k = linear(keys, weight_k, bias_k).unflatten(-1, (heads, -1)).transpose(0, 1)
        return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)

    def _queries_and_keys(self, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        keys = stretch_table(self.pos_embed, self.side).to(self.ln_k.weight.dtype)
        queries = self.query[:count] + self.pos_embed[:count].to(self.query.dtype)
        return self.ln_q(queries).to(dtype), self.ln_k(keys).to(dtype)

    def _pooled(self, patches: Tensor, count: int) -> Tensor:
        attention, values, shift = self._constants(patches)
        normed, heads = self.ln_v(patches), len(attention)
        if count <= _POOL_FIRST:
            pooled = torch.einsum("hmn,bnv->bmhv", attention[:, :count], normed)
            return torch.einsum("bmhv,hvd->bmd", pooled, values) + shift
        weight_v = self.attn.in_proj_weight.chunk(3)[2]
        projected = linear(normed, weight_v).unflatten(-1, (heads, -1))
        brought = torch.einsum("hmn,bnhk->bmhk", attention[:, :count], projected).flatten(2)
        return brought @ (self.attn.out_proj.weight.mT @ self.proj) + shift

    def _constants(self, patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The attention, each head's way from normed patches to tokens ``[H V D]``, and what all tokens get."""
        now = (
            patches.dtype,
            patches.device,
            *((p.data_ptr(), p._version) for p in self.state_dict(keep_vars=True).values()),
        )
        kept = self._kept
        if kept is None or kept[0] != now:
            with torch.no_grad():
                kept = self._kept = (now, self._fold(patches.dtype))
        return kept[1]

    def _fold(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.attn.num_heads
        weight_v = self.attn.in_proj_weight.chunk(3)[2].float().unflatten(0, (heads, -1))
        out = (self.attn.out_proj.weight.float().mT @ self.proj.float()).unflatten(0, (heads, -1))
        shift = self.attn.in_proj_bias.chunk(3)[2].float() @ out.flatten(0, 1)
        shift = shift + self.attn.out_proj.bias.float() @ self.proj.float()
        values = torch.einsum("hkv,hkd->hvd", weight_v, out)
        return self.attention().to(dtype), values.to(dtype), shift.to(dtype)


def _side_of(cells: int, what: str) -> int:
    side = math.isqrt(cells)
    if side * side != cells:
        raise InputError(f"{cells} {what} form no square: pass a square number")
    return side
