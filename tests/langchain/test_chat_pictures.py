"""Every form in which a picture may stand in a message, and what is said about those that cannot be read."""

import base64
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from langchain_core.caches import BaseCache
from langchain_core.messages import AIMessage, BaseMessage, ChatMessage, HumanMessage, SystemMessage, ToolMessage
from PIL import Image

QUESTION = {"type": "text", "text": "what color is the box ?"}


def drawn(colour: tuple[int, int, int] = (200, 0, 0)) -> Image.Image:
    """A square, far from the middle."""
    picture = Image.new("RGB", (320, 240), "white")
    picture.paste(colour, (200, 100, 280, 180))
    return picture


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


BYTES = png(drawn())
BASE64 = base64.b64encode(BYTES).decode()
URI = f"data:image/png;base64,{BASE64}"
FORMS: dict[str, dict[str, Any]] = {
    "base64": {"type": "image", "base64": BASE64, "mime_type": "image/png"},
    "base64 without a type": {"type": "image", "base64": BASE64},
    "base64 that is a URI": {"type": "image", "base64": URI, "mime_type": "image/png"},
    "url": {"type": "image", "url": URI},
    "v0 base64": {"type": "image", "source_type": "base64", "data": BASE64, "mime_type": "image/png"},
    "v0 base64 without a type": {"type": "image", "source_type": "base64", "data": BASE64},
    "v0 url": {"type": "image", "source_type": "url", "url": URI},
    "OpenAI": {"type": "image_url", "image_url": {"url": URI, "detail": "low"}},
    "OpenAI, a string": {"type": "image_url", "image_url": URI},
    "Anthropic": {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": BASE64}},
    "Bedrock": {"image": {"format": "png", "source": {"bytes": BYTES}}},
    "a Pillow picture": {"type": "image", "image": drawn()},
    "a Pillow picture without a type": {"image": drawn()},
    "a URI as image": {"type": "image", "image": URI},
}


@pytest.fixture(scope="module")
def chat(qr_mini_vl: Any) -> Any:
    from qr_integrations.langchain import ChatViCrop

    return ChatViCrop(backend=qr_mini_vl, max_tokens=4)


@pytest.fixture(scope="module")
def expected(qr_mini_vl: Any) -> Any:
    """The answer by the model itself, which saw the same picture."""
    from qr_integrations.cropping.vicrop import ViCrop
    from qr_integrations.types import Message

    return qr_mini_vl.answer([Message.user(drawn(), QUESTION["text"])], crop=ViCrop(), max_new_tokens=4)


def box_of(message: AIMessage) -> list[int]:
    box: list[int] = message.response_metadata["qr_steps"]["crop"][0]["box"]
    return box


# ---- forms


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_all_forms_show_the_same_picture(chat: Any, expected: Any, form: dict[str, Any]) -> None:
    (look,) = expected.steps["crop"]
    answer = chat.invoke([HumanMessage([form, QUESTION])])
    assert (answer.text, box_of(answer)) == (expected.text, list(look.box.as_tuple()))
    (*_, last) = chat.stream([HumanMessage([form, QUESTION])])
    assert box_of(last) == box_of(answer)


def test_a_picture_may_be_a_file_if_that_is_allowed(qr_mini_vl: Any, expected: Any, tmp_path: Path) -> None:
    from qr_integrations.langchain import ChatViCrop

    (tmp_path / "a.png").write_bytes(BYTES)
    chat = ChatViCrop(backend=qr_mini_vl, max_tokens=4, allow_local_files=True)
    path = tmp_path / "a.png"
    for form in ({"path": str(path)}, {"image": str(path)}, {"image": path}):
        answer = chat.invoke([HumanMessage([{"type": "image", **form}, QUESTION])])
        assert box_of(answer) == list(expected.steps["crop"][0].box.as_tuple())


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"type": "image", "file_id": "f1"}, "a file_id names a picture on another's server: pass the picture itself"),
        ({"type": "image", "source_type": "id", "id": "f1"}, "a file_id names a picture"),
        ({"type": "image", "url": "https://example.com/a.png"}, "as allow_urls is off"),
        ({"type": "image_url", "image_url": "https://example.com/a.png?key=secret"}, "a.png' is not fetched"),
        ({"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}, "as allow_urls is off"),
        ({"type": "image", "url": "file:///etc/passwd"}, "only data:, http: and https: are"),
        ({"type": "image", "path": "/etc/passwd"}, "as allow_local_files is off"),
        ({"type": "image", "image": "a.png"}, "as allow_local_files is off"),
        ({"type": "image"}, "an image without a picture: pass"),
        ({"type": "image", "base64": "?"}, "is no base64"),
        ({"type": "image", "base64": base64.b64encode(b"a text").decode()}, "is broken, or in none of the formats"),
        ({"type": "image", "base64": base64.b64encode(BYTES[:-40]).decode()}, "is cut short or broken"),
        ({"type": "image", "image": 3}, "is no picture"),
        ({"type": "audio", "base64": "UklG", "mime_type": "audio/wav"}, "a block of type 'audio' is not read: pass"),
        ({"type": "input_audio", "input_audio": {"data": "UklG", "format": "wav"}}, "type 'audio'"),
        ({"type": "video", "url": "https://example.com/a.mp4"}, "type 'video'"),
        ({"type": "file", "file": {"file_id": "f1"}}, "type 'file'"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_read_is_an_error_that_says_where(chat: Any, block: dict[str, Any], message: str) -> None:
    from qr_integrations.errors import InputError

    said = [SystemMessage("a"), HumanMessage([QUESTION, block])]
    for ask in (chat.invoke, lambda messages: list(chat.stream(messages)), chat.get_num_tokens_from_messages):
        with pytest.raises(InputError, match=rf"^messages\[1\]\.content\[1\]: .*{message}"):
            ask(said)


# ---- conversations


def read(chat: Any, *messages: BaseMessage) -> list[tuple[str, list[Any]]]:
    """What the model is told: roles and texts, for a picture its size."""
    return [
        (message.role, [part if isinstance(part, str) else part.size for part in message.content])
        for message in chat._read(messages)
    ]


def test_a_conversation_keeps_its_turns_and_its_pictures(chat: Any) -> None:
    first, second = drawn(), drawn().crop((0, 0, 50, 40))
    assert read(
        chat,
        SystemMessage("be brief"),
        HumanMessage([{"type": "image", "image": first}, "what color ?", {"image": second}]),
        AIMessage("red"),
        HumanMessage([{"type": "image", "image": second}, QUESTION]),
    ) == [
        ("system", ["be brief"]),
        ("user", [(320, 240), "what color ?", (50, 40)]),
        ("assistant", ["red"]),
        ("user", [(50, 40), QUESTION["text"]]),
    ]


def test_the_pictures_of_a_tool_are_seen(chat: Any) -> None:
    call = {"name": "camera", "args": {"zoom": 2}, "id": "1", "type": "tool_call"}
    messages = [
        HumanMessage("what color is the box ?"),
        AIMessage("", tool_calls=[call]),
        ToolMessage([FORMS["OpenAI"], FORMS["base64"], {"type": "text", "text": "taken"}], tool_call_id="1"),
    ]
    assert read(chat, *messages)[1:] == [
        ("assistant", ['{"name": "camera", "arguments": {"zoom": 2}}']),
        ("user", [(320, 240), (320, 240), "taken"]),
    ]
    assert len(chat.invoke(messages).response_metadata["qr_steps"]["crop"]) == 2


def test_what_another_model_thought_is_left_out(chat: Any) -> None:
    thought = AIMessage([{"type": "thinking", "thinking": "hm", "signature": "s"}, {"type": "text", "text": "red"}])
    called = AIMessage(
        [{"type": "reasoning", "reasoning": "hm"}, {"type": "tool_use", "name": "f", "input": {}, "id": "1"}, "red"]
    )
    assert read(chat, thought, called) == [("assistant", ["red"])] * 2


@pytest.mark.parametrize(
    ("role", "expected"), [("user", "user"), ("human", "user"), ("ai", "assistant"), ("developer", "system")]
)
def test_roles_by_name_are_understood(chat: Any, role: str, expected: str) -> None:
    assert read(chat, ChatMessage("a", role=role)) == [(expected, ["a"])]


def test_messages_that_say_nothing_are_an_error(chat: Any) -> None:
    from langchain_core.messages import RemoveMessage

    from qr_integrations.errors import InputError

    for messages, message in (
        ([HumanMessage("a"), RemoveMessage("1")], "a RemoveMessage says nothing"),
        ([ChatMessage("a", role="narrator")], "unknown role 'narrator'"),
        ([HumanMessage("")], "nothing was said"),
        ([HumanMessage([])], "nothing was said"),
    ):
        with pytest.raises(InputError, match=message):
            chat.invoke(messages)


def test_the_callers_messages_are_left_as_they_are(chat: Any) -> None:
    picture = drawn()
    message = HumanMessage([{"type": "image", "image": picture}, {"type": "image", "base64": BASE64}, QUESTION])
    before = list(message.content)
    chat.invoke([message])
    assert message.content == before and message.content[0]["image"] is picture and "mime_type" not in before[1]


# ---- caches and traces


class Counted(BaseCache):
    """A cache that counts what it finds."""

    def __init__(self) -> None:
        self.known: dict[tuple[str, str], Any] = {}
        self.hits = 0

    def lookup(self, prompt: str, llm_string: str) -> Any:
        found = self.known.get((prompt, llm_string))
        self.hits += found is not None
        return found

    def update(self, prompt: str, llm_string: str, return_val: Sequence[Any]) -> None:
        self.known[prompt, llm_string] = return_val

    def clear(self, **kwargs: Any) -> None:
        self.known.clear()


def pictures() -> Iterator[Image.Image]:
    """Each is gone before the next one is made, and may lie at the same address."""
    for red in range(0, 250, 50):
        yield drawn((red, 0, 0))


def test_a_cache_tells_pillow_pictures_apart(qr_mini_vl: Any) -> None:
    from qr_integrations.langchain import ChatDeCo

    cache = Counted()
    chat = ChatDeCo(backend=qr_mini_vl, max_tokens=2, cache=cache)
    for picture in pictures():
        chat.invoke([HumanMessage([{"type": "image", "image": picture}, QUESTION])])
        del picture
    assert (len(cache.known), cache.hits) == (5, 0)
    chat.invoke([HumanMessage([{"type": "image", "image": drawn((0, 0, 0))}, QUESTION])])
    assert (len(cache.known), cache.hits) == (5, 1)


def test_a_trace_holds_the_picture(chat: Any, recorder: Any) -> None:
    chat.invoke([HumanMessage([FORMS["a Pillow picture"], QUESTION])], config={"callbacks": [recorder]})
    (block, _) = recorder.named("ChatViCrop").inputs["messages"][0][0]["kwargs"]["content"]
    encoded = block["image_url"]["url"].removeprefix("data:image/png;base64,")
    assert Image.open(io.BytesIO(base64.b64decode(encoded))).getpixel((240, 140)) == (200, 0, 0)
