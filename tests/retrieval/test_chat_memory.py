"""Chat memory: a turn appended costs itself only, and the memory is what it would be if built at once."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from qr_integrations.backend import Backend
    from qr_integrations.retrieval.memory import ChatMemory
    from qr_integrations.types import Ranking

TURNS = [
    {"speaker": "Anna", "time": "2024-05-03 14:12", "text": "My sister lives in Oslo, close to the harbour."},
    {"speaker": "assistant", "time": "2024-05-03 14:13", "text": "I have never been to Norway."},
    {"speaker": "Ben", "time": "2024-05-04 09:00", "text": "For lunch I had soup."},
    {"speaker": "Anna", "time": "2024-05-04 12:30", "text": "For lunch I had pizza, and a salad."},
    {"speaker": "Anna", "time": "2024-06-01 08:00", "text": "For lunch I will have soup tomorrow."},
    {"text": "Somebody wrote this on the wall: the Danube flows through Vienna."},
]
QUERY = "What did Anna have for lunch?"
each_layout = pytest.mark.parametrize("layout", ["joint", "block"])


@pytest.fixture
def memory_of(qr_mini: "Backend") -> Callable[..., "ChatMemory"]:
    """Make a memory of some turns."""
    from qr_integrations.retrieval.memory import ChatMemory

    def make(turns: Sequence[Any] = TURNS, **settings: Any) -> "ChatMemory":
        memory = ChatMemory(qr_mini, **settings)
        memory.extend(turns)
        return memory

    return make


@pytest.fixture(scope="module")
def kept(qr_mini: "Backend") -> "ChatMemory":
    """All turns. Do not change it."""
    from qr_integrations.retrieval.memory import ChatMemory

    memory = ChatMemory(qr_mini)
    memory.extend(TURNS)
    return memory


def scores(ranking: "Ranking") -> dict[int, float]:
    return {item.index: item.score for item in ranking}


def assert_same(one: "ChatMemory", other: "ChatMemory") -> None:
    assert list(one) == list(other)
    for query in (QUERY, "which river flows through vienna"):
        expected = scores(other.search(query, top_k=None))
        assert len(expected) == len(other)
        assert scores(one.search(query, top_k=None)) == pytest.approx(expected, abs=1e-5)


# ---- appended or built at once


@each_layout
def test_turns_one_by_one_are_the_same_as_all_at_once(memory_of: Any, layout: str) -> None:
    memory = memory_of([], layout=layout)
    assert [memory.append(turn) for turn in TURNS] == list(range(len(TURNS)))
    assert_same(memory, memory_of(layout=layout))


@each_layout
def test_searching_between_two_turns_makes_no_difference(memory_of: Any, layout: str) -> None:
    memory = memory_of([], layout=layout)
    for turn in TURNS:
        memory.search(QUERY)
        memory.append(turn)
    assert_same(memory, memory_of(layout=layout))


@each_layout
def test_it_ranks_as_the_reranker_does(qr_mini: "Backend", memory_of: Any, layout: str) -> None:
    from qr_integrations import Document, QRHeadReranker

    titles = [
        "Anna, 2024-05-03 14:12",
        "assistant, 2024-05-03 14:13",
        "Ben, 2024-05-04 09:00",
        "Anna, 2024-05-04 12:30",
        "Anna, 2024-06-01 08:00",
        None,
    ]
    documents = [Document(turn["text"], title) for turn, title in zip(TURNS, titles, strict=True)]
    expected = QRHeadReranker(qr_mini, refinements={"layout": layout}).rank(QUERY, documents)
    found = memory_of(layout=layout).search(QUERY, top_k=None)
    assert scores(found) == pytest.approx(scores(expected), abs=1e-5)
    assert [item.document.title for item in found] == [item.document.title for item in expected]


@each_layout
def test_a_turn_costs_its_own_tokens(memory_of: Any, lengths_read: list[int], layout: str) -> None:
    """Whatever stands before it."""
    costs = []
    for count in (5, 50):
        memory = memory_of(
            [{"text": f"This is remark {number}.", "speaker": "Ben"} for number in range(count)], layout=layout
        )
        lengths_read.clear()
        memory.append("For lunch I had pizza.", speaker="Anna")
        costs.append(sum(lengths_read))
    assert 5 < costs[0] < 60 and costs[1] <= costs[0] + 5


@each_layout
def test_saved_and_loaded_it_goes_on(qr_mini: "Backend", memory_of: Any, tmp_path: Path, layout: str) -> None:
    from qr_integrations.retrieval.memory import ChatMemory

    memory_of(TURNS[:4], layout=layout).save(tmp_path / "memory")
    memory = ChatMemory.load(tmp_path / "memory", qr_mini)
    assert_same(memory, memory_of(TURNS[:4], layout=layout))
    memory.extend(TURNS[4:])
    assert_same(memory, memory_of(layout=layout))


def test_loading_reads_no_turn_again(
    qr_mini: "Backend", memory_of: Any, tmp_path: Path, lengths_read: list[int]
) -> None:
    from qr_integrations.retrieval.memory import ChatMemory

    memory_of([*TURNS, "Of the rest, " + "and so on, " * 100]).save(tmp_path / "memory")
    lengths_read.clear()
    ChatMemory.load(tmp_path / "memory", qr_mini).search(QUERY)
    assert sum(lengths_read) < 200


def test_an_empty_one_can_be_searched_saved_and_filled(qr_mini: "Backend", memory_of: Any, tmp_path: Path) -> None:
    from qr_integrations.retrieval.memory import ChatMemory

    memory = memory_of([])
    assert len(memory) == 0 and list(memory) == []
    assert list(memory.search(QUERY)) == [] and list(memory.search(QUERY, since="2024-01-01")) == []
    memory.save(tmp_path / "memory")
    loaded = ChatMemory.load(tmp_path / "memory", qr_mini)
    loaded.extend(TURNS)
    assert_same(loaded, memory_of())


# ---- threads and failures


@each_layout
def test_sixteen_threads_append_and_search(memory_of: Any, layout: str) -> None:
    memory, start = memory_of(TURNS[:1], layout=layout), threading.Barrier(16)

    def talk(number: int) -> tuple[int, str]:
        start.wait()
        text = f"Speaker {number} says it."
        place, before = memory.append(text, speaker=f"S{number}"), len(memory)
        seen = memory.search(f"what did S{number} say", top_k=None)
        assert before <= len(seen) and sorted(item.index for item in seen) == list(range(len(seen)))
        assert text in {item.document.text for item in seen}
        return place, text

    with ThreadPoolExecutor(16) as threads:
        placed = list(threads.map(talk, range(16)))
    assert sorted(place for place, _ in placed) == list(range(1, 17))
    assert all(memory[place].text == text for place, text in placed)
    assert_same(memory, memory_of(list(memory), layout=layout))


@pytest.mark.parametrize("bad", [{"speaker": "Anna"}, {"text": "Hello.", "time": "yesterday"}, "  "])
def test_of_several_turns_all_or_none_are_remembered(memory_of: Any, bad: Any) -> None:
    from qr_integrations.errors import InputError

    memory = memory_of(TURNS[:3])
    with pytest.raises(InputError):
        memory.extend([TURNS[3], bad, TURNS[4]])
    assert_same(memory, memory_of(TURNS[:3]))


@each_layout
def test_a_pass_that_fails_leaves_the_memory_as_it_was(
    qr_mini: "Backend", memory_of: Any, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    memory = memory_of(TURNS[:3], layout=layout)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("the plug was pulled")

    with monkeypatch.context() as broken:
        broken.setattr(qr_mini.attention_layers[1].module, "forward", fail)
        with pytest.raises(RuntimeError, match="plug"):
            memory.extend(TURNS[3:5])
    assert_same(memory, memory_of(TURNS[:3], layout=layout))
    memory.extend(TURNS[3:])
    assert_same(memory, memory_of(layout=layout))


# ---- what is searched


FILTERS: list[tuple[dict[str, Any], set[int]]] = [
    ({"speaker": "anna"}, {0, 3, 4}),
    ({"speaker": ["Ben", "Assistant"]}, {1, 2}),
    ({"since": "2024-05-04"}, {2, 3, 4}),
    ({"since": date(2024, 5, 4), "before": date(2024, 5, 5)}, {2, 3}),
    ({"before": "2024-05-03 14:13"}, {0}),
    ({"since": datetime(2024, 5, 3, 14, 13), "before": "2024-05-04T09:00"}, {1}),
    ({"skip_recent": 2}, {0, 1, 2, 3}),
    ({"skip_recent": 99}, set()),
    ({"where": lambda turn: "soup" in turn.text}, {2, 4}),
    ({"speaker": "Anna", "since": "2024-05-04", "skip_recent": 2}, {3}),
    ({"speaker": "Carla"}, set()),
]


@pytest.mark.parametrize(("wanted", "expected"), FILTERS, ids=str)
def test_a_filter_leaves_turns_out_and_scores_as_they_are(
    kept: "ChatMemory", wanted: dict[str, Any], expected: set[int]
) -> None:
    everything = kept.search(QUERY, top_k=None)
    found = kept.search(QUERY, top_k=None, **wanted)
    assert found.order == [index for index in everything.order if index in expected]
    assert scores(found) == pytest.approx({index: scores(everything)[index] for index in expected}, abs=1e-6)
    assert kept.search(QUERY, top_k=1, **wanted).order == found.order[:1]


def test_the_speaker_counts_though_the_text_does_not_say_who(kept: "ChatMemory", memory_of: Any) -> None:
    for name in ("Ben", "Anna"):
        assert kept[kept.search(f"What did {name} have for lunch?")[0].index].speaker == name
    bare = memory_of([turn["text"] for turn in TURNS])
    assert TURNS[bare.search("What did Ben have for lunch?")[0].index]["speaker"] != "Ben"


def test_spans_are_found_in_what_was_said(kept: "ChatMemory") -> None:
    for options in ({}, {"speaker": "Anna"}):
        best = kept.search("where does Anna's sister live", top_k=1, explain=True, **options)[0]
        assert best.index == 0
        assert best.spans and all(span.text == TURNS[0]["text"][span.span.slice()] for span in best.spans)


def test_several_questions_at_once(kept: "ChatMemory") -> None:
    queries = [QUERY, "where does Anna's sister live"]
    for query, found in zip(queries, kept.search_batch(queries, top_k=3), strict=True):
        expected = kept.search(query, top_k=3)
        assert found.order == expected.order and scores(found) == pytest.approx(scores(expected), abs=1e-5)


async def _off_the_loop(memory: "ChatMemory") -> tuple[int, "Ranking"]:
    place = await memory.aappend("Carla plays the harp.", time="2024-07-01")
    return place, await memory.asearch("who plays the harp", top_k=1, since="2024-07-01")


def test_off_the_event_loop(memory_of: Any) -> None:
    import asyncio

    place, found = asyncio.run(_off_the_loop(memory_of()))
    assert place == 6 and found.order == [6]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"since": "last week"}, "is no time"),
    ({"skip_recent": -1}, "skip_recent"),
    ({"top_k": 0, "speaker": "Anna"}, "top_k"),
    ({"query": " "}, "empty"),
    ({"query": " ", "speaker": "Anna"}, "empty"),
    ({"since": datetime(2024, 5, 4, tzinfo=UTC)}, "time zone"),
]


@pytest.mark.parametrize(("options", "says"), WRONG, ids=str)
def test_what_cannot_be_searched_is_said(kept: "ChatMemory", options: dict[str, Any], says: str) -> None:
    from qr_integrations.errors import InputError

    with pytest.raises(InputError, match=says):
        kept.search(**{"query": QUERY, **options})


# ---- turns


def test_every_form_of_a_turn(memory_of: Any) -> None:
    from PIL import Image

    from qr_integrations.retrieval.turns import Turn
    from qr_integrations.types import Message

    memory = memory_of([])
    noon = datetime(2024, 5, 3, 12, tzinfo=UTC)
    memory.append("Hello.")
    memory.append("Hello.", speaker="Anna", time=noon, metadata={"session": 3})
    memory.append(Message.user("Look:", Image.new("RGB", (2, 2)), "a cat."))
    memory.append({"role": "assistant", "content": "A fine cat."}, time="2024-05-03T12:00+00:00")
    memory.append({"role": "user", "name": "Ben", "content": [{"type": "text", "text": "It"}, {"type": "image"}]})
    memory.append(Turn("Bye.", "Anna", id="t7", metadata={"mood": "good"}), speaker="Ben", metadata={"session": 4})
    assert list(memory) == [
        Turn("Hello."),
        Turn("Hello.", "Anna", noon, metadata={"session": 3}),
        Turn("Look:\na cat.", "user"),
        Turn("A fine cat.", "assistant", noon),
        Turn("It", "Ben"),
        Turn("Bye.", "Ben", id="t7", metadata={"mood": "good", "session": 4}),
    ]
    assert memory[-1].id == "t7"
    assert [turn.title for turn in memory][:3] == [None, "Anna, 2024-05-03 12:00", "user"]


def test_metadata_and_times_survive_saving(qr_mini: "Backend", memory_of: Any, tmp_path: Path) -> None:
    from qr_integrations.retrieval.memory import ChatMemory

    turns = [{**TURNS[0], "id": "a", "metadata": {"session": 1, "tags": ["family"]}}, "Grüße, 世界!"]
    memory = memory_of(turns)
    memory.save(tmp_path / "memory")
    assert list(ChatMemory.load(tmp_path / "memory", qr_mini)) == list(memory)


def test_times_with_and_without_a_zone_do_not_mix(memory_of: Any) -> None:
    from qr_integrations.errors import InputError

    memory = memory_of(TURNS[:1])
    with pytest.raises(InputError, match="time zone"):
        memory.append("Hello.", time="2024-05-03 15:00+02:00")
    assert len(memory) == 1


@pytest.mark.parametrize("name", ["speaker", "time"])
def test_metadata_may_not_take_the_names_of_what_a_turn_says(memory_of: Any, name: str) -> None:
    from qr_integrations.errors import InputError

    with pytest.raises(InputError, match=name):
        memory_of([]).append("Hello.", metadata={name: "Anna"})


def test_a_speaker_is_one_line(memory_of: Any) -> None:
    from qr_integrations.errors import InputError

    with pytest.raises(InputError, match="one line"):
        memory_of([]).append("Hello.", speaker="Anna\n[2] Ben")


@pytest.mark.parametrize("name", ["Jean\u00a0Paul", "\u0645\u06cc\u200c\u0646\u0627", "Ada \U0001f469\u200d\U0001f4bb"])
def test_signs_that_do_not_show_are_no_line_ends(memory_of: Any, name: str) -> None:
    assert memory_of([{"text": "Hello.", "speaker": name}])[0].speaker == name


def test_parts_of_a_message_may_be_strings(memory_of: Any) -> None:
    parts = ["Hello.", {"type": "text", "text": "How are you?"}, {"type": "image"}, {"type": "text", "text": None}]
    assert memory_of([{"role": "user", "content": parts}])[0].text == "Hello.\nHow are you?"
