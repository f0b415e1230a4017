"""What a method for choosing tokens has to beat: chance, evenly spread cells, and two readings of attention.

Legend: B prompts, T tokens, H heads, N patches, d width of the tower, k picks.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qr_integrations.backend.tower_attention import class_attention
from qr_integrations.backend.visual_tokens import Embedded, Left
from qr_integrations.errors import InputError
from qr_integrations.pruning.base import (
    ChosenBefore,
    Positions,
    PruneRecord,
    check_finite,
    check_keep,
    check_positions,
    choose_before,
    is_compact,
    left_with,
    num_kept,
    top_places,
)

Choice = Callable[[int, Int[Tensor, " N"]], Int[Tensor, " k"]]
"""From the number of a prompt and the places of one of its views to those of them that stay."""


@dataclass(frozen=True, slots=True)
class RandomTokens:
    """Keep tokens drawn at random.

    Args:
        keep: tokens per view, or a share of them in (0, 1].
        seed: from 0; every prompt begins with it anew, so that a prompt keeps the same tokens alone and in a batch.
        positions: see `CDPruner`.

    Raises:
        InputError: a setting out of range.
    """

    keep: int | float
    seed: int = 0
    positions: Positions = "auto"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_positions(self.positions)
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or not 0 <= self.seed < 2**63:
            raise InputError(f"seed={self.seed!r} cannot be: pass a whole number from 0 to 2**63 - 1")

    def start(self, backend: Any, seen: Embedded) -> ChosenBefore:
        """Choose what the language model reads."""
        draws = [torch.Generator().manual_seed(self.seed) for _ in seen.mask]

        def choose(prompt: int, places: Int[Tensor, " N"]) -> Int[Tensor, " k"]:
            order = torch.randperm(len(places), generator=draws[prompt])
            return order[: num_kept(self.keep, len(places))].to(places.device)

        return _chosen("RandomTokens", seen, choose, self.positions)


@dataclass(frozen=True, slots=True)
class UniformGrid:
    """Keep cells that are spread evenly over each view.

    Args:
        keep: tokens per view, or a share of them in (0, 1].
        positions: see `CDPruner`.

    Raises:
        InputError: a setting out of range.
    """

    keep: int | float
    positions: Positions = "auto"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_positions(self.positions)

    def start(self, backend: Any, seen: Embedded) -> ChosenBefore:
        """Choose what the language model reads."""

        def choose(prompt: int, places: Int[Tensor, " N"]) -> Int[Tensor, " k"]:
            columns = _num_columns(seen, prompt, places)
            picked = evenly_spread(len(places) // columns, columns, num_kept(self.keep, len(places)))
            return torch.tensor(picked, device=places.device)

        return _chosen("UniformGrid", seen, choose, self.positions)


@dataclass(frozen=True, slots=True)
class ClassAttention:
    """Keep the patches that the vision tower's class token attends to most, in the layer that made the features.

    Args:
        keep: tokens per view, or a share of them in (0, 1].
        positions: see `CDPruner`.

    Raises:
        InputError: a setting out of range.
    """

    keep: int | float
    positions: Positions = "auto"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_positions(self.positions)

    def start(self, backend: Any, seen: Embedded) -> ChosenBefore:
        """Choose what the language model reads.

        Raises:
            UnsupportedModelError: a family without class token, or whose visual tokens are not patches.
            ScoreError: attention of NaN.
        """
        if not bool(seen.visual.any()):
            return choose_before("ClassAttention", seen, [], self.positions)
        attention = class_attention(backend.model, seen.tower)
        check_finite(attention, "attention of the class token")

        def choose(prompt: int, places: Int[Tensor, " N"]) -> Int[Tensor, " k"]:
            scores = attention[seen.view[prompt, places], seen.cell[prompt, places]]
            return top_places(scores, num_kept(self.keep, len(places)))

        return _chosen("ClassAttention", seen, choose, self.positions)


@dataclass(frozen=True, slots=True)
class LastTokenAttention:
    """Keep the tokens that the prompt's last token attends to most in an early layer, after the manner of FastV.

    All layers up to that one read all tokens. FastV is arXiv 2403.06764; there the budget is one for all pictures.

    Args:
        keep: tokens per view, or a share of them in (0, 1].
        layer: after which of the language model's layers tokens go, counted from 0.
        positions: see `CDPruner`; ``"kept"`` as published.

    Raises:
        InputError: a setting out of range.
    """

    keep: int | float
    layer: int = 2
    positions: Positions = "kept"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_positions(self.positions)
        if not isinstance(self.layer, int) or isinstance(self.layer, bool) or self.layer < 0:
            raise InputError(f"layer={self.layer!r} cannot be: pass the number of a layer, counted from 0")

    def start(self, backend: Any, seen: Embedded) -> "_LastTokenPruning":
        """Begin with a batch of prompts.

        Raises:
            InputError: the model has no such layer, or none behind it.
        """
        depth = backend.config.num_hidden_layers
        if self.layer >= depth - 1:
            raise InputError(f"{backend.name!r} has layers 0 to {depth - 1}: pass layer={depth - 2} or less")
        layers = (self.layer,) if bool(seen.visual.any()) else ()
        return _LastTokenPruning(self.keep, layers, is_compact(self.positions, seen))


class _LastTokenPruning:
    """A pass of `LastTokenAttention`."""

    def __init__(self, keep: int | float, layers: tuple[int, ...], compact: bool) -> None:
        self.layers, self.compact, self.record = layers, compact, PruneRecord("LastTokenAttention")
        self._keep = keep

    def before(self) -> Left | None:
        return None

    def rows(self, now: Embedded) -> Sequence[Int[Tensor, " _"]]:
        last = now.mask.shape[1] - 1  # padding is at the left
        return [torch.tensor([last], device=now.mask.device)] * len(now.mask)

    def after(self, layer: int, now: Embedded, attention: Sequence[Float[Tensor, "H _ T"]]) -> Left | None:
        kept = []
        for prompt, of_prompt in enumerate(attention):
            scores = of_prompt[:, 0].mean(0)
            check_finite(scores, "attention of the last token")
            chosen = [
                places[top_places(scores[places], num_kept(self._keep, len(places)))] for places in now.views_of(prompt)
            ]
            kept.append(torch.cat([now.source.new_zeros(0), *chosen]))
        left = left_with(now, kept)
        self.record.note(layer, now, left)
        return left


def _chosen(method: str, seen: Embedded, choose: Choice, positions: Positions) -> ChosenBefore:
    kept = []
    for prompt in range(len(seen.mask)):
        views = seen.views_of(prompt)
        kept.append(torch.cat([seen.source.new_zeros(0), *(places[choose(prompt, places)] for places in views)]))
    return choose_before(method, seen, kept, positions)


def evenly_spread(rows: int, columns: int, num: int) -> list[int]:
    """Cells of a grid, row by row: about as many rows as columns of them, each in the middle of its share.

    No more rows are used than there are cells to choose.

    Example:
        >>> evenly_spread(4, 4, 4)
        [5, 7, 13, 15]
    """
    lines = min(rows, num, max(1, round(math.sqrt(num * rows / columns)), math.ceil(num / columns)))
    cells = []
    for line in range(lines):
        row = (2 * line + 1) * rows // (2 * lines)
        here = (line + 1) * num // lines - line * num // lines
        cells += [row * columns + (2 * place + 1) * columns // (2 * here) for place in range(here)]
    return cells


def _num_columns(seen: Embedded, prompt: int, places: Int[Tensor, " N"]) -> int:
    """How long a view's lines are: found from positions in three directions, or from ends of lines, else a square's."""
    if seen.positions.dim() == 3:
        return len(seen.positions[2, prompt, places].unique())
    breaks = (places.diff() > 1).nonzero()[:, 0]
    columns = int(breaks[0]) + 1 if len(breaks) else math.isqrt(len(places))
    return columns if len(places) % columns == 0 else len(places)
