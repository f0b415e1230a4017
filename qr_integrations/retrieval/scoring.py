"""From attention rows to document scores: equations 2-4 of QRHead (arXiv 2506.09944).

Legend: K kept heads, T tokens, N documents. All scores are fp32.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from qr_integrations.errors import ScoreError
from qr_integrations.types import Span

NUM_STD = 2.0
Order = Literal["sum_then_filter", "filter_then_sum"]


def calibrate(
    query_KT: Float[Tensor, "K T1"], null_KT: Float[Tensor, "K T2"], weight: float = 1.0
) -> Float[Tensor, "K T3"]:
    """Subtract what any query would get: the null query's attention, token by token (equation 3).

    The longer one is cut to the shorter: the documents lie before both queries. `weight` is for several null queries.
    """
    num_tokens = min(query_KT.shape[-1], null_KT.shape[-1])
    return query_KT[:, :num_tokens] - weight * null_KT[:, :num_tokens]


def drop_outliers(scores_KT: Float[Tensor, "K T"]) -> Float[Tensor, "K T"]:
    """Zero out one document's tokens at or below mean - 2 standard deviations (n - 1), row by row.

    Calibration leaves single tokens far below zero, which the null query likes. One token alone has no deviation and
    stays.
    """
    if scores_KT.shape[-1] < 2:
        return scores_KT
    std, mean = torch.std_mean(scores_KT, dim=-1, keepdim=True)
    return scores_KT.where(scores_KT > mean - NUM_STD * std, 0.0)


def score_documents(
    scores_KT: Float[Tensor, "K T"], documents: Sequence[Span], *, order: Order = "sum_then_filter"
) -> Float[Tensor, "N"]:
    """One score per document from calibrated token scores.

    ``"sum_then_filter"`` is the official ranking path (heads are summed, then outliers dropped), ``"filter_then_sum"``
    sums the per-head scores of the detection path; the two are not equal.

    Raises:
        ScoreError: the scores are not finite.
    """
    if order == "filter_then_sum":
        return score_documents_per_head(scores_KT, documents).sum(0)
    return score_documents_per_head(scores_KT.sum(0, keepdim=True), documents)[0]


def score_documents_per_head(scores_KT: Float[Tensor, "K T"], documents: Sequence[Span]) -> Float[Tensor, "K N"]:
    """The official detection path: outliers are dropped in every head by itself.

    Raises:
        ScoreError: the scores are not finite.
    """
    if not torch.isfinite(scores_KT).all():  # before the filter, which NaN would pass for an outlier
        raise ScoreError("the model computed NaN or infinite attention: load it with dtype='bfloat16' or 'float32'")
    tokens_KM, owner_M, lengths_N = _document_tokens(scores_KT.double().cpu(), documents)

    def total(values_KM: Tensor) -> Tensor:
        return values_KM.new_zeros(len(values_KM), len(documents)).index_add_(1, owner_M, values_KM)

    centred_KM = tokens_KM - (total(tokens_KM) / lengths_N)[:, owner_M]
    std_KN = (total(centred_KM.square()) / (lengths_N - 1).clamp(min=1)).sqrt()
    kept_KM = (centred_KM > -NUM_STD * std_KN[:, owner_M]) | (lengths_N == 1)[owner_M]
    return total(tokens_KM.where(kept_KM, 0.0)).float()


def _document_tokens(scores_KT: Tensor, documents: Sequence[Span]) -> tuple[Tensor, Tensor, Tensor]:
    """The M tokens of all documents side by side, which document each belongs to, and how many each has.

    A handful of kernels for any number of documents; `drop_outliers` is the same written plainly.
    """
    starts_N = torch.tensor([span.start for span in documents])
    lengths_N = torch.tensor([len(span) for span in documents])
    owner_M = torch.repeat_interleave(torch.arange(len(documents)), lengths_N)
    first_N = lengths_N.cumsum(0) - lengths_N
    positions_M = torch.arange(len(owner_M)) + (starts_N - first_N)[owner_M]
    return scores_KT[:, positions_M], owner_M, lengths_N
