"""What can still be said when something else forbids every candidate.

Legend: B batch, N positions, V vocabulary.
"""

import torch
from jaxtyping import Float
from torch import Tensor

_DEPTH = 1e4  # at any usual temperature probability 0 in fp32; the order of logits stays to a thousandth


def keep_reachable(corrected: Float[Tensor, "B N V"], final: Float[Tensor, "B N V"]) -> Float[Tensor, "B N V"]:
    """Minus infinity becomes very low, in the order of the model's own logits.

    Such a token has probability 0 as long as any other may be said. Where a minimum length, bad words or suppressed
    tokens forbid all the others, the model's own next best is said, instead of token 0 or an error.
    """
    allowed = corrected.isfinite()
    lowest = corrected.masked_fill(~allowed, torch.inf).amin(-1, keepdim=True)
    below = final - final.amax(-1, keepdim=True) + (lowest - _DEPTH)
    return torch.where(allowed, corrected, below)
