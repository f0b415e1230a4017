"""nDCG, against numbers worked out by hand."""

import itertools
import math

import pytest

from qr_integrations.errors import InputError
from qr_integrations.evaluation import ndcg_at_k, random_ndcg_at_k


@pytest.mark.parametrize(
    ("order", "gold", "k", "expected"),
    [
        ([3, 1, 2], {3}, 10, 1.0),
        ([1, 3, 2], {3}, 10, 0.6309297535714575),  # 1 / log2(3)
        ([1, 2, 3], {3}, 10, 0.5),  # 1 / log2(4)
        ([1, 2, 3], {3}, 2, 0.0),  # third, and two count
        ([1, 2, 3], {7}, 10, 0.0),  # not in the order at all
        ([2, 3, 1], {2, 3}, 10, 1.0),
        ([2, 1, 3], {2, 3}, 10, 0.9197207891481876),  # (1 + 0.5) / (1 + 0.63093)
        ([1, 2, 3], {1, 2, 3}, 2, 1.0),  # more gold documents than ranks
        ([], {0}, 10, 0.0),
    ],
)
def test_ndcg_by_hand(order: list[int], gold: set[int], k: int, expected: float) -> None:
    assert ndcg_at_k(order, gold, k) == pytest.approx(expected, abs=1e-12)


def test_the_tenth_rank_counts_and_the_eleventh_does_not() -> None:
    order = list(range(20))
    assert ndcg_at_k(order, [9]) == pytest.approx(1 / math.log2(11))
    assert ndcg_at_k(order, [10]) == 0.0


@pytest.mark.parametrize(("num_documents", "num_gold", "k"), [(1, 1, 10), (4, 1, 10), (4, 1, 2), (5, 2, 3), (4, 4, 2)])
def test_random_is_the_mean_over_all_orders(num_documents: int, num_gold: int, k: int) -> None:
    values = [ndcg_at_k(order, range(num_gold), k) for order in itertools.permutations(range(num_documents))]
    assert random_ndcg_at_k(num_documents, num_gold, k) == pytest.approx(sum(values) / len(values), abs=1e-12)


def test_random_among_twenty() -> None:
    assert random_ndcg_at_k(20) == pytest.approx(4.543559338088346 / 20, abs=1e-12)  # 1 + 0.63093 + 0.5 + ...


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(InputError, match="gold document"):
        ndcg_at_k([0, 1], [])
    with pytest.raises(InputError, match="k=0"):
        ndcg_at_k([0, 1], [0], k=0)
    with pytest.raises(InputError, match="twice"):
        ndcg_at_k([0, 0], [0])
    for wrong in ((3, 0), (3, 4)):
        with pytest.raises(InputError, match="num_gold"):
            random_ndcg_at_k(*wrong)
