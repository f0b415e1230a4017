"""Chats over HTTP as such: what is refused and how, which pictures are opened, and what a stream looks like.

The engine of most of these tests says again what it was told: no model is needed to refuse a request.
"""

import asyncio
import base64
import json
import re
import socket
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import Request
from PIL import Image
from pydantic import ValidationError

from tests.serving.talking import Serving, address_of, until

PATH = "/v1/chat/completions"
Post = Callable[..., httpx.Response]


def png(size: tuple[int, int] = (8, 6), colour: str = "red", kind: str = "PNG") -> bytes:
    file = BytesIO()
    Image.new("RGB", size, colour).save(file, kind)
    return file.getvalue()


def uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def shown(*urls: str) -> list[dict[str, Any]]:
    """A message with a text and pictures."""
    pictures = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [{"type": "text", "text": "look"}, *pictures]}]


@dataclass
class Repeating:
    """An engine that says what it was told, piece by piece, and keeps the work that came.

    Attributes:
        pieces: said in place of what it was told; an exception among them is raised.
        endless: goes on until it is called off.
    """

    state: str = "ready"
    pieces: Sequence[str | Exception] | None = None
    endless: bool = False
    metadata: dict[str, Any] = field(default_factory=lambda: {"qr_method": "plain"})
    works: list[Any] = field(default_factory=list)
    closed: threading.Event = field(default_factory=threading.Event)

    async def models(self) -> tuple[Any, ...]:
        from qr_integrations.serving.work import ModelCard

        if self.state != "ready":
            return ()
        names = {"text": False, "vision": True}
        return (
            *(ModelCard(name, False, True, sees, 100) for name, sees in names.items()),
            ModelCard("ranker", True, False, False),
        )

    async def chat(self, work: Any) -> Any:
        return [piece async for piece in self.stream(work)][-1]

    async def stream(self, work: Any) -> AsyncIterator[Any]:
        from qr_integrations.serving.work import Said
        from qr_integrations.types import Usage

        self.works.append(work)
        told = work.messages[-1].text.split(" ") if self.pieces is None else self.pieces
        try:
            for piece in told:
                if isinstance(piece, Exception):
                    raise piece
                yield piece
            while self.endless:
                await asyncio.sleep(0.01)
                yield "more"
            yield Said("".join(map(str, told)), "stop", Usage(3, 4), self.metadata)
        finally:
            self.closed.set()

    async def rank(self, work: Any) -> Any:
        raise NotImplementedError

    async def start(self) -> None:
        """Nothing is loaded."""

    async def stop(self, grace: float) -> None:
        """Nothing is left."""


@pytest.fixture(scope="module")
def serve(serving: Serving) -> Iterator[Callable[..., Post]]:
    """Starts a server for an engine, with other settings where given; gives what posts a chat to it."""
    with ExitStack() as running:

        def start(engine: Any, **given: Any) -> Post:
            from qr_integrations.serving import ServerSettings

            url = running.enter_context(serving(ServerSettings(model="text", **given), engine, wait=False))
            client = running.enter_context(httpx.Client(base_url=url, timeout=60))

            def post(messages: Any = None, **given: Any) -> httpx.Response:
                said = [{"role": "user", "content": "who goes there"}] if messages is None else messages
                body = json.dumps({"model": "vision", "messages": said, **given})
                return client.post(PATH, content=body, headers={"Content-Type": "application/json"})

            return post

        yield start


@pytest.fixture(scope="module")
def engine() -> Repeating:
    """With the model's libraries loaded, which the first request with a step would wait for."""
    from qr_integrations import cropping, decoding, encoding, pruning

    assert all((cropping, decoding, encoding, pruning))
    return Repeating()


@pytest.fixture(scope="module")
def post(serve: Callable[..., Post], engine: Repeating) -> Post:
    """Posts a chat to a server that takes little."""
    return serve(
        engine,
        max_new_tokens=100,
        max_pictures=3,
        max_picture_bytes=10_000,
        max_picture_pixels=1000,
        max_body_bytes=10**6,
    )


def complaint(answer: httpx.Response, status: int = 400) -> str:
    """The message of an error, in OpenAI's shape."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return str(error["message"])


# ---- what is asked for


def test_settings_reach_the_engine(post: Post, engine: Repeating) -> None:
    given = {"temperature": 0.5, "top_p": 0.9, "top_k": 3, "repetition_penalty": 1.2, "seed": 7}
    answer = post(**given, max_tokens=9, stop="end", crop={"layers": [3]}, prune=0.5, deco=False, heat_map=True)
    assert answer.status_code == 200
    work = engine.works[-1]
    assert work.model == "vision" and work.heat_maps
    assert work.settings == {**given, "max_new_tokens": 9, "stop": ["end"], "crop": {"layers": [3]}, "prune": 0.5}
    assert post().status_code == 200 and engine.works[-1].settings == {} and not engine.works[-1].heat_maps


def test_what_asks_for_nothing_is_taken(post: Post) -> None:
    from qr_integrations.serving.openai_shapes import IGNORED, NEUTRAL

    for name in IGNORED:
        assert post(**{name: {"any": "thing"}}).status_code == 200
    for name, values in NEUTRAL.items():
        for value in (None, *values):
            assert post(**{name: value}).status_code == 200, (name, value)
    unset = ("max_tokens", "temperature", "top_p", "stop", "seed", "stream", "stream_options", "crop", "deco", "prune")
    assert post(**dict.fromkeys(unset)).status_code == 200


def test_every_parameter_of_openais_client_is_known() -> None:
    from openai.types.chat.completion_create_params import CompletionCreateParamsBase

    from qr_integrations.serving.openai_shapes import IGNORED, NEUTRAL, ChatRequest

    known = {*ChatRequest.model_fields, *IGNORED, *NEUTRAL}
    assert set(CompletionCreateParamsBase.__annotations__) <= known


TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"tools": [TOOL]}, r"'tools' is not supported here other than as \[\]: leave it out"),
    ({"response_format": {"type": "json_object"}}, "'response_format' is not supported"),
    ({"logprobs": True}, "'logprobs' is not supported here other than as false"),
    ({"n": 2}, "'n' is not supported here other than as 1"),
    ({"n": True}, "'n' is not supported"),
    ({"presence_penalty": 0.1}, "'presence_penalty'"),
    ({"audio": {}}, "'audio' is not supported here other than as null"),
    ({"crops": True}, "'crops' is no parameter"),
    ({"max_tokens": 101}, "max_tokens=101 is more than this server gives: pass 100 or less"),
    ({"max_completion_tokens": 101, "max_tokens": 5}, "max_completion_tokens=101 .* pass 100 or less"),
    ({"max_completion_tokens": 5, "max_tokens": 101}, "max_tokens=101 .* pass 100 or less"),
    ({"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1"),
    ({"temperature": 2.1}, "temperature: Input should be less"),
    ({"temperature": "1"}, "temperature: Input should be a valid number"),
    ({"temperature": 10**400}, "temperature: Input should be a valid number"),
    ({"top_p": 0}, "top_p: Input should be greater than 0"),
    ({"seed": -1}, "seed: "),
    ({"stream": "yes"}, "stream: Input should be a valid boolean"),
    ({"stop": ["a"] * 5}, "stop: List should have at most 4 items"),
    ({"stop": ["a", ""]}, r"stop\[1\]: String should have at least 1 character"),
    ({"heat_map": 1}, "heat_map: "),
    ({"crop": "gradient"}, "crop='gradient' is no ViCrop"),
    ({"crop": {"methods": 1}}, "ViCrop has no setting 'methods'"),
    ({"crop": {"method": "random"}}, "crop: unknown method 'random'"),
    ({"deco": {"layers": ["a"]}}, r"deco: layers=\('a',\) cannot be"),
    ({"deco": {"alpha": 10**400}}, "alpha"),
    ({"prune": True}, "prune=True does not say how many"),
    ({"prune": {"pruner": "Any"}}, "there is no pruner 'Any'"),
    ({"prune": 0}, "prune: keep=0 cannot be"),
    ({"num_visual_tokens": 0}, "num_visual_tokens=0 is no number"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=str)
def test_what_cannot_be_is_refused_by_name(unchecked: None, post: Post, given: dict[str, Any], message: str) -> None:
    assert re.search(message, told := complaint(post(**given))), told


@pytest.mark.parametrize(
    "steps",
    [
        {"crop": {"high_resolution": "no"}},
        {"crop": {"instruction": 5}},
        {"crop": {"layers": ["a"]}},
        {"crop": {"base": 10**400}},
        {"deco": {"alpha": "0.5"}},
        {"deco": {"alpha": 10**400}},
        {"deco": {"layers": [[5]]}},
        {"deco": {"skip_confident": 1}},
        {"prune": {"keep": [1]}},
        {"prune": {"pruner": "SparseVLM", "heads": "a"}},
        {"prune": {"pruner": "SparseVLM", "layers": 3}},
        {"prune": {"pruner": {}}},
        {"num_visual_tokens": {"budget": "TimeBudget", "seconds": {}}},
        {"num_visual_tokens": [4]},
    ],
    ids=str,
)
def test_settings_of_wrong_types_are_refused_without_type_checks_too(
    unchecked: None, post: Post, steps: dict[str, Any]
) -> None:
    assert complaint(post(**steps)).strip()


@pytest.mark.parametrize(
    ("steps", "told"),
    [
        ({"crop": {"generic": "a" * 4001}}, "crop: more than 4,000 characters in all steps: shorten the texts"),
        ({"crop": {"generic": "a" * 2000, "instruction": "a" * 2001}}, "crop: more than 4,000 characters"),
        ({"crop": {"a" * 4001: 1}}, "crop: more than 4,000 characters"),
        ({"crop": "a" * 4001}, "crop: more than 4,000 characters"),
        ({"prune": {"pruner": "SparseVLM", "layers": list(range(257))}}, "prune: more than 256 values in all steps"),
        ({"deco": {"layers": list(range(150))}, "crop": {"layers": list(range(150))}}, "more than 256 values"),
        ({"deco": {"layers": [[list(range(257))]]}}, "deco: more than 256 values"),
        ({"crop": {"generic": "\ud800"}}, "crop: a text holds half a character: send both halves, or none"),
        ({"crop": {"\udfff": 1}}, "crop: a text holds half a character"),
        ({"prune": {"pruner": "\ud800"}}, "prune: a text holds half a character"),
        ({"deco": {"layers": ["\ud800"]}}, "deco: a text holds half a character"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_steps_hold_little_and_whole_characters(post: Post, steps: dict[str, Any], told: str) -> None:
    message = complaint(post(**steps))
    assert told in message and len(message) < 300


def test_steps_may_hold_some_text_and_lists(post: Post, engine: Repeating) -> None:
    crop = {"generic": "a" * 2000, "instruction": "é" * 1900, "layers": list(range(100))}
    assert post(crop=crop, deco={"layers": list(range(1, 101))}).status_code == 200
    assert engine.works[-1].settings["crop"] == crop


def test_no_model_is_loaded_for_a_request(post: Post, tmp_path: Path) -> None:
    for given in ({"relevance": "clip"}, {}):
        prune = {"pruner": "CDPruner", "keep": 4, "text_encoder": str(tmp_path), **given}
        assert "leave out 'text_encoder'" in complaint(post(prune=prune))


# ---- models


def test_only_models_that_answer_are_there(post: Post) -> None:
    for name in ("ranker", "gpt-4o", "\x00", "x" * 10_000):
        answer = post(model=name)
        told = complaint(answer, 404)
        assert "pass one of text, vision" in told and len(told) < 500
        assert answer.json()["error"]["code"] == "model_not_found"


def test_a_model_of_texts_gets_neither_pictures_nor_their_steps(post: Post) -> None:
    assert complaint(post(shown(uri(png())), model="text")).startswith("messages[0].content[1]: 'text' reads text only")
    for name, value in {"crop": True, "prune": 4, "num_visual_tokens": 4}.items():
        assert f"'{name}' is about pictures" in complaint(post(model="text", **{name: value}))
    assert post(model="text", deco=True, crop=False).status_code == 200


@pytest.mark.parametrize("state", ["loading", "draining"])
def test_before_models_are_there_it_is_not_the_clients_fault(serve: Callable[..., Post], state: str) -> None:
    answer = serve(Repeating(state=state))()
    assert state in complaint(answer, 503) and int(answer.headers["Retry-After"]) > 0


# ---- messages


def test_all_that_may_be_said(post: Post, engine: Repeating) -> None:
    from qr_integrations.types import Message

    said = [
        {"role": "developer", "content": "be brief", "name": "boss"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, *shown(uri(png()))[0]["content"]]},
        {"role": "assistant", "content": "b", "refusal": None, "tool_calls": None, "audio": None, "annotations": []},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "system", "content": [{"type": "text", "text": "c"}]},
        {"role": "user", "content": "d"},
    ]
    assert post(said).status_code == 200
    first, seen, *others = engine.works[-1].messages
    assert first == Message.system("be brief")
    assert others == [Message.assistant("b"), Message.assistant(""), Message.system("c"), Message.user("d")]
    assert seen.content[:2] == ("a", "look")
    assert (seen.content[2].size, seen.content[2].getpixel((0, 0))) == ((8, 6), (255, 0, 0))


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ([], "messages: List should have at least 1 item"),
        ([{"role": "tool", "content": "x", "tool_call_id": "1"}], "messages[0]: its 'role' should be one of 'user'"),
        ([{"role": "user"}], "messages[0].content: Field required"),
        ([{"role": "user", "content": 5}], "messages[0].content: should be a text, or a list of parts"),
        ([{"role": "user", "content": None}], "messages[0].content: should be"),
        (
            [{"role": "user", "content": ["a"]}],
            "messages[0].content[0]: its 'type' should be one of 'text', 'image_url'",
        ),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], "messages[0].content[0]: its 'type'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text: Field required"),
        ([{"role": "user", "content": "half \ud800"}], "messages[0].content: Input should be a valid string"),
        ([{"role": "assistant", "tool_calls": [{"id": "1"}]}], "messages[0].tool_calls: List should have at most 0"),
        (
            [{"role": "system", "content": shown("data:,")[0]["content"][1:]}],
            "messages[0].content[0].type: Input should be 'text'",
        ),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
            "messages[0].content[0].image_url: ",
        ),
    ],
    ids=str,
)
def test_errors_name_the_message_and_the_part(post: Post, messages: Any, told: str) -> None:
    assert complaint(post(messages)).startswith(told)


def test_what_cannot_fit_is_not_read(post: Post, engine: Repeating) -> None:
    before = len(engine.works)
    parts = [{"type": "text", "text": "a" * 5_000}] * 4
    assert post([{"role": "user", "content": parts}]).status_code == 200
    answer = post([{"role": "user", "content": [*parts, {"type": "text", "text": "a"}]}])
    assert "20,001 characters, 'vision' holds 100 tokens" in complaint(answer)
    assert answer.json()["error"]["code"] == "context_length_exceeded" and len(engine.works) == before + 1


@pytest.mark.parametrize(
    "given",
    [
        {"messages": [1] * 1000},
        *({"messages": [{"role": role, "content": [1] * 1000}]} for role in ("user", "system", "assistant")),
        {"messages": [{"role": "user", "content": "a"}], "stop": [1] * 1000},
    ],
    ids=lambda given: str(given)[:60],
)
def test_one_mistake_is_enough(given: dict[str, Any]) -> None:
    from qr_integrations.serving.openai_shapes import ChatRequest

    with pytest.raises(ValidationError) as caught:
        ChatRequest.model_validate({"model": "vision", **given})
    assert caught.value.error_count() == 1


def test_all_messages_together_have_so_many_parts() -> None:
    from qr_integrations.serving.openai_shapes import ChatRequest

    parts = [{"type": "text", "text": ""}] * 2048
    turn = {"role": "user", "content": parts}
    assert ChatRequest.model_validate({"model": "vision", "messages": [turn] * 2})
    with pytest.raises(ValidationError, match=r"messages\n +should have at most 4096 parts together"):
        ChatRequest.model_validate({"model": "vision", "messages": [turn, turn, {**turn, "content": parts[:1]}]})


def test_what_is_no_request_is_refused(post: Post) -> None:
    assert complaint(post("who")).startswith("messages: ")
    assert complaint(post(model=None)).startswith("model: ")


# ---- pictures


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("/etc/hostname", "'/etc/hostname' is no address of a picture: send the picture itself"),
        ("etc/hostname", "is no address"),
        ("C:\\pictures\\it.png", "is no address"),
        ("file:///etc/hostname", "is no address"),
        ("FILE:/etc/hostname", "is no address"),
        ("ftp://host/it.png", "is no address"),
        (" \n" * 50 + "file:///etc/hostname", "is no address"),
        ("http://127.0.0.1/it.png", "this server fetches no pictures: send the picture itself, as data:"),
        ("https://example.org/it.png?key=secret", "'https://example.org/it.png' is not fetched"),
        ("a" * 500_000, "is no address"),
        ("data:image/png;base64,!!!", "is no base64"),
        ("data:image/png;base64", "has no data"),
        ("data:text/plain,hello", "is broken, or in none of the formats"),
        (uri(png()[:45]), "is cut short or broken"),
        (uri(png((40, 26))), "has 40 x 26 pixels, 1 to 1000 are allowed"),
        (uri(bytes(10_001)), "has more than 10000 bytes"),
    ],
    ids=lambda value: value[:40],
)
def test_pictures_that_are_not_opened(post: Post, url: str, told: str) -> None:
    message = complaint(post(shown(url)))
    assert message.startswith("messages[0].content[1]: ") and told in message and len(message) < 700
    assert "secret" not in message


def test_what_cannot_be_opened_is_no_stream(post: Post) -> None:
    answer = post(shown(uri(png()[:45])), stream=True)
    assert "is cut short or broken" in complaint(answer) and answer.headers["Content-Type"] == "application/json"


def test_no_more_pictures_than_the_server_takes(post: Post) -> None:
    assert post(shown(*[uri(png())] * 3)).status_code == 200
    one = shown(uri(png()), uri(png()))
    assert "4 pictures are more than this server takes: send 3 or fewer" in complaint(post(one + one), 413)


def test_all_pictures_together_have_no_more_pixels_than_one(post: Post) -> None:
    most = uri(png((40, 25)))
    assert post(shown(most)).status_code == 200
    half = uri(png((20, 25)))
    assert post(shown(half, half)).status_code == 200
    told = complaint(post([*shown(half, half), *shown(uri(png()))]))
    assert told.startswith("messages[1].content[1]: ") and "all pictures together may have 1,000 pixels" in told
    assert "messages[0].content[2]: " in complaint(post(shown(uri(png()), most)))


def test_two_pictures_are_opened_at_once_for_all_who_ask(
    post: Post, engine: Repeating, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qr_integrations.serving import openai_messages

    real, lock, running, most = openai_messages.open_picture, threading.Lock(), 0, 0

    def slow(*args: Any, **kwargs: Any) -> Any:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.05)
        with lock:
            running -= 1
        return real(*args, **kwargs)

    monkeypatch.setattr(openai_messages, "open_picture", slow)
    done: list[int] = []
    threads = [threading.Thread(target=lambda: done.append(post(shown(uri(png()))).status_code)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done == [200] * 6 and most == 2


def test_formats_that_openai_takes_are_opened(post: Post) -> None:
    for kind in ("PNG", "JPEG", "WEBP", "GIF"):
        assert post(shown(uri(png(kind=kind)))).status_code == 200
    for kind in ("BMP", "TIFF", "PPM"):
        told = complaint(post(shown(uri(png(kind=kind)))))
        assert "in none of the formats PNG, JPEG, WEBP, GIF: convert it to PNG or JPEG" in told


def test_pixels_for_which_there_is_no_room_are_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    from qr_integrations.serving import ServerSettings, openai_messages
    from qr_integrations.serving.openai_shapes import ChatRequest
    from qr_integrations.serving.refusals import Overloaded
    from qr_integrations.serving.work import ModelCard

    real, decoded = openai_messages.open_picture, list[tuple[int, int]]()

    def decode(source: Any, **kwargs: Any) -> Any:
        decoded.append(source.size)
        return real(source, **kwargs)

    monkeypatch.setattr(openai_messages, "open_picture", decode)
    reader = openai_messages.ChatReader(ServerSettings(model="text", max_picture_pixels=1000))
    card = ModelCard("vision", False, True, True)
    large, small = (
        ChatRequest.model_validate({"model": "vision", "messages": shown(uri(png(size)))})
        for size in [(40, 25), (1, 1)]
    )

    async def ask() -> None:
        async with AsyncExitStack() as held:
            for _ in range(4):
                await held.enter_async_context(reader.reading(large, card))
            with pytest.raises(Overloaded, match="other requests hold 4,000 pixels of pictures"):
                await held.enter_async_context(reader.reading(small, card))
        assert reader.room.taken == 0
        async with reader.reading(small, card) as work:
            assert work.messages[0].pictures[0].size == (1, 1) and reader.room.taken == 1

    asyncio.run(ask())
    assert decoded == [(40, 25)] * 4 + [(1, 1)]


@pytest.fixture
def picture_server() -> Iterator[Callable[[Callable[[Any], None]], int]]:
    """Starts a server on this machine that answers every request so; gives its port."""
    started: list[tuple[ThreadingHTTPServer, threading.Thread]] = []

    def start(answer: Callable[[Any], None]) -> int:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                answer(self)

            def log_message(self, *args: Any) -> None:
                """Nothing to say."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        started.append((server, threading.Thread(target=server.serve_forever, args=(0.01,))))
        started[-1][1].start()
        return int(server.server_address[1])

    yield start
    for server, thread in started:
        server.shutdown()
        thread.join()
        server.server_close()


def respond(request: BaseHTTPRequestHandler, body: bytes, status: int = 200, **headers: str) -> None:
    request.send_response(status)
    for name, value in headers.items():
        request.send_header(name, value)
    request.end_headers()
    request.wfile.write(body)


def test_addresses_are_fetched_from_the_public_internet_only(
    serve: Callable[..., Post],
    picture_server: Callable[[Callable[[Any], None]], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from qr_integrations.images import PictureFetcher
    from qr_integrations.serving import openai_messages

    asked: list[str] = []

    def answer(request: Any) -> None:
        asked.append(request.path)
        if request.path == "/away":
            return respond(request, b"", 302, Location="http://10.0.0.1/it.png")
        return respond(request, png())

    engine = Repeating()
    fetching, port = serve(engine, allow_urls=True), picture_server(answer)
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", f"[::1]:{port}"):
        told = complaint(fetching(shown(f"http://{host}/it.png")))
        assert told.startswith("messages[0].content[1]: the host") and "is not on the public internet" in told
    assert not asked
    permitted = partial(PictureFetcher, permits=lambda address: address == "127.0.0.1", resolve=lambda host, _: [host])
    monkeypatch.setattr(openai_messages, "PictureFetcher", permitted)
    assert "is not on the public internet" in complaint(fetching(shown(f"http://127.0.0.1:{port}/away")))
    assert asked == ["/away"]
    assert fetching(shown(f"http://127.0.0.1:{port}/it.png")).status_code == 200
    assert engine.works[-1].messages[0].content[1].size == (8, 6)
    assert "file:///etc/hostname" in complaint(fetching(shown("file:///etc/hostname")))


# ---- streams


def events(answer: httpx.Response) -> list[Any]:
    """The data of each event; the last may be the word that ends a stream."""
    *found, rest = answer.text.split("\n\n")
    assert rest == "" and all(event.startswith("data: ") and "\n" not in event for event in found)
    return [event[6:] if event == "data: [DONE]" else json.loads(event[6:]) for event in found]


def test_a_stream_is_what_openais_is(post: Post) -> None:
    answer = post(stream=True)
    assert answer.status_code == 200 and answer.headers["Content-Type"].startswith("text/event-stream")
    assert (answer.headers["Cache-Control"], answer.headers["X-Accel-Buffering"]) == ("no-cache", "no")
    *chunks, done = events(answer)
    assert done == "[DONE]"
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas == [
        {"role": "assistant", "content": ""},
        *({"content": word} for word in ("who", "goes", "there")),
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 4 + ["stop"]
    assert all("usage" not in chunk for chunk in chunks)
    assert {(chunk["object"], chunk["model"]) for chunk in chunks} == {("chat.completion.chunk", "vision")}


def test_the_usage_comes_at_the_end_if_it_is_asked_for(post: Post) -> None:
    *chunks, usage, done = events(
        post(stream=True, stream_options={"include_usage": True, "include_obfuscation": False})
    )
    assert done == "[DONE]" and all(chunk["usage"] is None for chunk in chunks)
    assert usage["choices"] == [] and usage["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}


@pytest.mark.parametrize("fate", ["never sent", "sent", "broken off"])
def test_a_stream_holds_pixels_while_it_is_sent_and_no_longer(monkeypatch: pytest.MonkeyPatch, fate: str) -> None:
    from qr_integrations.serving import ServerSettings, chat_api
    from qr_integrations.serving.openai_shapes import ChatRequest

    real, readers, held = chat_api.ChatReader, list[Any](), list[int]()

    def reader_of(settings: Any) -> Any:
        readers.append(real(settings))
        return readers[-1]

    monkeypatch.setattr(chat_api, "ChatReader", reader_of)
    (route,) = chat_api.chat_routes(Repeating(), ServerSettings(model="text")).routes
    sent = ChatRequest.model_validate({"model": "vision", "messages": shown(uri(png())), "stream": True})

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        held.append(readers[0].room.taken)
        if fate == "broken off":
            raise OSError

    async def ask() -> Any:
        response = await route.endpoint(Request({"type": "http"}, receive), sent)  # type: ignore[attr-defined]
        if fate != "never sent":
            with suppress(OSError):
                await response({"type": "http"}, receive, send)
        return response  # which may be kept for long, as in the traceback of an error

    response = asyncio.run(ask())
    assert response and readers[0].room.taken == 0 and held[:1] == ([] if fate == "never sent" else [8 * 6])


def test_an_answer_without_text_is_an_answer(serve: Callable[..., Post]) -> None:
    post = serve(Repeating(pieces=["", ""]))
    first, last, _ = events(post(stream=True))
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert last["choices"][0]["finish_reason"] == "stop"
    assert post().json()["choices"][0]["message"]["content"] == ""


def refusals() -> list[tuple[Exception, int]]:
    from qr_integrations import errors
    from qr_integrations.serving import refusals

    return [
        (errors.WindowError("too long"), 400),
        (errors.InputError("bad"), 400),
        (errors.MemoryLimitError("too large"), 413),
        (refusals.Overloaded("full", retry_after=2.5), 429),
        (refusals.WorkerLost("gone"), 503),
        (refusals.OutOfTime("late"), 504),
        (KeyError("secret"), 500),
    ]


def test_an_error_before_the_first_piece_is_an_answer_of_its_own(serve: Callable[..., Post]) -> None:
    engine = Repeating()
    post = serve(engine)
    for error, status in refusals():
        engine.pieces = [error]
        for stream in (False, True):
            answer = post(stream=stream)
            told = complaint(answer, status)
            assert "secret" not in told and (status == 500 or told == str(error))
            assert answer.headers.get("Retry-After") == ("3" if status == 429 else None)


def test_an_error_after_the_first_piece_is_the_last_event(serve: Callable[..., Post]) -> None:
    engine = Repeating()
    post = serve(engine)
    for error, status in refusals():
        engine.pieces = ["once", error]
        answer = post(stream=True)
        role, chunk, last = events(answer)
        assert answer.status_code == 200 and role["choices"][0]["delta"]["role"] == "assistant"
        assert chunk["choices"][0]["delta"]["content"] == "once"
        assert set(last["error"]) == {"message", "type", "param", "code"}
        assert "secret" not in last["error"]["message"] and (status == 500) == (
            last["error"]["code"] == "internal_error"
        )


@pytest.mark.parametrize("pieces", [["once"], []], ids=["in the middle", "before the first piece"])
def test_a_client_that_goes_away_ends_the_work(serving: Serving, pieces: list[str]) -> None:
    from qr_integrations.serving import ServerSettings

    class Silent(Repeating):
        async def stream(self, work: Any) -> AsyncGenerator[Any, None]:
            try:
                for piece in pieces:
                    yield piece
                self.works.append(work)
                await asyncio.sleep(60)
            finally:
                self.closed.set()

    engine = Silent()
    with serving(ServerSettings(model="text"), engine, wait=False) as url:
        for number, stream in enumerate((True, False)):
            body = json.dumps(
                {"model": "text", "messages": [{"role": "user", "content": "a"}], "stream": stream}
            ).encode()
            head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            with socket.create_connection(address_of(url)) as connection:
                connection.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
                until(lambda seen=number: len(engine.works) > seen)
                assert not engine.closed.is_set()
            assert engine.closed.wait(10)
            engine.closed.clear()


# ---- what is told


def test_what_openai_tells_comes_first(post: Post) -> None:
    openais = ["id", "object", "created", "model", "choices", "usage"]
    assert list(post().json())[:6] == openais
    *_, last, usage, done = events(post(stream=True, stream_options={"include_usage": True}))
    assert done == "[DONE]" and list(last)[:6] == list(usage) == openais


def test_what_is_no_number_is_null(serve: Callable[..., Post]) -> None:
    told = {
        "qr_method": "vicrop",
        "qr_steps": {"crop": [{"lift": float("nan")}]},
        "qr_params": {},
        "model_name": "/srv/it",
    }
    post = serve(Repeating(metadata=told))
    found = post().json()
    assert found["qr_steps"] == {"crop": [{"lift": None}]} and "/srv" not in json.dumps(found)
    assert events(post(stream=True))[-2]["qr_steps"] == {"crop": [{"lift": None}]}


def test_the_schema_says_what_is_taken(serve: Callable[..., Post]) -> None:
    from qr_integrations.serving import ServerSettings
    from qr_integrations.serving.app import create_app

    schema = create_app(ServerSettings(model="text"), Repeating()).openapi()
    responses = schema["paths"][PATH]["post"]["responses"]
    assert {"200", "400", "401", "404", "413", "429", "503", "504", "default"} == set(responses)
    assert set(responses["200"]["content"]) == {"application/json", "text/event-stream"}
    request = schema["components"]["schemas"]["ChatRequest"]
    assert request["additionalProperties"] is False and request["required"] == ["model", "messages"]
    assert request["properties"]["n"]["enum"] == [None, 1]


def test_importing_the_routes_loads_no_model_library(in_fresh_python: Callable[[str], str]) -> None:
    code = "import sys; import qr_integrations.serving.chat_api; print('torch' in sys.modules, 'ray' in sys.modules)"
    assert in_fresh_python(code) == "False False"
