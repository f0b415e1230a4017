"""Does the work in replicas of a Ray Serve deployment: on this machine, or on many."""

import asyncio
import hashlib
import json
import logging
import re
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    RayTaskError,
    TaskCancelledError,
    WorkerCrashedError,
)
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from qr_integrations.errors import ModelError, QRError
from qr_integrations.serving.refusals import NotReady, OutOfTime, Overloaded, WorkerLost
from qr_integrations.serving.settings import ServerSettings
from qr_integrations.serving.work import ChatWork, ModelCard, Ranked, RankWork, Said, State

_log = logging.getLogger(__name__)
_ATTEMPTS = 3  # the first replica and two others
_BETWEEN_ATTEMPTS = 0.1  # seconds; Ray learns meanwhile who is gone
_RESTART = 5.0  # seconds after which a lost replica is likely to be replaced
_BETWEEN_LOOKS = 1.0  # seconds
_PATIENCE = 5.0  # seconds, with replicas that are asked how they are
_COUNTERS = frozenset({"done", "refused", "cancelled", "seconds", "batches", "cache_hits", "cache_misses"})
_GONE = (
    RayActorError,
    WorkerCrashedError,
    NodeDiedError,
    ObjectLostError,
    ReplicaUnavailableError,
    TaskCancelledError,  # by the replica, which is being stopped: who calls work off here does not wait for it
)


@dataclass(frozen=True, slots=True)
class Told:
    """What a replica tells about itself.

    Attributes:
        replica: machine and number of the process.
        cards: of its models.
        stats: see `LocalEngine.stats`.
    """

    replica: str
    cards: tuple[ModelCard, ...]
    stats: Mapping[str, Any]


class RayEngine:
    """An `Engine` whose models are replicas of a deployment.

    Rankings of the same documents go to the same replica while it has room, so that their keys and values are found
    there. Work of a replica that dies is done again by another one; an answer that has begun to stream ends with
    `WorkerLost`.

    Args:
        replicas: a handle of `ModelReplica`.
        settings: as the replicas have them.
    """

    def __init__(self, replicas: DeploymentHandle[Any], settings: ServerSettings) -> None:
        self.settings = settings
        self.failure: Exception | None = None
        self._replicas = replicas
        self._state: State = "loading"
        self._cards: tuple[ModelCard, ...] = ()
        self._stats: dict[str, Mapping[str, Any]] = {}  # of each replica, dead ones too
        self._looking: asyncio.Task[None] | None = None
        self._open: set[asyncio.Task[Any]] = set()

    @property
    def state(self) -> State:
        """Whether there is work to be had: whether any replica runs."""
        return self._state

    async def start(self) -> None:
        """Begin to watch the replicas."""
        if self._looking is None:
            self._looking = asyncio.ensure_future(self._look())

    async def stop(self, grace: float) -> None:
        """Refuse new work, finish what there is within `grace` seconds, call off the rest. The replicas go on."""
        self._state = "draining"
        if self._looking is not None:
            self._looking.cancel()
        if self._open:
            await asyncio.wait(self._open, timeout=grace)
        for task in self._open:
            task.cancel()

    async def models(self) -> tuple[ModelCard, ...]:
        """What is served; empty while no replica has run yet."""
        return self._cards

    def stats(self) -> dict[str, Any]:
        """As `LocalEngine.stats`, of all replicas together, as it was a moment ago."""
        return _summed(self._stats.values())

    async def rank(self, work: RankWork) -> Ranked:
        """Rank documents.

        Raises:
            Refused: not now.
            InputError, WindowError, ModelError: as the replica's engine.
        """
        ranked: Ranked = await self._call("rank", work, documents_key(work))
        return ranked

    async def chat(self, work: ChatWork) -> Said:
        """Answer a conversation.

        Raises:
            Refused: not now.
            InputError, WindowError, ModelError: as the replica's engine.
        """
        said: Said = await self._call("chat", work, "")
        return said

    async def stream(self, work: ChatWork) -> AsyncIterator[str | Said]:
        """As `chat`, piece by piece; the last thing is the whole. Closing the iterator calls the work off."""
        self._check_state()
        end = asyncio.get_running_loop().time() + self.settings.deadline
        with self._opened():
            for attempt in range(_ATTEMPTS):
                pieces: Any = self._replicas.options(method_name="stream", stream=True).remote(work)
                begun = False
                try:
                    while True:
                        with _told_plainly():
                            async with asyncio.timeout_at(end):
                                piece: str | Said = _checked(await anext(pieces))
                        begun = True
                        yield piece
                except StopAsyncIteration:
                    return
                except WorkerLost:
                    if begun or attempt == _ATTEMPTS - 1:
                        raise
                finally:
                    pieces.cancel()
                await asyncio.sleep(_BETWEEN_ATTEMPTS)

    async def _call(self, method: str, work: RankWork | ChatWork, key: str) -> Any:
        """One result from whichever replica has it first; what the key stands for is likely to be known there."""
        self._check_state()
        handle = self._replicas.options(method_name=method, session_id=key)
        with self._opened(), _told_plainly():
            async with asyncio.timeout(self.settings.deadline):
                for attempt in range(_ATTEMPTS):
                    try:
                        return await _result(handle, work)
                    except WorkerLost:
                        if attempt == _ATTEMPTS - 1:
                            raise
                    await asyncio.sleep(_BETWEEN_ATTEMPTS)

    async def _look(self) -> None:
        while True:
            try:
                await self._learn(await asyncio.to_thread(serve.status))
            except Exception as error:  # the controller is being restarted: replicas work on without it
                _log.warning("cannot learn how the replicas are: %s", error)
            await asyncio.sleep(_BETWEEN_LOOKS)

    async def _learn(self, status: Any) -> None:
        app = status.applications.get(self._replicas.app_name)
        deployment = app and app.deployments.get(self._replicas.deployment_name)
        if not deployment or self._state == "draining":
            return
        if any(deployment.replica_states.get(name) for name in ("RUNNING", "PENDING_MIGRATION")):
            await self._ask_all()
            self._state, self.failure = ("ready" if self._cards else "loading"), None
        elif deployment.status == "DEPLOY_FAILED":
            self._state, self.failure = "failed", start_failure(deployment.message)
        else:
            self._state = "loading"

    async def _ask_all(self) -> None:
        """What every replica tells about itself; of those that are gone, what they have done is kept."""
        answers = await self._replicas.broadcast("tell").results_async(timeout_s=_PATIENCE, return_exceptions=True)
        told = [answer for answer in answers if isinstance(answer, Told)]
        here = {one.replica for one in told}
        for name, stats in self._stats.items():
            if name not in here:
                self._stats[name] = {key: value for key, value in stats.items() if key in _COUNTERS}
        for one in told:
            self._cards, self._stats[one.replica] = one.cards, one.stats

    def _check_state(self) -> None:
        if self._state == "failed":
            raise NotReady("the models could not be loaded: see the server's log")
        if self._state != "ready":
            raise NotReady(f"the server is {self._state}: ask again", retry_after=_RESTART)

    @contextmanager
    def _opened(self) -> Iterator[None]:
        """This task is waited for when the engine stops."""
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        try:
            yield
        finally:
            self._open.discard(task)


def start_failure(message: str) -> ModelError:
    """Why replicas cannot be started, from what Ray tells about it: tracebacks with the error itself at the end."""
    errors = re.findall(r"^qr_integrations\.[\w.]+: (.+)$", message, re.MULTILINE)
    return ModelError(f"no replica can be started: {errors[-1] if errors else message}")


def documents_key(work: RankWork) -> str:
    """The same for the same documents in the same order, whatever is asked about them.

    Of the whole list: keys and values depend on everything in front of them.
    """
    contents = [(document.title, document.text) for document in work.documents]
    return hashlib.blake2b(json.dumps(contents).encode(), digest_size=16).hexdigest()


def _summed(stats: Iterable[Mapping[Any, Any]]) -> dict[Any, Any]:
    """Numbers of the same name added up, also those in mappings."""
    totals: dict[Any, Any] = {}
    for one in stats:
        for key, value in one.items():
            if isinstance(value, Mapping):
                totals[key] = _summed([totals.get(key, {}), value])
            else:
                totals[key] = totals.get(key, 0) + value
    return totals


async def _result(handle: DeploymentHandle[Any], work: RankWork | ChatWork) -> Any:
    """Of one replica; who stops waiting calls the work off there."""
    with _told_plainly():
        response = handle.remote(work)
        try:
            return _checked(await response)
        except asyncio.CancelledError:
            response.cancel()
            raise


def _checked(result: Any) -> Any:
    """What a replica returned; an error is raised.

    Raises:
        WorkerLost: the replica is about to end.
        QRError: as it was raised there.
    """
    if isinstance(result, NotReady):
        raise WorkerLost("the model's process is being stopped: ask again", retry_after=_RESTART)
    if isinstance(result, QRError):
        raise result
    return result


@contextmanager
def _told_plainly() -> Iterator[None]:
    """Ray's errors as refusals.

    Raises:
        WorkerLost: the replica is gone, or about to go.
    """
    try:
        yield
    except RayTaskError:  # of the program, not of Ray; it may look like one of those below
        raise
    except _GONE:
        _log.warning("a replica is gone")
        raise WorkerLost(
            "the model's process ended before the work was done: ask again", retry_after=_RESTART
        ) from None
    except BackPressureError:
        raise Overloaded("too many requests wait for a model already: ask again", retry_after=1.0) from None
    except DeploymentUnavailableError:
        raise NotReady("the models could not be loaded: see the server's log") from None
    except TimeoutError:
        raise OutOfTime("not done in the time that a request has: ask for less, or raise --deadline") from None
