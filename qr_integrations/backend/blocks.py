"""Texts that do not see each other: each read as if it stood alone behind a common beginning, then put side by side.

Legend: B blocks, G key/value heads, P tokens of the beginning, T tokens, D head width.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from qr_integrations.backend.prefix import Prefix, narrowest_window
from qr_integrations.errors import InputError, UnsupportedModelError
from qr_integrations.types import Span

_PASS_TOKENS = 4096  # padded tokens of one pass


def read_blocks(
    run: Callable[..., Any], beginning: Prefix, token_ids: tuple[int, ...], blocks: Sequence[Span], config: Any
) -> Prefix:
    """`beginning` with every block behind it, all blocks at the same positions.

    Blocks of similar length go through the model together, padded at their ends: what comes later changes nothing
    before it, so no mask is needed.

    Args:
        run: `Backend._run`.
        beginning: the tokens before the first block.
        token_ids: the whole text.
        blocks: one after the other up to the end of `token_ids`.
        config: the text model's config.

    Raises:
        InputError: `blocks` leave something out.
        UnsupportedModelError: layers of the model are recurrent, or do not see that far.
    """
    ends = [len(beginning), *(block.stop for block in blocks)]
    if [block.start for block in blocks] != ends[:-1] or ends[-1] != len(token_ids):
        raise InputError("blocks must follow each other from the beginning to the end of the text: pass all of them")
    _check(beginning, len(token_ids), config)
    assert beginning.cache is not None
    read: list[list[tuple[Tensor, Tensor]]] = [[] for _ in blocks]
    for group in _groups(blocks):
        for place, layers in zip(group, _read(run, beginning, token_ids, [blocks[i] for i in group]), strict=True):
            read[place] = layers
    cache = beginning.growing()
    assert cache is not None
    for number, layer in enumerate(cache.layers):
        layer.keys = torch.cat([layer.keys, *(layers[number][0] for layers in read)], dim=-2)
        layer.values = torch.cat([layer.values, *(layers[number][1] for layers in read)], dim=-2)
    return Prefix(token_ids, beginning.top_layer, cache, tuple(blocks))


def _check(beginning: Prefix, num_tokens: int, config: Any) -> None:
    if not beginning.can_crop or beginning.cache is None:
        raise UnsupportedModelError("recurrent layers read documents one after the other: leave out layout='block'")
    check_reach(num_tokens, config)


def check_reach(num_tokens: int, config: Any) -> None:
    """Blocks can only be read where all layers see all of them.

    Raises:
        UnsupportedModelError: some layers do not see that far back.
    """
    window = narrowest_window(config)
    if window is not None and num_tokens > window:
        raise UnsupportedModelError(
            f"sliding layers see {window:,} tokens back, the documents have {num_tokens:,}: leave out layout='block'"
        )


def _groups(blocks: Sequence[Span]) -> Iterator[list[int]]:
    """Numbers of blocks that share a pass: of similar length, few enough that padding included they fit."""
    group: list[int] = []
    for number in sorted(range(len(blocks)), key=lambda number: -len(blocks[number])):
        if group and (len(group) + 1) * len(blocks[group[0]]) > _PASS_TOKENS:
            yield group
            group = []
        group.append(number)
    if group:
        yield group


def _read(
    run: Callable[..., Any], beginning: Prefix, token_ids: tuple[int, ...], blocks: Sequence[Span]
) -> list[list[tuple[Tensor, Tensor]]]:
    """Keys and values of each block: for every layer ``[1, G, T, D]`` without the beginning's."""
    past, longest, cache = len(beginning), len(blocks[0]), DynamicCache()
    assert beginning.cache is not None
    cache.layers = [_many(layer, len(blocks)) for layer in beginning.cache.layers]
    device = cache.layers[0].keys.device
    ids = torch.zeros(len(blocks), longest, dtype=torch.long, device=device)
    for row, block in zip(ids, blocks, strict=True):
        row[: len(block)] = torch.tensor(token_ids[block.slice()], device=device)
    run(ids, cache, past, None, tap=None, stop_after=beginning.top_layer)
    return [
        [
            (layer.keys[i : i + 1, :, past : past + len(block)], layer.values[i : i + 1, :, past : past + len(block)])
            for layer in cache.layers
        ]
        for i, block in enumerate(blocks)
    ]


def _many(layer: Any, count: int) -> DynamicLayer:
    """The same keys and values for `count` texts, to be appended to; the top layer goes on without values."""
    many: DynamicLayer = type(layer)()
    many.keys, many.values = (kept.expand(count, -1, -1, -1) for kept in (layer.keys, layer.values))
    many.dtype, many.device, many.is_initialized = layer.keys.dtype, layer.keys.device, True
    return many
