"""Whose turn it is on a model: one thread, two bounded queues, and a fair share of its time for each.

Rankings and chats wait in queues of their own. The kind that has had less of the model's time goes next, and rankings
also go in between two tokens of a long answer. Rankings that can share a pass through the model run together. Nothing
goes in between the passes of a ranking: a long one holds the model until it is done, called off, or late.
"""

import contextvars
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from qr_integrations.backend import interruptible
from qr_integrations.errors import Cancelled, QRError
from qr_integrations.serving.refusals import NotReady, OutOfTime, Overloaded

Kind = Literal["rank", "chat"]
KINDS: tuple[Kind, ...] = ("rank", "chat")
_SMOOTHING = 0.2  # of the time that a job takes, for Retry-After


@dataclass(eq=False, slots=True)
class Job:
    """Something for the model to do.

    Attributes:
        kind: whose queue it waits in.
        run: does it, for this job and those of equal `group` that wait with it; returns one result for each.
        work: what is to be done.
        group: jobs of equal groups may run together; None: never.
        deadline: as `time.monotonic` tells the time.
        result: what came of it.
        called_off: why nobody waits for it any more; None: somebody does.
    """

    kind: Kind
    run: Callable[[Sequence[Any]], Sequence[Any]]
    work: Any
    group: Hashable | None
    deadline: float
    result: "Future[Any]" = field(default_factory=Future)
    called_off: QRError | None = None

    @property
    def complaint(self) -> QRError | None:
        """Why it is not worth doing any more."""
        if self.called_off is None and time.monotonic() > self.deadline:
            return too_late()
        return self.called_off


def too_late() -> OutOfTime:
    """What is said of a job whose time is over."""
    return OutOfTime("not done in the time that a request has: ask for less, or raise --deadline")


def _shutting_down() -> NotReady:
    return NotReady("the server is shutting down: ask again", retry_after=5.0)


@dataclass(slots=True)
class QueueStats:
    """What a queue has done.

    Attributes:
        done, refused, cancelled: jobs by kind.
        seconds: of the model's time, by kind.
        batches: how often so many rankings ran together.
    """

    done: dict[Kind, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    seconds: dict[Kind, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    refused: dict[Kind, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    cancelled: dict[Kind, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    batches: dict[int, int] = field(default_factory=dict)


class ModelQueue:
    """Does the jobs of one model, one at a time.

    Args:
        name: of the model.
        size: jobs of each kind that may wait.
        max_batch: jobs that run together.
    """

    def __init__(self, name: str, *, size: int, max_batch: int) -> None:
        self.name, self.size, self.max_batch = name, size, max_batch
        self.stats = QueueStats()
        self._waiting: dict[Kind, deque[Job]] = {kind: deque() for kind in KINDS}
        self._running: list[Job] = []
        self._share = dict.fromkeys(KINDS, 0.0)  # seconds of the model's time; only differences mean something
        self._typical = dict.fromkeys(KINDS, 0.0)  # seconds of one job
        self._stopping = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name=f"model {name}", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Put a job at the end of its queue.

        Raises:
            Overloaded: there is no room.
            NotReady: the queue is being stopped.
        """
        with self._changed:
            if self._stopping:
                raise _shutting_down()
            waiting = self._waiting[job.kind]
            if len(waiting) >= self.size:
                self.stats.refused[job.kind] += 1
                seconds = max(1.0, len(waiting) * self._typical[job.kind])
                raise Overloaded(
                    f"{len(waiting)} requests wait for {self.name!r} already: ask again in {seconds:.0f} seconds",
                    retry_after=seconds,
                )
            if not waiting:  # who was away has not saved up time
                others = [self._share[kind] for kind in KINDS if kind != job.kind and self._is_busy(kind)]
                self._share[job.kind] = max([self._share[job.kind], *others])
            waiting.append(job)
            self._changed.notify_all()

    def cancel(self, job: Job) -> None:
        """Nobody waits for it: it leaves the queue, or ends before its next pass through the model."""
        with self._changed:
            if self._call_off(job, Cancelled("nobody waits for this any more")):
                self.stats.cancelled[job.kind] += 1

    def depth(self, kind: Kind) -> int:
        """Jobs that wait."""
        return len(self._waiting[kind])

    @property
    def num_running(self) -> int:
        """Jobs that the model works on."""
        return len(self._running)

    def stop(self, grace: float) -> None:
        """Take no more jobs, do those that are there within `grace` seconds, and call off the rest."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join(grace)
        with self._changed:
            for job in [*self._running, *(job for kind in KINDS for job in self._waiting[kind])]:
                self._call_off(job, _shutting_down())
        self._thread.join()

    def _call_off(self, job: Job, why: QRError) -> bool:
        """Whether there was anything to call off."""
        waits = job in self._waiting[job.kind]
        if job.called_off is not None or not (waits or job in self._running):
            return False
        job.called_off = why
        if waits:
            self._waiting[job.kind].remove(job)
            if job.result.set_running_or_notify_cancel():
                job.result.set_exception(why)
        return True

    def _is_busy(self, kind: Kind) -> bool:
        return bool(self._waiting[kind]) or any(job.kind == kind for job in self._running)

    def _work(self) -> None:
        while self._step():
            pass

    def _step(self) -> bool:
        """Do the jobs whose turn it is; False: there will be none any more."""
        jobs = self._next()
        self._do(jobs)
        return bool(jobs)

    def _next(self) -> list[Job]:
        """The jobs whose turn it is; none when the queue is stopped and empty."""
        with self._changed:
            while not any(self._waiting.values()):
                if self._stopping:
                    return []
                self._changed.wait()
            return self._take(min((kind for kind in KINDS if self._waiting[kind]), key=self._share.__getitem__))

    def _take(self, kind: Kind) -> list[Job]:
        """The oldest job of a kind, and those that can run with it."""
        waiting = self._waiting[kind]
        first = waiting.popleft()
        alike = [job for job in waiting if first.group is not None and job.group == first.group]
        jobs = [first, *alike[: self.max_batch - 1]]
        for job in jobs[1:]:
            waiting.remove(job)
        self._running += jobs
        return jobs

    def _do(self, jobs: Sequence[Job]) -> None:
        """Run jobs of one kind, and book the time that they take; that of rankings which go in between is theirs."""
        wanted = [job for job in jobs if _is_wanted(job)]
        if not wanted:
            self._end(jobs)
            return
        kind, since = wanted[0].kind, time.monotonic()

        def book() -> None:
            nonlocal since
            now = time.monotonic()
            self._share[kind] += now - since
            self.stats.seconds[kind] += now - since
            since = now

        def between_tokens() -> None:
            nonlocal since
            with self._changed:
                book()
                is_due = self._waiting["rank"] and self._share["rank"] <= self._share["chat"]
                others = self._take("rank") if is_due else []
            if others:
                contextvars.Context().run(self._do, others)  # they do not end when this answer does
                since = time.monotonic()

        before = self.stats.seconds[kind]
        with interruptible(lambda: _check(wanted), between_tokens if kind == "chat" else None):
            outcomes = _outcomes(wanted)
        with self._changed:
            book()
            self._count(wanted, self.stats.seconds[kind] - before)
        self._end(jobs)
        for job, outcome in zip(wanted, outcomes, strict=True):
            outcome.tell(job)

    def _count(self, jobs: Sequence[Job], seconds: float) -> None:
        kind, count = jobs[0].kind, len(jobs)
        self._typical[kind] += _SMOOTHING * (seconds / count - self._typical[kind])
        self.stats.done[kind] += count
        if kind == "rank":
            self.stats.batches[count] = self.stats.batches.get(count, 0) + 1

    def _end(self, jobs: Sequence[Job]) -> None:
        with self._changed:
            self._running = [job for job in self._running if job not in jobs]


def _is_wanted(job: Job) -> bool:
    """Whether somebody waits for it; whoever waits in vain is told."""
    if not job.result.set_running_or_notify_cancel():
        return False
    complaint = job.complaint
    if complaint is not None:
        job.result.set_exception(complaint)
    return complaint is None


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What came of a job."""

    result: Any = None
    error: BaseException | None = None

    def tell(self, job: Job) -> None:
        """Whoever waits for the job hears of it.

        Errors raised on purpose go without their traceback: it holds on to the tensors of the pass that failed.
        """
        if self.error is None:
            job.result.set_result(self.result)
            return
        error: BaseException | None = self.error
        while isinstance(self.error, QRError) and error is not None:
            error.__traceback__, error = None, error.__cause__ or error.__context__
        job.result.set_exception(self.error)


def _outcomes(jobs: Sequence[Job]) -> list[_Outcome]:
    """Run them together; if that fails, one by one, so that each gets its own error."""
    try:
        _check(jobs)
        results = jobs[0].run([job.work for job in jobs])
        return [_Outcome(result) for _, result in zip(jobs, results, strict=True)]
    except BaseException as error:
        if len(jobs) == 1:
            return [_Outcome(error=error)]
    found = []
    for job in jobs:
        with interruptible(partial(_check, [job])):
            found += _outcomes([job])
    return found


def _check(jobs: Sequence[Job]) -> None:
    """Raises the first one's complaint if all of them have one."""
    complaints = [complaint for job in jobs if (complaint := job.complaint) is not None]
    if len(complaints) == len(jobs):
        raise complaints[0]
