"""How sure a mean is: bootstrap intervals, and a paired test."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from qr_integrations.errors import MissingExtra

RESAMPLES = 10_000
_AT_ONCE = 500  # resamples held in memory together


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over questions and the interval that holds it.

    Attributes:
        mean, low, high: the mean and its bootstrap interval (percentiles) at 95 %.
        p: of a paired test against a baseline, where there is one.
    """

    mean: float
    low: float
    high: float
    p: float | None = None

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def interval(values: Float[np.ndarray, "n"], seed: int = 0) -> Estimate:
    """The mean with its interval: questions are drawn again, with replacement, `RESAMPLES` times.

    Raises:
        MissingExtra: scipy is not installed.
    """
    stats = _stats()
    mean = float(values.mean())
    if len(values) < 2 or np.ptp(values) == 0:
        return Estimate(mean, mean, mean)
    found = stats.bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, batch=_AT_ONCE, method="percentile", rng=np.random.default_rng(seed)
    )
    return Estimate(mean, float(found.confidence_interval.low), float(found.confidence_interval.high))


def difference(values: Float[np.ndarray, "n"], baseline: Float[np.ndarray, "n"], seed: int = 0) -> Estimate:
    """How much better than a baseline on the same questions, with a two-sided randomization test.

    The test (Fisher's, as Smucker et al. 2007 recommend for retrieval) swaps the two systems question by question: `p`
    is how often the mean then differs at least as much.

    Raises:
        MissingExtra: scipy is not installed.
    """
    found = interval(values - baseline, seed)
    if len(values) < 2 or not np.any(values - baseline):
        return Estimate(found.mean, found.low, found.high, 1.0)
    test = _stats().permutation_test(
        (values - baseline,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=_AT_ONCE,
        rng=np.random.default_rng(seed),
    )
    return Estimate(found.mean, found.low, found.high, float(test.pvalue))


def mean_ranks() -> Callable[[np.ndarray], np.ndarray]:
    """The function that ranks values from 1 for the smallest; what ties shares the mean rank.

    Raises:
        MissingExtra: scipy is not installed.
    """
    ranked: Callable[[np.ndarray], np.ndarray] = _stats().rankdata
    return ranked


def _stats() -> Any:
    try:
        from scipy import stats
    except ImportError as error:
        raise MissingExtra("intervals and tests", "eval") from error
    return stats
