"""The matryoshka query transformer: a picture in as many tokens as one likes, the first of them the most telling.

Source: MQT (arXiv 2405.19315) and its code, github.com/gordonhu608/MQT-LLaVA at 92c35d0. Parameters have the names of
the published checkpoints (``model.query_abstractor.*``).

Legend: B pictures, N patches, M queries, m tokens asked for, H heads, V the tower's width, D the language model's.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import interpolate, linear

from qr_integrations.errors import InputError

_NORM_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class _Constants:
    """What is the same for all pictures.

    Attributes:
        parameters: it was computed from them; held, so that no others get their place in memory.
        of: which contents they had, by place and version, and for which patches it was computed.
        attention: ``[H, M, N]``.
        out: from the heads' values to tokens, ``[V, D]``.
        shift: what every token gets whatever the picture, ``[D]``: rows of the attention sum to 1.
    """

    parameters: tuple[Tensor, ...]
    of: tuple[Any, ...]
    attention: Tensor
    out: Tensor
    shift: Tensor


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

    Keys are made of places only and queries of parameters only, so the attention is the same for all pictures. Where no
    parameter learns it is therefore computed once and kept: a picture then costs a pooling with a constant and two
    products. `plain` is the published computation, and what is trained.

    Differences from the published module: the table of places is a buffer, as it never learns; numbers of tokens are
    whole numbers only (theirs takes ``"64"``, ``36.9`` and True as well, and draws one at random where none is given,
    ``"second_stage"``); grids of other sizes than 16 x 16 queries and 24 x 24 patches can be made.

    Args:
        width: V, of the tower's patches; a multiple of 4 and of `num_heads`.
        num_heads: H, 16 in the published checkpoint.
        out_width: D.
        num_queries: M, a square; 256 in the published checkpoint.
        num_patches: N, a square; 576 in the published checkpoint.

    Raises:
        InputError: a number that is no square, or a width that cannot be divided so.
    """

    def __init__(self, width: int, num_heads: int, out_width: int, num_queries: int = 256, num_patches: int = 576):
        super().__init__()
        if width % 4 or width % num_heads:
            raise InputError(f"width={width} cannot be divided by 4 and by {num_heads} heads: pass a multiple of both")
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
        self._kept: _Constants | None = None

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

        Equal to the first rows of all tokens up to rounding, not bit for bit.

        Raises:
            InputError: another number of patches than N, or of tokens than 1 to M.
        """
        count = self._checked(patches, num_tokens)
        if torch.is_grad_enabled() and any(one.requires_grad for one in self.parameters()):
            return self.plain(patches, count)
        return self._folded(patches, count)

    def pooled(self, patches: Float[Tensor, "B N V"], num_tokens: int | None = None) -> Float[Tensor, "B m V"]:
        """What the queries take from each picture before it is multiplied with anything: means of normed patches.

        The heads' attention is averaged, so that a vector keeps the tower's own space.

        Raises:
            InputError: as `forward`.
        """
        count = self._checked(patches, num_tokens)
        return self._constants(patches).attention[:, :count].mean(0) @ self.ln_v(patches)

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

    def _checked(self, patches: Tensor, num_tokens: int | None) -> int:
        if patches.shape[1] != self.num_patches:
            raise InputError(
                f"{patches.shape[1]} patches do not fit a query transformer made for {self.num_patches}: pass pictures "
                "at the resolution it was trained with"
            )
        return self.check_num_tokens(num_tokens)

    def _queries_and_keys(self, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        keys = stretch_table(self.pos_embed, self.side).to(self.ln_k.weight.dtype)
        queries = self.query[:count] + self.pos_embed[:count].to(self.query.dtype)
        return self.ln_q(queries).to(dtype), self.ln_k(keys).to(dtype)

    def _folded(self, patches: Tensor, count: int) -> Tensor:
        """`plain`, with all that does not depend on the picture computed beforehand."""
        kept, normed = self._constants(patches), self.ln_v(patches)
        attention, heads = kept.attention[:, :count], len(kept.attention)
        weight_v = self.attn.in_proj_weight.chunk(3)[2].unflatten(0, (heads, -1))
        if self._pooling_first_is_cheaper(count):
            pooled = (attention.flatten(0, 1) @ normed).unflatten(1, (heads, -1))
            values = torch.einsum("bhmv,hkv->bmhk", pooled, weight_v)
        else:
            projected = linear(normed, weight_v.flatten(0, 1)).unflatten(-1, (heads, -1))
            values = torch.einsum("hmn,bnhk->bmhk", attention, projected)
        return values.flatten(2) @ kept.out + kept.shift

    def _pooling_first_is_cheaper(self, count: int) -> bool:
        """Few tokens: pool the patches once a head, and multiply only those with the values' weights."""
        width, heads = self.query.shape[1], self.attn.num_heads
        first = count * width * (heads * self.num_patches + width)
        return first < self.num_patches * width * (width + count)

    def _constants(self, patches: Tensor) -> _Constants:
        """Computed anew once a parameter was moved, cast, loaded or changed in place, unless through ``.data``."""
        own = tuple(self.state_dict(keep_vars=True).values())
        versions = [(one.data_ptr(), 0 if one.is_inference() else one._version) for one in own]
        now = (patches.dtype, patches.device, *versions)
        kept = self._kept  # another thread may put its own there meanwhile: the same
        if kept is None or kept.of != now or any(a is not b for a, b in zip(kept.parameters, own, strict=True)):
            with torch.inference_mode(False), torch.no_grad():  # what is kept may be needed for gradients later
                kept = self._kept = self._fold(own, now, patches.dtype)
        return kept

    def _fold(self, parameters: tuple[Tensor, ...], of: tuple[Any, ...], dtype: torch.dtype) -> _Constants:
        proj = self.proj.float()
        out = self.attn.out_proj.weight.float().mT @ proj
        shift = self.attn.in_proj_bias.float().chunk(3)[2] @ out + self.attn.out_proj.bias.float() @ proj
        return _Constants(parameters, of, self.attention().to(dtype), out.to(dtype), shift.to(dtype))

    def _apply(self, fn: Any, recurse: bool = True) -> "QueryTransformer":
        self._kept = None  # freed memory may be given to other weights
        super()._apply(fn, recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles do without what can be computed again."""
        return {**self.__dict__, "_kept": None}


def _side_of(cells: int, what: str) -> int:
    side = math.isqrt(cells)
    if side * side != cells:
        raise InputError(f"{cells} {what} form no square: pass a square number")
    return side
