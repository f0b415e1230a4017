"""What is changed in the weights of qr-mini before it learns to answer."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

from ..init import CONTENT
from .reading import POINTING

_TWINS, _NOISE = 0.85, 0.7
_COPIED = 4.0


def tell_apart(model: LlamaForCausalLM, end: int) -> None:
    """Moves apart tokens that mean the same, such as a word and the same letters inside a word.

    As long as they are nearly parallel, neither can be written without the other. A token nearly parallel to an earlier
    one gets noise, and `end`, the token that ends answers, a direction of its own.
    """
    meanings = model.model.embed_tokens.weight.data[:, CONTENT:]
    noise = F.normalize(torch.randn(meanings.shape, generator=torch.Generator().manual_seed(3)), dim=1)
    unit = F.normalize(meanings, dim=1)
    twins = torch.cat([(part @ unit.T).tril(start - 1).amax(1) > _TWINS for start, part in _parts(unit)])
    length = meanings.norm(dim=1, keepdim=True)
    meanings[twins] = (F.normalize(unit + _NOISE * noise, dim=1) * length)[twins]
    meanings[end] = noise[end] * length.median()


def _parts(rows: Tensor, size: int = 1000) -> Iterator[tuple[int, Tensor]]:
    return ((start, rows[start : start + size]) for start in range(0, len(rows), size))


def let_copy(model: LlamaForCausalLM) -> None:
    """The pointing heads pass on what they look at: a part of a token's meaning each, read and written alike."""
    number, heads = POINTING
    attention, size = model.model.layers[number].self_attn, model.config.head_dim
    width = model.config.hidden_size - CONTENT
    basis = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(2)))[0]
    for place, head in enumerate(heads):
        rows, part = slice(head * size, (head + 1) * size), basis[place * size : (place + 1) * size]
        attention.v_proj.weight.data[rows] = F.pad(part, (CONTENT, 0))
        attention.o_proj.weight.data[:, rows] = F.pad(part, (CONTENT, 0)).T * _COPIED
