"""What a model reads of a conversation: every word and picture in its place, and no word that passes for a picture."""

from typing import Any

import pytest
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from qr_integrations.backend import Backend, prompts
from qr_integrations.backend.picture_reading import find_pictures
from qr_integrations.backend.prompts import as_messages
from qr_integrations.errors import InputError, LoadError, WindowError
from qr_integrations.types import Message
from tests.backend.found_pictures import TALL, WIDE, noise
from tests.backend.seeing import QUESTION, backend, fresh, pictures, seen
from tests.backend.tiny_vlms import FAMILIES

TEMPLATED = [name for name in FAMILIES if name not in ("instructblip", "paligemma")]
NO_SYSTEM = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %}"
    "{{ message['role'] }} : {% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}\n{% endfor %}"
)


def words(opened: Backend, messages: Any) -> str:
    """The prompt as text, each picture as one word."""
    text: str = opened.tokenizer.decode(opened.lay_out(messages).token_ids)
    shown: list[str] = []
    for word in text.replace("<image>", " <image> ").split():
        if word != "<image>" or shown[-1:] != ["<image>"]:
            shown.append(word)
    return " ".join(shown)


def test_a_question_alone_is_a_conversation() -> None:
    opened = backend("llava")
    assert words(opened, "what is left ?") == "<s> user : what is left ? assistant :"
    assert opened.lay_out("what is left ?").token_ids == opened.lay_out([Message.user("what is left ?")]).token_ids


def test_texts_and_pictures_keep_their_order() -> None:
    one, two = pictures(2)
    conversation = [
        Message.system("look"),
        Message.user("red", one, "green", two, "blue"),
        Message.assistant("left"),
        Message.user("right"),
    ]
    expected = "<s> system : look user : red <image> green <image> blue assistant : left user : right assistant :"
    assert words(backend("llava"), conversation) == expected
    assert backend("llava").lay_out(conversation).pictures[0].size == one.size


@pytest.mark.parametrize(
    ("name", "count"), [(name, count) for name in FAMILIES for count in range(4) if name != "paligemma" or count]
)
def test_a_prompt_holds_as_many_pictures_as_it_is_given(name: str, count: int) -> None:
    opened = backend(name)
    prompt = opened.lay_out(seen(count))
    assert len(find_pictures(opened, prompt)) == count == len(prompt.pictures)
    assert ("pixel_values" in prompt.inputs) == (count > 0)
    assert prompt.inputs["input_ids"].tolist() == [list(prompt.token_ids)]
    assert all(isinstance(value, torch.Tensor) for value in prompt.inputs.values())


def test_a_model_that_needs_a_picture_says_so() -> None:
    with pytest.raises(InputError, match="0 pictures"):
        backend("paligemma").lay_out("what is left ?")


@pytest.mark.parametrize("name", FAMILIES)
def test_words_that_spell_a_picture_stay_words(name: str) -> None:
    opened = backend(name)
    processor: Any = opened.processor
    spelt = sorted(str(value) for key, value in vars(processor).items() if key.endswith("_token"))
    assert any("im" in token.lower() for token in spelt)
    said = " ".join(["what is", *spelt, *spelt, "?"])
    prompt = opened.lay_out([Message.user(*pictures(1), said)])
    plain = opened.lay_out([Message.user(*pictures(1), "what is ?")])
    (picture,), (alone,) = find_pictures(opened, prompt), find_pictures(opened, plain)
    assert picture.positions == alone.positions
    ids = set(prompt.token_ids[picture.stop :])
    assert not ids & set(opened.tokenizer.convert_tokens_to_ids(spelt)) - {opened.tokenizer.unk_token_id}
    opened.answer([Message.user(*pictures(1), said)], max_new_tokens=1)


def test_words_that_spell_a_picture_stay_words_in_a_published_prompt() -> None:
    opened = fresh("llava")
    opened.processor.chat_template = None
    prompt = opened.lay_out([Message.user(*pictures(1), "what is <image> {pictures} ?")])
    assert len(find_pictures(opened, prompt)) == 1
    assert words(opened, "left {question} right") == "<unk> : left <unk> question <unk> right <unk> :"


def test_a_published_prompt_takes_one_message() -> None:
    opened = fresh("llava")
    opened.processor.chat_template = None
    assert words(opened, seen(2, "left")) == "<image> <unk> : left <unk> :"
    with pytest.raises(InputError, match="chat_template, or pass one message alone"):
        opened.lay_out([*seen(1), Message.assistant("left"), Message.user("right")])
    opened = fresh("qwen3_vl")
    opened.processor.chat_template = None
    with pytest.raises(InputError, match=r"set backend\.processor\.chat_template$"):
        opened.lay_out(seen(1))


@pytest.mark.parametrize("name", TEMPLATED)
def test_the_first_token_stands_there_once(name: str) -> None:
    opened = backend(name)
    begin = opened.tokenizer.bos_token_id
    assert opened.lay_out(seen(1)).token_ids.count(begin) == 1


# ---- templates that refuse


def without_system() -> Backend:
    opened = fresh("llava")
    opened.processor.chat_template = opened.tokenizer.chat_template = NO_SYSTEM
    return opened


def test_a_system_message_goes_into_the_users_where_the_template_has_no_place_for_it() -> None:
    opened = without_system()
    messages = [Message.system("look left"), Message.user(*pictures(1), "what is right ?")]
    assert words(opened, messages) == "user : look left <image> what is right ?"
    spoken = opened.lay_out([Message.system("left"), Message.user("right")]).token_ids
    assert opened.tokenizer.decode(spoken) == "user : left right"


def test_what_the_assistant_said_is_not_put_into_the_users_mouth() -> None:
    with pytest.raises(InputError, match="no system role"):
        without_system().lay_out([Message.system("look"), Message.assistant("left"), Message.user("right")])
    with pytest.raises(InputError, match="no system role"):
        without_system().lay_out([Message.user("right"), Message.system("look")])


def test_text_models_too(qr_mini: Backend) -> None:
    tokenizer: Any = qr_mini.tokenizer
    expected = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What do cats do?"}], tokenize=False, add_generation_prompt=True
    )
    ids = qr_mini.lay_out("What do cats do?").token_ids
    assert list(ids) == tokenizer(expected, add_special_tokens=False)["input_ids"]


# ---- what is refused


@pytest.mark.parametrize("given", [[], "", [Message("user", ())], [Message.user("", "")], [Message.user(" \n")]])
def test_nothing_to_answer(given: Any) -> None:
    with pytest.raises(InputError, match="nothing to answer"):
        as_messages(given)


def test_an_unknown_role_is_named() -> None:
    with pytest.raises(InputError, match="'tool': pass system, user, assistant"):
        as_messages([Message("tool", ("left",))])


def test_text_in_the_place_of_parts_is_one_part(unchecked: None) -> None:
    """`Message("user", "left")` instead of ``("left",)`` is easily written."""
    content: Any = "left right"
    assert as_messages([Message("user", content)]) == (Message.user("left right"),)


def test_pictures_are_opened() -> None:
    clear = Image.new("RGBA", (20, 10), (255, 0, 0, 0))
    (message,) = as_messages([Message.user(clear, "left")])
    assert message.pictures[0].mode == "RGB" and message.pictures[0].getpixel((3, 3)) == (255, 255, 255)


def test_a_broken_picture_is_refused(tmp_path: Any) -> None:
    path = tmp_path / "cut.png"
    noise(WIDE, 0).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with Image.open(path) as cut, pytest.raises(InputError, match="broken"):
        backend("llava").lay_out([Message.user(cut, QUESTION)])


def test_a_text_model_takes_no_pictures(qr_mini: Backend) -> None:
    with pytest.raises(InputError, match="reads text only"):
        qr_mini.lay_out([Message.user(noise(TALL, 0), QUESTION)])


def test_a_model_without_its_processor(qr_mini: Backend) -> None:
    opened = backend("llava")
    tokenizer: PreTrainedTokenizerFast = opened.tokenizer
    with pytest.raises(LoadError, match=r"processor=\.\.\."):
        Backend(opened.model, tokenizer).lay_out(seen(1))


def test_a_picture_that_the_processor_refuses() -> None:
    """Qwen's takes no picture that is more than 200 times as long as it is wide; nor does the door before it."""
    narrow = Message.user(noise((1, 1000), 0), QUESTION)
    with pytest.raises(InputError, match="aspect ratio"):
        prompts.lay_out(backend("qwen2_5_vl"), (narrow,))
    with pytest.raises(InputError, match="too long or too narrow"):
        backend("qwen2_5_vl").lay_out([narrow])


def test_a_window_that_is_too_short(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = backend("llava")
    needed = len(opened.lay_out(seen(1)))
    monkeypatch.setattr(opened.config, "max_position_embeddings", needed + 1)
    assert len(opened.lay_out(seen(1))) == needed
    monkeypatch.setattr(opened.config, "max_position_embeddings", needed)
    with pytest.raises(WindowError, match=f"needs {needed} tokens.* pass fewer or shorter"):
        opened.lay_out(seen(1))
