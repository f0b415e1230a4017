"""Read chosen rows of chosen heads while the model runs, and stop when the last of them is read.

The model keeps its own attention kernel (sdpa, flash, eager). For the length of one forward pass the tapped layers get
a copy of their config that names our attention function; it reads the rows it was asked for, then hands over to the
kernel. Masks are still made by the model from its own config, so they are what the kernel expects.

Legend: B batch, H heads, K kept heads, Q query rows, T all tokens (cache included).
"""

import copy
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qr_integrations.backend.attention_rows import attention_rows
from qr_integrations.errors import HeadError, UnsupportedModelError
from qr_integrations.types import Span

_SCALES = (2.0**14, 2.0**7, 1.0)  # exact in every precision
_EAGER_BLOCK = 256  # rows of an eager softmax at a time, so that H x T x T is never allocated


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
            raise HeadError(
                f"a tap needs at least one row, got {self.rows}: pass rows=Span(start, stop) with stop > start"
            )

    @property
    def top_layer(self) -> int:
        """The deepest layer that is read; nothing above it needs to run."""
        return max(layer for layer, _ in self.heads)


class _TappedKernel(str):
    """The name of our attention function, which passes for the name of the kernel underneath.

    Families ask for that name inside their attention (to fold a sparse choice of keys into the mask, to pad values for
    flash) and must hear what they would hear without us; the lookup goes by the hash and finds our function.
    """

    kernel: str

    def __new__(cls, kernel: str) -> "_TappedKernel":
        name = super().__new__(cls, f"qr_tap_{kernel}")
        name.kernel = kernel
        return name

    def __eq__(self, other: object) -> bool:
        return other == self.kernel or super().__eq__(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


class StopForward(Exception):
    """Not an error: everything wanted has been read. Raised inside the top tapped layer, caught by `run_tapped`."""


class Pass:
    """What one forward pass reads: mutable, lives as long as the pass."""

    def __init__(self, tap: AttentionTap | None, stop_after: int | None, past: int) -> None:
        self.tap, self.stop_after, self.past = tap, stop_after, past
        self.wanted: dict[int, list[int]] = defaultdict(list)
        for layer, head in tap.heads if tap else ():
            self.wanted[layer].append(head)
        self.rows: dict[int, Tensor] = {}

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, kwargs: dict[str, Any]) -> Any:
        """What a layer's attention gives: its output, and perhaps weights."""
        layer = module.layer_idx
        if self.tap is not None and layer in self.wanted:
            with torch.set_grad_enabled(self.tap.differentiable and torch.is_grad_enabled()):
                self.rows[layer] = self._read(module, query, key, mask, kwargs)
        if layer == self.stop_after:
            raise StopForward
        return _underlying_attention(module)(module, query, key, value, mask, **kwargs)

    def _read(self, module: Any, query: Tensor, key: Tensor, mask: Any, kwargs: dict[str, Any]) -> Tensor:
        assert self.tap is not None
        rows = Span(self.tap.rows.start - self.past, self.tap.rows.stop - self.past)
        return attention_rows(
            query, key, mask, rows=rows, heads=self.wanted[module.layer_idx], reduce=self.tap.reduce, **kwargs
        )

    def result(self) -> Tensor:
        """Rows in the order of `tap.heads`: ``[B, K, T]`` or ``[B, K, Q, T]``, fp32."""
        assert self.tap is not None
        slots = {(layer, head): i for layer, heads in self.wanted.items() for i, head in enumerate(heads)}
        device = self.rows[self.tap.top_layer].device
        return torch.stack(
            [self.rows[layer][:, slots[layer, head]].to(device) for layer, head in self.tap.heads], dim=1
        )


class _WeighedPass(Pass):
    """Reads the last position's rows, and adds to what each head brings home there a zero whose gradient is wanted."""

    def __init__(self, tap: AttentionTap, past: int) -> None:
        super().__init__(tap, None, past)
        self.zeros: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, kwargs: dict[str, Any]) -> Any:
        output, weights = super().attend(module, query, key, value, mask, kwargs)
        layer = module.layer_idx
        if layer not in self.wanted:
            return output, weights
        zero = torch.zeros_like(output[:, -1:]).requires_grad_()
        self.zeros[layer], self.values[layer] = zero, value.detach().float()
        return torch.cat([output[:, :-1], output[:, -1:] + zero], dim=1), weights

    def gradients(self, of: Tensor) -> Tensor:
        """The derivative of a number with respect to each weight of `result`: ``[B, K, T]``, fp32.

        A head brings home the sum of its weights times the values, so the derivative with respect to the weight of a
        key is the product of its value and the gradient of what is brought home.
        """
        assert self.tap is not None
        brought = dict(zip(self.zeros, scaled_gradients(of, list(self.zeros.values())), strict=True))
        parts = []
        for layer, head in self.tap.heads:
            gradient, values = brought[layer], self.values[layer]
            group = head * values.shape[1] // gradient.shape[2]
            parts.append((values[:, group] @ gradient[:, 0, head, :, None])[..., 0])
        return torch.stack(parts, dim=1)


def scaled_gradients(number: Tensor, of: Sequence[Tensor]) -> list[Tensor]:
    """The derivatives of a number, fp32; half precision has no numbers as small as those of a confident answer."""
    for scale in _SCALES:
        gradients = torch.autograd.grad(number * scale, list(of), retain_graph=True)
        found = [gradient.float() / scale for gradient in gradients]
        if all(gradient.isfinite().all() for gradient in found):
            break
    return found


def _tapped_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    result: tuple[Tensor, Tensor | None] = module.config.qr_pass.attend(
        module, query, key, value, attention_mask, kwargs
    )
    return result


def _underlying_attention(module: Any) -> Callable[..., Any]:
    """The kernel that the model runs without us."""
    name = module.config._attn_implementation.kernel
    if name != "eager":
        kernel: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[name]
        return kernel
    homes = [sys.modules[cls.__module__] for cls in type(module).__mro__]
    eager = next((home.eager_attention_forward for home in homes if hasattr(home, "eager_attention_forward")), None)
    if eager is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} keeps its eager attention under a name of its own: load the model with "
            "attn_implementation='sdpa'"
        )
    return _in_blocks(eager)


def _in_blocks(eager: Callable[..., Any]) -> Callable[..., Any]:
    """The family's own eager attention, some rows at a time: the rows of a softmax do not depend on each other."""

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> Any:
        parts = []
        for start in range(0, query.shape[2], _EAGER_BLOCK):
            rows = slice(start, start + _EAGER_BLOCK)
            row_mask = mask[:, :, rows] if mask is not None and mask.dim() == 4 else mask
            parts.append(eager(module, query[:, :, rows], key, value, row_mask, **kwargs)[0])
        return torch.cat(parts, dim=1), None

    return attention


def _register(kernel: str) -> _TappedKernel:
    """Register our function for `kernel`, with the kernel's mask function: without it padding is attended."""
    tapped = _TappedKernel(kernel)
    if tapped not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(tapped, _tapped_attention)
        AttentionMaskInterface.register(tapped, ALL_MASK_ATTENTION_FUNCTIONS[kernel])
    return tapped


@contextmanager
def _installed(modules: Sequence[Any], state: Pass) -> Iterator[None]:
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

    The pass ends in layer `stop_after` once its keys are in the cache: that layer's attention and MLP are not computed.
    """
    state = Pass(tap, stop_after, past)
    run_as(state, run, modules)
    return None if tap is None else state.result()


def run_as(state: Pass, run: Callable[[], Any], modules: Sequence[nn.Module]) -> None:
    """Call `run` (one forward pass) with `state` in place of the attention of `modules`."""
    with _installed(modules, state), suppress(StopForward):
        run()


def run_weighed(
    run: Callable[[], Tensor], modules: Sequence[nn.Module], *, tap: AttentionTap, past: int
) -> tuple[Tensor, Tensor]:
    """The last position's rows, and the derivative of the number that `run` returns with respect to each weight.

    Parameters are left alone: what is differentiated is what the heads bring home at the last position.
    """
    state = _WeighedPass(tap, past)
    with torch.enable_grad(), _installed(modules, state):
        number = run()
        return state.result(), state.gradients(number)


class _Watched(Pass):
    """Shows somebody what comes by."""

    def __init__(self, look: Callable[[Any, Tensor, Tensor, Any, dict[str, Any]], None]) -> None:
        super().__init__(None, None, 0)
        self.look = look

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, kwargs: dict[str, Any]) -> Any:
        self.look(module, query, key, mask, kwargs)
        return super().attend(module, query, key, value, mask, kwargs)


def rows_watched(
    modules: Sequence[nn.Module], look: Callable[[Any, Tensor, Tensor, Any, dict[str, Any]], None]
) -> AbstractContextManager[None]:
    """Within the block, `look` sees module, rotated queries, keys, mask and arguments of every attention there."""
    return _installed(modules, _Watched(look))


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """A layer whose attention can be read."""

    module: nn.Module
    num_heads: int
    num_kv_heads: int

    @property
    def kernel(self) -> str:
        """The attention implementation that the layer runs: ``"sdpa"``, ``"eager"``, ..."""
        config: Any = self.module.config
        return config._attn_implementation or "eager"


class _Survey(Pass):
    """Notes which modules come by."""

    def __init__(self) -> None:
        super().__init__(None, None, 0)
        self.layers: dict[int, AttentionLayer] = {}

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, kwargs: dict[str, Any]) -> Any:
        layer = module.layer_idx
        if not isinstance(layer, int) or layer < 0 or layer in self.layers:
            raise UnsupportedModelError(
                f"{type(module).__name__} attends more than once per pass (for several layers, or twice in one), so "
                "that no single row belongs to a head: use a model from the README's table of architectures"
            )
        self.layers[layer] = AttentionLayer(module, query.shape[1], key.shape[1])
        return super().attend(module, query, key, value, mask, kwargs)


def survey_attention(decoder: nn.Module, run: Callable[[], Any]) -> dict[int, AttentionLayer]:
    """The layers whose attention goes through transformers' interface, found by one tiny forward pass `run`.

    Raises:
        UnsupportedModelError: none does.
    """
    survey = _Survey()
    candidates = [m for m in decoder.modules() if hasattr(m, "layer_idx") and hasattr(m, "config")]
    with _installed(candidates, survey):
        run()
    if not survey.layers:
        raise UnsupportedModelError(
            f"{type(decoder).__name__} does not send its attention through transformers' attention interface, so its "
            "heads cannot be read: use a model from the README's table of architectures, or a newer transformers"
        )
    return dict(sorted(survey.layers.items()))
