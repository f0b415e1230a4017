"""Keys and values of a text that is read once and asked many times.

Legend: B batch, G key/value heads, T tokens, D head width.
"""

import copy
import json
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from qr_integrations.backend.stored import Stored
from qr_integrations.errors import InputError, UnsupportedModelError
from qr_integrations.types import Span

Continuation = Literal["keys", "values", "tokens"]
"""What a prefix must keep at its top layer for a later pass to read right: keys, or values too; or only the tokens."""


class _KeyLayer(DynamicLayer):
    """The top layer: its keys are read, its values never."""

    keys: Tensor
    values: Tensor

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = torch.cat([self.keys, key_states], dim=-2)
        self.values = self.keys[..., :0]
        return self.keys, value_states


class StoredLayer(DynamicLayer):
    """Keys and values as they are kept, cast whenever they are read; never appended to.

    `heads`: which of `num_heads` key/value heads are kept, None for all; the others read as zero.
    """

    def __init__(
        self,
        keys: Stored,
        values: Stored | None,
        dtype: torch.dtype,
        heads: tuple[int, ...] | None = None,
        num_heads: int | None = None,
    ) -> None:
        self.stored_keys, self.stored_values, self.heads, self.num_heads = keys, values, heads, num_heads
        self.dtype, self.device, self.is_initialized = dtype, keys.steps.device, True

    @property
    def keys(self) -> Tensor:
        """``[1, G, T, D]``."""
        kept = self.stored_keys.read(self.dtype)
        if self.heads is None:
            return kept
        assert self.num_heads is not None
        whole = kept.new_zeros(len(kept), self.num_heads, *kept.shape[2:])
        whole[:, list(self.heads)] = kept
        return whole

    @property
    def values(self) -> Tensor:
        """``[1, G, T, D]``; D is 0 where none are kept."""
        if self.stored_values is None:
            return self.stored_keys.steps[..., :0].to(self.dtype)
        return self.stored_values.read(self.dtype)

    @property
    def num_bytes(self) -> int:
        """What is kept."""
        return sum(stored.num_bytes for stored in (self.stored_keys, self.stored_values) if stored is not None)

    def get_seq_length(self) -> int:
        """T."""
        return self.stored_keys.num_tokens

    def dense(self) -> DynamicLayer:
        """The same as a layer that can be appended to."""
        layer = _KeyLayer() if self.stored_values is None else DynamicLayer()
        layer.keys, layer.values, layer.is_initialized = self.keys, self.values, True
        layer.dtype, layer.device = self.dtype, self.device
        return layer


class _BorrowedLayer(DynamicLayer):
    """Reads a prefix's keys and values and keeps nothing of what one further pass appends: branches cost no memory."""

    def __init__(self, owner: DynamicLayer) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = owner.keys, owner.values, True
        self.keys_only = isinstance(owner, _KeyLayer) or getattr(owner, "stored_values", owner) is None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys = _append(self.keys, key_states)
        return keys, value_states if self.keys_only else _append(self.values, value_states)


def _append(kept: Tensor, new: Tensor) -> Tensor:
    return torch.cat([kept.expand(len(new), -1, -1, -1), new], dim=-2)  # one prefix, perhaps many continuations


@dataclass(frozen=True, slots=True)
class Prefix:
    """The cache of `token_ids`, up to `top_layer` and no further. Never changed once made; threads may share it.

    Sliding-window layers keep all their keys: the window is in the mask, and a cropped prefix stays exact. Where a
    model cannot continue from a cache, `cache` is None and each pass reads the tokens again.

    `blocks` are spans of tokens that do not see each other and share their positions, see `Backend.prefill_blocks`;
    `block_positions` is where each begins if they do not share it, `next_position` where the next token stands if that
    is not behind the last.
    """

    token_ids: tuple[int, ...]
    top_layer: int
    cache: DynamicCache | None
    blocks: tuple[Span, ...] = ()
    block_positions: tuple[int, ...] = ()
    next_position: int | None = None

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_positions(self) -> int:
        """The position of the next token."""
        if self.next_position is not None:
            return self.next_position
        if not self.blocks:
            return len(self)
        begins = self.block_positions or (self.blocks[0].start,) * len(self.blocks)
        return max(begin + len(block) for begin, block in zip(begins, self.blocks, strict=True))

    def position_of(self, token: int) -> int:
        """Where a token of this prefix stands."""
        number = bisect_right(self.blocks, token, key=lambda block: block.start) - 1
        if number < 0 or token >= self.blocks[number].stop:
            return token
        begins = self.block_positions[number] if self.block_positions else self.blocks[0].start
        return begins + token - self.blocks[number].start

    @property
    def is_plain(self) -> bool:
        """Whether it is keys and values of single tokens, and nothing else."""
        return self.cache is not None and all(type(layer) in (*_PLAIN, StoredLayer) for layer in self._layers)

    @property
    def num_bytes(self) -> int:
        """Memory of the kept keys, values and states."""
        kept = [vars(layer) for layer in self._layers]
        stored = sum(layer.num_bytes for layer in self._layers if isinstance(layer, StoredLayer))
        kept += [value for values in kept for value in values.values() if isinstance(value, dict)]  # recurrent states
        tensors = [value for values in kept for value in values.values() if isinstance(value, Tensor)]
        return stored + sum(t.numel() * t.element_size() for t in tensors)

    @property
    def can_crop(self) -> bool:
        """False for models with recurrent layers, whose state at an earlier token is gone, for blocks and pieces."""
        if self.blocks or self.next_position is not None:
            return False
        return all(type(layer) in (*_PLAIN, StoredLayer, DummyLayer) for layer in self._layers)

    def is_of(self, other: "Prefix") -> bool:
        """Whether the model that made `other`, a prefix of the first few of these tokens, made this one too."""
        if self.top_layer != other.top_layer or len(self._layers) != len(other._layers):
            return False
        for mine, its in zip(self._layers, other._layers, strict=True):
            if type(mine) in (*_PLAIN, StoredLayer):
                keys = mine.keys[..., : len(other), :].float()
                if keys.shape != its.keys.shape or (keys - its.keys.float()).abs().mean() > 0.05 * keys.abs().mean():
                    return False
        return True

    @property
    def _layers(self) -> list[Any]:
        return self.cache.layers if self.cache is not None else []

    def common_length(self, token_ids: Sequence[int]) -> int:
        """How many leading tokens `token_ids` shares with this prefix."""
        limit = min(len(self), len(token_ids))
        if self.token_ids[:limit] == tuple(token_ids[:limit]):  # the usual case, without a loop in Python
            return limit
        return next((i for i in range(limit) if self.token_ids[i] != token_ids[i]), limit)

    def beginning_of(self, token_ids: Sequence[int]) -> "Prefix | None":
        """The part of this prefix that `token_ids` begins with; None where there is none, or it cannot be had alone."""
        common = self.common_length(token_ids)
        if common == len(self) and not self.blocks and self.next_position is None:
            return self
        return self.crop(common) if common and self.can_crop else None

    def branch(self) -> DynamicCache | None:
        """A cache for one pass of further tokens, which leaves the prefix as it is."""
        return self._with(_borrow)

    def growing(self) -> DynamicCache | None:
        """A cache that starts with this prefix and keeps what is appended; this prefix itself stays as it is."""
        return self._with(_grown)

    def crop(self, num_tokens: int) -> "Prefix":
        """The first `num_tokens` tokens; shares memory with this one."""
        assert self.can_crop and num_tokens <= len(self)
        cache = self._with(lambda layer: _cropped(layer, num_tokens))
        return Prefix(self.token_ids[:num_tokens], self.top_layer, cache)

    def save(self, path: str | Path) -> None:
        """Write the prefix to a safetensors file, to be read by `Backend.load_prefix`.

        Raises:
            UnsupportedModelError: it holds the states of recurrent layers, or blocks.
            InputError: of the top layer, it holds some heads only.
        """
        if not self.can_crop:
            raise UnsupportedModelError(
                "states of recurrent layers, and blocks, cannot be saved: keep the text, and prefill it again"
            )
        if any(isinstance(layer, StoredLayer) and layer.heads is not None for layer in self._layers):
            raise InputError("the prefix lacks heads of its top layer: prefill the text, and save that")
        layers = [layer.dense() if isinstance(layer, StoredLayer) else layer for layer in self._layers]
        parts = {f"{i}.keys": layer.keys for i, layer in enumerate(layers) if type(layer) in _PLAIN}
        parts |= {f"{i}.values": layer.values for i, layer in enumerate(layers) if type(layer) is DynamicLayer}
        metadata = {"token_ids": json.dumps(self.token_ids), "top_layer": str(self.top_layer)}
        save_file({name: tensor.contiguous() for name, tensor in parts.items()}, path, metadata)

    def _with(self, change: Callable[[Any], Any]) -> DynamicCache | None:
        if self.cache is None:
            return None
        cache = DynamicCache()
        vars(cache).update({name: value for name, value in vars(self.cache).items() if name not in vars(cache)})
        cache.layers = [change(layer) for layer in self._layers]
        return cache


_PLAIN = (
    DynamicLayer,
    _KeyLayer,
)  # exact types: heirs carry recurrent states or further caches besides keys and values


def _grown(layer: Any) -> Any:
    if isinstance(layer, StoredLayer):
        return layer.dense()
    return copy.copy(layer) if type(layer) in _PLAIN else copy.deepcopy(layer)


def _borrow(layer: Any) -> Any:
    if type(layer) in (*_PLAIN, StoredLayer):
        return _BorrowedLayer(layer)
    return copy.deepcopy(layer)  # recurrent and convolution states are small, and are updated in place


def _cropped(layer: Any, num_tokens: int) -> Any:
    if isinstance(layer, StoredLayer):
        values = None if layer.stored_values is None else layer.stored_values.tokens(0, num_tokens)
        return StoredLayer(layer.stored_keys.tokens(0, num_tokens), values, layer.dtype, layer.heads, layer.num_heads)
    shorter = copy.copy(layer)
    if type(layer) in _PLAIN:
        shorter.keys = layer.keys[..., :num_tokens, :]
        shorter.values = layer.values[..., :num_tokens, :]
    return shorter


def read_prefix(path: str | Path, config: PreTrainedConfig, device: torch.device) -> Prefix:
    """What `Prefix.save` wrote. All layers go to `device`."""
    with safe_open(path, "pt", device=str(device)) as file:
        metadata, parts = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    top_layer = int(metadata["top_layer"])
    continuation: Continuation = ("values" if f"{top_layer}.values" in parts else "keys") if parts else "tokens"
    cache = new_cache(config, top_layer, continuation)
    for i, layer in enumerate(cache.layers if cache is not None else []):
        if f"{i}.keys" in parts:
            keys = parts[f"{i}.keys"]
            layer.keys, layer.values, layer.is_initialized = keys, parts.get(f"{i}.values", keys[..., :0]), True
            layer.dtype, layer.device = keys.dtype, keys.device
    return Prefix(tuple(json.loads(metadata["token_ids"])), top_layer, cache)


def sliding_window(config: PreTrainedConfig) -> int | None:
    """How many tokens back the model's sliding layers see; None where no layer slides."""
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    return window if window and slides else None


def narrowest_window(config: PreTrainedConfig) -> int | None:
    """How many tokens back all layers see: the sliding ones, and those that attend within chunks; None without them."""
    windows = [sliding_window(config), getattr(config, "attention_chunk_size", None)]
    return min((window for window in windows if window), default=None)


def new_cache(config: PreTrainedConfig, top_layer: int, continuation: Continuation) -> DynamicCache | None:
    """An empty cache for layers 0..top_layer: full layers for sliding ones, at the top what `continuation` asks for."""
    if continuation == "tokens":
        return None
    cache = DynamicCache(config=config)
    layers = cache.layers[: top_layer + 1] or [DynamicLayer() for _ in range(top_layer + 1)]
    layers = [DynamicLayer() if type(layer) is DynamicSlidingWindowLayer else layer for layer in layers]
    if continuation == "keys" and type(layers[top_layer]) is DynamicLayer:
        layers[top_layer] = _KeyLayer()
    cache.layers = layers
    return cache
