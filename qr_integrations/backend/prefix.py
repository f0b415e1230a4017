"""Keys and values of a text that is read once and asked many times.

Legend: B batch, G key/value heads, T tokens, D head width.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


class _KeyLayer(DynamicLayer):
    """The top layer: its keys are read, its values never."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = torch.cat([self.keys, key_states], dim=-2)
        self.values = self.keys[..., :0]
        return self.keys, value_states


class _BorrowedLayer(DynamicLayer):
    """Reads a prefix's keys and values and keeps nothing of what one further pass appends, so that branches cost no memory."""

    def __init__(self, owner: DynamicLayer) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = owner.keys, owner.values, True
        self.keys_only = isinstance(owner, _KeyLayer)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys = torch.cat([self.keys, key_states], dim=-2)
        return keys, value_states if self.keys_only else torch.cat([self.values, value_states], dim=-2)


@dataclass(frozen=True, slots=True)
class Prefix:
    """The cache of `token_ids`, up to `top_layer` and no further. Never changed once made; threads may share it.

    Sliding-window layers keep all their keys: the window is in the mask, and a cropped prefix stays exact.
    """

    token_ids: tuple[int, ...]
    top_layer: int
    cache: DynamicCache

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_bytes(self) -> int:
        """Memory of the kept keys and values."""
        tensors = [t for layer in self.cache.layers for t in vars(layer).values() if isinstance(t, Tensor)]
        return sum(t.numel() * t.element_size() for t in tensors)

    @property
    def can_crop(self) -> bool:
        """False for models with recurrent layers, whose state at an earlier token is gone."""
        return all(isinstance(layer, DynamicLayer) for layer in self.cache.layers[: self.top_layer + 1])

    def common_length(self, token_ids: Sequence[int]) -> int:
        """How many leading tokens `token_ids` shares with this prefix."""
        limit = min(len(self), len(token_ids))
        return next((i for i in range(limit) if self.token_ids[i] != token_ids[i]), limit)

    def branch(self) -> DynamicCache:
        """A cache for one pass of further tokens, which leaves the prefix as it is."""
        cache = DynamicCache()
        cache.layers = [_borrow(layer) for layer in self.cache.layers[: self.top_layer + 1]]
        return cache

    def crop(self, num_tokens: int) -> "Prefix":
        """The first `num_tokens` tokens; shares memory with this one."""
        assert self.can_crop and num_tokens <= len(self)
        layers = []
        for layer in self.cache.layers[: self.top_layer + 1]:
            shorter = copy.copy(layer)
            shorter.keys = layer.keys[..., :num_tokens, :]
            shorter.values = layer.values[..., :num_tokens, :]
            layers.append(shorter)
        cache = DynamicCache()
        cache.layers = layers
        return Prefix(self.token_ids[:num_tokens], self.top_layer, cache)

    def growing(self) -> DynamicCache:
        """A cache that starts with this prefix and keeps what is appended; this prefix itself stays as it is."""
        cache = DynamicCache()
        cache.layers = [copy.copy(x) if isinstance(x, DynamicLayer) else copy.deepcopy(x) for x in self.cache.layers]
        return cache


def _borrow(layer: Any) -> Any:
    if type(layer) in (DynamicLayer, _KeyLayer):
        return _BorrowedLayer(layer)
    return copy.deepcopy(layer)  # recurrent and convolution states are small, and are updated in place


def new_cache(config: PreTrainedConfig, top_layer: int) -> DynamicCache:
    """An empty cache for layers 0..top_layer: full layers for sliding ones, keys only at the top."""
    cache = DynamicCache(config=config)
    layers = cache.layers[: top_layer + 1] or [DynamicLayer() for _ in range(top_layer + 1)]
    layers = [DynamicLayer() if type(layer) is DynamicSlidingWindowLayer else layer for layer in layers]
    if type(layers[top_layer]) is DynamicLayer:
        layers[top_layer] = _KeyLayer()
    cache.layers = layers
    return cache
