"""Does the work in this process: models, a queue for each, and the store of keys and values that all requests share."""

import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from qr_integrations.backend import Backend
from qr_integrations.backend.interruptions import check_interruption
from qr_integrations.chatting import MODEL_NAME, ChatSettings
from qr_integrations.errors import QRError, WindowError
from qr_integrations.reranking import RerankSettings
from qr_integrations.retrieval.token_scores import contents
from qr_integrations.serving.model_queue import KINDS, Job, Kind, ModelQueue, too_late
from qr_integrations.serving.refusals import NotReady, TooLarge, UnknownModel
from qr_integrations.serving.settings import ServerSettings
from qr_integrations.serving.work import ChatWork, HeatMap, ModelCard, Ranked, RankWork, Said, State
from qr_integrations.types import Answer, Ranking

_log = logging.getLogger(__name__)
_COUNTED = 100_000  # characters: a tokenizer cannot be interrupted
_LOADING = 5.0  # seconds after which it is worth asking again
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Served:
    """A model, what it is used with, and its queue."""

    card: ModelCard
    backend: Backend
    queue: ModelQueue
    ranking: RerankSettings | None
    chatting: ChatSettings


class LocalEngine:
    """An `Engine` with models in this process.

    Every model has one thread and a `ModelQueue`. Rankings over the same documents that wait at the same time go
    through the model together. Nothing of a request that is called off stays behind.

    Args:
        settings: which models, and how much is let in.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.failure: Exception | None = None
        self._state: State = "loading"
        self._served: dict[str, _Served] = {}
        self._loading: asyncio.Task[None] | None = None

    @property
    def state(self) -> State:
        """Whether there is work to be had."""
        return self._state

    async def start(self) -> None:
        """Begin to load the models; `state` tells when they are there, or, with `failure`, that they are not."""
        if self._loading is None:
            self._loading = asyncio.ensure_future(self._load())

    async def stop(self, grace: float) -> None:
        """Refuse new work, finish what there is within `grace` seconds, call off the rest."""
        self._state = "draining"
        if self._loading is not None:
            await asyncio.wait({self._loading}, timeout=grace)
        stopping = [asyncio.to_thread(queue.stop, grace) for queue in self._queues()]
        await asyncio.gather(*stopping)
        for served in self._served.values():
            if served.ranking is not None:
                await asyncio.to_thread(served.ranking.cache.flush)

    async def models(self) -> tuple[ModelCard, ...]:
        """What is served; empty while nothing is loaded."""
        return tuple(served.card for served in self._served.values())

    async def rank(self, work: RankWork) -> Ranked:
        """Rank documents.

        Raises:
            TooLarge: more documents or tokens than the settings let in.
            Refused: not now.
            InputError, WindowError, ModelError: as `AttentionReranker.rank`.
        """
        self._check_state()
        if len(work.documents) > self.settings.max_documents:
            raise TooLarge(
                f"{len(work.documents):,} documents, at most {self.settings.max_documents:,} are taken: send fewer, or "
                "raise --max-documents"
            )
        served = next(one for one in self._served.values() if one.ranking is not None)
        how = (work.instruction, work.explain, work.max_spans, work.max_doc_tokens, work.truncate)
        group = (contents(work.documents), how)
        ranked: Ranked = await self._done(served, "rank", partial(self._rank_all, served), work, group)
        return ranked

    async def chat(self, work: ChatWork) -> Said:
        """Answer a conversation.

        Raises:
            UnknownModel: no such model answers.
            Refused: not now.
            InputError, WindowError, ModelError: as `ChatSettings.give_answer`.
        """
        served = self._chatting(work)

        def run(works: Sequence[ChatWork]) -> list[Said]:
            self._check_conversation(served, works[0])
            return [_said(served, works[0], served.chatting.give_answer(works[0].messages, works[0].settings))]

        said: Said = await self._done(served, "chat", run, work, None)
        return said

    async def stream(self, work: ChatWork) -> AsyncIterator[str | Said]:
        """As `chat`, piece by piece; the last thing is the whole. Closing the iterator calls the work off."""
        served = self._chatting(work)
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[str | Said | None] = asyncio.Queue()

        def tell(piece: str | Said | None) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        def run(works: Sequence[ChatWork]) -> list[None]:
            self._check_conversation(served, works[0])
            for piece in served.chatting.stream_answer(works[0].messages, works[0].settings):
                tell(piece.delta if piece.answer is None else _said(served, works[0], piece.answer))
            return [None]

        job = self._submitted(served, "chat", run, work, None)
        job.result.add_done_callback(lambda _: tell(None))
        try:
            while (piece := await _next_of(pieces, job.deadline)) is not None:
                yield piece
            job.result.result()
        except QRError as error:
            raise _by_its_id(error, served) from None
        finally:
            served.queue.cancel(job)

    def stats(self) -> dict[str, Any]:
        """What is going on, read without waiting.

        ``"queue_depth"``: (model, kind) -> jobs that wait; ``"running"``: model -> jobs in it; ``"done"``,
        ``"refused"``, ``"cancelled"``: (model, kind) -> jobs so far; ``"seconds"``: (model, kind) -> of the model's
        time; ``"batches"``: how many rankings ran together -> how often; ``"cache_hits"``, ``"cache_misses"``:
        documents; ``"cache_bytes"``, ``"cache_documents"``: what the store holds now; ``"loaded"``: model -> True.
        """
        by_kind = ("queue_depth", "done", "refused", "cancelled", "seconds")
        told: dict[str, Any] = {"loaded": dict.fromkeys(self._served, True), "batches": Counter(), "running": {}}
        told |= {name: {} for name in by_kind}
        for queue in self._queues():
            told["running"][queue.name] = queue.num_running
            told["batches"].update(queue.stats.batches.copy())
            for kind in KINDS:
                told["queue_depth"][queue.name, kind] = queue.depth(kind)
                for name in by_kind[1:]:
                    told[name][queue.name, kind] = getattr(queue.stats, name)[kind]
        for served in self._served.values():
            if served.ranking is not None:
                cache = served.ranking.cache.stats()
                told |= {"cache_hits": cache.hits, "cache_misses": cache.misses}
                told |= {"cache_bytes": cache.num_bytes, "cache_documents": len(served.ranking.cache)}
        return told

    async def _load(self) -> None:
        try:
            self._served = await asyncio.to_thread(self._load_models)
        except Exception as error:
            self.failure = error
            if self._state == "loading":
                self._state = "failed"
            _log.error("the models cannot be loaded: %s", error)
            return
        if self._state == "loading":
            self._state = "ready"

    def _load_models(self) -> dict[str, _Served]:
        settings = self.settings
        names = {settings.name: settings.model}
        if settings.vision_name is not None and settings.vision_model is not None:
            names[settings.vision_name] = settings.vision_model
        how: dict[str, Any] = {name: getattr(settings, name) for name in ("device", "dtype", "device_map")}
        backends = {name: Backend.load(path, **how) for name, path in names.items()}
        ranks = _rank_settings(settings, backends[settings.name])
        ranks.open()  # says now what is wrong with the heads
        served: dict[str, _Served] = {}
        queues: dict[int, ModelQueue] = {}
        for name, backend in backends.items():
            if id(backend) not in queues:
                queues[id(backend)] = ModelQueue(name, size=settings.queue_size, max_batch=settings.max_batch)
            ranking = ranks if name == settings.name else None
            card = ModelCard(name, ranking is not None, True, backend.sees_pictures, backend.max_tokens)
            chatting = ChatSettings(backend=backend, max_new_tokens=settings.default_new_tokens)
            served[name] = _Served(card, backend, queues[id(backend)], ranking, chatting)
        return served

    def _queues(self) -> list[ModelQueue]:
        return list({id(served.queue): served.queue for served in self._served.values()}.values())

    def _check_state(self) -> None:
        if self._state == "failed":
            raise NotReady("the models could not be loaded: see the server's log")
        if self._state != "ready":
            raise NotReady(f"the server is {self._state}: ask again", retry_after=_LOADING)

    def _chatting(self, work: ChatWork) -> _Served:
        self._check_state()
        served = self._served.get(work.model)
        if served is None or not served.card.chats:
            raise UnknownModel(f"there is no model {work.model!r} here: pass one of {', '.join(self._served)}")
        return served

    def _submitted(
        self, served: _Served, kind: Kind, run: Callable[[Sequence[Any]], Sequence[Any]], work: Any, group: Any
    ) -> Job:
        job = Job(kind, run, work, group, time.monotonic() + self.settings.deadline)
        served.queue.submit(job)
        return job

    async def _done(
        self, served: _Served, kind: Kind, run: Callable[[Sequence[Any]], Sequence[Any]], work: Any, group: Any
    ) -> Any:
        job = self._submitted(served, kind, run, work, group)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(job.result), self.settings.deadline)
        except TimeoutError:
            raise too_late() from None
        except QRError as error:
            raise _by_its_id(error, served) from None
        finally:
            served.queue.cancel(job)

    def _rank_all(self, served: _Served, works: Sequence[RankWork]) -> list[Ranked]:
        """Rankings over the same documents, told in the same way."""
        first = works[0]
        ranking = served.ranking
        assert ranking is not None
        self._check_length(served.backend, [*_texts_of(first), *(work.query for work in works[1:])])
        most = max(len(first.documents) if work.top_n is None else work.top_n for work in works)
        rankings: list[Ranking] = ranking.open().rank_batch(
            [work.query for work in works],
            [work.documents for work in works],
            instruction=first.instruction,
            explain=most if first.explain else 0,
            max_spans=first.max_spans,
            truncation=_truncation(first),
            max_doc_tokens=first.max_doc_tokens,
        )
        return [
            _ranked(ranking, work, found, len(served.backend.tokenizer(work.query)["input_ids"]))
            for work, found in zip(works, rankings, strict=True)
        ]

    def _check_conversation(self, served: _Served, work: ChatWork) -> None:
        """Whether its text is not longer than the model's window, before all of it is made tokens."""
        texts = [message.text for message in work.messages]
        window = served.card.max_tokens
        if window is not None and self._counts_more(served.backend, texts, window):
            raise WindowError(
                f"the conversation has more tokens than the {window:,} that {served.card.id!r} holds: send fewer or "
                "shorter messages"
            )

    def _check_length(self, backend: Backend, texts: Sequence[str]) -> None:
        """Whether documents are not too long, as they were sent."""
        if self._counts_more(backend, texts, limit := self.settings.max_request_tokens):
            raise TooLarge(
                f"more than {limit:,} tokens, which is what is taken: send fewer documents, or raise "
                "--max-request-tokens"
            )

    def _counts_more(self, backend: Backend, texts: Sequence[str], limit: int) -> bool:
        """Whether texts have more tokens than that; they are counted only where they may, and only so far."""
        if sum(len(text.encode(errors="replace")) for text in texts) <= limit:  # no token is shorter than a byte
            return False
        count = 0
        for part in (text[start : start + _COUNTED] for text in texts for start in range(0, len(text), _COUNTED)):
            check_interruption()
            count += len(backend.tokenizer(part, add_special_tokens=False)["input_ids"])
            if count > limit:
                return True
        return False


def _texts_of(work: RankWork) -> list[str]:
    return [work.query, *(f"{document.title or ''}\n{document.text}" for document in work.documents)]


def _rank_settings(settings: ServerSettings, backend: Backend) -> RerankSettings:
    from qr_integrations.retrieval.store import DocumentCache

    same = ("method", "heads", "normalize", "truncation", "max_context_tokens")
    return RerankSettings(
        backend=backend,
        cache=DocumentCache(
            settings.cache_bytes,
            folder=settings.cache_folder,
            max_disk_bytes=settings.cache_disk_bytes,
            kv_dtype=settings.cache_dtype,
        ),
        refinements={"layout": settings.layout},
        **{name: getattr(settings, name) for name in same},
    )


async def _next_of(pieces: "asyncio.Queue[str | Said | None]", deadline: float) -> str | Said | None:
    """What is there, however late; else what comes in time."""
    if not pieces.empty():
        return pieces.get_nowait()
    try:
        return await asyncio.wait_for(pieces.get(), max(0.0, deadline - time.monotonic()))
    except TimeoutError:
        raise too_late() from None


def _by_its_id(error: QRError, served: _Served) -> QRError:
    """The same error, in which the model is called what clients call it: its own name may be a path."""
    name, told = served.backend.name, str(error)
    told = told.replace(name, served.card.id) if os.sep in name else told.replace(repr(name), repr(served.card.id))
    error.args = (told, *error.args[1:])
    return error


def _truncation(work: RankWork) -> Any:
    return None if work.truncate is None else "head" if work.truncate else "chunk"


def _ranked(settings: RerankSettings, work: RankWork, ranking: Ranking, query_tokens: int) -> Ranked:
    changed: dict[str, Any] = {"explain": work.explain} | ({"normalize": None} if work.raw_scores else {})
    told = settings.model_copy(update=changed)
    num_tokens = query_tokens + sum(item.num_tokens for item in ranking)
    return Ranked(tuple(told.relevances_of(ranking, work.top_n)), num_tokens, ranking.notes)


def _said(served: _Served, work: ChatWork, answer: Answer) -> Said:
    metadata = {**served.chatting.answer_metadata(answer, work.settings), MODEL_NAME: served.card.id}
    maps = tuple(_heat_map(look) for look in answer.steps.get("crop", ())) if work.heat_maps else ()
    return Said(answer.text, answer.finish_reason, answer.usage, metadata, maps)


def _heat_map(look: Any) -> HeatMap:
    values = look.importance.values
    low, high = float(values.min()), float(values.max())
    scaled = (values - low) / ((high - low) or 1.0)
    rows = tuple(tuple(round(float(value), 4) for value in row) for row in scaled)
    left, top, right, bottom = map(float, look.importance.covers)
    return HeatMap(rows, (left, top, right, bottom), look.importance.image_size)
