"""How much each visual token has to do with what is asked.

Legend: N tokens of a view, M texts or tokens of a text, D width.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

_EPSILON = 1e-6


def mean_cosine(tokens: Shaped[Tensor, "N D"], texts: Shaped[Tensor, "M D"]) -> Float[Tensor, " N"]:
    """The mean of each token's cosines with all texts, in fp32; vectors of zeros have the cosine 0.

    There must be at least one text: the mean of none is NaN.
    """
    with_N, with_M = (torch.nn.functional.normalize(some.float(), dim=-1) for some in (tokens, texts))
    return (with_N @ with_M.T).mean(-1)


def relevance_of(
    cosines: Sequence[Float[Tensor, " _"]], *, sign: int = 1, theta: float | None = None, published: bool = False
) -> list[Float[Tensor, " _"]]:
    """Relevance from about 0 to 1, over all views that are given together.

    Args:
        cosines: of the tokens of each view.
        sign: -1 makes the least similar token the most relevant one.
        theta: in [0, 1): how much relevance counts beside diversity, ``exp(theta / (2 - 2 theta) * relevance)``; 0 is
            diversity alone. None takes relevance as it is.
        published: divide by the range even where it is 0, which gives infinity. Otherwise cosines that are equal but
            for rounding give 1.

    Example:
        >>> import torch
        >>> relevance_of([torch.tensor([0.1, 0.3, 0.2])])[0].round(decimals=3)
        tensor([0.0000, 1.0000, 0.5000])
    """
    if not cosines:
        return []
    together = torch.cat([sign * one for one in cosines])
    lowest, highest = together.min(), together.max()
    if not published and highest - lowest < _EPSILON:
        found = torch.ones_like(together)
    else:
        found = (together - lowest + _EPSILON) / (highest - lowest)
    if theta is not None:
        found = (theta / (2 - 2 * theta) * found).exp()
    return list(found.split([len(one) for one in cosines]))
