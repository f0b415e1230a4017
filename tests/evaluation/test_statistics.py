"""Intervals and paired tests, against a bootstrap and a randomization test written plainly."""

import itertools
from typing import Any

import numpy as np
import pytest


def statistics() -> Any:
    from qr_integrations.evaluation import statistics

    return statistics


def test_an_interval_agrees_with_a_plain_bootstrap() -> None:
    rng = np.random.default_rng(0)
    values = rng.beta(2, 1, size=40)
    means = np.sort([rng.choice(values, 40).mean() for _ in range(20_000)])
    found = statistics().interval(values)
    assert found.mean == values.mean()
    spread = means[19_500] - means[500]
    assert found.low == pytest.approx(means[500], abs=0.03 * spread)  # three times the error of 10,000 resamples
    assert found.high == pytest.approx(means[19_500], abs=0.03 * spread)
    assert found.p is None


def test_an_interval_covers_the_true_mean_as_often_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics(), "RESAMPLES", 400)
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        found = statistics().interval(rng.uniform(size=50))
        covered += found.low <= 0.5 <= found.high
    assert 0.88 <= covered / 200 <= 0.99


@pytest.mark.parametrize("values", [[0.7], [0.0], [1.0] * 9])
def test_one_value_or_equal_ones_have_no_spread(values: list[float]) -> None:
    found = statistics().interval(np.array(values))
    assert (found.mean, found.low, found.high) == (values[0],) * 3


def test_the_same_values_give_the_same_figures() -> None:
    values, baseline = np.random.default_rng(2).uniform(size=(2, 30))
    stats = statistics()
    assert stats.interval(values) == stats.interval(values.copy())
    assert stats.difference(values, baseline) == stats.difference(values.copy(), baseline.copy())
    assert stats.interval(values, seed=1) != stats.interval(values)


def test_a_clear_difference_is_told_from_none() -> None:
    rng = np.random.default_rng(3)
    baseline = rng.uniform(size=60)
    better = statistics().difference(baseline + 0.1 + rng.normal(0, 0.05, 60), baseline)
    worse = statistics().difference(baseline - 0.1 + rng.normal(0, 0.05, 60), baseline)
    same = statistics().difference(baseline + rng.permutation([-0.1, 0.1] * 30), baseline)
    assert better.p < 0.001 and 0.05 < better.low < better.mean < better.high
    assert worse.p < 0.001 and worse.low < worse.mean < worse.high < -0.05
    assert same.p > 0.5 and same.low < 0 < same.high


def test_no_difference_at_all_and_a_single_question_tell_nothing() -> None:
    values = np.array([0.2, 0.9, 0.4])
    assert statistics().difference(values, values.copy()).p == 1.0
    single = statistics().difference(np.array([0.9]), np.array([0.1]))
    assert single.p == 1.0 and single.mean == pytest.approx(0.8)


def test_p_of_few_questions_is_exact() -> None:
    differences = np.array([0.5, 0.3, 0.4, -0.1, 0.2, 0.6])
    means = np.array([(differences * signs).mean() for signs in itertools.product((-1, 1), repeat=6)])
    expected = (abs(means) >= differences.mean() - 1e-12).mean()
    assert statistics().difference(differences, np.zeros(6)).p == pytest.approx(expected)
    assert expected == pytest.approx(4 / 64)


def test_p_of_many_questions_agrees_with_a_plain_randomization_test() -> None:
    rng = np.random.default_rng(4)
    differences = rng.normal(0.02, 0.1, size=80)
    means = [(differences * rng.choice((-1, 1), 80)).mean() for _ in range(20_000)]
    expected = (np.abs(means) >= abs(differences.mean())).mean()
    assert 0.01 < expected < 0.9
    assert statistics().difference(differences, np.zeros(80)).p == pytest.approx(expected, abs=0.03)


def test_ranks_of_ties_are_shared() -> None:
    assert statistics().mean_ranks()(np.array([3.0, 1.0, 3.0, 9.0])).tolist() == [2.5, 1.0, 2.5, 4.0]


def test_it_is_written_with_its_interval() -> None:
    assert str(statistics().Estimate(0.92345, 0.8, 1.0)) == "0.923 [0.800, 1.000]"


@pytest.mark.parametrize("call", ["interval", "difference", "mean_ranks"])
def test_without_scipy_the_extra_is_named(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from qr_integrations.errors import MissingExtra

    monkeypatch.setitem(sys.modules, "scipy", None)
    values = [np.array([0.1, 0.2])] * {"interval": 1, "difference": 2, "mean_ranks": 0}[call]
    with pytest.raises(MissingExtra, match=r"intervals and tests needs .* pip install 'qr-integrations\[eval\]'"):
        getattr(statistics(), call)(*values)
