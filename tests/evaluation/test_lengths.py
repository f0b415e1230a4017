"""Recall against length: what is measured on which inputs."""

import re
from collections.abc import Sequence
from typing import Any

import pytest


@pytest.fixture(scope="module")
def lists() -> list[Any]:
    from qr_integrations.bundled import read_detection_lists

    return read_detection_lists()[:20]


class KnowsAnswers:
    """Puts first what answers one of its questions, then the last documents; blind beyond a number of documents."""

    reads_order = True

    def __init__(self, name: str, lists: Sequence[Any], most: int = 10**6) -> None:
        self.name, self.lists, self.most = name, lists, most
        self.read: list[list[str]] = []

    def score(self, query: str, documents: Sequence[Any]) -> list[float]:
        self.read.append([document.text for document in documents])
        asked = [one for one in self.lists if one.query.strip() in query and len(documents) <= self.most]
        answers = [one.documents[place].text for one in asked for place in one.relevance]
        return [
            place + 1e6 * any(text in document.text for text in answers) for place, document in enumerate(documents)
        ]


def measure(systems: Sequence[Any], lists: list[Any], *settings: Any, **options: Any) -> list[Any]:
    from qr_integrations.evaluation.lengths import recall_by_length

    return recall_by_length(lambda made: systems, lists, settings, **options)


def settings(num_tokens: int, **options: Any) -> Any:
    from qr_integrations.evaluation.long_context import LongContext

    return LongContext(num_tokens, **options)


def test_every_system_at_every_length(lists: list[Any]) -> None:
    good, blind = KnowsAnswers("good", lists), KnowsAnswers("blind", ())
    short = KnowsAnswers("short", lists, most=60)
    done: list[tuple[int, int]] = []
    points = measure(
        [good, blind, short],
        lists,
        settings(1200, count=4),
        settings(6000, count=4),
        progress=lambda *step: done.append(step),
    )
    assert [(one.num_tokens, one.system) for one in points] == [
        (length, name) for length in (1200, 6000) for name in ("good", "blind", "short")
    ]
    found = {(one.system, one.num_tokens): one.recall_any.mean for one in points}
    assert found["good", 1200] == found["good", 6000] == 1.0 == found["short", 1200]
    assert found["short", 6000] < 1.0 and found["blind", 6000] < 1.0
    assert done == [(1, 2), (2, 2)]
    sizes = {one.num_tokens: one.documents for one in points}
    assert sizes[1200] == sum(map(len, good.read[:4])) / 4 and sizes[6000] == sum(map(len, good.read[4:])) / 4
    assert sizes[1200] < 60 < sizes[6000]


def test_turns_are_read_in_the_order_of_time_and_once(lists: list[Any]) -> None:
    good = KnowsAnswers("good", lists)
    measure([good], lists, settings(2000, count=3))
    assert len(good.read) == 3
    for turns in good.read:
        times = [re.match(r"[\d-]+ [\d:]+", turn)[0] for turn in turns]  # type: ignore[index]
        assert times == sorted(times)


def test_any_and_all_of_several_pieces(lists: list[Any]) -> None:
    (one,) = measure([KnowsAnswers("half", lists[:3])], lists, settings(3000, count=3, evidence=2))
    (both,) = measure([KnowsAnswers("all", lists)], lists, settings(3000, count=3, evidence=2))
    assert both.recall_any.mean == both.recall_all.mean == 1.0
    assert one.recall_any.mean == 1.0 and one.recall_all.mean < 1.0


def test_how_many_ranks_count(lists: list[Any]) -> None:
    """Both pieces of evidence stand on top: the first rank holds one of them, the first two hold both."""
    counts = {
        at: measure([KnowsAnswers("all", lists)], lists, settings(3000, count=3, evidence=2), at=at) for at in (1, 2)
    }
    assert [(point.at, point.recall_any.mean, point.recall_all.mean) for (point,) in counts.values()] == [
        (1, 1.0, 0.0),
        (2, 1.0, 1.0),
    ]


def test_books(lists: list[Any]) -> None:
    good = KnowsAnswers("good", lists)
    (one,) = measure([good], lists, settings(3000, count=2), kind="book")
    assert one.recall_all.mean == 1.0 and all("Chapter" in text.split("\n")[0] for text in good.read[0])


def test_systems_are_made_for_the_lists_that_they_read(lists: list[Any]) -> None:
    from qr_integrations.evaluation.lengths import recall_by_length
    from qr_integrations.evaluation.systems import make_systems

    points = recall_by_length(
        lambda made: make_systems(["bm25"], made, backend=lambda: pytest.fail("loaded")),
        lists,
        [settings(1000, count=5), settings(4000, count=5)],
    )
    assert [one.system for one in points] == ["bm25", "bm25"] and points[0].recall_any.mean > 0.5


def test_a_length_that_cannot_be_made_is_refused_before_anything_is_measured(lists: list[Any]) -> None:
    from qr_integrations.errors import InputError

    good = KnowsAnswers("good", ())
    with pytest.raises(InputError, match="at hand, 1,000,000 are wanted: pass more lists"):
        measure([good], lists, settings(1000, count=2), settings(1_000_000, count=2))
    assert not good.read
