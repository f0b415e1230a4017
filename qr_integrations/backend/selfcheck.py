"""Is a model's attention read right? Compares what the tap reads with what the model computes itself.

Each check is a function of a `Backend` that returns a frozen `Check` and leaves the model as it was.

Legend: B batch, L attention layers, H heads, Q query rows, S tokens of this pass, T all tokens.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qr_integrations.backend.attention_tap import AttentionTap
from qr_integrations.backend.backend import Backend
from qr_integrations.backend.families import published_pieces
from qr_integrations.errors import InputError, QRError
from qr_integrations.types import Span

Outcome = Literal["passed", "failed", "skipped"]
LEAST_TOKENS = 300  # of the memory check
_TEXT = "Kushva lies east of the Urals. Its first furnace was lit in 1739, and the town grew around it. " * 4
_NUM_TOKENS, _NUM_KEPT, _NUM_PADDING = 48, 29, 5
_WEIGHT_LIMIT = 1e-5  # largest difference of one attention weight, in fp32
# Mean share of a row's attention that lies elsewhere. In half precision a family's eager attention rounds its logits to
# 11 (float16) or 8 bits before the softmax, where the tap computes in fp32: single weights differ by up to 0.1.
_SHARE_LIMIT = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True, slots=True)
class Check:
    """One line of a report.

    Attributes:
        name: what was checked.
        outcome: a skipped check says why in `detail` and fails nothing.
        value: what was measured; None where nothing was.
        limit: the largest `value` that passes.
        detail: unit and circumstances, or the error.
    """

    name: str
    outcome: Outcome
    value: float | None = None
    limit: float | None = None
    detail: str = ""


def describe(backend: Backend) -> dict[str, str]:
    """What the model is, in words.

    Raises:
        UnsupportedModelError: its attention cannot be read.
    """
    model, config, layers = backend.model, backend.config, backend.attention_layers
    heads = sorted({(layer.num_heads, layer.num_kv_heads) for layer in layers.values()})
    sliding = getattr(config, "sliding_window", None)
    kernels = sorted({layer.kernel for layer in layers.values()})
    return {
        "architecture": f"{type(model).__name__} ({config.model_type})",
        "layers": f"{config.num_hidden_layers}, attention can be read in {len(layers)}",
        "heads": ", ".join(f"{query} per layer, {kv} for keys and values" for query, kv in heads),
        "window": f"{backend.max_tokens:,} tokens" if backend.max_tokens else "no limit stated",
        "sliding window": f"{sliding:,} tokens in some or all layers" if sliding else "none",
        "parameters": f"{model.num_parameters():,}",
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(backend.device),
        "attention kernel": ", ".join(kernels),
        "prompt": _prompt(backend),
    }


def _prompt(backend: Backend) -> str:
    if published_pieces(backend.config, backend.tokenizer) is not None:
        return "as published with QRHead"
    return "the model's chat template" if getattr(backend.tokenizer, "chat_template", None) else "plain text"


def run_checks(backend: Backend, *, num_tokens: int = 512) -> Iterator[Check]:
    """All checks, each as soon as it is done. One that raises has failed, and the others still run.

    Args:
        backend: the model.
        num_tokens: length of the memory check; cut to the model's window.
    """
    checks: list[tuple[str, Callable[[Backend], Check]]] = [
        ("rows equal eager attention", check_rows),
        ("rows under the model's kernel", check_kernel),
        ("layers above do not run", check_early_stop),
        ("kept prefix", check_prefix),
        ("prefix read in chunks", partial(check_prefix, chunk_tokens=7)),
        ("left padding", check_padding),
        ("memory", partial(check_memory, num_tokens=num_tokens)),
    ]
    for name, check in checks:
        yield guarded(name, partial(check, backend))


def guarded(name: str, check: Callable[[], Check]) -> Check:
    """The check's result, or a failed one that tells the error."""
    try:
        return check()
    except (QRError, RuntimeError, ValueError, TypeError, AttributeError, LookupError, NotImplementedError) as error:
        return Check(name, "failed", detail=f"{type(error).__name__}: {error}".split("\n")[0])


def check_rows(backend: Backend) -> Check:
    """Rows of all heads of all attention layers against the eager attention weights, both under the eager kernel."""
    name, ids = "rows equal eager attention", _token_ids(backend)
    with backend.locked(), _eager(backend):
        expected = _own_weights(backend, ids)
        if expected is None:
            return Check(name, "skipped", detail="the model does not hand out its eager attention weights")
        found = backend.forward(ids, tap=_all_heads(backend, len(ids)))
    if backend.model.dtype != torch.float32:
        return _judged(name, _moved(found, expected), backend, "share of attention elsewhere (half precision)")
    error = (found.cpu() - expected).abs().max().item()
    outcome: Outcome = "passed" if error <= _WEIGHT_LIMIT else "failed"
    return Check(name, outcome, error, _WEIGHT_LIMIT, "largest difference of a weight")


def check_kernel(backend: Backend) -> Check:
    """Rows under the kernel the model was loaded with (sdpa, flash, ...) against eager: are its masks read right?"""
    name, ids = "rows under the model's kernel", _token_ids(backend)
    with backend.locked(), _eager(backend):
        expected = _own_weights(backend, ids)
    if expected is None:
        return Check(name, "skipped", detail="the model does not hand out its eager attention weights")
    found = backend.forward(ids, tap=_all_heads(backend, len(ids)))
    kernel = next(iter(backend.attention_layers.values())).kernel
    return _judged(name, _moved(found, expected), backend, f"share of attention elsewhere, {kernel}")


def check_early_stop(backend: Backend) -> Check:
    """A tap in the middle runs no layer above it, and reads what a tap of all layers reads."""
    name, ids, layers = "layers above do not run", _token_ids(backend), list(backend.attention_layers)
    if len(layers) < 2:
        return Check(name, "skipped", detail="only one layer has attention")
    middle = layers[(len(layers) - 1) // 2]
    rows, heads = Span(0, len(ids)), _heads_of(backend, [middle])
    with backend.locked(), _counted(backend) as ran:
        stopped = backend.forward(ids, tap=AttentionTap(heads, rows, reduce="none"))
        num_ran = len(ran)
    through = backend.forward(ids, tap=AttentionTap(heads + _heads_of(backend, layers[-1:]), rows, reduce="none"))
    error = (stopped - through[:, : len(heads)]).abs().max().item()
    total, above = len(_blocks(backend)), _blocks_above(backend, middle)
    detail = f"largest difference of a weight; read in layer {middle}, {num_ran} of {total} layers ran"
    return Check(name, "passed" if error <= 1e-6 and num_ran <= total - above else "failed", error, 1e-6, detail)


def check_prefix(backend: Backend, *, chunk_tokens: int | None = None) -> Check:
    """Rows of later tokens on a kept prefix, read whole or in chunks, against those of one pass over everything."""
    name = "prefix read in chunks" if chunk_tokens else "kept prefix"
    ids, top = _token_ids(backend), max(backend.attention_layers)
    kept = len(ids) * _NUM_KEPT // _NUM_TOKENS
    tap = AttentionTap(_heads_of(backend, list(backend.attention_layers)), Span(kept, len(ids)), reduce="none")
    prefix = backend.prefill(ids[:kept], top_layer=top, chunk_tokens=chunk_tokens)
    found = backend.forward(ids[kept:], tap=tap, prefix=prefix)
    kind = "" if prefix.cache is not None else "; this family reads its prefix again"
    moved = _moved(found, backend.forward(ids, tap=tap))
    return _judged(name, moved, backend, f"share of attention elsewhere{kind}")


def check_padding(backend: Backend) -> Check:
    """A text padded on the left, in a batch with a longer one, against the text alone."""
    long = _token_ids(backend)
    short, pad = long[_NUM_PADDING:], getattr(backend.tokenizer, "pad_token_id", None) or 0
    ids = torch.tensor([long, [pad] * _NUM_PADDING + short])
    mask = torch.ones_like(ids)
    mask[1, :_NUM_PADDING] = 0
    padded = backend.forward(ids, tap=_all_heads(backend, len(long)), attention_mask=mask.to(backend.device))
    alone = backend.forward(short, tap=_all_heads(backend, len(short)))
    moved = _moved(padded[1:, :, _NUM_PADDING:, _NUM_PADDING:], alone)
    return _judged("left padding", moved, backend, "share of attention elsewhere")


def check_memory(backend: Backend, *, num_tokens: int = 512) -> Check:
    """No tensor of heads x tokens x tokens is made while a text is read and its last rows are tapped.

    Raises:
        InputError: fewer than 300 tokens, which an eager kernel may take in one block.
    """
    if num_tokens < LEAST_TOKENS:
        raise InputError(f"the memory check needs at least {LEAST_TOKENS} tokens, got {num_tokens}: pass 512")
    size = _unlike_any_weight(backend, min(num_tokens, backend.max_tokens or num_tokens))
    if size < LEAST_TOKENS - 8:
        return Check("memory", "skipped", detail=f"the model holds {backend.max_tokens} tokens, too few to tell")
    ids, top = (_token_ids(backend) * size)[:size], max(backend.attention_layers)
    tail = size - size // 8
    backend.prefill(ids[:8], top_layer=top)  # what is tried out once per layer is not measured
    with _Allocations(size) as made:
        prefix = backend.prefill(ids[:tail], top_layer=top)
        backend.forward(ids[tail:], tap=AttentionTap(_heads_of(backend, [top]), Span(tail, size)), prefix=prefix)
        backend.prefill(ids, top_layer=top)
    square = max(layer.num_heads for layer in backend.attention_layers.values()) * size * size
    detail = (
        f"elements of the largest tensor of tokens x tokens; {size} tokens, largest tensor of all "
        f"{made.largest_bytes / 2**20:.1f} MiB, the prefix keeps {prefix.num_bytes // len(prefix):,} bytes per token"
    )
    passed = made.largest_square < square or square == size * size
    return Check("memory", "passed" if passed else "failed", float(made.largest_square), float(square - 1), detail)


# ---- what the checks stand on


def _token_ids(backend: Backend) -> list[int]:
    ids = list(backend.tokenizer(_TEXT, add_special_tokens=True)["input_ids"])
    while len(ids) < _NUM_TOKENS:
        ids += ids or [0]
    return ids[:_NUM_TOKENS]


def _heads_of(backend: Backend, layers: Sequence[int]) -> tuple[tuple[int, int], ...]:
    return tuple((layer, head) for layer in layers for head in range(backend.attention_layers[layer].num_heads))


def _all_heads(backend: Backend, num_rows: int) -> AttentionTap:
    return AttentionTap(_heads_of(backend, list(backend.attention_layers)), Span(0, num_rows), reduce="none")


def _moved(found: Tensor, expected: Tensor) -> float:
    """Mean over rows of the attention that would have to be moved to make one the other, 0 to 1."""
    return (found.float().cpu() - expected.float().cpu()).abs().sum(-1).mean().item() / 2


def _judged(name: str, value: float, backend: Backend, detail: str) -> Check:
    limit = _SHARE_LIMIT.get(backend.model.dtype, max(_SHARE_LIMIT.values()))
    return Check(name, "passed" if value <= limit else "failed", value, limit, detail)  # NaN fails


@contextmanager
def _eager(backend: Backend) -> Iterator[None]:
    """The eager kernel in every attention layer; each gets its own back on every way out. Hold the lock."""
    holders = [backend.decoder, *(m for m in backend.decoder.modules() if hasattr(m, "config"))]
    configs: list[Any] = list({id(m.config): m.config for m in holders}.values())
    kernels = [config._attn_implementation_internal for config in configs]
    try:
        for config in configs:
            config._attn_implementation_internal = "eager"
        yield
    finally:
        for config, kernel in zip(configs, kernels, strict=True):
            config._attn_implementation_internal = kernel


@torch.no_grad()
def _own_weights(backend: Backend, ids: Sequence[int]) -> Tensor | None:
    """Full attention weights of all attention layers from a plain pass, ``[1, L * H, T, T]``; None without any."""
    out = backend.decoder(
        input_ids=torch.tensor([list(ids)], device=backend.device), use_cache=False, output_attentions=True
    )
    square = (len(ids), len(ids))  # recurrent layers report something else, or None
    found = [a.float().cpu() for a in out.attentions or () if a is not None and tuple(a.shape[-2:]) == square]
    return torch.cat(found, dim=1) if len(found) == len(backend.attention_layers) else None


def _blocks(backend: Backend) -> list[nn.Module]:
    """The decoder's layers; its attention modules where they do not stand in one list."""
    num_layers = backend.config.num_hidden_layers
    lists = [m for m in backend.decoder.modules() if isinstance(m, nn.ModuleList) and len(m) == num_layers]
    return list(lists[0]) if lists else [layer.module for layer in backend.attention_layers.values()]


def _blocks_above(backend: Backend, layer: int) -> int:
    blocks, module = _blocks(backend), backend.attention_layers[layer].module
    at = next(i for i, block in enumerate(blocks) if any(inner is module for inner in block.modules()))
    return len(blocks) - 1 - at


@contextmanager
def _counted(backend: Backend) -> Iterator[list[int]]:
    """Notes which layers are entered."""
    ran: list[int] = []
    hooks = [
        block.register_forward_pre_hook(lambda *_, index=index: ran.append(index))
        for index, block in enumerate(_blocks(backend))
    ]
    try:
        yield ran
    finally:
        for hook in hooks:
            hook.remove()


def _unlike_any_weight(backend: Backend, size: int) -> int:
    """`size`, or the next smaller number that is no dimension of a weight: so that tokens x tokens is recognised."""
    taken = {n for weight in backend.model.parameters() for n in weight.shape}
    return next(n for n in range(size, 0, -1) if n not in taken)


class _Allocations(TorchDispatchMode):
    """Watches every tensor that torch makes: bytes of the largest, elements of the largest with two sides of `size`."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.largest_bytes, self.largest_square = size, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for made in tree_leaves(out):
            if isinstance(made, Tensor) and made.untyped_storage()._cdata not in given:  # a view allocates nothing
                self.largest_bytes = max(self.largest_bytes, made.numel() * made.element_size())
                if list(made.shape).count(self.size) >= 2:
                    self.largest_square = max(self.largest_square, made.numel())
        return out


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """How long `work` takes, and what it returns."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result
