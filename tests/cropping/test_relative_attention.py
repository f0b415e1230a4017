"""rel-att: the quotient of two questions' attention, and which prompts it is made of."""

from typing import Any

import numpy as np
import pytest
import torch

from qr_integrations.backend.picture_reading import find_pictures, read_pictures
from qr_integrations.cropping.asking import GENERIC, SHORT_ANSWER, asked, asked_in_general
from qr_integrations.cropping.relative_attention import RelativeAttention, relative_attention
from qr_integrations.errors import InputError
from qr_integrations.types import Message
from tests.backend.found_pictures import TALL, WIDE, noise
from tests.backend.seeing import OTHER, QUESTION, backend, eager, equal, pictures, seen

FAMILIES = ["llava", "llava_onevision", "qwen2_5_vl", "gemma3", "idefics3", "internvl", "mistral3"]


@torch.no_grad()
def by_hand(name: str, prompt: Any, layer: int) -> list[torch.Tensor]:
    """The mean over heads of full eager attention, for each picture."""
    attention = eager(name)(**prompt.inputs, output_attentions=True, use_cache=False).attentions[layer]
    found = find_pictures(backend(name), prompt)
    row = attention[0, :, -1].mean(0)
    return [row[list(one.positions)].view(one.grid.rows, one.grid.columns) for one in found]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_map_is_the_quotient_of_two_attentions(name: str) -> None:
    opened = backend(name)
    found = RelativeAttention(opened, layers=1).of_conversation(seen(2))
    prompts = [opened.lay_out(messages) for messages in (asked(seen(2)), asked_in_general(seen(2)))]
    question, generic = (by_hand(name, prompt, 1) for prompt in prompts)
    equal([torch.from_numpy(one.values) for one in found.maps], [a / b for a, b in zip(question, generic, strict=True)])
    assert [one.image_size for one in found.maps] == [WIDE, TALL]
    assert [one.covers for one in found.maps] == [one.covers for one in find_pictures(opened, prompts[0])]
    assert {(one.method, one.values.dtype) for one in found.maps} == {("relative", np.dtype("float32"))}
    assert found.read is not None


def test_one_picture() -> None:
    found = RelativeAttention(backend("llava"), layers=2)
    alone = found.importance(pictures(1)[0], QUESTION)
    np.testing.assert_array_equal(alone.values, found.of_conversation(seen(1)).maps[0].values)
    assert alone.is_informative


def test_the_generic_question_says_nothing_about_itself() -> None:
    found = RelativeAttention(backend("llava"), layers=2).importance(pictures(1)[0], GENERIC)
    np.testing.assert_allclose(found.values, 1.0, rtol=1e-5)
    assert not found.is_informative
    own = RelativeAttention(backend("llava"), layers=2, generic=OTHER).importance(pictures(1)[0], OTHER)
    assert not own.is_informative


def test_several_layers_are_averaged() -> None:
    opened, (picture,) = backend("llava"), pictures(1)
    single = [RelativeAttention(opened, layers=layer).importance(picture, QUESTION).values for layer in range(4)]
    both = RelativeAttention(opened, layers=(3, 1)).importance(picture, QUESTION).values
    np.testing.assert_allclose(both, (single[1] + single[3]) / 2, rtol=1e-5)
    every = RelativeAttention(opened, layers="all").importance(picture, QUESTION).values
    np.testing.assert_allclose(every, np.mean(single, axis=0), rtol=1e-5)


def test_the_instruction_is_appended_to_both_questions() -> None:
    opened, (picture,) = backend("llava"), pictures(1)
    instructed = RelativeAttention(opened, layers=1, instruction=SHORT_ANSWER).importance(picture, QUESTION)
    both = RelativeAttention(opened, layers=1, generic=f"{GENERIC} {SHORT_ANSWER}")
    said = both.importance(picture, f"{QUESTION} {SHORT_ANSWER}")
    np.testing.assert_array_equal(instructed.values, said.values)
    assert np.ptp(instructed.values - RelativeAttention(opened, layers=1).importance(picture, QUESTION).values) > 0


def test_words_are_asked_behind_the_pictures_wherever_they_stood() -> None:
    one, two = pictures(2)
    behind = asked([Message.user("what is", one, "in the picture", two, "?")])
    assert [type(part).__name__ == "str" for part in behind[0].content] == [False, False, True]
    assert behind[0].text == "what is\nin the picture\n?"
    assert asked([Message.user(one, "left ?")], "short") == (Message.user(one, "left ? short"),)


def test_the_last_question_of_a_conversation_is_asked() -> None:
    one, two = pictures(2)
    turns = [Message.system("look"), Message.user(one, "left ?"), Message.assistant("no"), Message.user(two, "right ?")]
    assert asked(turns) == (*turns[:3], Message.user(two, "right ?"))
    assert asked_in_general(turns) == (*turns[:3], Message.user(two, GENERIC))
    found = RelativeAttention(backend("llava"), layers=1).of_conversation(turns)
    assert [one.image_size for one in found.maps] == [WIDE, TALL]
    later = [Message.user(one, "left ?"), Message.assistant("no"), Message.user("right ?")]
    first = RelativeAttention(backend("llava"), layers=1).of_conversation(later)
    assert len(first.maps) == 1 and first.maps[0].is_informative


@pytest.mark.parametrize("turns", [[Message.user("left ?")], [Message.system("look")], [Message.assistant("left")], []])
def test_without_a_question_or_a_picture_there_is_nothing_to_look_at(turns: list[Message]) -> None:
    with pytest.raises(InputError, match="nothing to look at"):
        RelativeAttention(backend("llava"), layers=1).of_conversation(turns)


def test_a_picture_that_only_the_assistant_shows_is_looked_at() -> None:
    shown = [Message("assistant", (noise(TALL, 3), "left")), Message.user("what is left ?")]
    assert len(RelativeAttention(backend("llava"), layers=1).of_conversation(shown).maps) == 1


def test_where_the_generic_question_does_not_look_the_quotient_is_finite() -> None:
    """Gemma's sliding layers do not see pictures that lie further back than their window."""
    found = RelativeAttention(backend("gemma3"), layers=0).importance(pictures(1)[0], " ".join([QUESTION] * 5))
    assert np.isfinite(found.values).all() and not found.values.any()


def test_both_questions_may_share_what_was_read() -> None:
    opened = backend("qwen3_vl")
    prompts = [opened.lay_out(seen(2, question)) for question in (QUESTION, GENERIC)]
    shared = relative_attention(opened, *prompts, (0, 3), read_pictures(opened, prompts[1]))
    equal(shared, relative_attention(opened, *prompts, (0, 3)))
