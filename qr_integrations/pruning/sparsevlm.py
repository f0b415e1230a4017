"""SparseVLM: the words of the question choose, between layers of the language model, which visual tokens stay.

arXiv 2410.04417; the authors' code is Gumpest/SparseVLMs, read at 26a5f48.

Legend: B prompts, T tokens, D width, H heads, r raters, n visual tokens of a prompt, k of them kept, K merged.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qr_integrations.backend.visual_tokens import NOT_VISUAL, Embedded, Left
from qr_integrations.errors import InputError, UnsupportedModelError
from qr_integrations.pruning.base import (
    Positions,
    PruneRecord,
    check_finite,
    check_keep,
    check_positions,
    is_compact,
    left_with,
    num_kept,
)
from qr_integrations.pruning.sparse_budgets import (
    PUBLISHED_TOKENS,
    booked_mean,
    budgets_for,
    num_recycled,
    scaled_layers,
)
from qr_integrations.pruning.sparse_merge import density_peaks
from qr_integrations.pruning.sparse_scores import rotary_gravity, text_raters, visual_scores

RANK_RULES: dict[int, tuple[float, float]] = {192: (13.5, 0.0), 128: (9.0, 6.0), 64: (0.8, 0.0)}
"""Version 1.0, scale and bias by tokens in the mean, of 576."""


@dataclass(frozen=True, slots=True)
class SparseVLM:
    """Drop visual tokens after a few layers of the language model, by the attention that the question's words pay them.

    Words behind the last picture whose embeddings resemble the visual tokens more than the mean word does are raters.
    After each of `layers`, the visual tokens of a prompt with the most attention from its raters stay, whatever picture
    they belong to; all words stay. Only the raters' rows of attention are computed.

    Args:
        keep: visual tokens per view in the mean over all layers, as published results count them: a layer after which
            tokens go counts with what it leaves. A float is a share. With as many as there are nothing is done, and
            nothing changes.
        version: ``"1.5"``: fixed budgets, dropped tokens are recycled. ``"2.0"`` (SparseVLM+): attention is divided by
            what rotary positions give to near tokens, only `heads` heads count, nothing is recycled, tokens keep their
            positions. ``"1.0"``: as 1.5, but the rank of the raters' attention says how many tokens stay.
        layers: after which tokens go, counted from 0. None: 2, 6 and 15 of 32 (version 1.0 also 19), and the same
            shares of other depths, but none before layer 2; earlier only where `keep` asks for so few that it must be.
            The authors cut after the same layers of 40: pass ``layers=(2, 6, 15)``.
        budgets: tokens kept per view after each layer, in the place of `keep`.
        recycle: merge the best of the dropped tokens into a few (density-peak clustering). None: as the version does.
        heads: version 2.0: how many heads are heard, 14 as published for models of 28; all where there are fewer, which
            the authors' code refuses.
        gravity_floor: version 2.0: what attention is divided by is at least this share of what it is at distance 0. The
            published numbers fall below 0 from distance 1,707 (base 10,000), which turns the order around; the default
            changes nothing up to distance 700 in heads of 128. None: no floor, as published.
        positions: ``"compact"`` counts the tokens that are left anew, ``"kept"`` leaves each its own. ``"auto"``: as
            the version does, and kept where positions are time, height and width.
        rank_rule: version 1.0: scale and bias, so that rank * scale + bias tokens stay. None: those published for
            `keep` 192, 128 and 64 of 576; `keep` says nothing else then.
        always_drop: drop one token at least after each layer, as the authors' code does whatever the budget.
        noise_seed: decide between equal densities by random draws from this seed, as published. None: for the earlier
            token.

    Batches and several pictures work here, not in the authors' code; a budget counts once for each view.

    Raises:
        InputError: a setting out of range.

    Example:
        >>> SparseVLM(keep=192).budgets_of(576, (2, 6, 15), 32)
        (300, 200, 110)
    """

    keep: int | float = 1 / 3
    version: Literal["1.0", "1.5", "2.0"] = "1.5"
    layers: tuple[int, ...] | None = None
    budgets: tuple[int, ...] | None = None
    recycle: bool | None = None
    heads: int = 14
    gravity_floor: float | None = 0.1
    positions: Positions = "auto"
    rank_rule: tuple[float, float] | None = None
    always_drop: bool = False
    noise_seed: int | None = None

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_positions(self.positions)
        if self.version not in ("1.0", "1.5", "2.0"):
            raise InputError(f"unknown version {self.version!r}: pass '1.0', '1.5' or '2.0'")
        for name in ("layers", "budgets", "rank_rule"):
            given = getattr(self, name)
            if isinstance(given, list):
                object.__setattr__(self, name, tuple(given))
        self._check_layers()
        if self.heads < 1 or (self.gravity_floor is not None and not 0 < self.gravity_floor <= 1):
            raise InputError(
                f"heads={self.heads}, gravity_floor={self.gravity_floor} cannot be: pass at least 1, and a share above "
                "0 or None"
            )
        if self.version == "1.0" and self.budgets is not None:
            raise InputError("version 1.0 has no budgets: pass rank_rule=(scale, bias), or version='1.5'")
        if self.version != "1.0" and self.rank_rule is not None:
            raise InputError(f"version {self.version} has budgets and no rank rule: pass budgets=..., or version='1.0'")
        if self.version == "1.0" and self.rank_rule is None and num_kept(self.keep, PUBLISHED_TOKENS) not in RANK_RULES:
            raise InputError(
                f"no rank rule is published for keep={self.keep}: pass 192, 128, 64 or rank_rule=(9.0, 6.0)"
            )

    def _check_layers(self) -> None:
        layers, budgets = self.layers, self.budgets
        if layers is not None and not (layers and layers[0] >= 0 and list(layers) == sorted(set(layers))):
            raise InputError(f"layers={layers} cannot be: pass ascending numbers from 0, such as (2, 6, 15)")
        if budgets is not None and not (budgets and min(budgets) >= 1):
            raise InputError(f"budgets={budgets} cannot be: pass one number from 1 for each layer")
        if layers is not None and budgets is not None and len(layers) != len(budgets):
            raise InputError(f"{len(layers)} layers and {len(budgets)} budgets: pass one budget for each layer")

    @property
    def recycles(self) -> bool:
        """Whether dropped tokens are merged into a few."""
        return self.version != "2.0" if self.recycle is None else self.recycle

    def layers_of(self, num_layers: int) -> tuple[int, ...]:
        """After which layers of a model of so many tokens go.

        Raises:
            InputError: the model has fewer layers; none reads what is left after its last one.
        """
        layers = scaled_layers(self.version, num_layers) if self.layers is None else self.layers
        if not layers or layers[-1] >= num_layers - 1:
            raise InputError(
                f"layers={layers} do not go with {num_layers} layers, of which the last one must read what is left: "
                f"pass layers=(...) up to {num_layers - 2}, or prune before the language model, with CDPruner"
            )
        return layers

    def budgets_of(self, num_tokens: int, layers: tuple[int, ...], num_layers: int) -> tuple[int, ...]:
        """How many of a view's tokens are kept after each of `layers`; versions 1.5 and 2.0.

        Raises:
            InputError: `keep` is less than the layers before the first cut allow, or budgets and layers do not match.
        """
        if self.budgets is not None:
            if len(self.budgets) != len(layers):
                raise InputError(f"{len(self.budgets)} budgets for layers {layers}: pass one for each")
            return self.budgets
        keep = num_kept(self.keep, num_tokens)
        return budgets_for(keep, num_tokens, layers, num_layers, version=self.version, recycle=self.recycles)

    def start(self, backend: Any, seen: Embedded) -> "SparsePruning":
        """Choose the raters of a batch of prompts.

        Raises:
            InputError: nothing stands behind the last picture.
        """
        depth, prompts = backend.config.num_hidden_layers, range(len(seen.mask))
        layers = self._layers_for(depth, {len(view) for prompt in prompts for view in seen.views_of(prompt)})
        budgets = [self._budgets_of_prompt(seen, prompt, layers, depth) for prompt in prompts]
        raters = [_raters(seen, prompt) for prompt in prompts]
        by_budget = any(min(one) < whole for one, whole in zip(budgets, seen.visual.sum(-1).tolist(), strict=True))
        drops = by_budget or bool(seen.visual.any() and (self.always_drop or self.version == "1.0"))
        own = self.version == "2.0" and self.positions == "auto"
        return SparsePruning(
            settings=self,
            layers=layers if drops else (),
            compact=is_compact("kept" if own else self.positions, seen),
            raters=raters,
            budgets=[dict(zip(layers, budget, strict=True)) for budget in budgets],
            gravity=_Gravity.of(backend, self.gravity_floor) if self.version == "2.0" else None,
            noise=None if self.noise_seed is None else _Draws(self.noise_seed),
            record=SparseRecord(type(self).__name__, raters=_as_tuples(raters), num_layers=depth),
        )

    def _layers_for(self, num_layers: int, sizes: Collection[int]) -> tuple[int, ...]:
        """The layers for views of so many tokens: the usual ones, or the first cut earlier where `keep` is too few."""
        usual = self.layers_of(num_layers)
        if self.layers is not None or self.version == "1.0":
            return usual
        earlier = [scaled_layers(self.version, num_layers, first) for first in reversed(range(usual[0]))]
        for layers in [usual, *earlier]:
            try:
                for size in sizes:
                    self.budgets_of(size, layers, num_layers)
            except InputError:
                continue
            return layers
        return earlier[-1] if earlier else usual  # says when it is used what is too few

    def _budgets_of_prompt(
        self, seen: Embedded, prompt: int, layers: tuple[int, ...], num_layers: int
    ) -> tuple[int, ...]:
        """Each view has its own; together they are what the prompt's visual tokens compete for."""
        sizes = [len(view) for view in seen.views_of(prompt)]
        if self.version == "1.0" or not sizes:
            return (sum(sizes),) * len(layers)
        of_views = [self.budgets_of(size, layers, num_layers) for size in sizes]
        return tuple(sum(budgets) for budgets in zip(*of_views, strict=True))

    def count(self, budget: int, attention: Float[Tensor, "H r n"]) -> int:
        """How many of n visual tokens stay: the budget, or what the rank of the raters' attention says."""
        whole = attention.shape[-1]
        if self.version == "1.0":
            scale, bias = self.rank_rule or RANK_RULES[num_kept(self.keep, PUBLISHED_TOKENS)]
            rank = int(torch.linalg.matrix_rank(attention.mean(0)))
            if rank == whole:
                return whole
            budget = int(rank * scale + bias)
        return max(1, min(budget, whole - self.always_drop))


@dataclass(slots=True)
class SparseRecord(PruneRecord):
    """What SparseVLM did.

    Attributes:
        raters: the places in each prompt of the words that rated.
        num_layers: depth of the language model.
    """

    raters: tuple[tuple[int, ...], ...] = ()
    num_layers: int = 1

    @property
    def mean_tokens(self) -> float | None:
        """Visual tokens per view in the mean over all layers, booked as published; None where nothing was dropped."""
        if not self.stages:
            return None
        after = [stage.kept + stage.merged for stage in self.stages]
        layers = [stage.layer for stage in self.stages if stage.layer is not None]
        return booked_mean(after, self.stages[0].of, layers, self.num_layers) / len(self.stages[0].views)

    def as_dict(self) -> dict[str, Any]:
        """As `PruneRecord`, with ``"raters"`` and ``"mean_tokens"``."""
        told = {"raters": [list(places) for places in self.raters], "mean_tokens": self.mean_tokens}
        return PruneRecord.as_dict(self) | told


@dataclass(slots=True)
class SparsePruning:
    """One pass of `SparseVLM` (a `Pruning`).

    Attributes:
        settings: how.
        layers, compact, record: see `Pruning`.
        raters: for each prompt the places of its raters in it.
        budgets: for each prompt and layer, how many visual tokens stay.
        gravity: what attention is divided by; None: nothing.
        noise: uniform draws, so many as asked for; None: equal densities are decided by order.
    """

    settings: SparseVLM
    layers: tuple[int, ...]
    compact: bool
    raters: Sequence[Int[Tensor, " _"]]
    budgets: Sequence[dict[int, int]]
    gravity: "_Gravity | None"
    noise: Callable[[int], Tensor] | None
    record: SparseRecord

    def before(self) -> Left | None:
        """The first layer reads everything."""
        return None

    def rows(self, now: Embedded) -> Sequence[Int[Tensor, " _"]]:
        """Where the raters stand; in prompts without pictures the last token."""
        last = torch.tensor([now.mask.shape[1] - 1], device=now.mask.device)
        places = [
            torch.isin(source, raters).nonzero()[:, 0] for source, raters in zip(now.source, self.raters, strict=True)
        ]
        return [found if len(found) else last for found in places]

    def after(self, layer: int, now: Embedded, attention: Sequence[Float[Tensor, "H _ T"]]) -> Left | None:
        """Keep what the raters attend to, and merge the best of the rest."""
        rows = self.rows(now)
        cuts = [
            self._cut(now, prompt, self.budgets[prompt][layer], rows[prompt], attended)
            for prompt, attended in enumerate(attention)
        ]
        if not any(cut.num_dropped for cut in cuts):
            return None
        left = left_with(now, [cut.kept for cut in cuts])
        if any(len(cut.merged_from) for cut in cuts):
            left = replace(left, merged=[cut.merged for cut in cuts], merged_from=[cut.merged_from for cut in cuts])
        self.record.note(layer, now, left)
        return left

    def _cut(
        self, now: Embedded, prompt: int, budget: int, rows: Int[Tensor, " r"], attended: Float[Tensor, "H r T"]
    ) -> "_Cut":
        places = now.visual[prompt].nonzero()[:, 0]
        if not len(places):
            return _Cut(places, 0, now.states[prompt, :0], places)
        attention, heads = attended[..., places], None
        if self.gravity is not None:
            positions = now.positions[..., prompt, :].reshape(-1, now.mask.shape[1])
            attention, heads = (
                attention / self.gravity.between(positions[:, rows], positions[:, places]),
                self.settings.heads,
            )
        scores = visual_scores(attention, heads)[0]
        check_finite(scores, "SparseVLM's scores")
        best = places[scores.sort(descending=True, stable=True).indices]
        count = self.settings.count(budget, attention)
        merged, origin = self._recycled(now.states[prompt], best[count:])
        return _Cut(best[:count], len(best) - count, merged, origin)

    def _recycled(
        self, states: Float[Tensor, "T D"], dropped: Int[Tensor, " n"]
    ) -> tuple[Float[Tensor, "K D"], Int[Tensor, " K"]]:
        """Tokens merged out of the best of those that are dropped, the best first, and the centre of each."""
        recycled, num_clusters = num_recycled(len(dropped)) if self.settings.recycles else (0, 0)
        if not recycled:
            return states[:0].float(), dropped[:0]
        some = states[dropped[:recycled]]
        noise = None if self.noise is None else self.noise(recycled).to(states.device)
        clusters = density_peaks(some, num_clusters, noise)
        return clusters.means(some), dropped[clusters.centers]


@dataclass(frozen=True, slots=True)
class _Cut:
    """What becomes of one prompt's visual tokens: places that stay, in any order, and what is merged."""

    kept: Int[Tensor, " k"]
    num_dropped: int
    merged: Float[Tensor, "K D"]
    merged_from: Int[Tensor, " K"]


@dataclass(frozen=True, slots=True)
class _Gravity:
    """What the attention of version 2.0 is divided by."""

    frequencies: Float[Tensor, " f"]
    sections: tuple[int, ...] | None
    floor: float | None

    @classmethod
    def of(cls, backend: Any, floor: float | None) -> "_Gravity":
        frequencies = getattr(getattr(backend.decoder, "rotary_emb", None), "inv_freq", None)
        if frequencies is None:
            raise UnsupportedModelError(
                f"{backend.name!r} has no rotary positions, whose gravity version 2.0 takes away: pass version='1.5'"
            )
        sections = (getattr(backend.config, "rope_parameters", None) or {}).get("mrope_section")
        return cls(frequencies, None if sections is None else tuple(sections), floor)

    def between(self, rows: Int[Tensor, "axes r"], columns: Int[Tensor, "axes n"]) -> Float[Tensor, "r n"]:
        weights = rotary_gravity(rows, columns, self.frequencies, self.sections)
        return weights if self.floor is None else weights.clamp(min=self.floor * (2 * len(self.frequencies)) ** 0.5)


class _Draws:
    """Uniform numbers from a seed, on the CPU: the same on every device."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, number: int) -> Float[Tensor, " n"]:
        return torch.rand(number, generator=self._generator)


def _raters(seen: Embedded, prompt: int) -> Int[Tensor, " r"]:
    """The places of the words that rate; none in a prompt without pictures."""
    if not bool(seen.visual[prompt].any()):
        return seen.source[prompt, :0]
    behind = seen.words_behind(prompt)
    words = behind[seen.picture[prompt, behind] == NOT_VISUAL]  # ends of lines are no words
    if not len(words):
        raise InputError("nothing stands behind the last picture that could rate it: put the question there")
    states = seen.states[prompt]
    return words[text_raters(states[seen.visual[prompt]], states[words])]


def _as_tuples(places: Sequence[Tensor]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(one.tolist()) for one in places)
