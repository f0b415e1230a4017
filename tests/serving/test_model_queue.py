"""Whose turn it is: order, bounds, batches, shares, ends. No model is needed for that."""

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from qr_integrations.backend.interruptions import check_interruption, let_others_in
from qr_integrations.errors import Cancelled, InputError
from qr_integrations.serving.model_queue import Job, Kind, ModelQueue
from qr_integrations.serving.refusals import NotReady, OutOfTime, Overloaded

LONG = 60.0  # seconds


@pytest.fixture
def queue() -> Iterator[ModelQueue]:
    made = ModelQueue("model", size=4, max_batch=3)
    yield made
    made.stop(5.0)


class Gate:
    """A job that runs until it is let go, and asks meanwhile whether to go on."""

    def __init__(self, kind: Kind = "rank") -> None:
        self.begun, self.open = threading.Event(), threading.Event()
        self.job = job(self._run, kind=kind)

    def _run(self, works: Sequence[Any]) -> list[str]:
        self.begun.set()
        while not self.open.wait(0.002):
            check_interruption()
            if self.job.kind == "chat":
                let_others_in()
        return ["gate" for _ in works]


def job(
    run: Callable[[Sequence[Any]], Sequence[Any]],
    work: Any = None,
    kind: Kind = "rank",
    group: Any = None,
    left: float = LONG,
) -> Job:
    return Job(kind, run, work, group, time.monotonic() + left)


def same(works: Sequence[Any]) -> list[Any]:
    return list(works)


def begin(queue: ModelQueue, kind: Kind = "rank") -> Gate:
    gate = Gate(kind)
    queue.submit(gate.job)
    assert gate.begun.wait(10)
    return gate


def test_first_come_first_served_and_results_go_where_they_belong(queue: ModelQueue) -> None:
    seen: list[int] = []
    gate = begin(queue)
    jobs = [job(lambda works: [seen.append(works[0]) or works[0] * 10], number) for number in range(4)]
    for one in jobs:
        queue.submit(one)
    gate.open.set()
    assert [one.result.result(10) for one in jobs] == [0, 10, 20, 30] and seen == [0, 1, 2, 3]


def test_a_full_queue_refuses_and_says_when_to_come_back(queue: ModelQueue) -> None:
    gate = begin(queue)
    waiting = [job(same, number) for number in range(4)]
    for one in waiting:
        queue.submit(one)
    with pytest.raises(Overloaded, match="ask again in") as refused:
        queue.submit(job(same))
    assert refused.value.retry_after is not None and refused.value.retry_after >= 1
    chat = job(same, "a chat has a queue of its own", kind="chat")
    queue.submit(chat)
    assert queue.depth("rank") == 4 and queue.depth("chat") == 1 and queue.stats.refused["rank"] == 1
    queue.cancel(waiting[0])
    queue.submit(job(same))  # there is room again
    gate.open.set()
    assert chat.result.result(10) == "a chat has a queue of its own"


def test_equal_groups_run_together_up_to_the_limit(queue: ModelQueue) -> None:
    sizes: list[int] = []

    def run(works: Sequence[Any]) -> list[Any]:
        sizes.append(len(works))
        return list(works)

    gate = begin(queue)
    jobs = [job(run, 0, group="a"), job(run, 1, group="b"), job(run, 2, group="a"), job(run, 3, group="a")]
    for one in jobs:
        queue.submit(one)
    gate.open.set()
    assert [one.result.result(10) for one in jobs] == [0, 1, 2, 3] and sizes == [3, 1]
    assert queue.stats.batches[3] == 1


def test_one_bad_job_of_a_batch_does_not_spoil_the_others(queue: ModelQueue) -> None:
    def run(works: Sequence[Any]) -> list[Any]:
        if "bad" in works:
            raise InputError("bad")
        return list(works)

    gate = begin(queue)
    jobs = [job(run, work, group="a") for work in ("good", "bad", "fine")]
    for one in jobs:
        queue.submit(one)
    gate.open.set()
    assert jobs[0].result.result(10) == "good" and jobs[2].result.result(10) == "fine"
    with pytest.raises(InputError, match="bad"):
        jobs[1].result.result(10)


def test_who_is_cancelled_ends_at_the_next_check(queue: ModelQueue) -> None:
    gate, waiting = begin(queue), job(same, 1)
    queue.submit(waiting)
    queue.cancel(gate.job)
    with pytest.raises(Cancelled):
        gate.job.result.result(1)
    assert waiting.result.result(1) == 1 and queue.stats.cancelled["rank"] == 1
    queue.cancel(waiting)  # what is done stays done
    assert queue.stats.cancelled["rank"] == 1


def test_a_batch_ends_when_nobody_of_it_waits_any_more(queue: ModelQueue) -> None:
    begun, ended = threading.Event(), threading.Event()

    def run(works: Sequence[Any]) -> list[Any]:
        begun.set()
        try:
            while True:
                check_interruption()
                time.sleep(0.002)
        finally:
            ended.set()

    gate = begin(queue)
    jobs = [job(run, number, group="a") for number in range(2)]
    for one in jobs:
        queue.submit(one)
    gate.open.set()
    assert begun.wait(10)
    queue.cancel(jobs[0])
    assert not ended.wait(0.1)
    queue.cancel(jobs[1])
    assert ended.wait(10)


def test_time_runs_out_while_waiting_and_while_working(queue: ModelQueue) -> None:
    gate, late = begin(queue), job(same, left=0.02)
    queue.submit(late)
    time.sleep(0.05)
    gate.open.set()
    with pytest.raises(OutOfTime):
        late.result.result(10)
    slow = Gate()
    slow.job.deadline = time.monotonic() + 0.05
    queue.submit(slow.job)
    with pytest.raises(OutOfTime):
        slow.job.result.result(10)


def test_rankings_go_between_the_tokens_of_an_answer_and_take_half_of_the_time() -> None:
    queue = ModelQueue("model", size=1000, max_batch=1)

    def work(works: Sequence[Any]) -> list[float]:
        time.sleep(0.01)
        return [time.monotonic()]

    def answer(works: Sequence[Any]) -> list[float]:
        for _ in range(40):
            time.sleep(0.005)
            let_others_in()
        return [time.monotonic()]

    chat, ranks = job(answer, kind="chat"), [job(work) for _ in range(60)]
    queue.submit(chat)
    for rank in ranks:
        queue.submit(rank)
    ended = chat.result.result(20)
    before = sum(rank.result.result(20) < ended for rank in ranks)
    assert 10 <= before <= 35  # 0.2 seconds of answering, 0.01 for each ranking: 20 at equal shares
    seconds = queue.stats.seconds
    assert seconds["chat"] == pytest.approx(0.2, rel=0.7) and queue.stats.done == {"rank": 60, "chat": 1}
    queue.stop(5.0)


def test_who_was_idle_has_not_saved_up_time() -> None:
    queue = ModelQueue("model", size=100, max_batch=1)
    order: list[str] = []

    def work(name: str) -> Callable[[Sequence[Any]], list[None]]:
        def run(works: Sequence[Any]) -> list[None]:
            order.append(name)
            time.sleep(0.01)
            return [None]

        return run

    for _ in range(10):
        alone = job(work("rank"))
        queue.submit(alone)
        alone.result.result(10)
    gate = begin(queue)
    jobs = [job(work(kind), kind=kind) for _ in range(6) for kind in ("chat", "rank")]
    for one in jobs:
        queue.submit(one)
    gate.open.set()
    for one in jobs:
        one.result.result(10)
    assert 2 <= order[10:16].count("chat") <= 4
    queue.stop(5.0)


def test_a_cancelled_answer_does_not_end_the_ranking_within(queue: ModelQueue) -> None:
    chat, inner = begin(queue, "chat"), Gate()
    queue.submit(inner.job)
    assert inner.begun.wait(10)
    queue.cancel(chat.job)
    time.sleep(0.05)
    assert not inner.job.result.done()
    inner.open.set()
    assert inner.job.result.result(10) == "gate"
    with pytest.raises(Cancelled):
        chat.job.result.result(10)


def test_stopping_finishes_what_is_there_and_calls_off_the_rest() -> None:
    queue = ModelQueue("model", size=4, max_batch=1)
    jobs = [job(lambda works: time.sleep(0.01) or ["done"]) for _ in range(3)]
    for one in jobs:
        queue.submit(one)
    queue.stop(10.0)
    assert [one.result.result(0) for one in jobs] == ["done"] * 3
    with pytest.raises(NotReady, match="shutting down"):
        queue.submit(job(same))
    queue.stop(0.0)

    stuck = ModelQueue("model", size=4, max_batch=1)
    gate, waiting = begin(stuck), job(same)
    stuck.submit(waiting)
    started = time.monotonic()
    stuck.stop(0.05)
    assert time.monotonic() - started < 5
    for one in (gate.job, waiting):
        with pytest.raises(NotReady, match="shutting down"):
            one.result.result(0)


def test_an_error_does_not_hold_on_to_what_was_computed(queue: ModelQueue) -> None:
    class Large:
        """Something that can be watched."""

    kept: list[weakref.ref[Large]] = []

    def fail(works: Sequence[Any]) -> list[Any]:
        large = Large()
        kept.append(weakref.ref(large))
        try:
            raise RuntimeError("deep down")
        except RuntimeError as error:
            raise InputError(f"bad: {large}") from error

    gc.collect()
    gc.disable()
    try:
        one = job(fail)
        queue.submit(one)
        with pytest.raises(InputError):
            one.result.result(10)
        after = job(same)
        queue.submit(after)
        after.result.result(10)
        assert kept[0]() is None
    finally:
        gc.enable()


def test_an_answer_that_ran_alone_is_not_squeezed_afterwards() -> None:
    queue = ModelQueue("model", size=1000, max_batch=1)
    tokens: list[float] = []

    def answer(works: Sequence[Any]) -> list[None]:
        for _ in range(100):
            time.sleep(0.005)
            tokens.append(time.monotonic())
            let_others_in()
        return [None]

    def rank(works: Sequence[Any]) -> list[None]:
        time.sleep(0.005)
        return [None]

    chat = job(answer, kind="chat")
    queue.submit(chat)
    time.sleep(0.25)
    ranks = [job(rank) for _ in range(200)]
    since = time.monotonic()
    for one in ranks:
        queue.submit(one)
    chat.result.result(20)
    done = sum(one.result.done() for one in ranks)
    meanwhile = sum(at > since for at in tokens)
    assert 0.4 <= done / meanwhile <= 2.5
    queue.stop(0.0)


def test_whoever_no_longer_waits_for_a_future_is_left_out(queue: ModelQueue) -> None:
    gate, waiting = begin(queue), job(same)
    queue.submit(waiting)
    assert waiting.result.cancel()  # as asyncio does it
    queue.cancel(waiting)
    assert queue.depth("rank") == 0 and queue.stats.cancelled["rank"] == 1
    gate.open.set()
    after = job(same, 7)
    queue.submit(after)
    assert after.result.result(10) == 7
