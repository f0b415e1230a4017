"""What a simple reader can tell from each layer of a vision tower: linear and nearest-neighbour probes with labels.

Legend: L layers and the embeddings before them, N examples, d width, C classes, G groups of examples, R resamples.
"""

import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor

from qr_integrations.backend import Backend
from qr_integrations.backend.tower_states import TowerStates, VisionTower, open_tower
from qr_integrations.errors import InputError, ScoreError, UnsupportedModelError
from qr_integrations.images import PictureSource, check_several, open_numbered

Probe = Literal["ridge", "knn"]

_STRENGTHS = tuple(10.0**power for power in range(-3, 5))  # of the ridge, per example
_RESAMPLES = 2000
_SMALLEST = 1e-6  # spread of a feature; below it the feature is constant


@dataclass(frozen=True, slots=True)
class PictureFeatures:
    """What every layer makes of pictures, one row for each.

    Attributes:
        mean: the mean over a picture's patches.
        at: the patch at one place of each picture; None where no places were given.
    """

    mean: Float[Tensor, "L N d"]
    at: Float[Tensor, "L N d"] | None = None


def picture_features(
    tower: VisionTower | Backend | str | Path,
    pictures: Iterable[PictureSource],
    places: Sequence[tuple[float, float]] | None = None,
    *,
    batch_size: int = 8,
) -> PictureFeatures:
    """One vector for each picture and layer, and if asked for the state of the patch at a place.

    Args:
        tower: what `open_tower` opens: a backend that sees pictures, a name, a folder, a hub id.
        pictures: opened, or what `open_picture` opens.
        places: one for each picture, as shares of its width and height from the left and the top. Pictures must be
            square then: others may be cropped or padded before the tower reads them, and are refused.
        batch_size: pictures of one pass at most.

    Raises:
        InputError: one picture instead of several, no pictures, not as many places, a place outside of 0 to 1, a
            broken picture, or with places one that is not square.
        UnsupportedModelError: for places, a tower that reads tiles, or patches in an order of its own.
    """
    if wrong := [place for place in places or () if not all(0 <= share <= 1 for share in place)]:
        raise InputError(f"{wrong[0]} is no place: pass shares of the width and the height, from 0 to 1")
    check_several(pictures, once=True)
    opened = open_tower(tower)
    means: list[Tensor] = []
    found: list[Tensor] = []
    shown = pictures if places is None else (_square(one, number) for number, one in enumerate(pictures))
    for states in opened.states(shown, batch_size=batch_size):
        for one, cell in _by_picture(states):
            means.append(one.mean(1))
            if places is not None and len(found) < len(places):
                found.append(one[:, _patch_at(opened.name, cell, places[len(found)])])
    if not means or (places is not None and len(places) != len(means)):
        told = "no pictures" if places is None else f"{len(means)} pictures and {len(places)} places"
        raise InputError(f"{told} to make features of: pass at least one picture, and a place for each")
    return PictureFeatures(torch.stack(means, 1), torch.stack(found, 1) if places is not None else None)


def _square(source: PictureSource, number: int) -> Image.Image:
    picture = open_numbered(source, number)
    if picture.width != picture.height:
        raise InputError(
            f"picture #{number}: the patch at a place is known in square pictures only, and this one has "
            f"{picture.width} x {picture.height} pixels: cut or pad it, or leave out places"
        )
    return picture


def _by_picture(states: TowerStates) -> Iterator[tuple[Float[Tensor, "L n d"], Int[Tensor, " n"]]]:
    """Patches of each picture of a batch, in fp32 on the CPU, and their cells."""
    chosen = states.patch
    counts = states.picture[chosen].unique_consecutive(return_counts=True)[1].tolist()
    kept = states.states[:, chosen].float().cpu().split(counts, dim=1)
    return zip(kept, states.cell[chosen].cpu().split(counts), strict=True)


def _patch_at(name: str, cell: Int[Tensor, " n"], place: tuple[float, float]) -> int:
    side = math.isqrt(len(cell))
    if cell.tolist() != list(range(side * side)):
        raise UnsupportedModelError(
            f"{name!r} does not read a square picture as rows of patches, so that the patch at a place is not known: "
            "leave out places, and use the means over patches"
        )
    column, row = (min(side - 1, int(share * side)) for share in place)
    return row * side + column


# ---- probes


@dataclass(frozen=True, slots=True)
class LayerProbes:
    """How often a probe of each layer is right on examples that it did not learn from.

    Attributes:
        probe: what reads the states.
        accuracy: share of right answers by layer; layer 0 are the embeddings.
        low, high: its bootstrap interval at 95 %, whole groups drawn again.
        guess: how often the most frequent class of the learned examples is right.
        as_good_as_best: layers for which the interval of the difference to the best layer holds zero. The best one is
            the best on the very examples that it is reported on.
        classes: what is told apart.
        num_learned, num_held_out: examples.
    """

    probe: Probe
    accuracy: Float[np.ndarray, " L"]
    low: Float[np.ndarray, " L"]
    high: Float[np.ndarray, " L"]
    guess: float
    as_good_as_best: tuple[int, ...]
    classes: tuple[str, ...]
    num_learned: int
    num_held_out: int

    @property
    def best(self) -> int:
        """The layer that is right most often; the first of equals."""
        return int(self.accuracy.argmax())

    def as_dict(self) -> dict[str, Any]:
        """All of it, as JSON can hold it."""
        curves = {name: getattr(self, name).tolist() for name in ("accuracy", "low", "high")}
        told = {name: getattr(self, name) for name in ("probe", "guess", "best", "num_learned", "num_held_out")}
        return {**told, **curves, "as_good_as_best": list(self.as_good_as_best), "classes": list(self.classes)}


def probe_layers(
    states: Float[Tensor, "L N d"],
    labels: Sequence[str | int],
    *,
    groups: Sequence[Hashable] | None = None,
    probe: Probe = "ridge",
    neighbours: int = 10,
    held_out: float = 0.4,
    seed: int = 0,
) -> LayerProbes:
    """Which layers hold what labels ask for, as far as a simple probe can read it.

    Every layer is read by the same probe, learned from the same examples and measured on the same others. Features are
    standardised by what is learned from.

    Args:
        states: an example for each column, as in `PictureFeatures`.
        labels: the class of each example.
        groups: examples of one group, for instance patches of one picture, are not parted; None: each by itself.
        probe: ``"ridge"``: least squares to the classes, its strength chosen by leave-one-out. ``"knn"``: votes of the
            nearest examples, weighted by their cosine.
        neighbours: how many vote.
        held_out: share of the groups to measure on.
        seed: of the split and of the resamples.

    Raises:
        InputError: labels or groups of another number, one class only, too few examples, or an unknown setting.
        ScoreError: the states hold NaN.

    Example:
        >>> import torch
        >>> labels = ["left", "right"] * 20
        >>> noise = torch.randn(1, 40, 3, generator=torch.Generator().manual_seed(0))
        >>> knows = noise + torch.tensor([-9.0, 9.0] * 20)[:, None]
        >>> probe_layers(torch.cat([noise, knows]), labels).best
        1
    """
    _check(states, labels, groups, probe, neighbours, held_out)
    classes = tuple(sorted({str(label) for label in labels}))
    target = torch.tensor([classes.index(str(label)) for label in labels])
    group = _numbered(range(len(labels)) if groups is None else groups)
    apart = _split(group, held_out, seed)
    told = target[~apart]
    if len(told.unique()) < 2:
        raise InputError("the examples to learn from are all of one class: pass more of them, or a smaller held_out")
    features = (_standardised(layer.double(), ~apart) for layer in states)
    read = _ridge if probe == "ridge" else _nearest(neighbours)
    right = torch.stack([read(one[~apart], told, one[apart], len(classes)) == target[apart] for one in features])
    guess = float((target[apart] == told.mode().values).double().mean())
    accuracy, low, high, as_good = _intervals(right.numpy(), group[apart].numpy(), seed)
    return LayerProbes(probe, accuracy, low, high, guess, as_good, classes, len(told), int(apart.sum()))


def _check(
    states: Tensor,
    labels: Sequence[Any],
    groups: Sequence[Any] | None,
    probe: str,
    neighbours: int,
    held_out: float,
) -> None:
    count = states.shape[1]
    if len(labels) != count or (groups is not None and len(groups) != count):
        raise InputError(f"{count} examples need a label, and a group if any, each: there are {len(labels)} labels")
    if len({str(label) for label in labels}) < 2:
        raise InputError("there is one class or none: pass labels of at least two")
    if probe not in ("ridge", "knn"):
        raise InputError(f"probe={probe!r} is not known: pass 'ridge' or 'knn'")
    if neighbours < 1 or not 0 < held_out < 1:
        raise InputError(f"neighbours={neighbours}, held_out={held_out}: pass at least 1, and a share between 0 and 1")
    if not torch.isfinite(states).all():
        raise ScoreError("the states hold NaN: load the model with dtype='float32'")


def _numbered(groups: Iterable[Hashable]) -> Int[Tensor, " N"]:
    numbers: dict[Hashable, int] = {}
    return torch.tensor([numbers.setdefault(group, len(numbers)) for group in groups])


def _split(group: Int[Tensor, " N"], held_out: float, seed: int) -> Bool[Tensor, " N"]:
    """True for what is held out."""
    count = int(group.max()) + 1
    size = round(held_out * count)
    if not 0 < size < count:
        raise InputError(f"{count} groups of examples cannot be split: pass more, or another held_out")
    order = torch.from_numpy(np.random.default_rng(seed).permutation(count))
    return torch.isin(group, order[:size])


def _standardised(features: Float[Tensor, "N d"], learned: Bool[Tensor, " N"]) -> Float[Tensor, "N d"]:
    seen = features[learned]
    return (features - seen.mean(0)) / seen.std(0, correction=0).clamp(min=_SMALLEST)


def _ridge(
    learned: Float[Tensor, "N d"], told: Int[Tensor, " N"], asked: Float[Tensor, "M d"], num_classes: int
) -> Int[Tensor, " M"]:
    """Least squares to one column per class; of the strengths the one that is right most often when left out."""
    one_hot = torch.nn.functional.one_hot(told, num_classes).double()
    offset = one_hot.mean(0)
    left, values, right = torch.linalg.svd(learned, full_matrices=False)
    shares, best, chosen = left.T @ (one_hot - offset), -1.0, 0.0
    for strength in (len(told) * one for one in _STRENGTHS):
        kept = values**2 / (values**2 + strength)
        fitted = left @ (kept[:, None] * shares) + offset
        leverage = (left**2 @ kept + 1 / len(told)).clamp(max=1 - _SMALLEST)
        without = one_hot - (one_hot - fitted) / (1 - leverage)[:, None]
        correct = float((without.argmax(1) == told).double().mean())
        if correct >= best:
            best, chosen = correct, strength
    weights = right.T @ ((values / (values**2 + chosen))[:, None] * shares)
    return (asked @ weights + offset).argmax(1)


def _nearest(neighbours: int) -> Any:
    """A probe in which the nearest examples vote."""

    def read(
        learned: Float[Tensor, "N d"], told: Int[Tensor, " N"], asked: Float[Tensor, "M d"], num_classes: int
    ) -> Int[Tensor, " M"]:
        near = torch.nn.functional.normalize(asked) @ torch.nn.functional.normalize(learned).T
        cosines, places = near.topk(min(neighbours, len(told)))
        votes = torch.zeros(len(asked), num_classes, dtype=near.dtype)
        return votes.scatter_add_(1, told[places], 1 + cosines).argmax(1)

    return read


def _intervals(
    right: Bool[np.ndarray, "L N"], group: Int[np.ndarray, " N"], seed: int
) -> tuple[Float[np.ndarray, " L"], Float[np.ndarray, " L"], Float[np.ndarray, " L"], tuple[int, ...]]:
    """Accuracy, where it lies at 95 %, and the layers that cannot be told from the best."""
    _, places = np.unique(group, return_inverse=True)
    sizes = np.bincount(places).astype(float)
    sums_LG = np.stack([np.bincount(places, weights=layer) for layer in right])
    drawn_RG = np.random.default_rng(seed).multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), _RESAMPLES)
    found_RL = (drawn_RG @ sums_LG.T) / (drawn_RG @ sizes)[:, None]
    accuracy = right.mean(1)
    low, high = np.quantile(found_RL, [0.025, 0.975], axis=0)
    lead = np.quantile(found_RL[:, [int(accuracy.argmax())]] - found_RL, 0.025, axis=0)
    as_good = tuple(np.flatnonzero(lead <= 0).tolist())
    return accuracy, low, high, as_good
