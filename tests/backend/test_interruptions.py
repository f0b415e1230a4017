"""Work that is called off leaves nothing behind, and what goes in between two tokens changes nothing."""

import threading
from typing import TYPE_CHECKING, Any

import pytest

from qr_integrations import QRHeadReranker
from qr_integrations.backend import interruptible
from qr_integrations.cropping.vicrop import ViCrop
from qr_integrations.decoding import DeCo
from qr_integrations.errors import Cancelled
from qr_integrations.pruning import SparseVLM
from qr_integrations.types import Message
from tests.backend import seeing

if TYPE_CHECKING:
    from qr_integrations.backend import Backend

DOCUMENTS = [f"Note {number}: " + "the river was calm and the boats were late. " * 150 for number in range(8)]
QUESTION = "which boats were late"


class Patience:
    """Runs out after so many questions."""

    def __init__(self, count: int) -> None:
        self.left = count
        self.asked = 0

    def check(self) -> None:
        self.asked += 1
        self.left -= 1
        if self.left < 0:
            raise Cancelled("no patience left")


def test_a_ranking_is_asked_before_every_chunk_and_ends_at_any(qr_mini: "Backend") -> None:
    expected = QRHeadReranker(qr_mini).rank(QUESTION, DOCUMENTS)
    endless = Patience(10**6)
    with interruptible(endless.check):
        QRHeadReranker(qr_mini, keep_prefixes=0).rank(QUESTION, DOCUMENTS)
    num_tokens = sum(item.num_tokens for item in expected)
    assert num_tokens > 10_000 and endless.asked > num_tokens // 1024  # a chunk on a CPU has 1,024 tokens
    reranker = QRHeadReranker(qr_mini)
    for count in range(6):
        with pytest.raises(Cancelled), interruptible(Patience(count).check):
            reranker.rank(QUESTION, DOCUMENTS)
    with pytest.raises(Cancelled), interruptible(Patience(endless.asked // 2).check):
        reranker.rank(QUESTION, DOCUMENTS)
    assert not qr_mini.held
    assert reranker.rank(QUESTION, DOCUMENTS) == expected


@pytest.mark.parametrize("steps", [{}, {"crop": ViCrop()}, {"deco": DeCo()}, {"prune": SparseVLM(keep=0.5)}])
def test_an_answer_ends_wherever_it_is_called_off(qr_mini_vl: "Backend", steps: dict[str, Any]) -> None:
    asked = [Message.user("what color is the square", seeing.pictures(1)[0])]
    settings = {**steps, "max_new_tokens": 6}
    expected, endless = qr_mini_vl.answer(asked, **settings), Patience(10**6)
    with interruptible(endless.check):
        assert qr_mini_vl.answer(asked, **settings).text == expected.text
    assert endless.asked >= expected.usage.completion_tokens
    for count in range(endless.asked):
        with pytest.raises(Cancelled), interruptible(Patience(count).check):
            qr_mini_vl.answer(asked, **settings)
        assert not qr_mini_vl.held
    assert qr_mini_vl.answer(asked, **settings).text == expected.text


@pytest.mark.parametrize("steps", [{}, {"crop": ViCrop()}, {"deco": DeCo()}])
@pytest.mark.parametrize("num_beams", [1, 2])
def test_rankings_between_two_tokens_change_neither(
    qr_mini_vl: "Backend", steps: dict[str, Any], num_beams: int
) -> None:
    documents = [document[:400] for document in DOCUMENTS]
    reranker = QRHeadReranker(qr_mini_vl, heads="all", keep_prefixes=0)
    ranking = reranker.rank(QUESTION, documents)
    asked = [Message.user("what color is the square", seeing.pictures(1)[0])]
    settings = {**steps, "max_new_tokens": 6, "num_beams": num_beams}
    alone, between = qr_mini_vl.answer(asked, **settings), []
    with interruptible(lambda: None, lambda: between.append(reranker.rank(QUESTION, documents))):
        together = qr_mini_vl.answer(asked, **settings)
    assert (together.text, together.usage) == (alone.text, alone.usage)
    assert between and all(found == ranking for found in between)


def test_nothing_goes_between_the_tokens_of_a_pruned_answer(qr_mini_vl: "Backend") -> None:
    between: list[int] = []
    with interruptible(lambda: None, lambda: between.append(1)):
        qr_mini_vl.answer([Message.user("what color?", seeing.pictures(1)[0])], prune=SparseVLM(keep=0.5))
    assert not between


def test_who_waits_for_a_model_can_leave(qr_mini: "Backend") -> None:
    gone, left = threading.Event(), threading.Event()

    def check() -> None:
        if gone.is_set():
            raise Cancelled("gone")

    def wait() -> None:
        with pytest.raises(Cancelled), interruptible(check):
            qr_mini.prefill([1, 2, 3], top_layer=0)
        left.set()

    thread = threading.Thread(target=wait)
    with qr_mini.locked():
        thread.start()
        assert not left.wait(0.2)
        gone.set()
        assert left.wait(20)
    thread.join()


def test_blocks_within_blocks_ask_everybody() -> None:
    from qr_integrations.backend.interruptions import check_interruption, uninterrupted

    outer, inner = Patience(2), Patience(10)
    with interruptible(outer.check):
        with interruptible(inner.check):
            check_interruption()
            with uninterrupted():
                check_interruption()
        check_interruption()
        with pytest.raises(Cancelled), interruptible(inner.check):
            check_interruption()
    check_interruption()
    assert (outer.asked, inner.asked) == (3, 1)


def test_a_long_conversation_is_read_in_chunks_and_answered_alike(qr_mini: "Backend") -> None:
    from qr_integrations.backend import answering

    question = " ".join(DOCUMENTS)[:9000] + " Which boats were late?"
    endless = Patience(10**6)
    with interruptible(endless.check):
        found = qr_mini.answer(question, max_new_tokens=8)
    num_tokens = found.usage.prompt_tokens
    assert num_tokens > 2048 and endless.asked >= num_tokens // 1024 + 8
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answering, "read_in_chunks", lambda backend, prompt: None)
        whole = qr_mini.answer(question, max_new_tokens=8)
        beams = qr_mini.answer(question, max_new_tokens=8, num_beams=2)
    assert (found.text, found.usage) == (whole.text, whole.usage)
    assert qr_mini.answer(question, max_new_tokens=8, num_beams=2).text == beams.text
    assert qr_mini.answer(question, max_new_tokens=8, deco=DeCo()).steps["deco"].as_dict()["num_steps"] <= 8


def test_a_sampled_answer_does_not_wait_with_the_model_in_its_hands(qr_mini: "Backend", qr_mini_vl: "Backend") -> None:
    begun, go_on, ranked = threading.Event(), threading.Event(), threading.Event()

    def pause() -> None:
        begun.set()
        assert go_on.wait(30)

    def sample(backend: "Backend", **how: Any) -> None:
        with interruptible(lambda: None, how.get("between", lambda: None)):
            backend.answer("What?", temperature=1.0, max_new_tokens=3, seed=1)

    def rank() -> None:
        QRHeadReranker(qr_mini_vl, heads="all").rank("which", ["a boat", "a river"])
        ranked.set()

    threads = [threading.Thread(target=sample, args=(qr_mini,), kwargs={"between": pause})]
    threads[0].start()
    assert begun.wait(30)
    threads += [threading.Thread(target=sample, args=(qr_mini_vl,)), threading.Thread(target=rank)]
    for thread in threads[1:]:
        thread.start()
    try:
        assert ranked.wait(30)
    finally:
        go_on.set()
        for thread in threads:
            thread.join(30)
    assert not any(thread.is_alive() for thread in threads)


def test_a_reranker_is_shared_by_a_thread_that_answers(qr_mini: "Backend") -> None:
    reranker = QRHeadReranker(qr_mini)
    others: list[threading.Thread] = []

    def rank_here_and_there() -> None:
        if not others:
            others.append(threading.Thread(target=reranker.rank, args=(QUESTION, DOCUMENTS[:3])))
            others[0].start()
            assert not others[0].join(0.2)
        reranker.rank(QUESTION, DOCUMENTS[:3])

    with interruptible(lambda: None, rank_here_and_there):
        qr_mini.answer("What?", max_new_tokens=3)
    others[0].join(30)
    assert not others[0].is_alive()


@pytest.mark.parametrize("count", range(8))
def test_what_a_model_can_do_is_found_out_undisturbed(count: int) -> None:
    backend = seeing.fresh("llava")
    patience = Patience(count)

    def check() -> None:
        try:
            patience.check()
        except Cancelled as error:
            raise ValueError("not one of ours") from error

    reranker = QRHeadReranker(backend, heads="all")
    with pytest.raises(ValueError, match="not one of ours"), interruptible(check):
        reranker.rank("which", ["a boat", "a river"])
        raise ValueError("not one of ours")
    assert set(backend._continuations.values()) <= {"keys", "values"} and set(backend._branching.values()) <= {True}
