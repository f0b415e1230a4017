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
    groups = query.shape[1] // key.shape[1]
    per_head = 4 * query.shape[0] * key.shape[2] * (len(rows) + key.shape[3])
    block = max(1, _ROWS_BYTES // per_head)
    parts = []
    for start in range(0, len(heads), block):
        some = list(heads[start : start + block])
        key_BKTD = key[:, [h // groups for h in some]].float()
        logits_BKQT = (query[:, some, rows.slice()].float() @ key_BKTD.transpose(-1, -2)) * scaling
        if softcap is not None:
            logits_BKQT = torch.tanh(logits_BKQT / softcap) * softcap
        if bias is not None:
            logits_BKQT = logits_BKQT + _of_heads(bias, some)
        logits_BKQT = logits_BKQT.masked_fill(~_of_heads(visible, some), torch.finfo(torch.float32).min)
        parts.append(_softmax(logits_BKQT, None if s_aux is None else s_aux[some], reduce))
    return torch.cat(parts, dim=1)


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
