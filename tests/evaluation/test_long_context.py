"""Long chats and books: their length, what they hide, and that a longer one only adds to a shorter one."""

import json
from dataclasses import replace
from hashlib import sha256
from itertools import pairwise
from random import Random
from statistics import mean
from typing import Any

import pytest

KINDS = ["chat", "book"]
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def lists() -> list[Any]:
    from qr_integrations.bundled import read_detection_lists

    return read_detection_lists()


@pytest.fixture(scope="module")
def count_tokens(qr_mini: Any) -> Any:
    return lambda text: len(qr_mini.tokenizer.encode(text, add_special_tokens=False))


def make(kind: str, lists: Any, num_tokens: int, **settings: Any) -> list[Any]:
    from qr_integrations.evaluation import long_context

    maker = {"chat": long_context.make_chats, "book": long_context.make_books}[kind]
    return maker(lists, long_context.LongContext(num_tokens, **settings))


def spoken(document: Any) -> str:
    return document.text[document.body.slice()]


def holders(made: Any, text: str) -> list[int]:
    return [place for place, document in enumerate(made.documents) if text in document.text]


def passage(number: int) -> str:
    """Thirty words that no other passage has."""
    return " ".join(f"word{number}x{i}" for i in range(30))


def made_up(number: int = 30) -> list[Any]:
    """Lists of one relevant passage, in front, and one other."""
    from qr_integrations import Document, JudgedList

    documents = [Document(passage(i), title=f"Topic {i}") for i in range(2 * number)]
    return [JudgedList(f"what is {i}?", tuple(documents[2 * i : 2 * i + 2]), {0: 1}, id=f"q{i}") for i in range(number)]


def refused(says: str) -> Any:
    from qr_integrations.errors import InputError

    return pytest.raises(InputError, match=says)


def longest(kind: str, lists: Any) -> Any:
    """The first list with all passages at hand: as long as the message says that refuses more."""
    with refused("at hand") as refusal:
        make(kind, lists, 10**6, count=1)
    at_hand = str(refusal.value).split(" has ")[1].split(" tokens of evidence and filler at hand")[0]
    return make(kind, lists, int(at_hand.replace(",", "")), count=1)[0]


# Length


@each_kind
@pytest.mark.parametrize("num_tokens", [1000, 2000, 5000])
@pytest.mark.parametrize("evidence", [1, 3])
def test_it_is_as_long_as_asked_for_and_never_longer(
    kind: str, num_tokens: int, evidence: int, lists: Any, count_tokens: Any
) -> None:
    chosen = make(kind, lists, num_tokens, evidence=evidence, count=8, count_tokens=count_tokens)
    for made in chosen:
        length = sum(count_tokens(document.text) for document in made.documents)
        assert num_tokens - 80 <= length <= num_tokens


@each_kind
def test_lengths_are_estimated_from_words_unless_one_says_how_to_count(kind: str, lists: Any) -> None:
    from qr_integrations.evaluation.long_context import estimated_tokens

    assert estimated_tokens("ten words " * 5) == 13 and estimated_tokens("") == 0
    for made in make(kind, lists, 3000, count=5):
        assert 2900 <= sum(estimated_tokens(document.text) for document in made.documents) <= 3000
    for made in make(kind, lists, 9000, count=5, count_tokens=len):
        assert 8700 <= sum(len(document.text) for document in made.documents) <= 9000


@each_kind
def test_text_without_spaces_is_cut_too(kind: str) -> None:
    from qr_integrations import Document, JudgedList

    documents = tuple(Document(chr(0x4E00 + i) * 400) for i in range(20))
    made = make(kind, [JudgedList("这是什么", documents, {3: 1})], 3000, count_tokens=len)[0]
    assert 2800 <= sum(len(document.text) for document in made.documents) <= 3000
    assert holders(made, documents[3].text) == list(made.relevance)


# The same at all lengths


@each_kind
def test_the_seed_decides(kind: str, in_fresh_python: Any, monkeypatch: pytest.MonkeyPatch, lists: Any) -> None:
    def digest(seed: int) -> str:
        made = make(kind, lists, 1500, evidence=2, seed=seed, count=3)
        return sha256(json.dumps([[d.text for d in one.documents] for one in made]).encode()).hexdigest()

    monkeypatch.setenv("PYTHONHASHSEED", "7")
    elsewhere = in_fresh_python(f"""
import json
from hashlib import sha256
from qr_integrations.bundled import read_detection_lists
from qr_integrations.evaluation.long_context import LongContext, make_{kind}s
made = make_{kind}s(read_detection_lists(), LongContext(1500, evidence=2, seed=5, count=3))
print(sha256(json.dumps([[d.text for d in one.documents] for one in made]).encode()).hexdigest())
""")
    assert digest(5) == elsewhere != digest(6)


@pytest.mark.parametrize("evidence", [1, 2])
def test_a_longer_chat_only_adds_turns(evidence: int, lists: Any, count_tokens: Any) -> None:
    lengths = [700, 1000, 2000, 2100, 5000]
    chats = [make("chat", lists, n, evidence=evidence, count=6, count_tokens=count_tokens) for n in lengths]
    for shorter, longer in ((a, b) for short, long in pairwise(chats) for a, b in zip(short, long, strict=True)):
        assert (shorter.query, shorter.id) == (longer.query, longer.id)
        texts, cut, place = [document.text for document in longer.documents], 0, 0
        for document in shorter.documents:
            if document.text not in texts[place:]:
                whole = next(text for text in texts[place:] if text.startswith(document.text))
                cut += 1
            else:
                whole = document.text
            place = texts.index(whole, place) + 1
        assert cut <= 1
        gold = [{one.documents[place].text for place in one.relevance} for one in (shorter, longer)]
        assert gold[0] == gold[1]


def test_a_longer_book_only_adds_passages(lists: Any, count_tokens: Any) -> None:
    lengths = [1000, 2000, 2300, 6000]
    books = [make("book", lists, n, count=8, count_tokens=count_tokens) for n in lengths]
    for shorter, longer in ((a, b) for short, long in pairwise(books) for a, b in zip(short, long, strict=True)):
        whole = [spoken(document) for document in longer.documents]
        kept = [spoken(document) for document in shorter.documents]
        assert sum(chapter not in whole for chapter in kept) <= 2
        present = "\n\n".join(whole)
        assert all(piece in present for chapter in kept for piece in chapter.split("\n\n"))
        same = [chapter for chapter in kept if chapter in whole]
        assert [whole.index(chapter) for chapter in same] == sorted(whole.index(chapter) for chapter in same)
        assert len(shorter.documents) == 1 or {kept[i] for i in shorter.relevance} == {
            whole[i] for i in longer.relevance
        }


@each_kind
def test_a_count_makes_the_first_of_all(kind: str) -> None:
    every = make(kind, made_up(), 700)
    assert [made.id for made in every] == [f"q{i}" for i in range(30)]
    assert make(kind, made_up(), 700, count=4) == every[:4]


# What is hidden


@each_kind
@pytest.mark.parametrize("evidence", [1, 2, 4])
def test_each_question_has_its_evidence_once(kind: str, evidence: int, lists: Any) -> None:
    by_id = {judged.id: judged for judged in lists}
    for number, made in enumerate(make(kind, lists, 3000, evidence=evidence, count=10)):
        asked = [by_id[name] for name in made.id.split("+")]
        assert asked[0] is lists[number] and len(set(made.id.split("+"))) == evidence
        found = [holders(made, judged.documents[0].text) for judged in asked]
        assert all(len(places) == 1 for places in found)
        assert {places[0] for places in found} == set(made.relevance) and len(made.relevance) == evidence
        assert all(judged.query in made.query for judged in asked)
    if evidence == 1:
        assert made.query == lists[number].query


def test_questions_are_joined_into_one() -> None:
    made = make("chat", made_up(3), 220, evidence=2)[0]
    other = made.id.removeprefix("q0+q")
    assert made.query == f"what is 0? And also: what is {other}?"
    sessions = [made.documents[place].metadata["session"] for place in made.relevance]
    assert len(set(sessions)) == 2


def test_short_evidence_has_a_chapter_of_its_own() -> None:
    from qr_integrations import Document

    lists = made_up(2)
    lists[1] = replace(lists[1], documents=(Document("It is short."), *lists[1].documents[1:]))
    for num_tokens in (60, 100):
        book = make("book", lists, num_tokens, evidence=2, count=1)[0]
        assert len(book.relevance) == 2 and holders(book, "It is short.") != holders(book, passage(0))


@each_kind
def test_nothing_else_answers(kind: str) -> None:
    from qr_integrations import Document, JudgedList

    answer, better = passage(100), passage(101)
    traps = [
        answer.upper().replace(" ", "\n"),  # the same text
        f"In short, {answer} and so on.",  # contains it
        answer[: len(answer) // 2],  # a part of it
        f"{better} and so on.",
        passage(102),  # answers the same question elsewhere
    ]
    documents = tuple(Document(text) for text in [answer, passage(0), better, "word0x3"])
    asked = JudgedList("what is it", documents, {0: 1, 1: 0, 2: 2, 3: 1})  # "word0x3" alone tells nothing of passage 0
    again = JudgedList("What  is it", (Document(passage(102)), Document("Too short to tell.")), {0: 1})
    other = JudgedList("what else", tuple(Document(text) for text in [passage(103), *traps[:-1]]), {0: 1})
    fillers = [judged for judged in made_up(8) if judged.id != "q0"]
    made = longest(kind, [asked, again, other, *fillers])
    text = "\n".join(document.text for document in made.documents).casefold()
    assert holders(made, better) == list(made.relevance) and text.count("word101x3 ") == 1
    assert "word100x" not in text and "word102x" not in text
    assert "word103x" in text and "too short to tell" in text and text.count("word0x3 ") == 1


@each_kind
def test_evidence_that_answers_both_questions_is_not_paired(kind: str) -> None:
    lists = made_up(3)
    lists[1] = replace(lists[1], documents=(*lists[1].documents, lists[0].documents[0]), relevance={0: 1, 2: 1})
    for seed in range(10):
        assert make(kind, lists, 220, evidence=2, seed=seed, count=1)[0].id == "q0+q2"
    with refused("joined with 1 questions .* pass more lists"):
        make(kind, lists, 220, evidence=3)


@each_kind
def test_evidence_may_stand_anywhere(kind: str) -> None:
    """Of 240 inputs, 60 are expected in each quarter, with a standard deviation of 6.7."""
    lists, quarters, draw = made_up(12), [0, 0, 0, 0], Random(0)
    for seed in range(20):
        for made in make(kind, lists, 600, seed=seed):
            within = next(iter(made.relevance)) + draw.random()  # a document may lie in two quarters
            quarters[int(4 * within / len(made.documents))] += 1
    assert sum(quarters) == 240 and all(40 <= found <= 80 for found in quarters)


# How it looks


def test_a_chat_looks_like_one(lists: Any) -> None:
    for chat in make("chat", lists, 4000, count=4):
        times = [turn.metadata["time"] for turn in chat.documents]
        sessions = [turn.metadata["session"] for turn in chat.documents]
        assert times == sorted(set(times)) and len(times[0]) == len("2023-05-14 09:32")
        assert sessions == sorted(sessions) and set(sessions) == set(range(1, max(sessions) + 1))
        assert all(2 <= sessions.count(session) <= 10 for session in set(sessions))
        assert mean(sessions.count(session) for session in set(sessions)) > 4
        for turn in chat.documents:
            speaker = turn.metadata["speaker"]
            assert turn.text == f"{turn.metadata['time']} {speaker.capitalize()}: {spoken(turn)}"
        speakers = [turn.metadata["speaker"] for turn in chat.documents]
        assert speakers == ["user", "assistant"] * (len(speakers) // 2)
    carriers = {
        chat.documents[place].metadata["speaker"]
        for chat in make("chat", lists, 500, count=20)
        for place in chat.relevance
    }
    assert carriers == {"user", "assistant"}


def test_a_book_has_chapters_of_similar_length(lists: Any) -> None:
    for book in make("book", lists, 6000, count=5):
        for number, chapter in enumerate(book.documents, start=1):
            assert chapter.metadata == {"chapter": number}
            assert chapter.text == f"Chapter {number}\n\n{spoken(chapter)}"
        lengths = [len(chapter.text) for chapter in book.documents]
        assert max(lengths) < 3 * min(lengths)
        assert mean(chapter.text.count("\n\n") for chapter in book.documents) > 2


@each_kind
def test_passages_without_titles(kind: str) -> None:
    from qr_integrations import Document

    lists = [replace(j, documents=tuple(Document(d.text) for d in j.documents)) for j in made_up()]
    made = make(kind, lists, 1000)[0]
    assert holders(made, passage(0)) == list(made.relevance)
    assert not any("None" in document.text or "  " in document.text for document in made.documents)


# What cannot be made


@each_kind
def test_what_cannot_be_made_is_refused_with_a_cure(kind: str) -> None:
    lists = made_up(5)
    for empty, settings in (([], {}), (lists, {"evidence": 6}), (lists, {"count": 6})):
        with refused("pass more lists"):
            make(kind, empty, 1000, **settings)
    for settings in ({"evidence": 0}, {"count": 0}):
        with refused("pass at least 1"):
            make(kind, lists, 1000, **settings)
    with refused("num_tokens is 0"):
        make(kind, lists, 0)
    with refused("evidence of 'what is 0.' has .* tokens: pass a num_tokens of at least that"):
        make(kind, lists, 30)
    for relevance in ({}, {0: 0}):
        with refused("#2 .*what is 2.* no relevant passage"):
            make(kind, [*lists[:2], replace(lists[2], relevance=relevance)], 100)


@each_kind
def test_too_little_filler_says_how_much_there_is(kind: str) -> None:
    lists = made_up(5)
    with refused("at hand, 5,000 are wanted: pass more lists or a smaller num_tokens"):
        make(kind, lists, 5000)
    made = longest(kind, lists)
    assert all(holders(made, passage(number)) for number in range(10))


# What it is for


def test_the_bundled_model_finds_evidence_in_a_chat(qr_mini: Any, lists: Any, count_tokens: Any) -> None:
    """By chance one of four: five of some twenty turns. Seven of eight or more by chance: less than once in 1,000."""
    from qr_integrations import QRHeadReranker

    reranker = QRHeadReranker(qr_mini, truncation="head", keep_prefixes=0)
    chats = make("chat", lists, 1500, count=8, count_tokens=count_tokens)
    assert mean(5 / len(chat.documents) for chat in chats) < 0.3
    found = [set(reranker.rank(chat.query, chat.documents).order[:5]) & set(chat.relevance) for chat in chats]
    assert sum(map(bool, found)) >= 7
