"""A prefix cut into pieces that are kept one by one, and pieces put together to a prefix.

Legend: G key/value heads, T tokens, D head width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from qr_integrations.backend.prefix import Prefix, StoredLayer
from qr_integrations.backend.stored import KeptDtype, Stored
from qr_integrations.errors import UnsupportedModelError
from qr_integrations.types import Span

Rotate = Callable[[Tensor, int, int], Tensor]
"""``(keys, layer, by)``: the keys of a layer as if their tokens stood `by` further on."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Keys and values of tokens that follow each other.

    Attributes:
        token_ids: T of them.
        position: where the first one stands.
        keys: of layers 0..top_layer; at the top perhaps only those of the heads that are read.
        values: of the same layers; None at the top, where they are not read.
    """

    token_ids: tuple[int, ...]
    position: int
    keys: tuple[Stored, ...]
    values: tuple[Stored | None, ...]

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def top_layer(self) -> int:
        """The deepest layer that is kept."""
        return len(self.keys) - 1

    @property
    def num_bytes(self) -> int:
        """What its keys and values take in memory."""
        return sum(stored.num_bytes for stored in (*self.keys, *self.values) if stored is not None)

    def own(self) -> "Piece":
        """The same in memory of its own."""
        values = tuple(None if value is None else value.own() for value in self.values)
        return replace(self, keys=tuple(key.own() for key in self.keys), values=values)


def cut(
    prefix: Prefix,
    spans: Sequence[Span],
    *,
    dtype: KeptDtype = "auto",
    top_heads: Sequence[int] | None = None,
) -> list[Piece]:
    """The pieces of a prefix that `spans` name, in views of its memory unless `dtype` or `top_heads` ask for less.

    Args:
        prefix: what was read; keys and values that are stored already stay as they are.
        spans: tokens of it.
        dtype: how keys and values are kept.
        top_heads: key/value heads of the top layer that are read; None keeps all.

    Raises:
        UnsupportedModelError: the prefix holds states of recurrent layers, or none at all.
    """
    if prefix.cache is None or not prefix.is_plain:
        raise UnsupportedModelError(
            "this model's layers keep more than keys and values of single tokens, which cannot be cut: rank with a "
            "reranker, which reads the documents anew"
        )
    layers: list[Any] = prefix.cache.layers
    keys = [_keys_of(layer, dtype, None if layer is not layers[-1] else top_heads) for layer in layers]
    values = [_values_of(layer, dtype) for layer in layers]
    return [
        Piece(
            prefix.token_ids[span.slice()],
            prefix.position_of(span.start),
            tuple(stored.tokens(span.start, span.stop) for stored in keys),
            tuple(None if stored is None else stored.tokens(span.start, span.stop) for stored in values),
        )
        for span in spans
    ]


def _keys_of(layer: Any, dtype: KeptDtype, heads: Sequence[int] | None) -> Stored:
    if isinstance(layer, StoredLayer):
        return layer.stored_keys
    return Stored.of(layer.keys if heads is None else layer.keys[:, list(heads)], dtype)


def _values_of(layer: Any, dtype: KeptDtype) -> Stored | None:
    if isinstance(layer, StoredLayer):
        return layer.stored_values
    return Stored.of(layer.values, dtype) if layer.values.numel() else None


def pack(prefix: Prefix, *, dtype: KeptDtype = "auto", top_heads: tuple[int, ...] | None = None) -> Prefix:
    """The same prefix, its keys and values kept as `dtype` and `top_heads` ask, cast whenever a pass reads them.

    Raises:
        UnsupportedModelError: as `cut`.
    """
    whole = cut(prefix, [Span(0, len(prefix))], dtype=dtype, top_heads=top_heads)
    assert prefix.cache is not None
    top: Any = prefix.cache.layers[-1]
    num_heads = top.num_heads if isinstance(top, StoredLayer) and top.heads is not None else top.keys.shape[1]
    packed = join(whole, dtype=top.dtype, top_heads=top_heads, num_top_heads=num_heads)
    return replace(prefix, cache=packed.cache)


def join(
    pieces: Sequence[Piece],
    *,
    dtype: torch.dtype,
    next_position: int | None = None,
    top_heads: tuple[int, ...] | None = None,
    num_top_heads: int | None = None,
) -> Prefix:
    """A prefix of pieces that were kept, side by side.

    What is read behind it sees all of them. They do not see each other unless they did when they were read.

    Args:
        pieces: in the order in which they lie; the first one, at least, stands at position 0.
        dtype: in which a pass reads them.
        next_position: where the next token stands; None: behind the last of all positions.
        top_heads: which key/value heads of the top layer the pieces hold; None: all.
        num_top_heads: how many that layer has; with `top_heads`.
    """
    cache = DynamicCache()
    last = pieces[0].top_layer
    cache.layers = [
        StoredLayer(
            Stored.joined([piece.keys[layer] for piece in pieces]),
            _joined([piece.values[layer] for piece in pieces]),
            dtype,
            top_heads if layer == last else None,
            num_top_heads,
        )
        for layer in range(last + 1)
    ]
    token_ids = tuple(token for piece in pieces for token in piece.token_ids)
    starts = list(accumulate(map(len, pieces), initial=0))
    if all(piece.position == start for piece, start in zip(pieces, starts, strict=False)):
        return Prefix(token_ids, last, cache, next_position=None if next_position == starts[-1] else next_position)
    blocks = tuple(Span(*span) for span in pairwise(starts[1:]))
    positions = tuple(piece.position for piece in pieces[1:])
    shared = all(position == blocks[0].start for position in positions)
    return Prefix(token_ids, last, cache, blocks, () if shared else positions, next_position)


def moved(piece: Piece, to: int, rotate: Rotate) -> Piece:
    """The piece as if it had been read from position `to` on, with nothing before it."""
    by = to - piece.position
    if not by:
        return piece
    keys = tuple(
        Stored.of(rotate(stored.read(torch.float32), layer, by), "int8")
        if stored.scale is not None
        else Stored(rotate(stored.steps, layer, by))
        for layer, stored in enumerate(piece.keys)
    )
    return Piece(piece.token_ids, to, keys, piece.values)


def in_line(pieces: Sequence[Piece], rotate: Rotate) -> list[Piece]:
    """The pieces one behind the other from position 0 on."""
    starts = accumulate(map(len, pieces), initial=0)
    return [moved(piece, to, rotate) for piece, to in zip(pieces, starts, strict=False)]


def _joined(parts: Sequence[Stored | None]) -> Stored | None:
    whole = [part for part in parts if part is not None]
    return Stored.joined(whole) if whole else None
