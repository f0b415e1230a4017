"""`ViCropLLM` and `DeCoLLM`: what they read of messages, what they answer, their settings."""

import base64
import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from llama_index.core.base.llms.types import (
    AudioBlock,
    CacheControl,
    CachePoint,
    ChatMessage,
    CitableBlock,
    CitationBlock,
    DocumentBlock,
    ImageBlock,
    MessageRole,
    TextBlock,
)
from llama_index.core.schema import ImageDocument, ImageNode

QUESTION = "what is the color of the box ?"
USAGE = {"prompt_tokens", "completion_tokens", "total_tokens"}
KNOWN = {"usage", "model_name", "finish_reason", "qr_method", "qr_params", "qr_steps", "qr_seconds"}


def asked(*blocks: Any, text: str = QUESTION) -> list[ChatMessage]:
    return [ChatMessage(role="user", blocks=[*blocks, TextBlock(text=text)])]


# ---- what is answered


@pytest.mark.parametrize(
    ("name", "settings", "method"),
    [
        ("ViCropLLM", {}, "vicrop"),
        ("DeCoLLM", {}, "deco"),
        ("ViCropLLM", {"deco": {"alpha": 0.3, "layers": [5, 6]}}, "vicrop+deco"),
        ("DeCoLLM", {"crop": True}, "vicrop+deco"),
        ("DeCoLLM", {"deco": False}, "plain"),
    ],
)
def test_an_answer_is_that_of_the_backend(
    qr_mini_vl: Any, make_llm: Any, picture: Any, png: bytes, name: str, settings: Any, method: str
) -> None:
    from qr_integrations import DeCo, Message, ViCrop

    steps: dict[str, Any] = {}
    if "vicrop" in method:
        steps["crop"] = ViCrop()
    if "deco" in method:
        steps["deco"] = DeCo(alpha=0.3, layers=(5, 6)) if "alpha" in str(settings) else DeCo()
    expected = qr_mini_vl.answer([Message.user(picture, QUESTION)], max_new_tokens=4, **steps)
    response = make_llm(name, **settings).chat(asked(ImageBlock(image=png)))
    assert response.message.content == expected.text and response.message.role == MessageRole.ASSISTANT
    assert response.raw["qr_method"] == method and set(response.raw["qr_steps"]) == set(steps)
    assert response.raw["finish_reason"] == expected.finish_reason
    assert response.raw["usage"]["prompt_tokens"] == expected.usage.prompt_tokens
    if "crop" in steps:
        box = expected.steps["crop"][0].box
        assert response.raw["qr_steps"]["crop"][0]["box"] == (None if box is None else list(box.as_tuple()))


def test_usage_stands_where_counters_look_for_it(make_llm: Any, png: bytes) -> None:
    chat = make_llm().chat(asked(ImageBlock(image=png)))
    complete = make_llm().complete(QUESTION, image_documents=[ImageBlock(image=png)])
    for response in (chat, complete):
        assert set(response.raw) == KNOWN and set(response.additional_kwargs) == USAGE
        assert response.raw["usage"] == response.additional_kwargs
        assert response.raw["usage"]["total_tokens"] == sum(
            response.raw["usage"][name] for name in ("prompt_tokens", "completion_tokens")
        )
        assert json.loads(json.dumps(response.raw)) == response.raw
    assert chat.message.additional_kwargs == {}  # it goes into the history as it is
    assert complete.text == chat.message.content and complete.raw["usage"] == chat.raw["usage"]


def test_a_streamed_answer_is_the_same_piece_by_piece(make_llm: Any, png: bytes) -> None:
    llm, messages = make_llm(), asked(ImageBlock(image=png))
    whole = llm.chat(messages)
    *pieces, last = llm.stream_chat(messages)
    assert len(pieces) >= 1 and all(piece.raw is None for piece in pieces)
    texts = [piece.message.content or "" for piece in [*pieces, last]]
    assert texts[-1] == whole.message.content == "".join(piece.delta for piece in [*pieces, last])
    assert all(after == before + piece.delta for before, after, piece in zip(["", *texts], texts, pieces, strict=False))
    assert last.raw["usage"] == whole.raw["usage"] and last.additional_kwargs == whole.additional_kwargs

    *pieces, last = llm.stream_complete(QUESTION, image_documents=[ImageBlock(image=png)])
    assert last.text == whole.message.content == "".join(piece.delta for piece in [*pieces, last])
    assert last.raw["usage"] == whole.raw["usage"] and pieces[0].text == pieces[0].delta


async def test_async_is_the_same(make_llm: Any, png: bytes) -> None:
    llm, messages, pictures = make_llm(), asked(ImageBlock(image=png)), [ImageBlock(image=png)]
    whole = llm.chat(messages)
    assert (await llm.achat(messages)).raw["usage"] == whole.raw["usage"]
    assert (await llm.achat(messages)).message == whole.message
    assert (await llm.acomplete(QUESTION, image_documents=pictures)).text == whole.message.content
    chat = [piece async for piece in await llm.astream_chat(messages)]
    assert [piece.delta for piece in chat] == [piece.delta for piece in llm.stream_chat(messages)]
    assert chat[-1].message == whole.message and chat[-1].raw["usage"] == whole.raw["usage"]
    complete = [piece async for piece in await llm.astream_complete(QUESTION, image_documents=pictures)]
    assert [piece.text for piece in complete] == [piece.message.content or "" for piece in chat]
    assert complete[-1].raw["usage"] == whole.raw["usage"]


@pytest.mark.parametrize("name", ["max_tokens", "max_new_tokens"])
def test_a_call_may_have_settings_of_its_own(make_llm: Any, name: str) -> None:
    llm = make_llm(max_new_tokens=5, temperature=1000.0, seed=1)
    usual = llm.complete(QUESTION)
    assert llm.complete(QUESTION, **{name: 2}).raw["usage"]["completion_tokens"] <= 2
    assert llm.chat(asked(), **{name: 2}, crop=False).raw["usage"]["completion_tokens"] <= 2
    assert list(llm.stream_complete(QUESTION, **{name: 2}))[-1].raw["usage"]["completion_tokens"] <= 2
    assert llm.complete(QUESTION, temperature=None).text == usual.text  # None leaves it as it is
    greedy = make_llm(max_new_tokens=5).complete(QUESTION).text
    assert llm.complete(QUESTION, temperature=0.0).text == greedy
    assert len({llm.complete(QUESTION, seed=seed).text for seed in range(5)}) > 1


def test_stop_sequences_of_field_and_call_both_end_an_answer(make_llm: Any) -> None:
    long: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1000.0, "seed": 3}
    words = make_llm(**long).complete(QUESTION).text.split()
    assert len(words) >= 6, words
    early, late = f" {words[2]}", f" {words[4]}"
    assert early not in " ".join(words[:2])
    stopped = make_llm(**long, stop=late)
    assert stopped.complete(QUESTION).text == " ".join(words).split(late)[0]
    for name in ("stop", "stop_sequences"):
        response = stopped.complete(QUESTION, **{name: [early]})
        assert response.text == " ".join(words[:2]) and response.raw["finish_reason"] == "stop"
        *_, last = stopped.stream_chat(asked(), **{name: early})
        assert last.message.content == " ".join(words[:2])


def test_a_setting_that_there_is_not_is_an_error(make_llm: Any) -> None:
    from qr_integrations.errors import InputError

    with pytest.raises(InputError, match=r"no setting 'max_token'.*max_tokens"):
        make_llm().chat(asked(), max_token=3)
    with pytest.raises(ValueError, match="max_token"):
        make_llm(max_token=3)


# ---- what is read


def as_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


@pytest.fixture
def looked_at(qr_mini_vl: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The conversations that the model was given, from here on."""
    given: list[Any] = []
    answer, stream = type(qr_mini_vl).answer, type(qr_mini_vl).stream

    def noted(method: Any) -> Any:
        return lambda self, messages, **settings: (given.append(messages), method(self, messages, **settings))[1]

    monkeypatch.setattr(type(qr_mini_vl), "answer", noted(answer))
    monkeypatch.setattr(type(qr_mini_vl), "stream", noted(stream))
    return given


BLOCKS: dict[str, Callable[[bytes, Path], ImageBlock]] = {
    "bytes": lambda png, path: ImageBlock(image=png),
    "base64": lambda png, path: ImageBlock(image=base64.b64encode(png)),
    "path": lambda png, path: ImageBlock(path=path),
    "data uri": lambda png, path: ImageBlock(url=as_uri(png)),
}
NODES: dict[str, Callable[[bytes, Path], Any]] = {
    "block": lambda png, path: ImageBlock(image=png),
    "node": lambda png, path: ImageNode(image=base64.b64encode(png).decode()),
    "document": lambda png, path: ImageDocument(image=base64.b64encode(png).decode()),
    "image_path": lambda png, path: ImageNode(image_path=str(path)),
    "file_path": lambda png, path: ImageNode(metadata={"file_path": str(path)}),
    "image_url": lambda png, path: ImageNode(image_url=as_uri(png)),
}


@pytest.mark.parametrize("form", BLOCKS)
def test_every_form_of_an_image_block_is_read(
    make_llm: Any, picture: Any, png: bytes, tmp_path: Path, looked_at: list[Any], form: str
) -> None:
    (tmp_path / "scene.png").write_bytes(png)
    make_llm().chat(asked(BLOCKS[form](png, tmp_path / "scene.png")))
    [[message]] = looked_at
    assert message.content[1] == QUESTION and message.pictures[0].tobytes() == picture.tobytes()


@pytest.mark.parametrize("source", ["memory", "file"])
def test_an_open_file_is_read_from_its_start(
    make_llm: Any, picture: Any, png: bytes, tmp_path: Path, looked_at: list[Any], source: str
) -> None:
    (tmp_path / "scene.png").write_bytes(png)
    with open(tmp_path / "scene.png", "rb") if source == "file" else BytesIO(png) as file:
        try:
            block = ImageBlock(image=file)
        except ValueError:
            pytest.skip("image blocks of this llama-index-core hold bytes only")
        file.seek(7)
        make_llm().chat(asked(block))
        make_llm().chat(asked(block))
    assert [given[0].pictures[0].tobytes() for given in looked_at] == [picture.tobytes()] * 2


@pytest.mark.parametrize("form", NODES)
def test_pictures_beside_a_prompt_are_read_in_front_of_it(
    make_llm: Any, picture: Any, png: bytes, tmp_path: Path, looked_at: list[Any], form: str
) -> None:
    (tmp_path / "scene.png").write_bytes(png)
    make_llm().complete(QUESTION, image_documents=[NODES[form](png, tmp_path / "scene.png")])
    [[message]] = looked_at
    assert message.content[1] == QUESTION and message.pictures[0].tobytes() == picture.tobytes()


def test_pictures_of_old_messages_are_read(make_llm: Any, picture: Any, png: bytes, looked_at: list[Any]) -> None:
    document = ImageDocument(image=base64.b64encode(png).decode())
    make_llm().chat([ChatMessage(content=QUESTION, additional_kwargs={"images": [document]})])
    [[message]] = looked_at
    assert message.text == QUESTION and message.pictures[0].tobytes() == picture.tobytes()


def test_turns_keep_their_speakers_and_blocks_their_order(make_llm: Any, png: bytes, looked_at: list[Any]) -> None:
    image = ImageBlock(image=png)
    make_llm(crop=False).chat(
        [
            ChatMessage(role="developer", content="be brief"),
            ChatMessage(role="user", blocks=[TextBlock(text="a"), image, TextBlock(text="b"), TextBlock(text="c")]),
            ChatMessage(role="model", content="d"),
            ChatMessage(role="tool", blocks=[image, TextBlock(text="e")]),
            ChatMessage(role="chatbot", blocks=[CachePoint(cache_control=CacheControl(type="ephemeral"))]),
            ChatMessage(
                role="user",
                blocks=[
                    CitableBlock(title="t", source="s", content=[TextBlock(text="f")]),
                    CitationBlock(title="t", source="s", cited_content=image, additional_location_info={}),
                ],
            ),
        ]
    )
    [turns] = looked_at
    told = [(turn.role, [part if isinstance(part, str) else "*" for part in turn.content]) for turn in turns]
    assert told == [
        ("system", ["be brief"]),
        ("user", ["a", "*", "b\nc"]),
        ("assistant", ["d"]),
        ("user", ["*", "e\nf", "*"]),
    ]


def test_the_system_prompt_is_told_once(make_llm: Any, looked_at: list[Any]) -> None:
    from llama_index.core.prompts import PromptTemplate

    llm = make_llm(system_prompt="be brief")
    llm.chat(asked())
    llm.complete(QUESTION)
    llm.predict(PromptTemplate("what is {thing} ?"), thing="red")
    llm.chat([ChatMessage(role="system", content="be long"), *asked()])
    systems = [[turn.text for turn in turns if turn.role == "system"] for turns in looked_at]
    assert systems == [["be brief"]] * 3 + [["be long"]]


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (lambda path: ImageBlock(), "message #1, block #0: there is no picture"),
        (lambda path: ImageBlock(image=b"no picture"), "message #1, block #0.*broken"),
        (lambda path: ImageBlock(path=path), "message #1, block #0.*broken"),
        (lambda path: ImageBlock(url="https://example.org/a.png"), "message #1, block #0.*allow_urls is off"),
        (lambda path: ImageBlock(url="file:///etc/passwd"), "message #1, block #0.*pass a file as pathlib"),
        (lambda path: AudioBlock(audio=b"sound"), "message #1, block #0.*'audio'.*leave it out"),
        (lambda path: DocumentBlock(data=b"%PDF"), "message #1, block #0.*'document'.*TextBlock"),
    ],
    ids=["empty", "bytes", "path", "url", "file url", "audio", "document"],
)
@pytest.mark.parametrize("how", ["chat", "stream_chat"])
def test_what_cannot_be_read_is_an_error_that_names_the_block(
    make_llm: Any, tmp_path: Path, block: Any, message: str, how: str
) -> None:
    from qr_integrations.errors import InputError

    (tmp_path / "note.png").write_text("no picture")
    messages = [ChatMessage(content="a"), *asked(block(tmp_path / "note.png"))]
    with pytest.raises(InputError, match=message):
        list(getattr(make_llm(), how)(messages))


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (lambda path: ImageNode(image="no base64!"), "image_documents, #0.*base64"),
        (lambda path: ImageNode(image_path="/nowhere.png"), "image_documents, #0: there is no file"),
        (lambda path: ImageNode(), "image_documents, #0.*there is no picture"),
    ],
    ids=["base64", "path", "empty"],
)
def test_a_picture_beside_a_prompt_that_cannot_be_read_is_an_error(make_llm: Any, document: Any, message: str) -> None:
    from qr_integrations.errors import InputError

    with pytest.raises(InputError, match=message):
        make_llm().complete(QUESTION, image_documents=[document(None)])


@pytest.mark.usefixtures("unchecked")
def test_a_path_beside_a_prompt_is_an_error_with_its_cure(make_llm: Any, png: bytes) -> None:
    from qr_integrations.errors import InputError

    with pytest.raises(InputError, match=r"image_documents, #1: a str is no picture.*: pass ImageBlock\(path="):
        make_llm().complete(QUESTION, image_documents=[ImageBlock(image=png), "a.png"])


def test_local_files_can_be_forbidden(make_llm: Any, png: bytes, tmp_path: Path) -> None:
    from qr_integrations.errors import InputError

    (tmp_path / "scene.png").write_bytes(png)
    with pytest.raises(InputError, match="allow_local_files is off"):
        make_llm(allow_local_files=False).chat(asked(ImageBlock(path=tmp_path / "scene.png")))


@pytest.mark.parametrize("messages", [[], [ChatMessage(content="")], [ChatMessage(role="system", content="a")]])
def test_nothing_said_is_an_error(make_llm: Any, messages: Any) -> None:
    from qr_integrations.errors import InputError

    with pytest.raises(InputError, match="nothing was said"):
        make_llm().chat(messages)
