"""Some rows of some heads of a softmax attention, in plain torch.

Legend: B batch, H heads, G key/value heads, K kept heads, Q query rows, S tokens of this pass,
T all tokens (cache + S), D head width.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from qr_integrations.errors import UnsupportedModelError
from qr_integrations.types import Span

_ROWS_BYTES = 64 * 2**20  # heads are read in blocks, so that K x Q x T of one layer stays below this


def attention_rows(
    query: Float[Tensor, "B H S D"],
    key: Float[Tensor, "B G T D"],
    mask: Tensor | None,
    *,
    rows: Span,
    heads: Sequence[int],
    reduce: Literal["mean", "none"] = "mean",
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> Float[Tensor, "B K *Q T"]:
    """Softmax attention of some rows of some heads, in fp32, as the family's eager attention computes it.

    `rows` count within the S tokens of this pass. `softcap` (Gemma 2), `s_aux` (attention sinks, GPT-OSS) and
    `sliding_window` are what the family hands to its kernel; a float mask is added to the logits, as eager does.
    """
    if position_bias is not None:
        raise UnsupportedModelError(
            "this family adds a learned position bias to its attention, which the tap does not read: use another model"
        )
    visible, bias = _read_mask(mask, rows, query.shape[2], key.shape[2], sliding_window, query.device)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    hidden = ~visible
    blocks = _blocks(heads, query.shape[1] // key.shape[1], 4 * query.shape[0] * key.shape[2] * len(rows))
    parts = []
    for kv_head, some in blocks:
        query_BKQD = query[:, some, rows.slice()].float() * scaling
        key_BDT = key[:, kv_head].float().transpose(-1, -2)  # a view in fp32: heads that share keys share one product
        logits_BKQT = (query_BKQD.flatten(1, 2) @ key_BDT).unflatten(1, query_BKQD.shape[1:3])
        if softcap is not None:
            logits_BKQT = torch.tanh(logits_BKQT / softcap) * softcap
        if bias is not None:
            logits_BKQT = logits_BKQT + _of_heads(bias, some)
        logits_BKQT.masked_fill_(_of_heads(hidden, some), torch.finfo(torch.float32).min)
        parts.append(_softmax(logits_BKQT, None if s_aux is None else s_aux[some], reduce))
    order = [head for _, some in blocks for head in some]
    return torch.cat(parts, dim=1)[:, [order.index(head) for head in heads]]


def _blocks(heads: Sequence[int], groups: int, bytes_per_head: int) -> list[tuple[int, list[int]]]:
    """Heads by the key/value head that they share, in blocks whose rows fit into `_ROWS_BYTES`."""
    sharing: dict[int, list[int]] = {}
    for head in heads:
        sharing.setdefault(head // groups, []).append(head)
    size = max(1, _ROWS_BYTES // bytes_per_head)
    return [(kv, some[i : i + size]) for kv, some in sharing.items() for i in range(0, len(some), size)]


def _softmax(logits_BKQT: Tensor, sinks_K: Tensor | None, reduce: str) -> Tensor:
    if sinks_K is None:
        weights = logits_BKQT.softmax(-1)
    else:
        sinks = sinks_K.float().reshape(1, -1, 1, 1).expand(*logits_BKQT.shape[:3], 1)
        weights = torch.cat([logits_BKQT, sinks], dim=-1).softmax(-1)[..., :-1]
    return weights.mean(2) if reduce == "mean" else weights


def _of_heads(mask: Tensor, heads: list[int]) -> Tensor:
    """The head dimension of a mask is 1 where all heads see the same."""
    return mask if mask.shape[1] == 1 else mask[:, heads]


def _read_mask(
    mask: Tensor | None, rows: Span, num_new: int, num_all: int, sliding_window: int | None, device: torch.device
) -> tuple[Bool[Tensor, "B H Q T"], Float[Tensor, "B H Q T"] | None]:
    """Which keys each row may see, and what is added to their logits, from whatever mask the kernel was given."""
    if mask is not None and not isinstance(mask, Tensor):
        raise UnsupportedModelError(
            "flex_attention masks cannot be read: load the model with attn_implementation='sdpa'"
        )
    if mask is not None and mask.dim() == 4:
        mask = mask[:, :, rows.slice(), :num_all]
        if mask.dtype == torch.bool:
            return mask, None
        visible = mask > torch.finfo(mask.dtype).min / 2
        return visible, mask.float().masked_fill(~visible, 0.0)
    columns = torch.arange(num_all, device=device)
    positions = torch.arange(num_all - num_new + rows.start, num_all - num_new + rows.stop, device=device)[:, None]
    visible = columns <= positions
    if sliding_window is not None:
        visible &= columns > positions - sliding_window
    if mask is None:
        return visible[None, None], None
    return visible[None, None] & mask[:, None, None, -num_all:].bool(), None  # flash: a padding mask [B, T]
