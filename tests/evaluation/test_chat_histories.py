"""Generated histories: their length, what is asked of them, and that only the evidence answers it."""

from collections import Counter
from typing import Any

import pytest

LENGTHS = [1000, 3000]


@pytest.fixture(scope="module")
def lists() -> list[Any]:
    from qr_integrations.bundled import read_detection_lists

    return read_detection_lists()


@pytest.fixture(scope="module")
def histories(lists: list[Any]) -> list[Any]:
    from qr_integrations.evaluation.chat_histories import make_histories

    return make_histories(lists, 2000, count=2)


def said(turn: Any) -> tuple[str, str, str]:
    return turn.metadata["time"], turn.metadata["speaker"], turn.text


@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_they_are_as_long_as_asked_for_and_never_longer(lists: list[Any], num_tokens: int) -> None:
    from qr_integrations.evaluation.chat_histories import make_histories
    from qr_integrations.evaluation.long_context import estimated_tokens

    for history in make_histories(lists, num_tokens, count=2):
        assert num_tokens - 100 < sum(estimated_tokens(turn.text) for turn in history.turns) <= num_tokens


def test_a_longer_one_asks_the_same_and_only_adds_turns(lists: list[Any]) -> None:
    from qr_integrations.evaluation.chat_histories import make_histories

    shorter, longer = (make_histories(lists, num_tokens, count=2) for num_tokens in (1000, 2000))
    for one, other in zip(shorter, longer, strict=True):
        assert [q.text for q in one.questions] == [q.text for q in other.questions]
        evidence = [[said(h.turns[q.evidence]) for q in h.questions] for h in (one, other)]
        assert evidence[0] == evidence[1]
        assert len(one.turns) < len(other.turns)
        cut = set(map(said, one.turns)) - set(map(said, other.turns))
        assert len(cut) <= 1  # the last passage of the shorter one may end earlier


def test_the_same_seed_gives_the_same_and_another_seed_something_else(lists: list[Any], histories: list[Any]) -> None:
    from qr_integrations.evaluation.chat_histories import make_histories

    assert make_histories(lists, 2000, count=2) == histories
    assert make_histories(lists, 2000, count=2, seed=1)[0].questions != histories[0].questions


def test_turns_stand_in_the_order_of_time_and_do_not_say_it(histories: list[Any]) -> None:
    for history in histories:
        times = [turn.metadata["time"] for turn in history.turns]
        assert times == sorted(times)
        assert not any(turn.text.startswith(turn.metadata["time"][:4]) or turn.title for turn in history.turns)


def test_sixteen_questions_of_all_kinds(histories: list[Any]) -> None:
    for history in histories:
        kinds = Counter(question.kind for question in history.questions)
        assert kinds == {"passage": 1, "fact": 3, "speaker": 6, "time": 4, "latest": 2}


def test_only_the_evidence_is_by_that_person_on_that_day(histories: list[Any]) -> None:
    """The question's words in the same order, but for name and day, are in turns that differ in one of the two."""
    for history in histories:
        for question in (q for q in history.questions if q.kind == "time"):
            evidence = history.turns[question.evidence].metadata
            on_that_day = [
                place
                for place, turn in enumerate(history.turns)
                if turn.metadata["time"][:10] == evidence["time"][:10]
                and turn.metadata["speaker"] == evidence["speaker"]
                and turn.text.startswith(("For lunch", "I had", "I am on", "A whole day", "I have just", "I read the"))
            ]
            assert on_that_day == [question.evidence]
            assert (
                evidence["speaker"] in question.text
                and evidence["speaker"] not in history.turns[question.evidence].text
            )


def test_what_a_speaker_says_of_himself_others_say_of_themselves(histories: list[Any]) -> None:
    for history in histories:
        asked = [q for q in history.questions if q.kind == "speaker"]
        speakers = [history.turns[q.evidence].metadata["speaker"] for q in asked]
        assert Counter(speakers) == dict.fromkeys(speakers, 2)
        assert all(name in q.text for name, q in zip(speakers, asked, strict=True))
        assert len({history.turns[q.evidence].text for q in asked}) == 6


def test_the_latest_statement_is_the_evidence(histories: list[Any]) -> None:
    """Of three by the same person about the same matter, which is told by the words that their texts share."""
    for history in histories:
        for question in (q for q in history.questions if q.kind == "latest"):
            name = history.turns[question.evidence].metadata["speaker"]
            mine = [
                place
                for place, turn in enumerate(history.turns)
                if turn.metadata["speaker"] == name and answers(question.text, name, turn.text)
            ]
            assert len(mine) == 3 and max(mine) == question.evidence


def answers(question: str, name: str, text: str) -> bool:
    from qr_integrations.evaluation.chat_histories import _TOPICS

    asked = question.removeprefix("As of now, ")
    topic = next(t for t in _TOPICS if asked.lower() == t.question.format(name=name).lower())
    return any(text == own.format(value=value) for own in topic.own for value in topic.values)


def test_the_first_question_is_of_the_given_lists(lists: list[Any], histories: list[Any]) -> None:
    for judged, history in zip(lists, histories, strict=False):
        question = history.questions[0]
        best = judged.documents[min(judged.relevance)]
        assert (question.kind, question.text) == ("passage", judged.query)
        assert best.text in history.turns[question.evidence].text


def test_judged_lists_share_the_turns(histories: list[Any]) -> None:
    made = histories[0].judged(["time", "latest"])
    assert [judged.id for judged in made] == ["time"] * 4 + ["latest"] * 2
    assert all(judged.documents == histories[0].turns for judged in made)
    assert [list(judged.relevance) for judged in made] == [
        [q.evidence] for q in histories[0].questions if q.kind in ("time", "latest")
    ]


def test_too_short_is_refused(lists: list[Any]) -> None:
    from qr_integrations.errors import InputError
    from qr_integrations.evaluation.chat_histories import make_histories

    with pytest.raises(InputError, match="evidence"):
        make_histories(lists, 200, count=1)
