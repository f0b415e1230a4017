"""How many visual tokens SparseVLM leaves after which layers: the published table, and any number of tokens besides.

A budget says how many of a view's tokens are kept after a layer; merged ones come on top. The mean over all layers is
booked as published: a layer after which tokens go counts with what it leaves, not with what it read.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from qr_integrations.errors import InputError

PUBLISHED_TOKENS, PUBLISHED_DEPTH, PUBLISHED_LAYERS = 576, 32, (2, 6, 15)
PUBLISHED_BUDGETS: dict[str, dict[int, tuple[int, ...]]] = {
    "1.5": {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)},
    "2.0": {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)},
}
"""Of 576 tokens and 32 layers, by the number of tokens in the mean."""

_LAYERS = {"1.0": (*PUBLISHED_LAYERS, 19), "1.5": PUBLISHED_LAYERS, "2.0": PUBLISHED_LAYERS}
_RECYCLED, _PER_CLUSTER = 0.3, 10


def scaled_layers(version: str, num_layers: int, first: int | None = None) -> tuple[int, ...]:
    """The published layers, moved to the same shares of another depth; never the last layer, no layer twice.

    From 8 layers on, three read everything, as published: what words and pictures have to do with each
    other must have been found before it can decide. On qr-mini-vl of 8 layers, cuts after layers 2, 3 and 4 do better
    than as many tokens drawn at random, cuts after layers 0, 1 and 3 worse.

    Args:
        version: of the method.
        num_layers: depth of the language model.
        first: the first cut comes after this layer, where so few tokens are wanted that it must come earlier.

    Example:
        >>> scaled_layers("1.5", 32), scaled_layers("1.5", 28), scaled_layers("1.5", 8), scaled_layers("1.5", 8, 0)
        ((2, 6, 15), (2, 5, 13), (2, 3, 4), (0, 1, 3))
    """
    layers: list[int] = []
    for published in _LAYERS[version]:
        nearest = math.floor((published + 1) * num_layers / PUBLISHED_DEPTH + 0.5) - 1
        earliest = layers[-1] + 1 if layers else min(PUBLISHED_LAYERS[0], max(0, num_layers - 2) // 3)
        layers.append(max(nearest, earliest) if layers or first is None else first)
    return tuple(layer for layer in layers if layer < num_layers - 1)


def num_recycled(num_dropped: int) -> tuple[int, int]:
    """Of so many dropped tokens, how many are recycled, and into how many they are merged; none of none.

    Example:
        >>> num_recycled(276)
        (83, 9)
    """
    if not num_dropped:
        return 0, 0
    recycled = int(_RECYCLED * num_dropped) + 1
    return recycled, recycled // _PER_CLUSTER + 1


def tokens_after(budgets: Sequence[int], num_tokens: int, recycle: bool) -> tuple[int, ...]:
    """How many of a view's tokens there are after each layer that drops some, merged ones included.

    Example:
        >>> tokens_after((300, 200, 110), 576, recycle=True)
        (309, 204, 113)
    """
    after, now = [], num_tokens
    for budget in budgets:
        kept = min(budget, now)
        now = kept + (num_recycled(now - kept)[1] if recycle else 0)
        after.append(now)
    return tuple(after)


def booked_mean(after: Sequence[int], num_tokens: int, layers: Sequence[int], num_layers: int) -> float:
    """Tokens of a view in the mean over all layers, booked as published.

    Args:
        after: how many there are after each of `layers`.
        num_tokens: how many the first layer reads.
        layers: after which tokens go.
        num_layers: depth of the language model.

    Example:
        >>> booked_mean((309, 204, 113), 576, (2, 6, 15), 32)
        192.03125
    """
    starts, counts = [0, *layers, num_layers], [num_tokens, *after]
    lengths = [stop - start for start, stop in pairwise(starts)]
    return sum(length * count for length, count in zip(lengths, counts, strict=True)) / num_layers


def budgets_for(
    keep: int, num_tokens: int, layers: tuple[int, ...], num_layers: int, *, version: str, recycle: bool
) -> tuple[int, ...]:
    """How many of a view's tokens are kept after each layer, so that the booked mean is `keep`.

    The published budgets where there are some for this case. Else their shares of 576 are read as curves, over the
    depth and over the mean, from nothing to everything; the point whose mean is nearest to `keep` is taken.

    Raises:
        InputError: layers before the first cut alone read more than `keep` in the mean.

    Example:
        >>> budgets_for(192, 576, (2, 6, 15), 32, version="1.5", recycle=True)
        (300, 200, 110)
    """
    if keep >= num_tokens:
        return (num_tokens,) * len(layers)
    as_published = (num_tokens, num_layers, layers) == (PUBLISHED_TOKENS, PUBLISHED_DEPTH, PUBLISHED_LAYERS)
    if as_published and recycle == (version == "1.5") and keep in PUBLISHED_BUDGETS[version]:
        return PUBLISHED_BUDGETS[version][keep]

    def at(point: float) -> tuple[tuple[int, ...], float]:
        budgets = tuple(max(1, round(share * num_tokens)) for share in _shares(point, layers, num_layers, version))
        return budgets, booked_mean(tokens_after(budgets, num_tokens, recycle), num_tokens, layers, num_layers)

    least = at(0.0)[1]
    if least > keep + 0.5:
        if not layers[0]:
            raise InputError(
                f"keep={keep} of {num_tokens} tokens cannot be: with what is merged there are {math.ceil(least)} at "
                "least; keep so many, or pass recycle=False"
            )
        raise InputError(
            f"keep={keep} tokens in the mean cannot be: before layer {layers[0]} of {num_layers} all {num_tokens} are "
            f"read, which makes at least {math.ceil(least)}; keep so many, or drop earlier: pass layers=(0, ...)"
        )
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle)[1] < keep else (low, middle)
    return min((at(low), at(high)), key=lambda found: abs(found[1] - keep))[0]


def _shares(point: float, layers: Sequence[int], num_layers: int, version: str) -> list[float]:
    """The share of tokens kept after each layer, where `point` is the published mean as a share of all tokens."""
    table = sorted(PUBLISHED_BUDGETS[version].items())
    means = [0.0, *(mean / PUBLISHED_TOKENS for mean, _ in table), 1.0]
    depths = [(layer + 1) / PUBLISHED_DEPTH for layer in PUBLISHED_LAYERS]
    curves = zip(*(budgets for _, budgets in table), strict=True)
    kept = [np.interp(point, means, [0.0, *(each / PUBLISHED_TOKENS for each in curve), 1.0]) for curve in curves]
    return [float(np.interp((layer + 1) / num_layers, depths, kept)) for layer in layers]
