"""Chats as OpenAI's clients ask for them: ``POST /v1/chat/completions``, whole or as a stream of events."""

import json
import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.types import Receive, Scope, Send

from qr_integrations.chatting import METHOD, PARAMS, SECONDS, STEPS
from qr_integrations.errors import Cancelled
from qr_integrations.serving.connection import while_connected
from qr_integrations.serving.http_errors import UNKNOWN_KEY, body_of, trouble_of
from qr_integrations.serving.openai_messages import ChatReader
from qr_integrations.serving.openai_shapes import (
    AnswerMessage,
    ChatChunk,
    ChatCompletion,
    ChatError,
    ChatRequest,
    Choice,
    ChunkChoice,
    Delta,
    Finish,
    PictureMap,
    TokenUsage,
)
from qr_integrations.serving.refusals import NotReady, UnknownModel
from qr_integrations.serving.settings import ServerSettings
from qr_integrations.serving.work import ChatWork, Engine, ModelCard, Said

_Reading = AbstractAsyncContextManager[ChatWork]
CHAT_PATH = "/v1/chat/completions"
_ERRORS = {
    400: "What was sent cannot be used, or is too long for the model.",
    401: UNKNOWN_KEY,
    404: "No such model answers here.",
    413: "More than the server takes.",
    429: "Too many requests wait: see Retry-After.",
    503: "Not now: models are being loaded, or the server is stopping.",
    504: "Not done in the time that a request has.",
}
_EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer; with `stream`, events as OpenAI has them, and ``data: [DONE]`` at the end.",
        "model": ChatCompletion,
        "content": {"text/event-stream": {"schema": _EVENT}},
    },
    **{status: {"description": what, "model": ChatError} for status, what in _ERRORS.items()},
    "default": {"description": "Another error.", "model": ChatError},
}


def chat_routes(engine: Engine, settings: ServerSettings) -> APIRouter:
    """The route of OpenAI's chats, answered by `engine`.

    Args:
        engine: does the work.
        settings: what is let in.
    """
    router, reader = APIRouter(tags=["chat"]), ChatReader(settings)

    @router.post(CHAT_PATH, responses=_RESPONSES, response_class=Response)
    async def complete_chat(request: Request, sent: ChatRequest) -> Response:
        """Answer a conversation."""
        card = await _chosen(engine, sent.model)
        usage = bool(sent.stream_options and sent.stream_options.include_usage)
        frame, read = _Frame(card.id, bool(sent.heat_map), usage), reader.reading(sent, card)
        if sent.stream:
            return EventStream(_events(_pieces(engine, read), frame))
        said = await while_connected(request, _said(engine, read))
        return Response(frame.completion(said), media_type="application/json")

    return router


class EventStream(Response):
    """Server-sent events; until the first one is there, an error is an answer of its own.

    The generator is closed as soon as the client has gone away.

    Args:
        events: what is sent; closed at the end in any case.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str, None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._begun = events, False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await while_connected(Request(scope, receive), self._send_all(send))
        except Cancelled:
            if not self._begun:
                raise

    async def _send_all(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            async for event in events:
                if not self._begun:
                    await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                    self._begun = True
                await send({"type": "http.response.body", "body": f"data: {event}\n\n".encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _chosen(engine: Engine, name: str) -> ModelCard:
    cards = await engine.models()
    if not cards and engine.state == "failed":
        raise NotReady("the models could not be loaded: see the server's log")
    if not cards:
        raise NotReady(f"no model is there yet, the server is {engine.state}: ask again", retry_after=5.0)
    answering = {card.id: card for card in cards if card.chats}
    if name not in answering:
        raise UnknownModel(f"there is no model {name[:100]!r} that answers: pass one of {', '.join(answering)}")
    return answering[name]


@dataclass(frozen=True, slots=True)
class _Frame:
    """What is the same in all that is told about one answer."""

    model: str
    heat_maps: bool
    usage: bool
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def completion(self, said: Said) -> str:
        """All of it."""
        choice = Choice(
            index=0,
            message=AnswerMessage(role="assistant", content=said.text, refusal=None),
            logprobs=None,
            finish_reason=said.finish_reason,
        )
        return self._as_json(ChatCompletion, choices=[choice], usage=_usage(said), **self._told(said))

    def first_chunk(self) -> str:
        """Who speaks."""
        return self._chunk(Delta(role="assistant", content=""))

    def chunks(self, piece: str | Said) -> Iterator[str]:
        """A piece of the text; or why it ended and what is known about it, and the usage if that was asked for."""
        if isinstance(piece, Said):
            yield self._chunk(Delta(), piece.finish_reason, **self._told(piece))
            if self.usage:
                yield self._as_json(ChatChunk, choices=[], usage=_usage(piece))
        elif piece:
            yield self._chunk(Delta(content=piece))

    def _chunk(self, delta: Delta, finish_reason: Finish | None = None, **more: Any) -> str:
        choice = ChunkChoice(index=0, delta=delta, logprobs=None, finish_reason=finish_reason)
        return self._as_json(ChatChunk, choices=[choice], **({"usage": None} if self.usage else {}), **more)

    def _as_json(self, kind: type[ChatCompletion | ChatChunk], **given: Any) -> str:
        shape = kind(
            id=self.id, object=kind.model_fields["object"].default, created=self.created, model=self.model, **given
        )
        return shape.model_dump_json(exclude_unset=True)  # what is not a number becomes null

    def _told(self, said: Said) -> dict[str, Any]:
        told = {name: said.metadata[name] for name in (METHOD, PARAMS, STEPS, SECONDS) if name in said.metadata}
        maps = [PictureMap(values=one.values, covers=one.covers, image_size=one.image_size) for one in said.heat_maps]
        return told | ({"qr_heat_maps": maps} if self.heat_maps else {})


def _usage(said: Said) -> TokenUsage:
    used = said.usage
    return TokenUsage(
        prompt_tokens=used.prompt_tokens, completion_tokens=used.completion_tokens, total_tokens=used.total_tokens
    )


async def _said(engine: Engine, reading: _Reading) -> Said:
    async with reading as work:
        return await engine.chat(work)


async def _pieces(engine: Engine, reading: _Reading) -> AsyncGenerator[str | Said, None]:
    async with reading as work:
        stream: Any = engine.stream(work)
        async with aclosing(stream) as pieces:
            async for piece in pieces:
                yield piece


async def _events(pieces: AsyncGenerator[str | Said, None], frame: _Frame) -> AsyncGenerator[str, None]:
    """The data of each event: chunks; where an error comes after the first, the error is the last event."""
    begun = False
    try:
        async with aclosing(pieces):
            async for piece in pieces:
                if not begun:
                    begun = True
                    yield frame.first_chunk()
                for chunk in frame.chunks(piece):
                    yield chunk
        yield "[DONE]"
    except Exception as error:
        if not begun:
            raise
        yield json.dumps(body_of(CHAT_PATH, trouble_of(error)))
