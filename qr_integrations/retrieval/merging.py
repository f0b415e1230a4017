"""Attention of several windows on one scale: it is a share of one prompt, and shares of different prompts differ.

Legend: W windows, K kept heads, T tokens of the shared part (documents).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from qr_integrations.types import Span


def on_one_scale(
    shares: Sequence[Float[Tensor, "K _"]], documents: Sequence[Sequence[Span]]
) -> list[Float[Tensor, "K _"]]:
    """What one query pays to the tokens of every window, as shares of one prompt that holds all the documents.

    Every window has the same beginning and the same query, so what a head spends there, beside the documents, is the
    same amount in each, of which it sees a different share. One window alone stays as it is.

    Call it for the query and for the null query, before `calibrate`, and with the heads apart.

    Args:
        shares: one query's attention to the shared tokens of each window, not calibrated.
        documents: the spans of the documents in each.
    """
    outside_WK = torch.stack(
        [1.0 - kept_KT[:, spans[0].start :].sum(-1) for kept_KT, spans in zip(shares, documents, strict=True)]
    )
    spent_WK = 1.0 / outside_WK.clamp(min=1e-6)  # all that a head spends in a window, in units of what is common
    factors_WK = spent_WK / (1.0 + (spent_WK - 1.0).sum(0))
    return [kept_KT * factors_K[:, None] for kept_KT, factors_K in zip(shares, factors_WK, strict=True)]
