"""What a request asks for and what comes back, whichever API it came by; it can go to another process.

Whoever does the work is an `Engine`: a model in this process, or replicas somewhere else.
"""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from qr_integrations.reranking import Relevance
from qr_integrations.types import Document, Message, Usage

State = Literal["loading", "ready", "draining", "failed"]


@dataclass(frozen=True, slots=True)
class RankWork:
    """Documents to be ranked for a query.

    Attributes:
        query: what is asked.
        documents: at least one.
        top_n: the best so many come back; None: all.
        instruction: what counts as relevant, in words; None is the server's own.
        explain: tell which words a document was ranked by, at most `max_spans` of each; None: all.
        max_doc_tokens: read so many tokens of each document; None is the server's own limit.
        truncate: documents that do not fit may be cut at their ends; else long ones are read in pieces. None is as the
            server is set.
        raw_scores: attention as it is, not normalized.
    """

    query: str
    documents: tuple[Document, ...]
    top_n: int | None = None
    instruction: str | None = None
    explain: bool = False
    max_spans: int | None = 3
    max_doc_tokens: int | None = None
    truncate: bool | None = None
    raw_scores: bool = False


@dataclass(frozen=True, slots=True)
class Ranked:
    """A ranking.

    Attributes:
        relevances: best first; `Relevance.index` is the position in `RankWork.documents`.
        num_tokens: tokens of the documents and of the query, read or found in the store.
        notes: what had to be done otherwise than asked, in words.
    """

    relevances: tuple[Relevance, ...]
    num_tokens: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ChatWork:
    """A conversation to be answered.

    Attributes:
        model: one of `Engine.models`, by its id.
        messages: as they were said, pictures opened.
        settings: of `ChatSettings.give_answer`, as JSON can hold them: ``max_new_tokens``, ``temperature``, ``stop``,
            ``crop``, ``prune`` and so on; what is left out is as the server is set.
        heat_maps: send along the maps by which crops were chosen.
    """

    model: str
    messages: tuple[Message, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    heat_maps: bool = False


@dataclass(frozen=True, slots=True)
class HeatMap:
    """Where a model looked in a picture.

    Attributes:
        values: one number per cell, row by row, from 0 to 1.
        covers: left, top, right, bottom of the part of the picture that the cells cover evenly, in pixels.
        image_size: width and height of the picture in pixels.
    """

    values: tuple[tuple[float, ...], ...]
    covers: tuple[float, float, float, float]
    image_size: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Said:
    """An answer.

    Attributes:
        text: all of it.
        finish_reason: ``"stop"`` or ``"length"``.
        usage: tokens read and written.
        metadata: see `ChatSettings.answer_metadata`.
        heat_maps: of each picture that was looked at, if asked for.
    """

    text: str
    finish_reason: Literal["stop", "length"]
    usage: Usage
    metadata: Mapping[str, Any] = field(default_factory=dict)
    heat_maps: tuple[HeatMap, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelCard:
    """A model that is served.

    Attributes:
        id: the name that clients call it by; never a path.
        ranks, chats, sees_pictures: what it does.
        max_tokens: its window; None: not known.
    """

    id: str
    ranks: bool
    chats: bool
    sees_pictures: bool
    max_tokens: int | None = None


@runtime_checkable
class Engine(Protocol):
    """Does the work. All methods are for one event loop; who stops waiting, by cancellation, calls the work off.

    What may be raised besides errors of the package: see `refusals`.
    """

    @property
    def state(self) -> State:
        """Whether there is work to be had."""

    async def models(self) -> tuple[ModelCard, ...]:
        """What is served; empty while nothing is loaded."""

    async def rank(self, work: RankWork) -> Ranked:
        """Rank documents."""

    async def chat(self, work: ChatWork) -> Said:
        """Answer a conversation."""

    def stream(self, work: ChatWork) -> AsyncIterator[str | Said]:
        """As `chat`, piece by piece; the last thing is the whole. Closing the iterator calls the work off."""

    async def start(self) -> None:
        """Load what is to be served; returns at once, see `state`."""

    async def stop(self, grace: float) -> None:
        """Refuse new work, finish what has begun within `grace` seconds, call off the rest."""
