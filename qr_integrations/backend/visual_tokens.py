"""Prompts with pictures as the decoder reads them, and the manners of what drops some of the pictures' tokens.

Legend: B prompts, T tokens, V tokens of pictures, D width of the language model, d of the tower, N patches of a view.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

NOT_VISUAL = -1


@dataclass(frozen=True, slots=True)
class VisualPlaces:
    """Which token shows what. All [V], for the placeholders of a batch in the order in which they are read.

    Attributes:
        picture: the number of the picture in the batch.
        view: the number of the view (crop, tile) in the batch.
        cell: which cell of its view, row by row. `NOT_VISUAL` for ends of lines, which belong to a picture and show
            nothing.
    """

    picture: Int[Tensor, " V"]
    view: Int[Tensor, " V"]
    cell: Int[Tensor, " V"]


@dataclass(frozen=True, slots=True)
class TowerView:
    """What the vision tower made of all views of a batch.

    Attributes:
        patches: what went into the projector, ``[views, N, d]``; ``[N, d]`` of all together where they differ in size.
        attended: what went into the self-attention of the layer that made them, ``[views, N (+ 1), d]``, behind its
            norm, the class token first where there is one.
    """

    patches: Float[Tensor, "*views N d"]
    attended: Float[Tensor, "*views _ d"] | None = None


@dataclass(frozen=True, slots=True)
class Embedded:
    """Tokens on their way through the language model, padded at the left where prompts differ in length.

    Attributes:
        states: the embeddings, pictures' features in place; later the hidden states.
        mask: False for padding.
        positions: ``[B, T]``, or ``[3, B, T]`` where positions are time, height and width.
        picture, view, cell: see `VisualPlaces`; `NOT_VISUAL` for what shows nothing: words, markers, ends of lines.
        source: where the token stood in the prompt; `NOT_VISUAL` for what was merged out of several.
        tower: None where the family's tokens do not come out of a projector.
        questions: what was asked in each prompt; empty where that is not known.
    """

    states: Float[Tensor, "B T D"]
    mask: Bool[Tensor, "B T"]
    positions: Int[Tensor, "*three B T"]
    picture: Int[Tensor, "B T"]
    view: Int[Tensor, "B T"]
    cell: Int[Tensor, "B T"]
    source: Int[Tensor, "B T"]
    tower: TowerView | None = None
    questions: tuple[str, ...] = ()

    @property
    def visual(self) -> Bool[Tensor, "B T"]:
        """Which tokens show a part of a picture, and may be dropped."""
        return self.cell != NOT_VISUAL

    def words_behind(self, prompt: int) -> Int[Tensor, " n"]:
        """The places of all tokens of a prompt that stand behind its last visual one."""
        places = torch.arange(self.mask.shape[1], device=self.mask.device)
        shown = places[self.visual[prompt]]
        return places[int(shown[-1]) + 1 :] if len(shown) else places[:0]

    def views_of(self, prompt: int) -> list[Int[Tensor, " _"]]:
        """The places of the tokens of each view of a prompt, in the order of the views."""
        shown = self.visual[prompt].nonzero()[:, 0]
        views = self.view[prompt, shown]
        return [shown[views == view] for view in views.unique(sorted=True)]

    def take(self, left: "Left", compact: bool) -> "Embedded":
        """What is left, padded at the left; `compact` gives it the positions 0, 1, 2, ..., else it keeps its own."""
        joined, order = self._joined(left)
        longest = max(len(one) for one in order)
        index = torch.stack([torch.nn.functional.pad(one, (longest - len(one), 0)) for one in order])
        lengths = torch.tensor([len(one) for one in order], device=index.device)
        mask = torch.arange(longest, device=index.device) >= longest - lengths[:, None]
        states = joined.states.gather(1, index[..., None].expand(-1, -1, joined.states.shape[2]))
        positions = joined.positions.gather(-1, index.expand(joined.positions.shape[:-1] + index.shape[1:]))
        counted = (mask.long().cumsum(-1) - 1).clamp(min=0)
        rest = {name: getattr(joined, name).gather(1, index) for name in _PLACES}
        rest["cell"] = rest["cell"].masked_fill(~mask, NOT_VISUAL)
        positions = counted.expand(positions.shape) if compact else positions.masked_fill(~mask, 0)
        return replace(self, states=states, mask=mask, positions=positions, **rest)

    def _joined(self, left: "Left") -> tuple["Embedded", list[Tensor]]:
        """The tokens with the merged ones at the end, and in which order those that are left are read."""
        if left.merged is None:
            return self, list(left.kept)
        assert left.merged_from is not None
        order, length = [], self.mask.shape[1]
        for prompt, (kept, merged) in enumerate(zip(left.kept, left.merged, strict=True)):
            shown = self.visual[prompt, kept].nonzero()[:, 0]
            cut = int(shown[-1]) + 1 if len(shown) else 0
            behind = torch.arange(length, length + len(merged), device=kept.device)
            order.append(torch.cat([kept[:cut], behind, kept[cut:]]))
        most = max(len(merged) for merged in left.merged)
        stacked = torch.stack([torch.nn.functional.pad(one, (0, 0, 0, most - len(one))) for one in left.merged])
        origin = torch.stack([torch.nn.functional.pad(one, (0, most - len(one))) for one in left.merged_from])
        mine = {name: getattr(self, name) for name in _PLACES}
        parts: dict[str, Any] = {name: torch.cat([own, own.gather(1, origin)], 1) for name, own in mine.items()}
        parts["source"][:, length:] = NOT_VISUAL
        found = self.positions.gather(-1, origin.expand(self.positions.shape[:-1] + origin.shape[1:]))
        joined = replace(
            self,
            states=torch.cat([self.states, stacked.to(self.states.dtype)], 1),
            mask=torch.cat([self.mask, torch.ones_like(origin, dtype=torch.bool)], 1),
            positions=torch.cat([self.positions, found], -1),
            **parts,
        )
        return joined, order


_PLACES = ("picture", "view", "cell", "source")


@dataclass(frozen=True, slots=True)
class Left:
    """What is left of each prompt.

    Attributes:
        kept: the places of all tokens that stay, words included and padding not, in ascending order.
        merged: tokens made out of dropped ones, ``[K, D]``, put behind the last visual token that stays; None for none.
        merged_from: for each of them the place of the token whose picture, view and position it takes over, ``[K]``.
    """

    kept: Sequence[Int[Tensor, " _"]]
    merged: Sequence[Float[Tensor, "_ D"]] | None = None
    merged_from: Sequence[Int[Tensor, " _"]] | None = None


@runtime_checkable
class Pruning(Protocol):
    """One pass of a `Pruner`; grows a record on the way.

    Attributes:
        layers: after which of the language model's layers tokens go, ascending, counted from 0.
        compact: whether what is left gets the positions 0, 1, 2, ...; else every token keeps its own.
        record: what was done, for `Answer.steps`.
    """

    layers: tuple[int, ...]
    compact: bool
    record: Any

    def before(self) -> Left | None:
        """What the first layer reads; None: everything."""
        ...

    def rows(self, now: Embedded) -> Sequence[Int[Tensor, " _"]]:
        """The places, in each prompt, of the tokens whose attention is read in a layer of `layers`; at least one."""
        ...

    def after(self, layer: int, now: Embedded, attention: Sequence[Float[Tensor, "H _ T"]]) -> Left | None:
        """What is left after a layer of `layers`, from its output and the attention of `rows`; None: everything."""
        ...


@runtime_checkable
class Pruner(Protocol):
    """What drops tokens of pictures: before the language model, within it, or both. Holds settings only."""

    def start(self, backend: Any, seen: Embedded) -> Pruning:
        """Begin with a batch of prompts."""
        ...
