"""How alike the layers of a vision tower see, which of them form groups, and one layer out of each.

Layer-wise representation similarity (Rethinking Visual Layer Selection in Multimodal LLMs, arXiv 2504.21447). The
authors' code for it is not published; what is averaged and how groups are cut is defined here.

Legend: L layers and the embeddings before them, C = L - 1 places to cut between two layers, N tokens, d width.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from qr_integrations.backend import Backend
from qr_integrations.backend.tower_states import TowerStates, VisionTower, open_tower
from qr_integrations.errors import InputError, ScoreError
from qr_integrations.images import PictureSource

Compared = Literal["tokens", "mean", "flat"]
Tokens = Literal["patches", "all"]
CutRule = Literal["novelty", "adjacent"]
Representative = Literal["medoid", "penultimate", "paper"]

_PUBLISHED, _PUBLISHED_DEPTH = (3, 18, 23), 24
_SMALLEST = 1e-12  # length of a state; one of zeros is like nothing
_WINDOW, _APART = 3, 2  # layers


@dataclass(frozen=True, slots=True)
class LayerSimilarity:
    """How alike the states of each two layers are, on average over pictures.

    Attributes:
        matrix: cosines from -1 to 1; layer 0 are the embeddings, layer l is the output of the l-th layer.
        error: standard errors over the pictures; NaN for one picture.
        num_pictures: how many were seen.
        tower: name of the model.
        compare, tokens: see `layer_similarity`.
        feature_layers: whose states the model's projector reads; empty where the model does not say.
    """

    matrix: Float[np.ndarray, "L L"]
    error: Float[np.ndarray, "L L"]
    num_pictures: int
    tower: str = ""
    compare: Compared = "tokens"
    tokens: Tokens = "patches"
    feature_layers: tuple[int, ...] = ()

    @property
    def num_layers(self) -> int:
        """Layers of the tower, without the embeddings."""
        return len(self.matrix) - 1

    @property
    def adjacent(self) -> Float[np.ndarray, " C"]:
        """The similarity of each layer and the next one."""
        return np.diagonal(self.matrix, 1).copy()

    def as_dict(self) -> dict[str, Any]:
        """All of it, as JSON can hold it; errors that are not known are None."""
        errors = [[None if math.isnan(one) else one for one in row] for row in self.error.tolist()]
        return {
            "tower": self.tower,
            "num_layers": self.num_layers,
            "num_pictures": self.num_pictures,
            "compare": self.compare,
            "tokens": self.tokens,
            "feature_layers": list(self.feature_layers),
            "matrix": self.matrix.tolist(),
            "error": errors,
        }


def layer_similarity(
    tower: VisionTower | Backend | str | Path,
    pictures: Iterable[PictureSource],
    *,
    compare: Compared = "tokens",
    tokens: Tokens = "patches",
    batch_size: int = 8,
) -> LayerSimilarity:
    """How alike each two layers of a vision tower see pictures; 64 to 256 pictures are enough for most towers.

    One pass for each picture, and one matrix product; states of one batch are held at a time.

    Args:
        tower: what `open_tower` opens: a backend that sees pictures, a name, a folder, a hub id.
        pictures: opened, or what `open_picture` opens. Each counts the same, whatever its number of tokens.
        compare: ``"tokens"``: the cosine of a token's state in one layer with its state in the other, the mean over
            tokens. ``"mean"``: the cosine of the means over tokens. ``"flat"``: the cosine of all states of a picture
            as one vector, so that long states count more.
        tokens: ``"patches"`` leaves out class tokens, registers and padding; ``"all"`` takes what the tower reads.
        batch_size: pictures of one pass at most.

    Raises:
        InputError: no pictures, or an unknown setting.
        ScoreError: the model computed NaN.
        UnsupportedModelError: the tower is not a stack of equal layers.
    """
    opened = open_tower(tower)
    found = similarity_of_states(opened.states(pictures, batch_size=batch_size), compare=compare, tokens=tokens)
    return replace(found, tower=opened.name, feature_layers=opened.feature_layers)


def similarity_of_states(
    batches: Iterable[TowerStates], *, compare: Compared = "tokens", tokens: Tokens = "patches"
) -> LayerSimilarity:
    """As `layer_similarity`, of states that were read already; batches must not cut a picture in two.

    Raises:
        InputError: no pictures, or an unknown setting.
        ScoreError: there are NaN in the states.
    """
    for name, given, known in (("compare", compare, Compared), ("tokens", tokens, Tokens)):
        _check_one_of(name, given, known.__args__)  # type: ignore[attr-defined]
    count, mean, squares = 0, np.zeros((1, 1)), np.zeros((1, 1))
    for states in batches:
        for one in _by_picture(states, tokens):
            found = _cosines(one, compare).double().cpu().numpy()
            count, before = count + 1, mean
            mean = mean + (found - mean) / count
            squares = squares + (found - before) * (found - mean)
    if not count:
        raise InputError("there are no pictures to compare layers on: pass at least one, better 64 or more")
    if not np.isfinite(mean).all():
        raise ScoreError("the vision tower computed NaN: load it with dtype='float32'")
    error = np.sqrt(squares / (count - 1) / count) if count > 1 else np.full_like(mean, math.nan)
    return LayerSimilarity(mean.clip(-1.0, 1.0), error, count, compare=compare, tokens=tokens)


def _by_picture(states: TowerStates, tokens: Tokens) -> Sequence[Float[Tensor, "L N d"]]:
    """The states of each picture of a batch."""
    chosen = states.patch if tokens == "patches" else torch.ones_like(states.patch)
    counts = states.picture[chosen].unique_consecutive(return_counts=True)[1].tolist()
    return states.states[:, chosen].split(counts, dim=1)


def _cosines(states: Float[Tensor, "L N d"], compare: Compared) -> Float[Tensor, "L L"]:
    if compare == "mean":
        states = states.float().mean(1, keepdim=True)
    vectors = states.float().flatten(1)[:, None] if compare == "flat" else states.float()
    units = torch.nn.functional.normalize(vectors, dim=-1, eps=_SMALLEST).flatten(1)
    return units @ units.T / vectors.shape[1]


# ---- groups


def cut_strengths(
    similarity: LayerSimilarity | Float[np.ndarray, "L L"], rule: CutRule = "novelty", *, window: int = _WINDOW
) -> Float[np.ndarray, " C"]:
    """How much speaks for a cut between each layer and the next one.

    Args:
        similarity: of the layers.
        rule: ``"novelty"`` (Foote 2000): how much more alike the layers of each side are among themselves than those
            of one side are to those of the other. ``"adjacent"``: 1 minus the similarity of the two layers.
        window: how many layers of each side novelty compares; fewer near the ends.

    Raises:
        InputError: no square matrix of numbers, or an unknown setting.
    """
    matrix = _matrix_of(similarity)
    _check_one_of("rule", rule, CutRule.__args__)  # type: ignore[attr-defined]
    if window < 1:
        raise InputError(f"window={window} compares no layers: pass at least 1")
    if rule == "adjacent":
        return 1.0 - np.diagonal(matrix, 1)
    found = np.zeros(len(matrix) - 1)
    for cut in range(1, len(matrix)):
        left, right = slice(max(0, cut - window), cut), slice(cut, cut + window)
        inside = matrix[left, left].mean() + matrix[right, right].mean()
        found[cut - 1] = inside - 2 * matrix[left, right].mean()
    return found


def group_layers(
    similarity: LayerSimilarity | Float[np.ndarray, "L L"],
    num_groups: int = 3,
    rule: CutRule = "novelty",
    *,
    window: int = _WINDOW,
    apart: int = _APART,
) -> tuple[range, ...]:
    """Neighbouring layers that see alike: groups from the embeddings (0) to the last layer, cut where most changes.

    The strongest cut is taken first, then the strongest that is further than `apart` layers from those taken, and so
    on. Where that gives too few groups, cuts may stand closer. Clusterings that balance sizes miss the groups of the
    paper (0-12, 13-20 and 21-24 of CLIP ViT-L/14), whose first is a wide band and no block.

    Args:
        similarity: of the layers.
        num_groups: the paper has 3: shallow, middle and deep layers.
        rule, window: see `cut_strengths`.
        apart: layers.

    Raises:
        InputError: more groups than layers, or an unknown setting.

    Example:
        >>> import numpy as np
        >>> blocks = np.kron(np.eye(2), np.ones((4, 4)))
        >>> group_layers(blocks, 2)
        (range(0, 4), range(4, 8))
    """
    strengths = cut_strengths(similarity, rule, window=window)
    size = len(strengths) + 1
    if not 1 <= num_groups <= size:
        raise InputError(f"{num_groups} groups of {size} layers, the embeddings included: pass 1 to {size}")
    if apart < 0:
        raise InputError(f"apart={apart} is no distance: pass 0 or more layers")
    cuts: list[int] = []
    strongest = np.argsort(-strengths, kind="stable").tolist()
    for distance in range(apart, -1, -1):
        for cut in strongest:
            if len(cuts) < num_groups - 1 and all(abs(cut - other) > distance for other in cuts):
                cuts.append(cut)
    edges = [0, *(cut + 1 for cut in sorted(cuts)), size]
    return tuple(range(start, stop) for start, stop in pairwise(edges))


def representatives(
    similarity: LayerSimilarity | Float[np.ndarray, "L L"],
    groups: Sequence[range] | None = None,
    rule: Representative = "penultimate",
) -> tuple[int, ...]:
    """One layer of each group: a candidate for ``vision_feature_layer`` of transformers, which counts layers alike.

    Which layers are best is not in the similarities: the paper's 3, 18 and 23 came from training a model on each layer.
    A projector that was trained on one layer cannot read another; candidates are for training.

    Args:
        similarity: of the layers.
        groups: of `group_layers`; None makes three, or as many as there are layers.
        rule: ``"medoid"``: the layer that is most like the others of its group. ``"penultimate"``: the same, but in the
            last group the last layer but one, which most models read. ``"paper"``: 3, 18 and 23 of 24 at this tower's
            depth, whatever the groups; halves are rounded down, so that the last layer is not taken.

    Raises:
        InputError: groups that are no groups of these layers, or an unknown rule.

    Example:
        >>> import numpy as np
        >>> representatives(np.eye(25), rule="paper")
        (3, 18, 23)
    """
    matrix = _matrix_of(similarity)
    _check_one_of("rule", rule, Representative.__args__)  # type: ignore[attr-defined]
    last = len(matrix) - 1
    if rule == "paper":
        scaled = [math.ceil(layer * last / _PUBLISHED_DEPTH - 0.5) for layer in _PUBLISHED]
        return tuple(sorted({max(min(1, last), layer) for layer in scaled}))
    groups = group_layers(matrix, min(3, len(matrix))) if groups is None else groups
    if [layer for group in groups for layer in group] != list(range(len(matrix))) or not all(groups):
        raise InputError(f"{list(groups)} are no groups of layers 0 to {last}: pass what group_layers returns")
    chosen = [group[int(np.argmax(matrix[np.ix_(group, group)].mean(1)))] for group in groups]
    if rule == "penultimate":
        chosen[-1] = max(groups[-1][0], last - 1)
    return tuple(chosen)


def _matrix_of(similarity: LayerSimilarity | Float[np.ndarray, "L L"]) -> Float[np.ndarray, "L L"]:
    matrix = similarity.matrix if isinstance(similarity, LayerSimilarity) else similarity
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix) or not np.isfinite(matrix).all():
        raise InputError(f"an array {matrix.shape} is no similarity of layers: pass a square of numbers")
    return matrix


def _check_one_of(name: str, given: str, known: Sequence[str]) -> None:
    if given not in known:
        raise InputError(f"{name}={given!r} is not known: pass {', '.join(map(repr, known))}")
