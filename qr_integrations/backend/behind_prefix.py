"""Answers behind a text that was read before: its keys and values are kept, and only what follows it is read.

Legend: G key/value heads, P tokens of the prefix, T all tokens, D head width.
"""

from typing import Any

import torch
from torch import Tensor

from qr_integrations.backend.prefix import Prefix, StoredLayer, narrowest_window
from qr_integrations.backend.prompts import Prompt
from qr_integrations.backend.reader import Reader
from qr_integrations.errors import InputError, UnsupportedModelError, WindowError
from qr_integrations.types import Message

_ALIKE = 0.1  # relative; keys kept as 8-bit steps are off by 0.01, another model's by 1


def lay_out_behind(backend: Reader, messages: tuple[Message, ...], prefix: Prefix) -> Prompt:
    """The prompt whose beginning is `prefix`, up to where the answer begins.

    Args:
        backend: the model.
        messages: what follows the prefix in the user's turn, one text.
        prefix: the beginning of that turn with what stands before it, read through all layers. Its tokens may share
            positions, or leave some out; what follows stands from its next position on.

    Raises:
        InputError: more than one text, a prefix that lacks layers, or another model's.
        WindowError: it is longer than the model's window.
        UnsupportedModelError: the prefix leaves positions out, and layers see fewer tokens back than they span.
    """
    text = messages[0].text
    if len(messages) > 1 or messages[0].role != "user" or messages[0].pictures:
        raise InputError(
            "behind a prefix stands the rest of the user's turn: pass one text without pictures, or leave out prefix"
        )
    _check_layers(backend, prefix)
    _check_model(backend, prefix)
    tail = backend.tokenizer(text + backend.chat.closing, add_special_tokens=False)["input_ids"]
    stop = prefix.num_positions + len(tail)
    if backend.max_tokens is not None and stop >= backend.max_tokens:
        raise WindowError(
            f"{len(tail):,} tokens behind a prefix that ends at position {prefix.num_positions:,} leave no room for an "
            f"answer, {backend.name!r} holds {backend.max_tokens:,}: pass fewer documents, or a shorter question"
        )
    _check_window(backend, prefix, max(stop, len(prefix) + len(tail)))
    token_ids = (*prefix.token_ids, *tail)
    ids = torch.tensor([token_ids], device=backend.device)
    inputs: dict[str, Tensor] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if prefix.num_positions != len(prefix):  # those of the prefix itself are not looked at again
        places = torch.arange(len(token_ids), device=backend.device) + prefix.num_positions - len(prefix)
        inputs["position_ids"] = places.clamp(min=0)[None]
    return Prompt(messages, inputs, token_ids)


def read_in_chunks(backend: Reader, prompt: Prompt) -> Prefix | None:
    """All but the last token of a long text, so that it takes less memory and can be called off between two chunks.

    None: it is short, or has pictures, or is read otherwise than token by token.
    """
    chunk, window = backend.auto_chunk, narrowest_window(backend.config)
    text_only = not prompt.pictures and backend.model.main_input_name != "pixel_values"
    if chunk is None or len(prompt) <= chunk or not text_only or (window is not None and len(prompt) > window):
        return None
    prefix = backend.prefill(prompt.token_ids[:-1], top_layer=max(backend.attention_layers), values=True)
    is_whole = prefix.cache is not None and len(prefix.cache.layers) == backend.config.num_hidden_layers
    return prefix if is_whole and prefix.is_plain else None


def continued_behind(backend: Reader, prompt: Prompt, prefix: Prefix, num_beams: int) -> dict[str, Any]:
    """What ``generate`` is given to go on from `prefix`, which stays as it is.

    Args:
        backend: the model.
        prompt: what `lay_out_behind` gave.
        prefix: the same as there.
        num_beams: how many answers are tried side by side.
    """
    model: Any = backend.model
    if hasattr(model.base_model, "rope_deltas"):
        model.base_model.rope_deltas = None  # of an earlier prompt, whose positions are not ours
    cache = prefix.growing()
    if cache is None:
        return dict(prompt.inputs)
    if num_beams > 1:
        cache.batch_repeat_interleave(num_beams)
    return {**prompt.inputs, "past_key_values": cache}


def num_positions_behind(prompt: Prompt, prefix: Prefix | None) -> int:
    """The position of the answer's first token."""
    return len(prompt) if prefix is None else prefix.num_positions + len(prompt) - len(prefix)


def _check_layers(backend: Reader, prefix: Prefix) -> None:
    """Whether the whole model can go on from it."""
    last = backend.config.num_hidden_layers - 1
    cure = f"build the index with answers=True, or prefill with top_layer={last} and values=True"
    if prefix.top_layer != last:
        raise InputError(f"the prefix holds layers 0..{prefix.top_layer}, an answer needs 0..{last}: {cure}")
    layers: list[Any] = prefix.cache.layers if prefix.cache is not None else []
    for number, layer in enumerate(layers):
        if isinstance(layer, StoredLayer):
            lacks = layer.stored_values is None or layer.heads is not None
        else:
            keys, values = (getattr(layer, name, None) for name in ("keys", "values"))
            lacks = keys is not None and keys.numel() > 0 and values is not None and not values.numel()
        if lacks:
            raise InputError(f"the prefix lacks values or heads of layer {number}, which an answer needs: {cure}")


def _check_model(backend: Reader, prefix: Prefix) -> None:
    """Whether the first attention layer's key of the first token is what this model computes."""
    if not prefix.is_plain or not len(prefix):
        return
    assert prefix.cache is not None
    first = min(backend.attention_layers)
    known = max(prefix.token_ids) < backend.config.vocab_size
    sample = backend.prefill(prefix.token_ids[:1], top_layer=first) if known else None
    if sample is not None and sample.cache is not None:
        mine, its = _first_key(sample.cache.layers[first]), _first_key(prefix.cache.layers[first])
        known = mine.shape == its.shape and bool((mine - its).norm() <= _ALIKE * mine.norm())
    if not known:
        raise InputError(f"the prefix is another model's, not {backend.name!r}'s: read the documents with this one")


def _first_key(layer: Any) -> Tensor:
    """``[1, G, 1, D]``, fp32."""
    if isinstance(layer, StoredLayer):
        return layer.stored_keys.tokens(0, 1).read(torch.float32)
    keys: Tensor = layer.keys[..., :1, :]
    return keys.float()


def _check_window(backend: Reader, prefix: Prefix, length: int) -> None:
    """Sliding layers see so many positions back, their mask counts tokens: where these differ, all must be in sight."""
    window = narrowest_window(backend.config)
    if (prefix.blocks or prefix.next_position is not None) and window is not None and length > window:
        raise UnsupportedModelError(
            f"layers of {backend.name!r} see {window:,} tokens back, documents that are not read one after the other "
            f"need {length:,}: answer from fewer of them, or write them into the question"
        )
