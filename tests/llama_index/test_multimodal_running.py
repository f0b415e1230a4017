"""`ViCropLLM` and `DeCoLLM` at work: events of both kinds, streams that are left, event loops, threads."""

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from llama_index.core.callbacks import (
    CallbackManager,
    CBEventType,
    EventPayload,
    LlamaDebugHandler,
    TokenCountingHandler,
)
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events import BaseEvent
from llama_index.core.llms import ChatMessage, ImageBlock, TextBlock

QUESTION = "what is the color of the box ?"
LONG: dict[str, Any] = {"max_new_tokens": 150, "temperature": 1000.0, "seed": 0}  # any token is as likely as any other
AT_LEAST = 40  # tokens of such an answer


class Everything(BaseEventHandler):
    """Keeps all events of language models."""

    seen: list[Any]

    def handle(self, event: BaseEvent, **_: Any) -> None:
        self.seen.append(event)


@pytest.fixture
def told() -> Iterator[list[Any]]:
    """The instrumentation events that this test made."""
    handlers = get_dispatcher().event_handlers
    recorder = Everything(seen=[])
    handlers.append(recorder)
    yield recorder.seen
    handlers.remove(recorder)


@pytest.fixture
def debug() -> LlamaDebugHandler:
    return LlamaDebugHandler(print_trace_on_end=False)


@pytest.fixture
def passes(qr_mini_vl: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry per pass through the language model, from here on."""
    counted: list[int] = []
    forward = type(qr_mini_vl.model).forward

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        counted.append(len(counted))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(qr_mini_vl.model), "forward", counting)
    return counted


@pytest.fixture
def messages(png: bytes) -> list[ChatMessage]:
    return [ChatMessage(role="user", blocks=[ImageBlock(image=png), TextBlock(text=QUESTION)])]


def names_of(events: list[Any]) -> list[str]:
    return [event.class_name() for event in events]


# ---- events


@pytest.mark.parametrize("method", ["chat", "stream_chat", "achat", "astream_chat"])
def test_events_and_callbacks_tell_of_a_chat(
    make_llm: Any, messages: Any, told: list[Any], debug: LlamaDebugHandler, method: str
) -> None:
    llm = make_llm(callback_manager=CallbackManager([debug]))
    last = run(llm, method, messages)
    assert names_of(told)[0] == "LLMChatStartEvent" and names_of(told)[-1] == "LLMChatEndEvent"
    assert set(names_of(told)[1:-1]) == ({"LLMChatInProgressEvent"} if "stream" in method else set())
    assert told[0].messages == messages and told[0].model_dict["class_name"] == "ViCropLLM"
    assert told[-1].response == last and told[-1].response.raw["usage"]["total_tokens"] > 0
    [(start, end)] = debug.get_event_pairs(CBEventType.LLM)
    assert start.payload[EventPayload.MESSAGES] == messages and end.payload[EventPayload.RESPONSE] == last


@pytest.mark.parametrize("method", ["complete", "stream_complete", "acomplete", "astream_complete"])
def test_events_and_callbacks_tell_of_a_completion(
    make_llm: Any, png: bytes, told: list[Any], debug: LlamaDebugHandler, method: str
) -> None:
    llm = make_llm(callback_manager=CallbackManager([debug]))
    last = run(llm, method, QUESTION, image_documents=[ImageBlock(image=png)])
    assert names_of(told)[0] == "LLMCompletionStartEvent" and names_of(told)[-1] == "LLMCompletionEndEvent"
    assert told[0].prompt == QUESTION and told[-1].response == last
    [(start, end)] = debug.get_event_pairs(CBEventType.LLM)
    assert start.payload[EventPayload.PROMPT] == QUESTION and end.payload[EventPayload.COMPLETION] == last


@pytest.mark.parametrize("method", ["chat", "stream_chat", "achat", "astream_chat"])
def test_what_was_announced_ends_also_when_it_fails(make_llm: Any, debug: LlamaDebugHandler, method: str) -> None:
    from qr_integrations.errors import InputError

    llm = make_llm(callback_manager=CallbackManager([debug]))
    with pytest.raises(InputError, match="message #0, block #0"):
        run(llm, method, [ChatMessage(role="user", blocks=[ImageBlock(image=b"no picture")])])
    [(_, end)] = debug.get_event_pairs(CBEventType.LLM)
    assert isinstance(end.payload[EventPayload.EXCEPTION], InputError)


@pytest.mark.parametrize("method", ["chat", "stream_chat", "achat", "complete", "astream_complete"])
def test_tokens_are_counted_as_the_model_read_them(make_llm: Any, messages: Any, method: str) -> None:
    counter = TokenCountingHandler(tokenizer=str.split)
    llm = make_llm(callback_manager=CallbackManager([counter]))
    given = messages if "chat" in method else QUESTION
    usage = run(llm, method, given).raw["usage"]
    assert counter.prompt_llm_token_count == usage["prompt_tokens"] > 0
    assert counter.completion_llm_token_count == usage["completion_tokens"] > 0


def run(llm: Any, method: str, given: Any, **call: Any) -> Any:
    """The last response of a method of any kind."""

    async def in_loop() -> Any:
        found = await getattr(llm, method)(given, **call)
        return [one async for one in found][-1] if "stream" in method else found

    if method.startswith("a"):
        return asyncio.run(in_loop())
    found = getattr(llm, method)(given, **call)
    return list(found)[-1] if "stream" in method else found


# ---- streams that are left


@pytest.mark.parametrize("watched", [False, True], ids=["alone", "watched"])
def test_closing_a_stream_frees_the_model(
    make_llm: Any, passes: list[int], debug: LlamaDebugHandler, told: list[Any], watched: bool
) -> None:
    llm = make_llm(crop=False, callback_manager=CallbackManager([debug] if watched else []), **LONG)
    assert llm.complete(QUESTION).raw["usage"]["completion_tokens"] > AT_LEAST
    passes.clear()
    stream = llm.stream_complete(QUESTION)
    next(stream)
    next(stream)
    stream.close()
    ended = len(passes)
    assert ended < AT_LEAST
    assert llm.complete(QUESTION, max_tokens=1).raw["usage"]["completion_tokens"] == 1
    assert len(passes) == ended + 1
    if watched:
        assert isinstance(debug.get_event_pairs(CBEventType.LLM)[1][1].payload[EventPayload.EXCEPTION], GeneratorExit)


def test_a_stream_that_is_forgotten_frees_the_model(make_llm: Any, passes: list[int]) -> None:
    llm = make_llm(crop=False, **LONG)
    for number, _ in enumerate(llm.stream_chat([ChatMessage(content=QUESTION)])):
        if number == 1:
            break
    ended = len(passes)
    time.sleep(0.3)
    assert len(passes) == ended < AT_LEAST


def test_a_stream_that_was_never_begun_starts_nothing(make_llm: Any, passes: list[int]) -> None:
    threads = threading.active_count()
    make_llm(**LONG).stream_complete(QUESTION).close()
    assert threading.active_count() == threads and not passes


async def test_closing_an_async_stream_frees_the_model(
    make_llm: Any, passes: list[int], debug: LlamaDebugHandler
) -> None:
    llm = make_llm(crop=False, callback_manager=CallbackManager([debug]), **LONG)
    stream = await llm.astream_chat([ChatMessage(content=QUESTION)])
    async for _ in stream:
        break
    await stream.aclose()
    ended = len(passes)
    await asyncio.sleep(0.3)
    assert len(passes) == ended < AT_LEAST
    [(_, end)] = debug.get_event_pairs(CBEventType.LLM)
    assert isinstance(end.payload[EventPayload.EXCEPTION], GeneratorExit)


@pytest.mark.parametrize("method", ["achat", "astream_chat"])
async def test_cancelling_frees_the_model(make_llm: Any, passes: list[int], method: str) -> None:
    llm = make_llm(crop=False, **LONG)

    async def ask() -> Any:
        found = await getattr(llm, method)([ChatMessage(content=QUESTION)])
        return [one async for one in found]

    task = asyncio.create_task(ask())
    while len(passes) < 3:
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await llm.acomplete(QUESTION, max_tokens=1)  # waits for the model
    assert len(passes) < AT_LEAST


def test_a_loop_that_ends_first_leaves_no_thread_behind(make_llm: Any, passes: list[int]) -> None:
    threads = threading.active_count()
    llm = make_llm(crop=False, **LONG)

    async def leave() -> None:
        stream = await llm.astream_chat([ChatMessage(content=QUESTION)])
        await anext(stream)

    asyncio.run(leave())
    deadline = time.monotonic() + 10
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == threads and len(passes) < AT_LEAST


def test_an_error_of_the_model_reaches_who_listens(
    make_llm: Any, qr_mini_vl: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("the model broke")

    llm = make_llm(crop=False)
    with monkeypatch.context() as patch:
        patch.setattr(type(qr_mini_vl.model), "forward", broken)
        for method in ("chat", "stream_chat", "achat", "astream_chat"):
            with pytest.raises(RuntimeError, match="the model broke"):
                run(llm, method, [ChatMessage(content=QUESTION)])
    assert llm.complete(QUESTION).text is not None


# ---- loops and threads


@pytest.mark.parametrize("method", ["achat", "astream_chat", "acomplete", "astream_complete"])
def test_the_event_loop_goes_on_meanwhile(make_llm: Any, messages: Any, heartbeat: Any, method: str) -> None:
    llm = make_llm(**LONG)
    given = messages if "chat" in method else QUESTION

    async def work() -> Any:
        found = await getattr(llm, method)(given)
        return [one async for one in found][-1] if "stream" in method else found

    expected = run(llm, method[1:], given)
    found, ticks, seconds, longest = heartbeat(work())
    assert found.raw["usage"] == expected.raw["usage"]
    assert ticks > 10 and longest < seconds / 2, (ticks, seconds, longest)


def test_many_at_once_on_one_loop_are_not_mixed_up(make_llm: Any, png: bytes) -> None:
    llm, jobs = make_llm(max_new_tokens=2), several(png)[::2]

    async def at_once() -> Any:
        return await asyncio.gather(*(llm.achat(job) for job in jobs))

    expected = [llm.chat(job).message.content for job in jobs]
    assert [response.message.content for response in asyncio.run(at_once())] == expected


@pytest.mark.parametrize("name", ["ViCropLLM", "DeCoLLM"])
def test_sixteen_threads_get_what_one_gets(
    make_llm: Any, qr_mini_vl: Any, png: bytes, debug: LlamaDebugHandler, name: str
) -> None:
    from qr_integrations import llama_index

    serial, jobs = make_llm(name), several(png)
    expected = [told_by(serial.chat(job)) for job in jobs]
    shared = getattr(llama_index, name)(  # opened by all at once
        model=qr_mini_vl.name, max_new_tokens=4, callback_manager=CallbackManager([debug])
    )

    def ask(number: int) -> Any:
        if number % 2:
            *_, last = shared.stream_chat(jobs[number])
            return told_by(last)
        return told_by(shared.chat(jobs[number]))

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, range(len(jobs)))) == expected
    assert len(debug.get_event_pairs(CBEventType.LLM)) == len(jobs)


def several(png: bytes) -> list[list[ChatMessage]]:
    """Sixteen conversations, half of them with a picture."""
    things = ["box", "moon", "star", "ring", "tent", "heart", "sign", "cross"]
    asked = [[TextBlock(text=f"what is the color of the {thing} ?")] for thing in things]
    return [
        [ChatMessage(role="user", blocks=[ImageBlock(image=png), *blocks] if seen else blocks)]
        for seen in (True, False)
        for blocks in asked
    ]


def told_by(response: Any) -> Any:
    crops = [look["box"] for look in response.raw["qr_steps"].get("crop", [])]
    return response.message.content, response.raw["usage"], crops
