"""Greedy selection under a determinantal point process: the fast greedy MAP of arXiv 1709.05135.

Legend: N tokens, k picks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

_TOLERANCE = 1e-5  # of a token's own entry: what single precision leaves of one that is made out of others


@dataclass(frozen=True, slots=True)
class Picks:
    """Tokens in the order in which they were picked.

    Attributes:
        order: their numbers.
        pivots: for each, the factor by which it raised the determinant; NaN for those that were picked because the
            others were made out of tokens that were picked before.
    """

    order: Int[np.ndarray, " k"]
    pivots: Float[np.ndarray, " k"]


def greedy_map(kernel: Float[np.ndarray, "N N"], num_picks: int, *, published: bool = False) -> Picks:
    """Pick the token that raises the determinant of what is picked most, again and again.

    A pivoted Cholesky factorisation that computes only the rows of what is picked: one product of a vector and a matrix
    for each pick. Ties go to the first token.

    Args:
        kernel: symmetric and positive semi-definite, float32 or float64. It is not changed.
        num_picks: how many; all tokens, where there are fewer.
        published: go on as the authors' code does where no token adds anything: rounding decides, then NaN, and tokens
            come again; `num_picks` may then exceed N. Otherwise those with the largest diagonal entries are taken.

    Example:
        >>> import numpy as np
        >>> greedy_map(np.array([[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 0.5]]), 2).order
        array([0, 2])
    """
    wanted = num_picks if published else min(num_picks, len(kernel))
    factor = np.empty((wanted, len(kernel)), dtype=kernel.dtype)
    residual, squares = kernel.diagonal().copy(), np.empty_like(factor, shape=len(kernel))
    least = [-math.nan] * len(kernel) if published else (_TOLERANCE * residual).tolist()
    largest, value_of, product, rows = residual.argmax, residual.item, np.dot, list(factor)
    order: list[int] = []
    pivots: list[float] = []
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):  # what is published may meet NaN
        while len(order) < wanted:
            token = int(largest())
            pivot = value_of(token)
            if pivot <= least[token]:
                if pivot == -math.inf:
                    break
                residual[token] = -math.inf
                continue
            done = len(order)
            row = rows[done]
            product(factor[:done, token], factor[:done], row)
            np.subtract(kernel[token], row, row)
            np.multiply(row, pivot**-0.5 if pivot > 0 else math.nan, row)
            np.square(row, squares)
            np.subtract(residual, squares, residual)
            residual[token] = -math.inf
            order.append(token)
            pivots.append(pivot)
    if len(order) < wanted:
        order += _largest(kernel.diagonal(), order, wanted - len(order))
    pivots += [math.nan] * (wanted - len(pivots))
    return Picks(np.array(order, dtype=np.int64), np.array(pivots, dtype=kernel.dtype))


def _largest(values: Float[np.ndarray, " N"], taken: Sequence[int], num: int) -> list[int]:
    """The largest of those that are not taken, the largest first."""
    free = np.setdiff1d(np.arange(len(values)), np.asarray(taken, dtype=np.int64))
    chosen: list[int] = free[np.argsort(-values[free], kind="stable")[:num]].tolist()
    return chosen
