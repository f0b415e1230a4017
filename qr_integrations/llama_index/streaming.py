"""Answers that are announced in LlamaIndex's events, streams that let go of the model as soon as nobody listens."""

import asyncio
import contextvars
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from contextlib import aclosing, closing
from functools import partial, update_wrapper
from typing import Any, TypeVar

from qr_integrations.types import Answer, AnswerPiece

Response = TypeVar("Response")
Respond = Callable[[str, str, Answer | None], Response]
Start = Callable[[], Any]  # gives a generator of `AnswerPiece`


def responses(pieces: Any, respond: Respond[Response]) -> Generator[Response, None, None]:
    """A response per piece: `respond` takes the text so far, what is new, and at the end the whole answer."""
    text = ""
    with closing(pieces):
        for piece in pieces:
            text += piece.delta
            yield respond(text, piece.delta, piece.answer)


async def aresponses(start: Start, respond: Respond[Response]) -> AsyncGenerator[Response, None]:
    """As `responses`; pieces are made in a thread of their own."""
    text = ""
    async with aclosing(_apieces(start)) as pieces:
        async for piece in pieces:
            text += piece.delta
            yield respond(text, piece.delta, piece.answer)


async def aanswer(start: Start) -> Answer:
    """The whole answer. Who cancels the wait stops the generation."""
    async with aclosing(_apieces(start)) as pieces:
        async for piece in pieces:
            answer = piece.answer
    assert answer is not None  # the last piece carries it
    return answer


def announced(callback: Callable[..., Any]) -> Callable[[Any], Any]:
    """A method with the events of LlamaIndex's ``llm_chat_callback()`` or ``llm_completion_callback()`` around it."""
    return lambda method: update_wrapper(_with_events(callback, method), method)


def _with_events(callback: Callable[..., Any], method: Any) -> Any:
    """LlamaIndex leaves out what any decorator has wrapped, as announced already; a partial does not show it."""
    return callback(partial(method))


def announced_stream(
    callback: Callable[..., Any], llm: Any, given: Any, call: Mapping[str, Any], start: Callable[..., Any]
) -> Generator[Any, None, None]:
    """The stream of ``start(given, call)``, with the events of such a callback around it.

    The callback's own stream does not close what it reads from, which an event handler that keeps errors keeps alive.
    """
    opened: list[Any] = []

    def work(_: Any, given: Any, **call: Any) -> Any:
        opened.append(start(given, call))
        return opened[0]

    return _closing(_with_events(callback, work)(llm, given, **call), opened[0])


def _closing(stream: Any, source: Any) -> Generator[Any, None, None]:
    with closing(source):
        yield from stream


async def announced_astream(
    callback: Callable[..., Any], llm: Any, given: Any, call: Mapping[str, Any], start: Callable[..., Any]
) -> AsyncGenerator[Any, None]:
    """As `announced_stream`, for streams on an event loop."""
    opened: list[Any] = []

    async def work(_: Any, given: Any, **call: Any) -> Any:
        opened.append(start(given, call))
        return opened[0]

    return _aclosing(await _with_events(callback, work)(llm, given, **call), opened[0])


async def _aclosing(stream: Any, source: Any) -> AsyncGenerator[Any, None]:
    async with aclosing(source), aclosing(stream):
        async for response in stream:
            yield response


async def _apieces(start: Start) -> AsyncGenerator[AnswerPiece, None]:
    """The pieces of a stream that is read in a thread; closing waits until the thread has let go of the model."""
    loop, arrived, gone = asyncio.get_running_loop(), asyncio.Queue[Any](), threading.Event()

    def tell(item: AnswerPiece | BaseException | None) -> None:
        try:
            loop.call_soon_threadsafe(arrived.put_nowait, item)
        except RuntimeError:  # the loop was closed
            gone.set()

    def work() -> None:
        try:
            with closing(start()) as pieces:
                while not gone.is_set() and (piece := next(pieces, None)) is not None:
                    tell(piece)
        except BaseException as error:  # goes to the caller, who waits for it
            tell(error)
        finally:
            tell(None)

    threading.Thread(target=contextvars.copy_context().run, args=(work,), daemon=True).start()
    try:
        while (item := await arrived.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    except GeneratorExit:
        gone.set()
        while await arrived.get() is not None:
            continue
        raise
    finally:
        gone.set()
