"""How far the tap's rows are from the model's own eager attention, for every architecture.

``python -m tests.backend.measure FILE`` measures all of them and writes the README's table as Markdown.
"""

import copy
import inspect
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from qr_integrations.backend import AttentionTap, Backend
from qr_integrations.types import Span
from tests.backend.architectures import SUPPORTED, VOCAB, Architecture

NUM_TOKENS, NUM_PREFIX, PADDING = 24, 13, 5  # all longer than the sliding windows, but for the padding
RECURRENT = ("A_log", "dt_bias", ".D", "conv", "dt_proj", "x_proj", "lambda", "recurrent_param", "decay")

QUERY_KEY_NORM = re.compile(r"(^|[._])(q|k|query|key)_?(layer)?norm")


@dataclass(frozen=True)
class Bench:
    """One architecture, set up: the backend under test, and a copy of its model that runs plain eager attention."""

    backend: Backend
    eager: PreTrainedModel

    @property
    def heads(self) -> tuple[tuple[int, int], ...]:
        layers = self.backend.attention_layers
        return tuple((layer, head) for layer in layers for head in range(layers[layer].num_heads))

    @property
    def top_layer(self) -> int:
        return max(self.backend.attention_layers)


@dataclass(frozen=True)
class Measured:
    """A line of the table: the largest difference of any attention weight, without cache, padded, on a kept prefix."""

    architecture: Architecture
    layers: str
    heads: str
    plain: float
    padded: float | None
    cached: float
    prefix: str


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(VOCAB)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), pad_token="w0")


def random_model(architecture: Architecture, kernel: str | None = None) -> PreTrainedModel:
    """Weights so spread out that attention is far from uniform and every norm, bias and sink matters."""
    config = getattr(transformers, architecture.config)(**architecture.kwargs)
    torch.manual_seed(7)
    auto = getattr(transformers, architecture.auto)
    model: PreTrainedModel = auto.from_config(config, dtype=torch.float32, attn_implementation=kernel).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if not any(part in name for part in RECURRENT):
                spread(name, weight)
    return model


def spread(name: str, weight: Tensor) -> None:
    if weight.dim() > 1 and "norm" not in name:
        weight.normal_(std=0.25)
    else:
        weight.add_(torch.randn_like(weight), alpha=1.0 if "sink" in name else 0.3)
    if QUERY_KEY_NORM.search(name):
        weight.mul_(1.2)  # or normed queries and keys would look everywhere alike


@lru_cache(maxsize=4)
def bench(architecture: Architecture, kernel: str | None = None) -> Bench:
    model = random_model(architecture, kernel)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    return Bench(Backend(model, tiny_tokenizer(), name=architecture.name), eager)


def named(name: str) -> Architecture:
    return next(architecture for architecture in SUPPORTED if architecture.name == name)


def random_ids(num_tokens: int = NUM_TOKENS, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (num_tokens,), generator=generator).tolist()


@torch.no_grad()
def reference(model: PreTrainedModel, ids: Sequence[int] | Tensor, mask: Tensor | None = None) -> Tensor:
    """Full attention of all attention layers from a plain forward pass: ``[B, layers * H, T, T]``."""
    ids = torch.as_tensor(ids).reshape(-1, torch.as_tensor(ids).shape[-1])
    positions = {} if mask is None else {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}  # as `generate` does
    if mask is not None and not takes_positions(model):
        positions = {}
    out = model(input_ids=ids, attention_mask=mask, use_cache=False, output_attentions=True, **positions)
    square = (ids.shape[1], ids.shape[1])  # linear-attention layers report something else, or None
    return torch.cat([a for a in out.attentions if a is not None and a.shape[-2:] == square], dim=1).float()


def takes_positions(model: PreTrainedModel) -> bool:
    return "position_ids" in inspect.signature(model.forward).parameters


def tap_all(on: Bench, rows: Span) -> AttentionTap:
    return AttentionTap(on.heads, rows, reduce="none")


def difference(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape, (found.shape, expected.shape)
    assert expected.isfinite().all()
    return (found - expected).abs().max().item()


def plain_error(on: Bench) -> float:
    ids = random_ids()
    rows = on.backend.forward(ids, tap=tap_all(on, Span(0, NUM_TOKENS)))
    return difference(rows, reference(on.eager, ids))


def padded_batch() -> tuple[Tensor, Tensor]:
    """Two texts of different length, the shorter one padded on the left."""
    ids, mask = torch.tensor([random_ids(), random_ids(seed=1)]), torch.ones(2, NUM_TOKENS, dtype=torch.long)
    ids[1, :PADDING], mask[1, :PADDING] = 0, 0
    return ids, mask


def padded_error(on: Bench) -> float:
    ids, mask = padded_batch()
    rows = on.backend.forward(ids, tap=tap_all(on, Span(0, NUM_TOKENS)), attention_mask=mask)
    expected = reference(on.eager, ids, mask)
    return max(difference(rows[0], expected[0]), difference(rows[1, :, PADDING:], expected[1, :, PADDING:]))


def cached_error(on: Bench, chunk_tokens: int | None = None) -> float:
    ids = random_ids()
    prefix = on.backend.prefill(ids[:NUM_PREFIX], top_layer=on.top_layer, chunk_tokens=chunk_tokens)
    rows = on.backend.forward(ids[NUM_PREFIX:], tap=tap_all(on, Span(NUM_PREFIX, NUM_TOKENS)), prefix=prefix)
    return difference(rows, reference(on.eager, ids)[:, :, NUM_PREFIX:])


def measure(architecture: Architecture) -> Measured:
    on = bench(architecture)
    layers = list(on.backend.attention_layers.values())
    return Measured(
        architecture,
        f"{len(layers)} of {len(decoder_layers(on.backend))}",
        f"{max(layer.num_heads for layer in layers)} / {max(layer.num_kv_heads for layer in layers)}",
        plain_error(on),
        padded_error(on) if architecture.left_padding else None,
        max(cached_error(on), cached_error(on, 5)),
        "read again" if on.backend.prefill(random_ids(), top_layer=on.top_layer).cache is None else "continued",
    )


def decoder_layers(backend: Backend) -> nn.ModuleList:
    """The stack of layers, whatever the family calls it."""
    depth = backend.config.num_hidden_layers
    return next(m for m in backend.decoder.modules() if isinstance(m, nn.ModuleList) and len(m) == depth)


def cells(row: Measured) -> list[str]:
    errors = ["—" if error is None else f"{error:.0e}" for error in (row.plain, row.padded, row.cached)]
    return [row.architecture.name, row.architecture.special, row.layers, row.heads, *errors, row.prefix]


HEADER = [
    "architecture",
    "what is special",
    "attention layers",
    "heads / kv",
    "plain",
    "left padding",
    "prefix",
    "kept",
]


def as_markdown(table: Sequence[Measured]) -> str:
    """The README's table: largest difference of any attention weight from eager attention, fp32."""
    lines = [HEADER, ["---"] * len(HEADER), *map(cells, table)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def as_text(table: Sequence[Measured]) -> str:
    lines = [HEADER, *map(cells, table)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(as_markdown([measure(architecture) for architecture in SUPPORTED]), encoding="utf-8")
