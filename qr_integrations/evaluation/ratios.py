"""How sure a ratio of sums is, where several counts come from the same picture.

Accuracy, precision, F1 and CHAIR are all parts divided by wholes, summed over pictures. Questions about one picture are
not independent, so pictures are drawn again, never single questions.
"""

from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Float

from qr_integrations.evaluation.statistics import Estimate, difference, interval

Counts = tuple[np.ndarray, np.ndarray]
"""Parts and wholes of a ratio, one of each for every picture."""


def per_picture(
    parts: Float[np.ndarray, "pictures"], wholes: Float[np.ndarray, "pictures"]
) -> Float[np.ndarray, "pictures"]:
    """A value for each picture whose mean is the ratio of the sums, and whose spread is the ratio's.

    The second is exact in the first order (the ratio linearised around its value, as for survey data).

    Example:
        >>> per_picture(np.array([1.0, 0.0]), np.array([1.0, 3.0])).tolist()
        [0.625, -0.125]
    """
    ratio = parts.sum() / wholes.sum()
    values: np.ndarray = ratio + (parts - ratio * wholes) / wholes.mean()
    return values


def ratio(parts: Float[np.ndarray, "pictures"], wholes: Float[np.ndarray, "pictures"]) -> Estimate | None:
    """The ratio of the sums with its bootstrap interval, cut to 0 to 1; None where the wholes are all 0.

    Raises:
        MissingExtra: scipy is not installed.
    """
    if not wholes.any():
        return None
    found = interval(per_picture(parts, wholes))
    return Estimate(found.mean, max(0.0, found.low), min(1.0, found.high))


def ratio_difference(
    parts: Float[np.ndarray, "pictures"],
    wholes: Float[np.ndarray, "pictures"],
    base_parts: Float[np.ndarray, "pictures"],
    base_wholes: Float[np.ndarray, "pictures"],
) -> Estimate | None:
    """How much larger one ratio is than another of the same pictures, with a paired test; None where one has no value.

    Raises:
        MissingExtra: scipy is not installed.
    """
    if not wholes.any() or not base_wholes.any():
        return None
    return difference(per_picture(parts, wholes), per_picture(base_parts, base_wholes))


def estimates(
    estimate: Callable[..., Estimate | None], *counts: Mapping[str, Mapping[str, Counts]]
) -> dict[str, dict[str, Estimate]]:
    """What `ratio` makes of counts, or `ratio_difference` of two, by what and by name; None is left out."""
    told: dict[str, dict[str, Estimate]] = {}
    for kind, named in counts[0].items():
        found = {name: estimate(*(part for one in counts for part in one[kind][name])) for name in named}
        told[kind] = {name: one for name, one in found.items() if one is not None}
    return told
