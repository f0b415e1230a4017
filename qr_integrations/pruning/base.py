"""What pruners share: how many tokens stay, which places of the prompts these are, and what is noted about it.

Legend: B prompts, T tokens, n tokens of one view.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qr_integrations.backend.visual_tokens import NOT_VISUAL, Embedded, Left
from qr_integrations.errors import InputError, ScoreError

Positions = Literal["auto", "compact", "kept"]


def check_keep(keep: int | float) -> None:
    """Tokens per view as a whole number, or a share of them as a float in (0, 1].

    Raises:
        InputError: neither.
    """
    is_count = isinstance(keep, int) and not isinstance(keep, bool) and keep >= 1
    if not (is_count or (isinstance(keep, float) and 0 < keep <= 1)):
        raise InputError(
            f"keep={keep!r} cannot be: pass a whole number from 1, tokens per picture or tile, or a share of them as a "
            "float above 0 and up to 1.0"
        )


def check_positions(positions: str) -> None:
    """One of those that `is_compact` knows.

    Raises:
        InputError: another word.
    """
    if positions not in ("auto", "compact", "kept"):
        raise InputError(f"unknown positions {positions!r}: pass 'auto', 'compact' or 'kept'")


def num_kept(keep: int | float, num_tokens: int) -> int:
    """How many of a view's tokens stay: at least one, and no more than there are.

    Example:
        >>> num_kept(64, 576), num_kept(0.25, 100), num_kept(64, 16)
        (64, 25, 16)
    """
    wanted = keep if isinstance(keep, int) else max(1, round(keep * num_tokens))
    return min(wanted, num_tokens)


def is_compact(positions: Positions, seen: Embedded) -> bool:
    """Whether what is left is counted anew; ``"auto"``: unless positions are time, height and width."""
    return seen.positions.dim() == 2 if positions == "auto" else positions == "compact"


def left_with(now: Embedded, kept: Sequence[Int[Tensor, " _"]]) -> Left:
    """All words, and of the visual tokens those at the places that are given for each prompt, in any order."""
    stays = now.mask & ~now.visual
    for prompt, places in enumerate(kept):
        stays[prompt, places] = True
    return Left([row.nonzero()[:, 0] for row in stays])


def top_places(scores: Float[Tensor, " n"], num: int) -> Int[Tensor, " k"]:
    """Which `num` of the scores are the largest, ascending; of equal ones the first.

    Example:
        >>> import torch
        >>> top_places(torch.tensor([0.5, 0.1, 0.5, 0.9, 0.5]), 3)
        tensor([0, 2, 3])
    """
    return scores.argsort(descending=True, stable=True)[:num].sort().values


def check_finite(values: Float[Tensor, "*any"], what: str) -> None:
    """Scores of NaN or infinity choose nothing.

    Raises:
        ScoreError: there are some.
    """
    if not bool(torch.isfinite(values).all()):
        raise ScoreError(f"{what} hold NaN or infinity: load the model with dtype='bfloat16' or 'float32'")


@dataclass(frozen=True, slots=True)
class KeptCells:
    """What was left of a view.

    Attributes:
        picture, view: their numbers in the batch.
        cells: those that stayed, row by row, ascending.
        of: how many tokens the view had just before, merged ones included.
        merged_before: how many tokens stayed that an earlier stage had merged; they show no single cell.
    """

    picture: int
    view: int
    cells: tuple[int, ...]
    of: int
    merged_before: int = 0

    def as_dict(self) -> dict[str, Any]:
        """``{"picture", "view", "cells", "of", "merged_before"}``."""
        cells = list(self.cells)
        told = {"picture": self.picture, "view": self.view, "cells": cells, "of": self.of}
        return told | {"merged_before": self.merged_before}


@dataclass(frozen=True, slots=True)
class PruneStage:
    """One time that tokens went.

    Attributes:
        layer: after which layer of the language model, counted from 0; None: before the first.
        views: what was left of each view of a picture.
        merged: how many of the tokens that are left were made out of dropped ones, in this stage or an earlier one.
    """

    layer: int | None
    views: tuple[KeptCells, ...]
    merged: int = 0

    @property
    def kept(self) -> int:
        """How many visual tokens stayed, merged ones left out; with `merged`, all that are left."""
        return sum(len(view.cells) for view in self.views)

    @property
    def of(self) -> int:
        """How many visual tokens there were just before, merged ones included."""
        return sum(view.of for view in self.views)

    @property
    def merged_before(self) -> int:
        """How many of `merged` an earlier stage had made; `of` less these and `kept` is what was dropped here."""
        return sum(view.merged_before for view in self.views)

    def as_dict(self) -> dict[str, Any]:
        """``{"layer", "kept", "of", "merged", "views"}``."""
        views = [view.as_dict() for view in self.views]
        return {"layer": self.layer, "kept": self.kept, "of": self.of, "merged": self.merged, "views": views}


@dataclass(slots=True)
class PruneRecord:
    """What a pruner did; grows while prompts are read.

    Attributes:
        method: the name of the pruner's class.
        stages: in the order in which they came; none where there was no picture.
    """

    method: str
    stages: list[PruneStage] = field(default_factory=list)

    def note(self, layer: int | None, now: Embedded, left: Left) -> None:
        """Add a stage: what there was, and what is left of it."""
        views: list[KeptCells] = []
        for prompt, kept in enumerate(left.kept):
            stays = torch.zeros_like(now.mask[prompt])
            stays[kept] = True
            for places in now.views_of(prompt):
                picture, view = int(now.picture[prompt, places[0]]), int(now.view[prompt, places[0]])
                stayed = places[stays[places]]
                own = stayed[now.source[prompt, stayed] != NOT_VISUAL]
                cells = now.cell[prompt, own].sort().values.tolist()
                views.append(KeptCells(picture, view, tuple(cells), len(places), len(stayed) - len(own)))
        merged = sum(view.merged_before for view in views) + sum(len(one) for one in left.merged or ())
        self.stages.append(PruneStage(layer, tuple(views), merged))

    def as_dict(self) -> dict[str, Any]:
        """``{"method", "stages"}``, as it stands in JSON and in the adapters' metadata."""
        return {"method": self.method, "stages": [stage.as_dict() for stage in self.stages]}


@dataclass(slots=True)
class ChosenBefore:
    """A pass of a pruner that is done before the language model begins (a `Pruning`).

    Attributes:
        left: what the first layer reads; None: everything.
        compact: see `is_compact`.
        record: what was done.
        layers: none.
    """

    left: Left | None
    compact: bool
    record: PruneRecord
    layers: tuple[int, ...] = ()

    def before(self) -> Left | None:
        """What the first layer reads."""
        return self.left

    def rows(self, now: Embedded) -> Sequence[Int[Tensor, " _"]]:
        """No attention is read."""
        return []

    def after(self, layer: int, now: Embedded, attention: Sequence[Float[Tensor, "H _ T"]]) -> Left | None:
        """Nothing goes within the language model."""
        return None


def choose_before(
    method: str, seen: Embedded, kept: Sequence[Int[Tensor, " _"]], positions: Positions = "auto"
) -> ChosenBefore:
    """A pass that leaves, of the visual tokens, those at the places that are given for each prompt, and all words."""
    record, compact = PruneRecord(method), is_compact(positions, seen)
    if not bool(seen.visual.any()):
        return ChosenBefore(None, compact, record)
    left = left_with(seen, kept)
    record.note(None, seen, left)
    return ChosenBefore(left, compact, record)
