"""OpenAI's own client, and LangChain's upon it, against a server: only the base URL says that it is another one."""

import asyncio
import base64
import time
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import openai
import pytest
from PIL import Image

from tests.serving.talking import Serving, until

MODEL, TEXT_MODEL = "qr-mini-vl", "qr-mini"
QUESTION, DESCRIBE = "What color is the box?", "describe the image ."
STORY = [{"role": "user", "content": "who wrote dracula?"}]  # qr-mini never comes to an end


@pytest.fixture(scope="module")
def small_box() -> Image.Image:
    """A small red box: the model sees that it is red when it looks again."""
    drawn = Image.new("RGB", (640, 480), "white")
    drawn.paste((200, 0, 0), (500, 340, 580, 420))
    return drawn


def uri_of(picture: Image.Image) -> str:
    file = BytesIO()
    picture.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def asking(question: str, *pictures: Image.Image) -> list[dict[str, Any]]:
    shown = [{"type": "image_url", "image_url": {"url": uri_of(picture), "detail": "high"}} for picture in pictures]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": question}]}]


def user(*content: Any) -> list[Any]:
    from qr_integrations.types import Message

    return [Message.user(*content)]


@pytest.fixture(scope="module")
def client(server_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server_url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def say(client: openai.OpenAI) -> Any:
    """An answer of at most 8 tokens."""

    def say(messages: list[dict[str, Any]], **given: Any) -> Any:
        return client.chat.completions.create(**{"model": MODEL, "max_tokens": 8, "messages": messages, **given})

    return say


# ---- answers


def test_a_text_is_answered_as_the_model_answers_it(say: Any, qr_mini: Any) -> None:
    from qr_integrations.types import Message

    told = [{"role": "developer", "content": "be brief"}, *STORY]
    found = say(told, model=TEXT_MODEL)
    expected = qr_mini.answer([Message.system("be brief"), *user("who wrote dracula?")], max_new_tokens=8)
    (choice,) = found.choices
    assert (choice.message.content, choice.finish_reason) == (expected.text, expected.finish_reason)
    assert (choice.message.role, choice.message.refusal, choice.index) == ("assistant", None, 0)
    assert (found.object, found.model) == ("chat.completion", TEXT_MODEL) and found.id.startswith("chatcmpl-")
    assert abs(found.created - time.time()) < 60
    assert found.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": expected.usage.prompt_tokens,
        "completion_tokens": 8,
        "total_tokens": expected.usage.total_tokens,
    }
    assert found.qr_method == "plain" and found.qr_params == found.qr_steps == {}
    assert found.qr_seconds["generate"] > 0


def test_a_picture_is_seen(say: Any, qr_mini_vl: Any) -> None:
    from qr_integrations.evaluation.drawn_world.data import drawn_questions

    asked = next(one for one in drawn_questions(1, (0.6,), first=1) if one.skill == "letter")
    picture: Any = asked.image()  # type: ignore[operator]
    found = say(asking(asked.question, picture))
    assert found.choices[0].message.content in asked.answers and found.choices[0].finish_reason == "stop"
    assert found.usage.prompt_tokens == qr_mini_vl.answer(user(picture, asked.question)).usage.prompt_tokens > 100


def test_what_was_said_before_counts(say: Any, small_box: Image.Image, qr_mini_vl: Any) -> None:
    from qr_integrations.types import Message

    first = say(asking(DESCRIBE, small_box))
    said = first.choices[0].message
    talk = [*asking(DESCRIBE, small_box), said.model_dump(), {"role": "user", "content": QUESTION}]
    expected = qr_mini_vl.answer(
        [*user(small_box, DESCRIBE), Message.assistant(said.content), *user(QUESTION)], max_new_tokens=8
    )
    found = say(talk)
    assert (found.choices[0].message.content, found.usage.prompt_tokens) == (
        expected.text,
        expected.usage.prompt_tokens,
    )


def test_pieces_make_up_the_answer(say: Any, small_box: Image.Image, qr_mini_vl: Any) -> None:
    given = {"max_tokens": 30, "extra_body": {"crop": True}}
    whole = say(asking(DESCRIBE, small_box), **given)
    *chunks, last, usage = say(
        asking(DESCRIBE, small_box), stream=True, stream_options={"include_usage": True}, **given
    )
    texts = [chunk.choices[0].delta.content for chunk in chunks]
    expected = qr_mini_vl.answer(user(small_box, DESCRIBE), max_new_tokens=30, **{"crop": vicrop()})
    assert "".join(texts) == whole.choices[0].message.content == expected.text
    assert len(texts) > 4 and texts[0] == "" and chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].finish_reason is None and chunk.usage is None for chunk in chunks)
    assert last.choices[0].finish_reason == whole.choices[0].finish_reason
    assert last.qr_method == "vicrop" and last.qr_steps == whole.qr_steps
    assert usage.choices == [] and usage.usage == whole.usage
    assert len({chunk.id for chunk in (*chunks, last, usage)}) == 1


def vicrop() -> Any:
    from qr_integrations.cropping.vicrop import ViCrop

    return ViCrop()


def test_many_at_once_answer_as_one(say: Any, server_url: str, small_box: Image.Image) -> None:
    questions = [QUESTION, DESCRIBE, "what shape is red", "is there a box"]
    alone = [say(asking(question, small_box)).choices[0].message.content for question in questions]

    async def together() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server_url}/v1", api_key="none", max_retries=0) as client:

            async def stream(question: str) -> str:
                messages: Any = asking(question, small_box)
                pieces: Any = await client.chat.completions.create(
                    model=MODEL, messages=messages, max_tokens=8, stream=True
                )
                return "".join([piece.choices[0].delta.content or "" async for piece in pieces])

            return await asyncio.gather(*map(stream, questions))

    assert asyncio.run(together()) == alone


# ---- what this server adds


def test_it_looks_again(say: Any, small_box: Image.Image) -> None:
    plain = say(asking(QUESTION, small_box))
    found = say(asking(QUESTION, small_box), extra_body={"crop": True, "heat_map": True})
    assert (plain.choices[0].message.content, found.choices[0].message.content) == ("white", "red")
    (look,) = found.qr_steps["crop"]
    left, top, right, bottom = look["box"]
    assert left <= 540 < right and top <= 380 < bottom  # the middle of the box
    (seen,) = found.qr_heat_maps
    rows, columns = len(seen["values"]), len(seen["values"][0])
    assert seen["image_size"] == [640, 480] and (rows, columns) == (10, 10)
    row, column = max(
        ((r, c) for r in range(rows) for c in range(columns)), key=lambda at: seen["values"][at[0]][at[1]]
    )
    x0, y0, x1, y1 = seen["covers"]
    x, y = x0 + (column + 0.5) * (x1 - x0) / columns, y0 + (row + 0.5) * (y1 - y0) / rows
    assert left <= x < right and top <= y < bottom
    assert seen["values"][row][column] == 1.0 and not hasattr(plain, "qr_heat_maps")


STEPS: list[tuple[dict[str, Any], str]] = [
    ({"crop": {"method": "gradient", "min_lift": 0.5}}, "vicrop"),
    ({"deco": True}, "deco"),
    ({"deco": {"alpha": 0.3, "layers": [5, 6]}}, "deco"),
    ({"prune": 20}, "cdpruner"),
    ({"prune": {"pruner": "SparseVLM", "keep": 0.5}}, "sparsevlm"),
    ({"crop": True, "prune": 0.5, "deco": True}, "vicrop+cdpruner+deco"),
]


@pytest.mark.parametrize(("steps", "method"), STEPS, ids=str)
def test_steps_are_those_of_the_model(
    say: Any, small_box: Image.Image, qr_mini_vl: Any, steps: dict[str, Any], method: str
) -> None:
    from qr_integrations.chatting import ChatSettings

    settings = ChatSettings(backend=qr_mini_vl, max_new_tokens=8, **steps)
    expected = settings.give_answer(user(small_box, DESCRIBE))
    found = say(asking(DESCRIBE, small_box), extra_body=steps)
    assert (found.choices[0].message.content, found.usage.prompt_tokens) == (
        expected.text,
        expected.usage.prompt_tokens,
    )
    told = settings.answer_metadata(expected)
    assert found.qr_method == method == told["qr_method"] and found.qr_params == told["qr_params"]
    assert found.qr_steps == told["qr_steps"]


def test_dropped_tokens_are_not_read(say: Any, small_box: Image.Image) -> None:
    whole, pruned = (say(asking(QUESTION, small_box), extra_body=more) for more in ({}, {"prune": 20}))
    assert whole.usage.prompt_tokens - pruned.usage.prompt_tokens == 80


# ---- how it is generated


def test_a_stop_text_ends_the_answer_and_does_not_belong_to_it(say: Any) -> None:
    text = say(STORY, model=TEXT_MODEL, max_tokens=20).choices[0].message.content
    stop = text[9:11]
    for given in (stop, ["never said", stop]):
        found = say(STORY, model=TEXT_MODEL, max_tokens=20, stop=given)
        assert found.choices[0].message.content == text[: text.index(stop)]
        assert found.choices[0].finish_reason == "stop"


def test_a_seed_repeats_what_chance_has_said(say: Any, qr_mini: Any) -> None:
    def sampled(seed: int) -> str:
        found = say(STORY, model=TEXT_MODEL, temperature=1.5, top_p=0.9, seed=seed)
        return str(found.choices[0].message.content)

    texts = [sampled(seed) for seed in (1, 1, 2, 3)]
    assert texts[0] == texts[1] and len(set(texts)) > 1
    expected = qr_mini.answer(user("who wrote dracula?"), max_new_tokens=8, temperature=1.5, top_p=0.9, seed=2)
    assert texts[2] == expected.text


def test_without_a_temperature_nothing_is_left_to_chance(say: Any) -> None:
    assert len({say(STORY, model=TEXT_MODEL).choices[0].message.content for _ in range(3)}) == 1


def test_the_longest_answer_has_two_names(say: Any) -> None:
    found = say(STORY, model=TEXT_MODEL, max_tokens=8, max_completion_tokens=3)
    assert (found.usage.completion_tokens, found.choices[0].finish_reason) == (3, "length")


def test_the_client_may_repeat_itself_less(say: Any, qr_mini: Any) -> None:
    plain, other = (
        say(STORY, model=TEXT_MODEL, extra_body=more).choices[0].message.content
        for more in ({}, {"repetition_penalty": 1.5, "top_k": 5})
    )
    assert other != plain
    assert other == qr_mini.answer(user("who wrote dracula?"), max_new_tokens=8, repetition_penalty=1.5).text


# ---- errors


def test_errors_are_the_clients_own(say: Any, small_box: Image.Image) -> None:
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4o' that answers: pass one of qr-mini") as unknown:
        say(STORY, model="gpt-4o")
    assert (unknown.value.code, unknown.value.type) == ("model_not_found", "invalid_request_error")
    with pytest.raises(openai.BadRequestError, match=r"more tokens than the 1,024 that .* send fewer") as too_long:
        say([{"role": "user", "content": "box " * 12_000}])
    assert too_long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match=r"messages\[0\]\.content\[0\]: 'qr-mini' reads text only"):
        say(asking(QUESTION, small_box), model=TEXT_MODEL)
    with pytest.raises(openai.BadRequestError, match="'crop' is about pictures, and 'qr-mini' reads text only"):
        say(STORY, model=TEXT_MODEL, extra_body={"crop": True})
    with pytest.raises(openai.BadRequestError, match="has more tokens than"):  # before the stream begins
        say([{"role": "user", "content": "box " * 12_000}], stream=True)


def test_a_stream_that_is_closed_frees_the_model_and_a_full_queue_says_so(serving: Serving, qr_mini: Any) -> None:
    from qr_integrations.serving import ServerSettings
    from qr_integrations.serving.engine import LocalEngine

    settings = ServerSettings(model="qr-mini", device="cpu", queue_size=1)
    engine = LocalEngine(settings)
    long: dict[str, Any] = {"model": TEXT_MODEL, "messages": STORY, "max_tokens": 1500, "stream": True}
    with serving(settings, engine) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client:
        running: Any = client.chat.completions.create(**long)
        assert "".join(next(running).choices[0].delta.content for _ in range(4))
        with ThreadedCall(lambda: client.chat.completions.create(**{**long, "max_tokens": 2})) as waiting:
            until(lambda: engine.stats()["queue_depth"]["qr-mini", "chat"] == 1)
            with pytest.raises(openai.RateLimitError, match="requests wait for 'qr-mini' already") as full:
                client.chat.completions.create(**{**long, "stream": False})
            assert int(full.value.response.headers["Retry-After"]) >= 1 and full.value.code == "overloaded"
            running.close()
            started = time.monotonic()
            pieces = list(waiting())
        assert time.monotonic() - started < 5 and pieces[-1].choices[0].finish_reason == "length"
        until(lambda: engine.stats()["running"]["qr-mini"] == 0)
        stats = engine.stats()
        assert (stats["cancelled"]["qr-mini", "chat"], stats["refused"]["qr-mini", "chat"]) == (1, 1)


class ThreadedCall:
    """``with ThreadedCall(call) as result: ... result()``: runs meanwhile."""

    def __init__(self, call: Any) -> None:
        from concurrent.futures import ThreadPoolExecutor

        self.pool, self.call = ThreadPoolExecutor(1), call

    def __enter__(self) -> Any:
        return self.pool.submit(self.call).result

    def __exit__(self, *_: Any) -> None:
        self.pool.shutdown()


# ---- upon it: LangChain


def test_langchain_by_base_url(server_url: str, small_box: Image.Image) -> None:
    pytest.importorskip("langchain_openai", exc_type=ImportError)
    from langchain_core.messages import HumanMessage
    from langchain_openai import ChatOpenAI
    from pydantic import SecretStr

    chat = ChatOpenAI(
        base_url=f"{server_url}/v1",
        api_key=SecretStr("none"),
        model=MODEL,
        max_completion_tokens=8,
        max_retries=0,
        extra_body={"crop": True},
    )
    content: list[Any] = [
        {"type": "image", "base64": uri_of(small_box).partition(",")[2], "mime_type": "image/png"},
        {"type": "text", "text": QUESTION},
    ]
    answer = chat.invoke([HumanMessage(content)])
    assert answer.text == "red" and answer.usage_metadata is not None
    assert answer.usage_metadata["input_tokens"] > 200 and answer.response_metadata["finish_reason"] == "stop"
    pieces = list(chat.stream([HumanMessage(content)]))
    assert "".join(piece.text for piece in pieces) == "red"
