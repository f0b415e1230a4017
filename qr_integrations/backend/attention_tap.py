"""Read chosen rows of chosen heads while the model runs, and stop when the last of them is read.

The model keeps its own attention kernel (sdpa, flash, eager). For the length of one forward pass the tapped layers get a copy
of their config that names our attention function; it reads the rows it was asked for, then hands over to the kernel. Masks
are still made by the model from its own config, so they are what the kernel expects.

Legend: B batch, H heads, G key/value heads, K kept heads, Q query rows, S tokens of this pass, T all tokens (cache + S),
D head width.
"""

import copy
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qr_integrations.errors import HeadError, UnsupportedModelError
from qr_integrations.types import Span

_PREFIX = "qr_tap_"
_EAGER_BLOCK = 256  # rows of an eager softmax at a time, so that H x T x T is never allocated
_ROWS_BYTES = 64 * 2**20  # heads are read in blocks, so that K x Q x T of one layer stays below this


@dataclass(frozen=True, slots=True)
class AttentionTap:
    """A request for attention rows.

    Attributes:
        heads: ``(layer, head)`` pairs, zero-based, in the order of the result.
        rows: token positions in the whole sequence (cached prefix included) whose attention is read.
        reduce: ``"mean"`` averages over the rows inside the layer (the result is ``[B, K, T]``), ``"none"`` keeps them
            (``[B, K, Q, T]``).
        differentiable: keep the graph, for gradients through the rows.
    """

    heads: tuple[tuple[int, int], ...]
    rows: Span
    reduce: Literal["mean", "none"] = "mean"
    differentiable: bool = False

    def __post_init__(self) -> None:
        if not self.heads:
            raise HeadError("a tap needs at least one head: pass heads=((layer, head), ...)")
        if not len(self.rows):
            raise HeadError(f"a tap needs at least one row, got {self.rows}: pass rows=Span(start, stop) with stop > start")

    @property
    def top_layer(self) -> int:
        """The deepest layer that is read; nothing above it needs to run."""
        return max(layer for layer, _ in self.heads)


class StopForward(Exception):  # noqa: N818 - not an error: the signal that everything wanted has been read
    """Raised inside the top tapped layer and caught by `run_tapped`."""


class _Pass:
    """What one forward pass reads: mutable, lives as long as the pass."""

    def __init__(self, tap: AttentionTap | None, stop_after: int | None, past: int) -> None:
        self.tap, self.stop_after, self.past = tap, stop_after, past
        self.wanted: dict[int, list[int]] = defaultdict(list)
        for layer, head in tap.heads if tap else ():
            self.wanted[layer].append(head)
        self.rows: dict[int, Tensor] = {}

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, kwargs: dict[str, Any]) -> Any:
        layer = module.layer_idx
        if self.tap is not None and layer in self.wanted:
            with torch.set_grad_enabled(self.tap.differentiable and torch.is_grad_enabled()):
                self.rows[layer] = self._read(module, query, key, mask, kwargs)
        if layer == self.stop_after:
            raise StopForward
        return _underlying_attention(module)(module, query, key, value, mask, **kwargs)

    def _read(self, module: nn.Module, query: Tensor, key: Tensor, mask: Any, kwargs: dict[str, Any]) -> Tensor:
        assert self.tap is not None
        rows = Span(self.tap.rows.start - self.past, self.tap.rows.stop - self.past)
        return attention_rows(query, key, mask, rows=rows, heads=self.wanted[module.layer_idx], reduce=self.tap.reduce, **kwargs)

    def result(self) -> Tensor:
        """Rows in the order of `tap.heads`: ``[B, K, T]`` or ``[B, K, Q, T]``, fp32."""
        assert self.tap is not None
        slots = {(layer, head): i for layer, heads in self.wanted.items() for i, head in enumerate(heads)}
        device = self.rows[self.tap.top_layer].device
        return torch.stack([self.rows[layer][:, slots[layer, head]].to(device) for layer, head in self.tap.heads], dim=1)


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
    `sliding_window` are what the family hands to its kernel.
    """
    if position_bias is not None:
        raise UnsupportedModelError(
            "this family adds a learned position bias to its attention, which the tap does not read: use another model"
        )
    visible = _visible(mask, rows, query.shape[2], key.shape[2], sliding_window, query.device)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    groups = query.shape[1] // key.shape[1]
    per_head = 4 * query.shape[0] * key.shape[2] * (len(rows) + key.shape[3])
    block = max(1, _ROWS_BYTES // per_head)
    parts = []
    for start in range(0, len(heads), block):
        some = list(heads[start : start + block])
        logits_BKQT = query[:, some, rows.slice()].float() @ key[:, [h // groups for h in some]].float().transpose(-1, -2)
        logits_BKQT = logits_BKQT * scaling
        if softcap is not None:
            logits_BKQT = torch.tanh(logits_BKQT / softcap) * softcap
        seen = visible if visible.shape[1] == 1 else visible[:, some]
        logits_BKQT = logits_BKQT.masked_fill(~seen, torch.finfo(torch.float32).min)
        parts.append(_softmax(logits_BKQT, None if s_aux is None else s_aux[some], reduce))
    return torch.cat(parts, dim=1)


def _softmax(logits_BKQT: Tensor, sinks_K: Tensor | None, reduce: str) -> Tensor:
    if sinks_K is None:
        weights = logits_BKQT.softmax(-1)
    else:
        sinks = sinks_K.float().reshape(1, -1, 1, 1).expand(*logits_BKQT.shape[:3], 1)
        weights = torch.cat([logits_BKQT, sinks], dim=-1).softmax(-1)[..., :-1]
    return weights.mean(2) if reduce == "mean" else weights


def _visible(
    mask: Tensor | None, rows: Span, num_new: int, num_all: int, sliding_window: int | None, device: torch.device
) -> Bool[Tensor, "B H Q T"]:
    """Which keys each row may see, from whatever mask the kernel was given."""
    if mask is not None and not isinstance(mask, Tensor):
        raise UnsupportedModelError("flex_attention masks cannot be read: load the model with attn_implementation='sdpa'")
    if mask is not None and mask.dim() == 4:
        mask = mask[:, :, rows.slice(), :num_all]
        return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    columns = torch.arange(num_all, device=device)
    positions = torch.arange(num_all - num_new + rows.start, num_all - num_new + rows.stop, device=device)[:, None]
    visible = columns <= positions
    if sliding_window is not None:
        visible &= columns > positions - sliding_window
    if mask is None:
        return visible[None, None]
    return visible[None, None] & mask[:, None, None, -num_all:].bool()  # flash: a padding mask [B, T]


def _tapped_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    result: tuple[Tensor, Tensor | None] = module.config.qr_pass.attend(module, query, key, value, attention_mask, kwargs)
    return result


def _underlying_attention(module: nn.Module) -> Callable[..., Any]:
    """The kernel that the model runs without us."""
    name = module.config._attn_implementation.removeprefix(_PREFIX)
    if name != "eager":
        kernel: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[name]
        return kernel
    return _in_blocks(sys.modules[type(module).__module__].eager_attention_forward)


def _in_blocks(eager: Callable[..., Any]) -> Callable[..., Any]:
    """The family's own eager attention, some rows at a time: the rows of a softmax do not depend on each other."""

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
        parts = []
        for start in range(0, query.shape[2], _EAGER_BLOCK):
            rows = slice(start, start + _EAGER_BLOCK)
            row_mask = mask[:, :, rows] if mask is not None and mask.dim() == 4 else mask
            parts.append(eager(module, query[:, :, rows], key, value, row_mask, **kwargs)[0])
        return torch.cat(parts, dim=1), None

    return attention


def _register(name: str) -> str:
    """Register our function for the kernel `name`, with the kernel's mask function: without it padding is attended."""
    tapped = _PREFIX + name
    if tapped not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(tapped, _tapped_attention)
        AttentionMaskInterface.register(tapped, ALL_MASK_ATTENTION_FUNCTIONS[name])
    return tapped


@contextmanager
def _installed(modules: Sequence[nn.Module], state: _Pass) -> Iterator[None]:
    """Give `modules` a config that names our attention; they get their own back on every way out."""
    originals = [(module, module.config) for module in modules]
    copies: dict[int, PreTrainedConfig] = {}
    try:
        for module, config in originals:
            if id(config) not in copies:
                copies[id(config)] = copy.copy(config)
                copies[id(config)]._attn_implementation_internal = _register(config._attn_implementation or "eager")
                copies[id(config)].qr_pass = state
            module.config = copies[id(config)]
        yield
    finally:
        for module, config in originals:
            module.config = config


def run_tapped(
    run: Callable[[], Any], modules: Sequence[nn.Module], *, tap: AttentionTap | None, stop_after: int | None, past: int
) -> Tensor | None:
    """Call `run` (one forward pass) with the tap in place; returns the rows, or None without a tap.

    The pass ends in layer `stop_after` once its keys are in the cache: that layer's own attention and MLP are not computed.
    """
    state = _Pass(tap, stop_after, past)
    with _installed(modules, state):
        try:
            run()
        except StopForward:
            pass
    return None if tap is None else state.result()


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """A layer whose attention can be read."""

    module: nn.Module
    num_heads: int
    num_kv_heads: int


class _Survey(_Pass):
    """Notes which modules come by."""

    def __init__(self) -> None:
        super().__init__(None, None, 0)
        self.layers: dict[int, AttentionLayer] = {}

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, kwargs: dict[str, Any]) -> Any:
        if module.layer_idx in self.layers:
            raise UnsupportedModelError(
                f"layer {module.layer_idx} attends more than once per pass, so its heads have no single row: use another model"
            )
        self.layers[module.layer_idx] = AttentionLayer(module, query.shape[1], key.shape[1])
        return super().attend(module, query, key, value, mask, kwargs)


def survey_attention(decoder: nn.Module, run: Callable[[], Any]) -> dict[int, AttentionLayer]:
    """The layers whose attention goes through transformers' interface, found by one tiny forward pass `run`.

    Raises:
        UnsupportedModelError: none does.
    """
    survey = _Survey()
    candidates = [m for m in decoder.modules() if isinstance(getattr(m, "layer_idx", None), int) and hasattr(m, "config")]
    with _installed(candidates, survey):
        run()
    if not survey.layers:
        raise UnsupportedModelError(
            f"{type(decoder).__name__} does not send its attention through transformers' attention interface, so its heads "
            "cannot be read: use a model from the README's table of architectures, or a newer transformers"
        )
    return dict(sorted(survey.layers.items()))
