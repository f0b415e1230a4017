"""Prompts as pruners are given them, made by hand: one picture each, two words in front and some behind."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from qr_integrations.backend.visual_tokens import Embedded

WIDTH = 8


def prompts(
    cells: Sequence[int],
    *,
    words: int = 3,
    features: Sequence[Tensor] | None = None,
    three: bool = False,
    **more: Any,
) -> "Embedded":
    """Prompt i shows one picture of ``cells[i]`` tokens: one word in front of it, and ``words - 1`` behind."""
    from qr_integrations.backend.visual_tokens import NOT_VISUAL, Embedded

    longest = max(cells) + words
    shape = (len(cells), longest)
    width = WIDTH if features is None else features[0].shape[1]
    states = torch.randn(*shape, width, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(shape, dtype=torch.bool)
    cell, picture = torch.full(shape, NOT_VISUAL), torch.full(shape, NOT_VISUAL)
    for prompt, count in enumerate(cells):
        first = longest - count - words
        mask[prompt, first:] = True
        cell[prompt, first + 1 : first + 1 + count] = torch.arange(count)
        picture[prompt, first + 1 : first + 1 + count] = prompt
        if features is not None:
            states[prompt, first + 1 : first + 1 + count] = features[prompt].to(states)
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return Embedded(
        states=states if features is None else states.to(features[0].dtype),
        mask=mask,
        positions=positions.expand(3, *shape) if three else positions,
        picture=picture,
        view=picture.clone(),
        cell=cell,
        source=torch.arange(longest).expand(shape),
        **more,
    )
