"""Biases that were planted are found, and none where there is none."""

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import pytest


def lists_of(count: int = 6, size: int = 20) -> list[Any]:
    """Documents of different lengths; the two relevant ones are the shortest and the longest."""
    from qr_integrations import Document, JudgedList

    lists = []
    for number in range(count):
        rng = Random(number)
        lengths = rng.sample(range(10, 400), size)
        shortest, longest = lengths.index(min(lengths)), lengths.index(max(lengths))
        titles = ["gold" if place in (shortest, longest) else "else" for place in range(size)]
        documents = tuple(Document("x" * length, title) for length, title in zip(lengths, titles, strict=True))
        lists.append(JudgedList(f"q{number}", documents, {shortest: 1, longest: 2}))
    return lists


class By:
    """Scores from place and document."""

    name, reads_order = "by", True

    def __init__(self, score_of: Callable[[int, Any], float]) -> None:
        self.score_of = score_of

    def score(self, query: str, documents: Sequence[Any]) -> list[float]:
        return [float(self.score_of(place, document)) for place, document in enumerate(documents)]


def biases(
    lists: list[Any], score_of: Callable[[int, Any], float], seeds: Sequence[int] = (0, 1, 2)
) -> tuple[Any, Any]:
    from qr_integrations.evaluation.biases import length_bias, position_bias
    from qr_integrations.evaluation.measuring import run_systems

    runs = run_systems([By(score_of)], lists, seeds=seeds)
    return position_bias(runs, lists), length_bias(runs, lists)


def test_who_prefers_the_first_places_is_found_out() -> None:
    lists = lists_of()
    position, length = biases(lists, lambda place, document: -place)
    assert position.correlation.mean == pytest.approx(-1.0) == position.correlation.high
    assert list(position.curve) == sorted(position.curve, reverse=True)
    assert position.curve[0] > 0.85 and position.curve[-1] < 0.15 and position.lists == 6
    assert abs(length.correlation.mean) < 0.25


def test_who_prefers_the_last_places_too() -> None:
    position, _ = biases(lists_of(), lambda place, document: place**3)
    assert position.correlation.mean == pytest.approx(1.0) and position.curve[0] < 0.15


def test_who_prefers_long_documents_is_found_out() -> None:
    position, length = biases(lists_of(), lambda place, document: len(document.text))
    assert length.correlation.mean == pytest.approx(1.0)
    assert list(length.curve) == sorted(length.curve) and length.curve[0] < 0.15
    assert abs(position.correlation.mean) < 0.25


def test_the_title_counts_as_length() -> None:
    from qr_integrations import Document, JudgedList

    documents = tuple(Document("x" * (50 - i), title="t" * (2 * i)) for i in range(12))
    _, length = biases([JudgedList("q", documents, {0: 1})], lambda place, document: len(document.title))
    assert length.correlation.mean == pytest.approx(1.0)


def test_chance_has_no_bias() -> None:
    draw = Random(5)
    position, length = biases(lists_of(count=30), lambda place, document: draw.random())
    for bias in (position, length):
        assert bias.correlation.low < 0 < bias.correlation.high and abs(bias.correlation.mean) < 0.08
        assert all(0.4 < rank < 0.6 for rank in bias.curve)


def test_relevant_documents_do_not_count() -> None:
    from qr_integrations.evaluation.measuring import RETRIEVED, quality, run_systems

    lists = lists_of()

    def score_of(place: int, document: Any) -> float:
        return 1e6 + 20 * place if document.title == "gold" else -place

    position, _ = biases(lists, score_of)
    assert position.correlation.mean == pytest.approx(-1.0)
    runs = run_systems([By(score_of)], lists, seeds=())
    assert quality(runs, lists, ["R@5"])[RETRIEVED]["by"]["R@5"].tolist() == [1.0] * 6


def test_the_order_retrieved_does_not_count() -> None:
    assert biases(lists_of(), lambda place, document: -place, seeds=()) == (None, None)


def test_equal_scores_tell_nothing() -> None:
    assert biases(lists_of(), lambda place, document: 0.5) == (None, None)


def test_equal_lengths_and_few_documents_tell_nothing() -> None:
    from qr_integrations import Document, JudgedList

    alike = JudgedList("q", tuple(Document("same length", title=f"t{i}") for i in range(8)), {0: 1})
    position, length = biases([alike], lambda place, document: -place)
    assert length is None and position.correlation.mean == pytest.approx(-1.0)
    few = JudgedList("q", tuple(Document("x" * (i + 1)) for i in range(3)), {0: 1})
    assert biases([few], lambda place, document: -place) == (None, None)
    both, _ = biases([few, alike], lambda place, document: -place)
    assert both.lists == 1


def test_a_fifth_that_no_document_fell_into_is_unknown() -> None:
    from qr_integrations import Document, JudgedList

    documents = tuple(Document("x" * (i + 1)) for i in range(4))
    _, length = biases([JudgedList("q", documents, {0: 1})], lambda place, document: len(document.text))
    assert length.curve == (0.0, 0.5, None, 1.0, None)
