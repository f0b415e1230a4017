"""Measures of a ranking against the documents known to be relevant."""

import math
from collections.abc import Collection, Sequence

from qr_integrations.errors import InputError


def ndcg_at_k(order: Sequence[int], gold: Collection[int], k: int = 10) -> float:
    """nDCG@k with binary relevance: 1.0 when all gold documents stand first, 0.0 when none is among the first `k`.

    A gold document at rank r (from 1) counts 1 / log2(r + 1); the sum is divided by that of the best order (Järvelin
    and Kekäläinen 2002, with the discount that trec_eval uses).

    Args:
        order: documents, best first, e.g. `Ranking.order`.
        gold: the relevant ones; they need not all be in `order`.
        k: how many ranks count.

    Raises:
        InputError: `k` below 1, no gold document, or a document that stands twice in `order`.
    """
    relevant = set(gold)
    if k < 1 or not relevant:
        raise InputError(f"nDCG@k needs k >= 1 and a gold document, got k={k} and {len(relevant)} gold documents")
    if len(set(order)) < len(order):
        raise InputError("a document stands twice in the order: pass each document once")
    gained = sum(_discount(rank) for rank, document in enumerate(order[:k], start=1) if document in relevant)
    return gained / sum(_discount(rank) for rank in range(1, min(k, len(relevant)) + 1))


def random_ndcg_at_k(num_documents: int, num_gold: int = 1, k: int = 10) -> float:
    """The mean of `ndcg_at_k` over all orders of `num_documents` documents, computed exactly.

    Each rank holds a gold document with probability ``num_gold / num_documents``.

    Raises:
        InputError: not ``1 <= num_gold <= num_documents``, or `k` below 1.
    """
    if not 1 <= num_gold <= num_documents or k < 1:
        raise InputError(f"needs 1 <= num_gold <= num_documents and k >= 1, got {num_gold}, {num_documents}, k={k}")
    expected = sum(_discount(rank) for rank in range(1, min(k, num_documents) + 1)) * num_gold / num_documents
    return expected / sum(_discount(rank) for rank in range(1, min(k, num_gold) + 1))


def _discount(rank: int) -> float:
    return 1.0 / math.log2(rank + 1)
