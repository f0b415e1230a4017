"""Pictures in as many tokens as one likes: prompts, answers, budgets, and where such a model looks."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from qr_integrations.backend.picture_reading import attention_to_pictures, find_pictures, read_pictures
from qr_integrations.backend.surgery import prefill_pruned
from qr_integrations.cropping.vicrop import ViCrop
from qr_integrations.errors import InputError
from qr_integrations.types import Message
from tests.backend.pruners import KeepFirst
from tests.backend.seeing import QUESTION, backend, eager, seen

NAME = "mqt_llava"


@dataclass(frozen=True)
class Four:
    def choose(self, backend: Any, messages: tuple[Message, ...]) -> int:
        return 4


@pytest.mark.parametrize("number", [1, 4, 9])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_prompt_has_as_many_placeholders_as_asked_for(number: int, count: int) -> None:
    opened = backend(NAME)
    prompt = opened.lay_out(seen(count), num_visual_tokens=number)
    assert prompt.token_ids.count(opened.model.config.image_token_id) == number * count
    assert all(value.shape[1] == len(prompt) for name, value in prompt.inputs.items() if name != "pixel_values")
    assert [len(picture.positions) for picture in find_pictures(opened, prompt)] == [number] * count


@pytest.mark.parametrize("number", [1, 4, 9])
def test_fewer_tokens_are_the_first_of_all(number: int) -> None:
    opened = backend(NAME)
    fewer = opened.lay_out(seen(2), num_visual_tokens=number)
    logits = opened.model(**fewer.inputs, logits_to_keep=1).logits[:, -1]
    cut = prefill_pruned(opened, opened.lay_out(seen(2)).inputs, _FirstOfEach(number))
    torch.testing.assert_close(logits, cut.logits, atol=1e-5, rtol=1e-4)


class _FirstOfEach(KeepFirst):
    """As many of each picture."""

    def __init__(self, number: int) -> None:
        super().__init__()
        object.__setattr__(self, "number", number)

    def start(self, backend: Any, seen: Any) -> Any:
        pruning = super().start(backend, seen)
        stays = seen.mask & (seen.cell < self.number)  # type: ignore[attr-defined]
        pruning.before = lambda: _left(stays)
        return pruning


def _left(stays: torch.Tensor) -> Any:
    from qr_integrations.backend.visual_tokens import Left

    return Left([row.nonzero()[:, 0] for row in stays])


def test_answers_take_a_number_or_a_budget() -> None:
    opened = backend(NAME)
    whole, fewer, chosen = (
        opened.answer(seen(2), num_visual_tokens=one, max_new_tokens=4) for one in (None, 4, Four())
    )
    assert whole.usage.prompt_tokens - fewer.usage.prompt_tokens == 2 * 5
    assert (chosen.text, chosen.usage) == (fewer.text, fewer.usage)
    assert chosen.steps == {"num_visual_tokens": 4} and fewer.steps == {}
    assert opened.answer(QUESTION, num_visual_tokens=4, max_new_tokens=3).text
    assert opened.answer(QUESTION, num_visual_tokens=Four(), max_new_tokens=1).steps == {}


@pytest.mark.parametrize(("count", "number"), [(1, 4), (2, 4), (3, 3)])  # three of three: as many as one picture's nine
def test_beams_see_the_first_tokens_of_each_picture(count: int, number: int) -> None:
    opened = backend(NAME)
    prompt = opened.lay_out(seen(count), num_visual_tokens=number)
    states = opened.model.get_input_embeddings()(prompt.inputs["input_ids"])
    with torch.no_grad():
        tokens = opened.model.model.tokens_of(prompt.inputs["pixel_values"], number)
        states = states.masked_scatter(
            (prompt.inputs["input_ids"] == opened.model.config.image_token_id)[..., None], tokens
        )
    given = {"inputs_embeds": states, "attention_mask": prompt.inputs["attention_mask"]}
    expected = opened.model.generate(**given, num_beams=3, max_new_tokens=6, do_sample=False)[0]
    answer = opened.answer(seen(count), num_visual_tokens=number, num_beams=3, max_new_tokens=6)
    assert answer.text == opened.tokenizer.decode(expected, skip_special_tokens=True).strip()


def test_pictures_are_seen_beside_embeddings_too() -> None:
    opened = backend(NAME)
    inputs = dict(opened.lay_out(seen(2)).inputs)
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    expected = opened.model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :]
    states = opened.model.get_input_embeddings()(inputs.pop("input_ids"))
    assert torch.equal(opened.model.generate(inputs_embeds=states, **inputs, **settings)[0], expected)


@pytest.mark.parametrize("wrong", [0, 10, -1, True])
def test_numbers_that_cannot_be_made_are_refused(wrong: int) -> None:
    with pytest.raises(InputError, match=r"cannot be made by .*: pass 1 to 9"):
        backend(NAME).answer(seen(1), num_visual_tokens=wrong)


def test_a_budget_needs_a_matryoshka_model() -> None:
    with pytest.raises(InputError, match=r"fixed number of tokens .*prune=CDPruner"):
        backend("llava").answer(seen(1), num_visual_tokens=Four())


def test_what_is_no_number_is_refused(unchecked: None) -> None:
    with pytest.raises(InputError, match=r"num_visual_tokens=.* cannot be used: pass a number, or a budget"):
        backend(NAME).answer(seen(1), num_visual_tokens="four")


@pytest.mark.parametrize("number", [None, 4])
def test_attention_goes_through_the_queries_to_the_patches(number: int | None) -> None:
    opened = backend(NAME)
    prompt = opened.lay_out(seen(2), num_visual_tokens=number)
    maps = attention_to_pictures(opened, prompt, [1, 3])
    attentions = eager(NAME)(**prompt.inputs, output_attentions=True).attentions
    pooling = opened.model.model.multi_modal_projector.attention().mean(0)
    for found, picture in zip(maps, find_pictures(opened, prompt), strict=True):
        places = list(picture.positions)
        rows = torch.stack([attentions[layer][0, :, -1, places].mean(0) for layer in (1, 3)])
        torch.testing.assert_close(found, (rows @ pooling[: len(places)]).unflatten(1, (4, 4)), atol=1e-6, rtol=1e-4)
    kept = attention_to_pictures(opened, prompt, [1, 3], read=read_pictures(opened, prompt))
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(maps, kept, strict=True))


def test_crops_fewer_tokens_and_pruning_compose() -> None:
    opened = backend(NAME)
    answer = opened.answer(seen(1), crop=ViCrop(base=30), num_visual_tokens=6, prune=KeepFirst(0.5), max_new_tokens=3)
    assert list(answer.steps) == ["crop", "prune"]
    plain = opened.answer(seen(1), crop=ViCrop(base=30), num_visual_tokens=6, max_new_tokens=3)
    assert plain.usage.prompt_tokens - answer.usage.prompt_tokens == 6  # two pictures of six tokens, half of them
