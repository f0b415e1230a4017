"""InstructBLIP: its maps against eager attention and full autograd, and its answers to one picture, two and none."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.backend.tiny_vlms import random_model, tiny

if TYPE_CHECKING:
    from qr_integrations.backend import Backend

QUESTION = "what colour is the large square ?"
SLOTS, ROWS, COLUMNS = 8, 4, 4
PUBLISHED_LAYERS = 12  # of the Q-Former, with cross-attention in every other one


def noise(size: tuple[int, int], seed: int) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


PICTURES = (noise((300, 200), 0), noise((100, 150), 1))


def instructblip(kernel: str = "sdpa", queries_layers: int | None = None) -> tuple[Any, Any]:
    model, processor = tiny("instructblip")
    if queries_layers is not None:
        config = model.config
        config.qformer_config.num_hidden_layers = queries_layers
        name, parts = "InstructBlipForConditionalGeneration", config.to_dict()
        model = random_model(name, "InstructBlipConfig", processor.tokenizer, **parts)
    model.set_attn_implementation(kernel)
    return model, processor


def opened(*how: Any) -> "Backend":
    from qr_integrations.backend import Backend

    model, processor = instructblip(*how)
    return Backend(model, processor.tokenizer, processor=processor)


@pytest.fixture(scope="module")
def backend() -> "Backend":
    return opened()


def asked(backend: "Backend", *pictures: Image.Image, question: str = QUESTION) -> Any:
    from qr_integrations.types import Message

    return backend.lay_out([Message.user(*pictures, question)])


def eager_attention(inputs: Mapping[str, Tensor], *how: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The log probability of the most probable answer token, with the graph; all attention, from an eager copy.

    Of the language model per layer, ``[1, H, T, T]``; of the queries per cross-attention, ``[P, H, Q, N + 1]``.
    """
    model, _ = instructblip("eager", *how)
    model.requires_grad_(True)
    queries = {name: value for name, value in inputs.items() if name.startswith("qformer_")}
    seen = model.get_image_features(inputs["pixel_values"], **queries, output_attentions=True, return_dict=True)
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    output = model(
        pixel_values=None,
        qformer_input_ids=None,
        mm_encoder_outputs={"image": seen},
        **text,
        output_attentions=True,
    )
    best = output.logits[0, -1].log_softmax(-1).max()
    return best, list(output.language_model_outputs.attentions), list(seen.qformer_outputs.cross_attentions)


def naive(slots_HQ: Tensor, looks_HQN: Tensor) -> Tensor:
    """Every head of the language model with every head of the queries: the mean of all products."""
    pairs = torch.einsum("hq,gqn->hgn", slots_HQ, looks_HQN)
    return pairs.mean((0, 1)).view(ROWS, COLUMNS)


# ---- maps


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize(("queries_layers", "crossing"), [(None, 1), (PUBLISHED_LAYERS, 2)])
def test_a_map_is_the_composition_of_two_attentions(
    kernel: str, count: int, queries_layers: int | None, crossing: int
) -> None:
    from qr_integrations.backend.picture_reading import attention_to_pictures

    backend = opened(kernel, queries_layers)
    prompt = asked(backend, *PICTURES[:count])
    maps = attention_to_pictures(backend, prompt, (1, 3))
    with torch.no_grad():
        _, rows, looks = eager_attention(prompt.inputs, queries_layers)
    assert len(maps) == count
    for number, found in enumerate(maps):
        slots = slice(number * SLOTS, (number + 1) * SLOTS)
        for place, layer in enumerate((1, 3)):
            row_HQ, look_HQN = rows[layer][0, :, -1, slots], looks[crossing][number]
            torch.testing.assert_close(found[place], naive(row_HQ, look_HQN[..., 1:]), atol=1e-7, rtol=1e-4)
            kept = (row_HQ.mean(0) * (1 - look_HQN[..., 0].mean(0))).sum()
            torch.testing.assert_close(found[place].sum(), kept, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize(("queries_layers", "crossing"), [(None, 1), (PUBLISHED_LAYERS, 2)])
@pytest.mark.parametrize("count", [1, 2])
def test_weighed_maps_have_the_gradients_of_full_autograd(
    kernel: str, count: int, queries_layers: int | None, crossing: int
) -> None:
    from qr_integrations.backend.picture_reading import attention_to_pictures

    backend = opened(kernel, queries_layers)
    prompt = asked(backend, *PICTURES[:count])
    maps = attention_to_pictures(backend, prompt, (2,), weighed=True)
    best, rows, looks = eager_attention(prompt.inputs, queries_layers)
    of_row, of_look = torch.autograd.grad(best, [rows[2], looks[crossing]])
    row_HT = (rows[2] * of_row.relu())[0, :, -1]
    look_PHQN = (looks[crossing] * of_look.relu())[..., 1:]
    for number, found in enumerate(maps):
        expected = naive(row_HT[:, number * SLOTS : (number + 1) * SLOTS], look_PHQN[number])
        assert expected.max() > 0
        torch.testing.assert_close(found[0], expected.detach(), atol=1e-4 * float(expected.detach().max()), rtol=1e-3)


def state(model: Any) -> Iterator[Any]:
    """What a look might leave behind."""
    for module in model.modules():
        yield id(getattr(module, "config", None))
        yield len(module._forward_hooks), len(module._forward_pre_hooks)
    yield [parameter.grad for parameter in model.parameters()]
    yield vars(model.qformer.config).copy()


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("layer", [1, 99])
def test_a_look_leaves_nothing_behind(layer: int, weighed: bool) -> None:
    from qr_integrations.backend.picture_reading import attention_to_pictures
    from qr_integrations.errors import HeadError

    backend = opened()
    backend.model.requires_grad_(True)
    prompt = asked(backend, PICTURES[0])
    backend.model(**prompt.inputs)
    before = list(state(backend.model))
    try:
        (found,) = attention_to_pictures(backend, prompt, (layer,), weighed=weighed)
        assert not found.requires_grad
    except HeadError:
        assert layer == 99
    assert list(state(backend.model)) == before
    assert all(parameter.requires_grad and parameter.grad is None for parameter in backend.model.parameters())


def test_a_pass_that_fails_leaves_nothing_behind(backend: "Backend", monkeypatch: pytest.MonkeyPatch) -> None:
    from qr_integrations.backend.picture_reading import attention_to_pictures

    prompt = asked(backend, PICTURES[0])
    backend.model(**prompt.inputs)
    before = list(state(backend.model))

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("broken")

    with monkeypatch.context() as patched:
        patched.setattr(backend.model.language_projection, "forward", fail)
        with pytest.raises(RuntimeError, match="broken"):
            attention_to_pictures(backend, prompt, (1,), weighed=True)
    assert list(state(backend.model)) == before


# ---- answers


def test_one_picture_is_laid_out_as_the_processor_does(backend: "Backend") -> None:
    prompt = asked(backend, PICTURES[0])
    processor: Any = backend.processor
    theirs = processor(images=PICTURES[0], text=f"Question: {QUESTION} Short answer:", return_tensors="pt")
    assert prompt.inputs.keys() == theirs.keys()
    assert all(torch.equal(prompt.inputs[name], theirs[name]) for name in theirs)


def test_the_answer_to_one_picture_is_the_models_own(backend: "Backend") -> None:
    from qr_integrations.types import Message

    answer = backend.answer([Message.user(PICTURES[0], QUESTION)], max_new_tokens=6)
    processor: Any = backend.processor
    inputs = processor(images=PICTURES[0], text=f"Question: {QUESTION} Short answer:", return_tensors="pt")
    ids = backend.model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert answer.text == processor.batch_decode(ids, skip_special_tokens=True)[0].strip()
    assert answer.text
    assert answer.usage.prompt_tokens == inputs["input_ids"].shape[1]


def test_two_pictures_keep_the_features_that_each_has_alone(backend: "Backend") -> None:
    def features(*pictures: Image.Image) -> Tensor:
        names = ("pixel_values", "qformer_input_ids", "qformer_attention_mask")
        inputs = asked(backend, *pictures).inputs
        model: Any = backend.model
        found: Tensor = model.get_image_features(**{name: inputs[name] for name in names}).pooler_output
        return found

    alone = torch.cat([features(picture) for picture in PICTURES])
    assert (alone[0] - alone[1]).abs().max() > 0.01
    torch.testing.assert_close(features(*PICTURES), alone, atol=1e-5, rtol=1e-5)


def test_two_pictures_are_answered_from_their_features_in_order(backend: "Backend") -> None:
    from qr_integrations.types import Message

    model: Any = backend.model
    singles = [asked(backend, picture).inputs for picture in PICTURES]
    names = ("pixel_values", "qformer_input_ids", "qformer_attention_mask")
    features = [model.get_image_features(**{name: one[name] for name in names}).pooler_output for one in singles]
    words = singles[0]["input_ids"][:, SLOTS:]
    embedded = torch.cat([*features, model.get_input_embeddings()(words)], dim=1)
    expected = model.language_model(inputs_embeds=embedded).logits[0, -1]
    torch.testing.assert_close(model(**asked(backend, *PICTURES).inputs).logits[0, -1], expected, atol=1e-4, rtol=1e-4)
    ids = model.language_model.generate(inputs_embeds=embedded, max_new_tokens=6, do_sample=False)
    answer = backend.answer([Message.user(*PICTURES, QUESTION)], max_new_tokens=6)
    assert answer.text == backend.tokenizer.decode(ids[0], skip_special_tokens=True).strip()
    assert answer.usage.prompt_tokens == 2 * SLOTS + words.shape[1]


def test_a_question_without_a_picture_is_answered_by_the_language_model(backend: "Backend") -> None:
    model: Any = backend.model
    prompt = asked(backend)
    assert prompt.inputs.keys() == {"input_ids", "attention_mask"}
    ids = model.language_model.generate(**prompt.inputs, max_new_tokens=6, do_sample=False)[0, len(prompt) :]
    assert backend.answer(QUESTION, max_new_tokens=6).text == backend.tokenizer.decode(ids, skip_special_tokens=True)


def test_words_that_spell_a_placeholder_show_no_picture(backend: "Backend") -> None:
    from qr_integrations.backend.picture_reading import find_pictures

    prompt = asked(backend, *PICTURES, question="what is <image> ?")
    slots = prompt.inputs["input_ids"][0] == backend.model.config.image_token_id
    assert int(slots.sum()) == 2 * SLOTS
    assert len(find_pictures(backend, prompt)) == 2


def test_a_question_longer_than_the_queries_can_read_is_refused(backend: "Backend") -> None:
    from qr_integrations.errors import WindowError

    longest = backend.model.config.qformer_config.max_position_embeddings
    with pytest.raises(WindowError, match=f"holds {longest}: pass a shorter question"):
        asked(backend, PICTURES[0], question="what " * longest)


# ---- looking again


@pytest.mark.parametrize("method", ["relative", "gradient", "input_gradient"])
@pytest.mark.parametrize("count", [1, 2])
def test_a_crop_is_found_and_read_behind_the_pictures(backend: "Backend", method: Any, count: int) -> None:
    from qr_integrations.cropping import ViCrop
    from qr_integrations.types import Message

    pictures = PICTURES[:count]
    messages = [Message.user(*pictures, QUESTION)]
    answer = backend.answer(messages, crop=ViCrop(method=method), max_new_tokens=4)
    looks = answer.steps["crop"]
    assert [look.importance.values.shape for look in looks] == [(ROWS, COLUMNS)] * count
    assert all(look.importance.is_informative for look in looks)
    assert [look.importance.covers for look in looks] == [(0.0, 0.0, *picture.size) for picture in pictures]
    crops = [picture.crop(look.box.as_tuple()) for picture, look in zip(pictures, looks, strict=True)]
    assert all(crop.size < picture.size for picture, crop in zip(pictures, crops, strict=True))

    shown = asked(backend, *pictures, *crops)
    assert answer.usage.prompt_tokens == len(shown)
    ids = backend.model.generate(**shown.inputs, max_new_tokens=4, do_sample=False)[0, len(shown) :]
    assert answer.text == backend.tokenizer.decode(ids, skip_special_tokens=True)


def test_pixel_gradients_are_told_in_patches(backend: "Backend") -> None:
    from qr_integrations.backend.picture_reading import pixel_gradients
    from qr_integrations.cropping import InputGradient
    from qr_integrations.cropping.asking import GENERIC
    from qr_integrations.cropping.high_pass import high_pass_mask

    found = InputGradient(backend).importance(PICTURES[0], QUESTION).values
    prompts = (asked(backend, PICTURES[0], question=question) for question in (QUESTION, GENERIC))
    ((of_question,), (of_generic,)) = (pixel_gradients(backend, prompt) for prompt in prompts)
    edges = of_question / of_generic * torch.from_numpy(high_pass_mask(PICTURES[0], (56, 56)))
    patches = edges.view(ROWS, 14, COLUMNS, 14).mean((1, 3))
    torch.testing.assert_close(torch.from_numpy(found), patches, atol=1e-5, rtol=1e-4)
