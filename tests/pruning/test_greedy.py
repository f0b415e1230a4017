"""Greedy picks against brute force, against the authors' code, and where kernels lack rank."""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

GOLDEN = Path(__file__).parents[1] / "golden" / "vision" / "cdpruner"
CASES: list[dict[str, Any]] = json.loads(GOLDEN.with_suffix(".json").read_text())["cases"]


@cache
def arrays() -> dict[str, np.ndarray]:
    with np.load(GOLDEN.with_suffix(".npz")) as file:
        return dict(file)


def kernel(size: int, rank: int, seed: int = 0, dtype: Any = np.float64) -> np.ndarray:
    features = np.random.default_rng(seed).standard_normal((size, rank))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    weights = np.random.default_rng(seed + 1).uniform(0.2, 1.0, size)
    return (weights[:, None] * (features @ features.T) * weights).astype(dtype)


def brute_force(matrix: np.ndarray, num: int) -> list[int]:
    picked: list[int] = []
    for _ in range(num):
        rest = [token for token in range(len(matrix)) if token not in picked]
        picked.append(max(rest, key=lambda token: np.linalg.det(matrix[np.ix_([*picked, token], [*picked, token])])))
    return picked


@pytest.mark.parametrize("seed", range(5))
def test_each_pick_raises_the_determinant_most(seed: int) -> None:
    from qr_integrations.pruning.greedy import greedy_map

    matrix = kernel(14, 20, seed)
    picks = greedy_map(matrix, 8)
    assert picks.order.tolist() == brute_force(matrix, 8)
    chosen = matrix[np.ix_(picks.order, picks.order)]
    np.testing.assert_allclose(picks.pivots.prod(), np.linalg.det(chosen), rtol=1e-9)


def test_fewer_picks_are_the_first_of_more() -> None:
    from qr_integrations.pruning.greedy import greedy_map

    matrix = kernel(60, 80, dtype=np.float32)
    whole = greedy_map(matrix, 60).order
    assert sorted(whole) == list(range(60))
    assert all(greedy_map(matrix, num).order.tolist() == whole[:num].tolist() for num in (1, 7, 30, 59))
    assert whole[0] == matrix.diagonal().argmax()


def test_the_order_of_tokens_and_the_scale_of_the_kernel_do_not_matter() -> None:
    from qr_integrations.pruning.greedy import greedy_map

    matrix = kernel(40, 50)
    order, shuffled = greedy_map(matrix, 20).order, np.random.default_rng(1).permutation(40)
    assert shuffled[greedy_map(matrix[np.ix_(shuffled, shuffled)], 20).order].tolist() == order.tolist()
    assert greedy_map(2.0**-40 * matrix, 20).order.tolist() == order.tolist()


def test_ties_go_to_the_first() -> None:
    from qr_integrations.pruning.greedy import greedy_map

    assert greedy_map(np.eye(6, dtype=np.float32), 4).order.tolist() == [0, 1, 2, 3]


def test_copies_wait_until_nothing_new_is_left() -> None:
    from qr_integrations.pruning.greedy import greedy_map

    copied = np.r_[0:10, 0:10]
    matrix = kernel(10, 30)[np.ix_(copied, copied)]
    order = greedy_map(matrix, 14).order
    assert sorted(order[:10] % 10) == list(range(10)) and len(set(order)) == 14
    behind = sorted(range(10, 20), key=lambda token: (-matrix[token, token], token))
    assert order[10:].tolist() == behind[:4]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_lacks_rank_still_gives_as_many_as_asked_for(dtype: Any) -> None:
    from qr_integrations.pruning.greedy import greedy_map

    matrix = kernel(90, 24, dtype=dtype)
    picks = greedy_map(matrix, 64)
    assert len(set(picks.order.tolist())) == 64
    assert np.isnan(picks.pivots).tolist() == [False] * 24 + [True] * 40
    rest = picks.order[24:]
    assert (np.diff(matrix.diagonal()[rest]) <= 0).all()


def test_more_picks_than_tokens_are_all_tokens() -> None:
    from qr_integrations.pruning.greedy import greedy_map

    assert sorted(greedy_map(kernel(7, 9), 12).order) == list(range(7))
    assert sorted(greedy_map(np.zeros((3, 3)), 2).order) == [0, 1]


def golden_runs() -> Iterator[tuple[str, np.ndarray, int, dict[str, Any], int]]:
    for case in CASES:
        if not case["kernel_finite"]:
            continue
        matrices = stored_kernels(case)
        for num, result in case["results"].items():
            for view in range(case["B"]):
                yield case["id"], matrices[view], int(num), result, view


def stored_kernels(case: dict[str, Any]) -> np.ndarray:
    """For the largest case rows are stored only; the kernel is made of what went into it."""
    if case["kernel"] in arrays():
        return arrays()[case["kernel"]]
    features = arrays()[f"{case['id']}_features"].astype(np.float32)
    features /= np.linalg.norm(features, axis=-1, keepdims=True)
    relevance = arrays()[case["relevance"]]
    made: np.ndarray = relevance[:, :, None] * (features @ features.swapaxes(1, 2)) * relevance[:, None]
    return made


def test_the_authors_picks_come_out() -> None:
    from qr_integrations.pruning.greedy import greedy_map

    checked = 0
    for name, matrix, num, result, view in golden_runs():
        stable = result["stable_prefix"][view]
        if result["min_relative_gap"][view] <= 1e-6:
            continue
        for published in (False, True):
            picks = greedy_map(matrix, num, published=published)
            assert picks.order[:stable].tolist() == result["greedy_order"][view][:stable], (name, num)
            np.testing.assert_allclose(picks.pivots[:stable], result["pivots"][view][:stable], rtol=2e-3, atol=1e-6)
        checked += stable
    assert checked > 900


def test_published_goes_on_where_nothing_is_left() -> None:
    from qr_integrations.pruning.greedy import greedy_map

    case = next(case for case in CASES if case["kind"] == "rankdef")
    matrix = stored_kernels(case)[0]
    published = greedy_map(matrix, 64, published=True)
    assert len(published.order) == 64 and len(set(published.order.tolist())) < 40
    assert len(set(greedy_map(matrix, 64).order.tolist())) == 64
