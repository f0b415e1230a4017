"""What a ranking is worth, against scikit-learn and plain formulas; which orders are run; what is refused."""

import math
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import numpy as np
import pytest


def refused(says: str, error: str = "InputError") -> Any:
    from qr_integrations import errors

    return pytest.raises(getattr(errors, error), match=says)


def judged(number: int, relevance: dict[int, int], missed: tuple[int, ...] = (), query: str = "q") -> Any:
    from qr_integrations import Document, JudgedList

    documents = tuple(Document(f"{query} text {i}") for i in range(number))
    return JudgedList(query, documents, relevance, missed=missed)


class Noted:
    """Scores by a function of the document's number, and remembers what it was asked."""

    def __init__(self, score_of: Callable[[str, int], float], *, name: str = "noted", reads_order: bool = False):
        self.score_of, self.name, self.reads_order = score_of, name, reads_order
        self.asked: list[tuple[str, list[int]]] = []

    def score(self, query: str, documents: Sequence[Any]) -> list[float]:
        numbers = [int(document.text.split()[-1]) for document in documents]
        self.asked.append((query, numbers))
        return [self.score_of(query, number) for number in numbers]


def random_lists(rng: Random, count: int, *, with_missed: bool) -> list[Any]:
    lists = []
    for i in range(count):
        size = rng.randrange(2, 30)
        grades = {place: rng.randrange(4) for place in rng.sample(range(size), rng.randrange(1, size))}
        missed = tuple(rng.choices([1, 2, 3], k=rng.randrange(4))) if with_missed else ()
        if not any(grades.values()) and not missed:
            grades[0] = 2
        lists.append(judged(size, grades, missed, query=f"q{i}"))
    return lists


def in_random_order(lists: Sequence[Any], rng: Random) -> Noted:
    """Ranks without ties."""
    orders = {one.query: rng.sample(range(len(one.documents)), len(one.documents)) for one in lists}
    return Noted(lambda query, number: -float(orders[query].index(number)))


def measured(lists: Sequence[Any], system: Any, metrics: Sequence[str]) -> tuple[list[Any], Any]:
    from qr_integrations.evaluation.measuring import RETRIEVED, quality, run_systems

    runs = run_systems([system], lists, seeds=())
    return runs, quality(runs, lists, metrics)[RETRIEVED][system.name]


def grades_by_rank(run: Any, one: Any) -> list[int]:
    return [one.relevance.get(document, 0) for document in run.ranking]


def test_ndcg_is_that_of_scikit_learn() -> None:
    from sklearn.metrics import ndcg_score

    rng = Random(0)
    lists = random_lists(rng, 40, with_missed=True)
    runs, found = measured(lists, in_random_order(lists, rng), ["nDCG@10", "nDCG@3"])
    for k in (3, 10):
        expected = []
        for run, one in zip(runs, lists, strict=True):
            # what was missed stands far below: ranks that do not count lie between
            truth = [*grades_by_rank(run, one), *([0] * 10), *one.missed]
            expected.append(ndcg_score([truth], [-np.arange(len(truth))], k=k))
        assert found[f"nDCG@{k}"] == pytest.approx(expected, abs=1e-9)
        assert len({round(value, 6) for value in expected}) > 20


@pytest.mark.parametrize("with_missed", [False, True])
def test_the_other_measures_are_their_formulas(with_missed: bool) -> None:
    rng = Random(1)
    lists = random_lists(rng, 40, with_missed=with_missed)
    runs, found = measured(lists, in_random_order(lists, rng), ["R@5", "RR", "RR@3", "P@1", "AP", "Success@5", "All@5"])
    for number, (run, one) in enumerate(zip(runs, lists, strict=True)):
        hits = [grade > 0 for grade in grades_by_rank(run, one)]
        wanted = sum(grade > 0 for grade in (*one.relevance.values(), *one.missed))
        first = next((1 / rank for rank, hit in enumerate(hits, start=1) if hit), 0.0)
        precisions = [sum(hits[:rank]) / rank for rank, hit in enumerate(hits, start=1) if hit]
        expected = {
            "R@5": sum(hits[:5]) / wanted,
            "RR": first,
            "RR@3": first if first >= 1 / 3 else 0.0,
            "P@1": float(hits[0]),
            "AP": sum(precisions) / wanted,
            "Success@5": float(any(hits[:5])),
            "All@5": float(sum(hits[:5]) == wanted),
        }
        assert {name: values[number] for name, values in found.items()} == pytest.approx(expected, abs=1e-9)
    assert 0 < found["All@5"].sum() < found["Success@5"].sum() < len(lists)


def test_recall_is_counted_as_the_authors_of_qrhead_do() -> None:
    def recalls(ranked: list[str], correct: list[str], k: int) -> tuple[float, float]:
        top = set(ranked[:k])
        return float(any(name in top for name in correct)), float(all(name in top for name in correct))

    rng = Random(2)
    lists = [judged(12, dict.fromkeys(rng.sample(range(12), rng.randrange(1, 4)), 1), query=f"q{i}") for i in range(40)]
    runs, found = measured(lists, in_random_order(lists, rng), ["Success@5", "All@5"])
    for number, (run, one) in enumerate(zip(runs, lists, strict=True)):
        names = [f"turn-{document}" for document in run.ranking]
        expected = recalls(names, [f"turn-{place}" for place in one.relevance], 5)
        assert (found["Success@5"][number], found["All@5"][number]) == expected
    assert 0 < found["All@5"].sum() < found["Success@5"].sum() < 40


def test_what_was_missed_can_still_be_lost() -> None:
    lists = [judged(4, {0: 1}), judged(4, {0: 1}, (2,)), judged(4, {}, (1,))]
    _, found = measured(lists, Noted(lambda query, number: -number), ["nDCG@10", "R@5", "RR"])
    assert found["nDCG@10"] == pytest.approx([1.0, 1 / (2 + 1 / math.log2(3)), 0.0])
    assert found["R@5"].tolist() == [1.0, 0.5, 0.0] and found["RR"].tolist() == [1.0, 1.0, 0.0]


def test_ties_keep_the_order_in_which_the_documents_came() -> None:
    from qr_integrations.evaluation.measuring import RETRIEVED, SHUFFLED, quality, run_systems

    lists = [judged(6, {4: 1}), judged(6, {0: 1})]
    runs = run_systems([Noted(lambda query, number: 0.5)], lists, seeds=(3, 4))
    assert [run.ranking for run in runs] == [list(run.order) for run in runs]
    found = quality(runs, lists, ["RR"])
    assert found[RETRIEVED]["noted"]["RR"].tolist() == [1 / 5, 1.0]
    ranks = [[1 / (1 + run.order.index(gold)) for run in runs if run.number == n and run.seed is not None]
             for n, gold in enumerate((4, 0))]  # fmt: skip
    assert found[SHUFFLED]["noted"]["RR"] == pytest.approx([sum(some) / 2 for some in ranks])


def test_orders_are_as_retrieved_and_then_shuffled_by_seed() -> None:
    from qr_integrations.evaluation.measuring import run_systems

    lists = [judged(8, {1: 1}, query="one"), judged(8, {1: 1}, query="two")]
    system = Noted(lambda query, number: float(number), reads_order=True)
    runs = run_systems([system], lists, seeds=(0, 7))
    assert [(run.number, run.seed) for run in runs] == [(n, seed) for n in (0, 1) for seed in (None, 0, 7)]
    assert runs[0].order == tuple(range(8)) == runs[3].order
    shuffled = [run.order for run in runs if run.seed is not None]
    assert len(set(shuffled)) == 4 and all(sorted(order) == list(range(8)) for order in shuffled)
    assert system.asked == [(lists[run.number].query, list(run.order)) for run in runs]
    assert all(run.scores == tuple(map(float, range(8))) for run in runs)  # by document, whatever the order
    again = run_systems([system], lists, seeds=(7,))
    assert [run.order for run in again if run.seed == 7] == [run.order for run in runs if run.seed == 7]


def test_who_does_not_read_the_order_is_asked_once_per_list() -> None:
    from qr_integrations.evaluation.measuring import run_systems

    lists = [judged(5, {1: 1}, query="one"), judged(3, {1: 1}, query="two")]
    once, every = (Noted(lambda query, n: float(n), name=str(reads), reads_order=reads) for reads in (False, True))
    done: list[tuple[int, int]] = []
    runs = run_systems([once, every], lists, seeds=(0, 1, 2), progress=lambda *step: done.append(step))
    assert [query for query, _ in once.asked] == ["one", "two"] and len(every.asked) == 8
    assert len(runs) == 16 and done == [(1, 2), (2, 2)]
    assert all(run.seconds >= 0 for run in runs)


def test_the_mean_over_seeds_counts() -> None:
    from qr_integrations.evaluation.measuring import SHUFFLED, quality, run_systems

    class ByPlace:
        name, reads_order = "place", True

        def score(self, query: str, documents: Sequence[Any]) -> list[float]:
            return [-float(place) for place in range(len(documents))]

    lists = [judged(6, {2: 1}, query=f"q{i}") for i in range(3)]
    runs = run_systems([ByPlace()], lists, seeds=(0, 1, 2))
    found = quality(runs, lists, ["RR"])[SHUFFLED]["place"]["RR"]
    for number in range(3):
        ranks = [run.order.index(2) + 1 for run in runs if run.number == number and run.seed is not None]
        assert found[number] == pytest.approx(sum(1 / rank for rank in ranks) / 3)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_scores_that_are_no_numbers_are_named_with_system_and_list(wrong: float) -> None:
    from qr_integrations.evaluation.measuring import run_systems

    lists = [judged(3, {0: 1}, query="fine"), judged(3, {0: 1}, query="bad")]
    broken = Noted(lambda query, number: wrong if (query, number) == ("bad", 2) else 0.0, name="broken")
    with refused(
        r"broken gave scores that are not finite for the 3 documents of list #1 \('bad'\): look", "ScoreError"
    ):
        run_systems([broken], lists)


def test_too_few_scores_are_named_with_system_and_list() -> None:
    from qr_integrations.evaluation.measuring import run_systems

    class Short:
        name, reads_order = "short", False

        def score(self, query: str, documents: Sequence[Any]) -> list[float]:
            return [0.0] * (len(documents) - 1)

    with refused(r"short gave 2 scores for the 3 documents of list #0 \('q'\): a system gives one", "ScoreError"):
        run_systems([Short()], [judged(3, {0: 1})])


@pytest.mark.parametrize(
    ("lists", "says"),
    [
        ([], "no lists to measure on: pass"),
        ([(3, {0: 1}), (3, {})], r"list #1 \('q'\) has 3 documents, and none is known .*: leave it out, or judge it"),
        ([(3, {0: 0})], "list #0 .* none is known to be relevant"),
        ([(0, {})], "list #0 .* has 0 documents"),
    ],
)
def test_lists_that_tell_nothing_are_refused(lists: list[Any], says: str) -> None:
    from qr_integrations.evaluation.measuring import run_systems

    system = Noted(lambda query, number: 0.0)
    with refused(says):
        run_systems([system], [judged(*one) for one in lists])
    assert not system.asked


def test_two_systems_of_one_name_are_refused() -> None:
    from qr_integrations.evaluation.measuring import run_systems

    with refused("two systems are named 'noted': give"):
        run_systems([Noted(lambda *_: 0.0), Noted(lambda *_: 1.0)], [judged(3, {0: 1})])


@pytest.mark.parametrize(
    "metric",
    [
        "",
        "foo",
        "nDCG@",
        "nDCG@x",
        "nDCG@0",
        "nDCG(cutoff=0)",
        "R",
        "All@",
        "All@0",
        "R@1.5",
        "P(rel=0)@5",
        "nDCG(a=1)",
    ],
)
def test_metrics_that_there_are_not_are_refused(metric: str) -> None:
    from qr_integrations.evaluation.measuring import quality, run_systems

    lists = [judged(3, {0: 1})]
    runs = run_systems([Noted(lambda *_: 0.0)], lists)
    with refused("cannot be measured .*: write nDCG@10, R@5"):
        quality(runs, lists, ["R@5", metric])


def test_without_ir_measures_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from qr_integrations.evaluation.measuring import quality, run_systems

    lists = [judged(3, {0: 1})]
    runs = run_systems([Noted(lambda *_: 0.0)], lists)
    monkeypatch.setitem(sys.modules, "ir_measures", None)
    with refused(r"measuring quality needs .* pip install 'qr-integrations\[eval\]'", "MissingExtra"):
        quality(runs, lists)
