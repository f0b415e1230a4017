"""Fewer tokens of pictures: who drops nothing changes nothing, and who drops some gets what a plain loop gives."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from qr_integrations.backend import Backend
from qr_integrations.backend.picture_families import picture_family
from qr_integrations.backend.prompts import Prompt
from qr_integrations.backend.surgery import prefill_pruned
from qr_integrations.cropping.vicrop import ViCrop
from qr_integrations.decoding import DeCo
from qr_integrations.errors import InputError, UnsupportedModelError
from qr_integrations.types import Message
from tests.backend.pruners import KeepFirst, by_hand
from tests.backend.seeing import OTHER, QUESTION, backend, breaking, fresh, layers, pictures, seen

PRUNED = ["llava", "pixtral", "llava_next", "qwen2_vl", "qwen2_5_vl", "idefics3", "smolvlm", "internvl", "mistral3"]
PRUNED += ["mqt_llava"]
WHOLE = ["llava_onevision", "qwen3_vl", "instructblip", "gemma3", "paligemma"]
DIFFERENT = [seen(1), seen(2, OTHER), (Message.user(*pictures(1), "what ?"),)]
ALL, BEFORE = KeepFirst(), KeepFirst(0.5)
WITHIN = KeepFirst(layers=(0, 2), share=0.5)
SETTINGS = [BEFORE, WITHIN, KeepFirst(0.7, (1,), 0.5), KeepFirst(layers=(0, 2), share=0.5, merge=True)]
SETTINGS += [KeepFirst(one.first, one.layers, one.share, compact=False, merge=one.merge) for one in SETTINGS]


def together(opened: Backend, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    """Prompts of different lengths as one batch, padded at the left."""
    longest = max(len(prompt) for prompt in prompts)
    tiles = max((prompt.inputs["pixel_values"].shape[1] for prompt in prompts), default=0)
    batch: dict[str, Tensor] = {}
    for name, first in prompts[0].inputs.items():
        parts = [prompt.inputs[name] for prompt in prompts]
        if first.shape == prompts[0].inputs["input_ids"].shape:
            filler = int(opened.tokenizer.pad_token_id or 0) if name == "input_ids" else 0
            parts = [pad(part, (longest - part.shape[1], 0), value=filler) for part in parts]
        elif first.dim() == 5:  # tiles of each picture, or of each prompt
            parts = [pad(part, (0,) * 6 + (0, tiles - part.shape[1])) for part in parts]
        batch[name] = torch.cat(parts)
    return batch


# ---- who drops nothing


@pytest.mark.parametrize("pruner", [ALL, KeepFirst(layers=(0, 2))], ids=["before", "within"])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", PRUNED)
def test_keeping_all_changes_no_bit(name: str, count: int, pruner: KeepFirst) -> None:
    opened = backend(name)
    prompt = opened.lay_out(seen(count))
    plain = opened.model(**prompt.inputs, use_cache=True, logits_to_keep=1)
    kept = prefill_pruned(opened, prompt.inputs, pruner)
    assert torch.equal(kept.logits, plain.logits[:, -1])
    assert kept.lengths == (len(prompt),) * len(layers(opened))
    assert all(
        torch.equal(a.keys, b.keys) for a, b in zip(kept.cache.layers, plain.past_key_values.layers, strict=True)
    )


@pytest.mark.parametrize("name", PRUNED)
def test_keeping_all_of_a_padded_batch_changes_no_bit(name: str) -> None:
    opened = backend(name)
    prompts = [opened.lay_out(one) for one in (DIFFERENT[0], DIFFERENT[2])]
    batch = together(opened, prompts)
    assert not batch["attention_mask"].all()
    plain = opened.model(**batch, use_cache=True, logits_to_keep=1).logits[:, -1]
    for pruner in (ALL, KeepFirst(layers=(0, 2))):
        assert torch.equal(prefill_pruned(opened, batch, pruner).logits, plain)


@pytest.mark.parametrize("name", PRUNED)
def test_answers_on_all_tokens_are_the_plain_ones(name: str) -> None:
    opened = backend(name)
    for settings in ({}, {"num_beams": 3}, {"temperature": 4.0, "seed": 3}, {"deco": DeCo(layers=(1, 2))}):
        given: dict[str, Any] = {"max_new_tokens": 6, **settings}
        plain = opened.answer(seen(), **given)
        for pruner in (ALL, KeepFirst(layers=(0, 2))):
            pruned = opened.answer(seen(), prune=pruner, **given)
            assert (pruned.text, pruned.usage) == (plain.text, plain.usage)


# ---- who drops some


@pytest.mark.parametrize("pruner", SETTINGS, ids=str)
@pytest.mark.parametrize("name", PRUNED)
def test_fewer_tokens_are_read_as_a_plain_loop_reads_them(name: str, pruner: KeepFirst) -> None:
    opened = backend(name)
    prompt = opened.lay_out(seen())
    start = prefill_pruned(opened, prompt.inputs, KeepFirst(layers=(0,)))  # to learn what the decoder is given
    whole = start.record[0][1]
    states = given_states(opened, prompt)
    now = type(whole)(**{slot: getattr(whole, slot) for slot in type(whole).__slots__} | {"states": states})
    shorter = now.take(pruner.start(opened, now).before(), pruner.compact) if pruner.first < 1 else now
    pruned = prefill_pruned(opened, prompt.inputs, pruner)
    expected = by_hand(opened, shorter, pruner)
    assert not torch.allclose(expected, start.logits, atol=1e-3)
    torch.testing.assert_close(pruned.logits, expected, atol=2e-5, rtol=1e-4)


def given_states(opened: Backend, prompt: Prompt) -> Tensor:
    caught: list[Tensor] = []
    hook = opened.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: caught.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    try:
        opened.model(**prompt.inputs)
    finally:
        hook.remove()
    return caught[0]


@pytest.mark.parametrize("pruner", SETTINGS, ids=str)
@pytest.mark.parametrize("name", PRUNED)
def test_a_batch_reads_as_its_prompts_alone(name: str, pruner: KeepFirst) -> None:
    opened = backend(name)
    prompts = [opened.lay_out(one) for one in (DIFFERENT[0], DIFFERENT[2])]
    alone = [prefill_pruned(opened, prompt.inputs, pruner) for prompt in prompts]
    batch = prefill_pruned(opened, together(opened, prompts), pruner)
    torch.testing.assert_close(batch.logits, torch.cat([one.logits for one in alone]), atol=2e-5, rtol=1e-4)
    assert batch.lengths == tuple(map(max, zip(*(one.lengths for one in alone), strict=True)))
    assert batch.mask.sum(1).tolist() == [one.lengths[0] for one in alone]


@pytest.mark.parametrize("name", PRUNED)
def test_what_comes_behind_stands_on_what_was_left(name: str) -> None:
    """The first generated token, read as a part of a longer prompt, gives the second one."""
    opened = backend(name)
    for pruner in (BEFORE, KeepFirst(0.5, compact=False), WITHIN, KeepFirst(layers=(0, 2), share=0.5, compact=False)):
        answered = opened.answer(seen(), prune=pruner, max_new_tokens=3, temperature=5.0, seed=1, stop=["</s>"])
        prompt = opened.lay_out(seen())
        words = opened.tokenizer(answered.text, add_special_tokens=False)["input_ids"]
        prefilled = prefill_pruned(opened, prompt.inputs, pruner)
        inputs = prefilled.continued()
        lengths = prefilled.lengths
        assert lengths[0] == answered.usage.prompt_tokens - 1 and lengths[-1] <= lengths[0]
        if not words or any(word < 4 for word in words):
            continue
        longer = dict(prompt.inputs) | extended(prompt, words[0])
        expected = prefill_pruned(opened, longer, pruner).logits
        with prefilled.decoding(opened):
            last = inputs["position_ids"][..., -1:]
            for step, word in enumerate((prompt.token_ids[-1], words[0])):
                ids = torch.tensor([[word]])
                given = {"input_ids": ids, "position_ids": last + step, "past_key_values": prefilled.cache}
                logits = opened.model(**given, use_cache=True).logits[:, -1]
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("pruner", [BEFORE, WITHIN], ids=str)
@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_a_prefix_may_be_continued_again(name: str, pruner: KeepFirst) -> None:
    """After as many tokens and beams as one likes."""
    opened = backend(name)
    inputs = opened.lay_out(seen()).inputs
    prefilled, model = prefill_pruned(opened, inputs, pruner), cast(Any, opened.model)
    before = [layer.keys.clone() for layer in prefilled.cache.layers]

    def went_on(again: Any, beams: int) -> Tensor:
        given = again.continued(beams)
        with again.decoding(opened):
            return cast(Tensor, model.generate(**given, max_new_tokens=4, num_beams=beams, do_sample=False))

    for beams in (1, 3, 2, 1):
        assert torch.equal(went_on(prefilled, beams), went_on(prefill_pruned(opened, inputs, pruner), beams))
    for _ in range(2):
        prefilled.continued()
        for layer, keys in zip(prefilled.cache.layers, before, strict=True):
            assert torch.equal(layer.keys, keys[..., :-1, :])


def extended(prompt: Prompt, word: int) -> dict[str, Tensor]:
    ids = prompt.inputs["input_ids"]
    more = {"input_ids": word, "attention_mask": 1}
    return {
        name: torch.cat([value, torch.full_like(value[:, :1], more.get(name, 0))], 1)
        for name, value in prompt.inputs.items()
        if value.shape == ids.shape
    }


def test_attention_is_that_of_the_rows_asked_for() -> None:
    opened = backend("llava")
    prompt = opened.lay_out(seen())
    prefilled = prefill_pruned(opened, prompt.inputs, KeepFirst(layers=(1, 3)))
    model = fresh("llava").model
    model.set_attn_implementation("eager")
    eager = model(**prompt.inputs, output_attentions=True).attentions
    for layer, _, attention in prefilled.record:
        torch.testing.assert_close(attention[0], eager[layer][0, :, -3:], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", PRUNED)
def test_eager_attention_reads_the_same(name: str) -> None:
    plain, eager = backend(name), fresh(name)
    eager.model.set_attn_implementation("eager")
    prompt = plain.lay_out(seen())
    for pruner in (ALL, BEFORE, WITHIN):
        one, other = (prefill_pruned(opened, prompt.inputs, pruner) for opened in (plain, eager))
        torch.testing.assert_close(one.logits, other.logits, atol=2e-5, rtol=1e-4)


def test_every_tile_of_a_picture_is_a_view_and_ends_of_lines_stay() -> None:
    opened = backend("llava_next")
    prompt = opened.lay_out(seen(2))
    places = picture_family(opened.model.config).places(opened.model, prompt.inputs)
    assert places.picture.unique().tolist() == [0, 1]
    ends = places.cell < 0
    assert bool((places.view[ends] < 0).all()) and int(ends.sum()) > 2
    base = places.view == 0
    assert places.cell[base].tolist() == list(range(16))
    newline = opened.model.model.image_newline
    states = given_states(opened, prompt)[prompt.inputs["input_ids"] == opened.model.config.image_token_id]
    assert torch.equal((states == newline).all(-1), ends)


# ---- composition, and what is left behind


def test_everything_composes() -> None:
    opened = backend("llava")
    answer = opened.answer(seen(), crop=ViCrop(base=30), prune=WITHIN, deco=DeCo(layers=(1, 2)), max_new_tokens=5)
    assert list(answer.steps) == ["crop", "prune", "deco"]
    assert len(answer.steps["prune"]) == 2
    pieces = list(opened.stream(seen(), prune=WITHIN, max_new_tokens=5))
    assert pieces[-1].answer is not None
    assert pieces[-1].answer.text == opened.answer(seen(), prune=WITHIN, max_new_tokens=5).text


def test_without_pictures_there_is_nothing_to_drop() -> None:
    opened = backend("llava")
    answer = opened.answer(QUESTION, prune=WITHIN, max_new_tokens=5)
    assert answer.text == opened.answer(QUESTION, max_new_tokens=5).text and "prune" not in answer.steps


@pytest.mark.parametrize("where", ["pruner", "layer", "tower"])
def test_a_failure_leaves_nothing_behind(where: str) -> None:
    opened = fresh("llava")
    prompt = opened.lay_out(seen())
    before = opened.model(**prompt.inputs).logits
    hooks = [(len(one._forward_pre_hooks), len(one._forward_hooks)) for one in opened.model.modules()]
    configs = [layer.self_attn.config for layer in layers(opened)]
    failing = {"pruner": None, "layer": layers(opened)[3], "tower": opened.model.model.vision_tower}[where]
    with pytest.raises(ZeroDivisionError):
        if failing is None:
            opened.answer(seen(), prune=KeepFirst(layers=(1,), fails=True))
        else:
            with breaking(failing):
                opened.answer(seen(), prune=WITHIN)
    assert [(len(one._forward_pre_hooks), len(one._forward_hooks)) for one in opened.model.modules()] == hooks
    assert [layer.self_attn.config for layer in layers(opened)] == configs
    assert torch.equal(opened.model(**prompt.inputs).logits, before) and not opened.held


def test_sixteen_threads_share_a_model() -> None:
    opened = backend("llava")
    kinds = [ALL, BEFORE, WITHIN, SETTINGS[3]] * 4
    alone = [opened.answer(seen(), prune=kind, max_new_tokens=4).text for kind in kinds]
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(lambda kind: opened.answer(seen(), prune=kind, max_new_tokens=4).text, kinds)) == alone


# ---- refusals


@pytest.mark.parametrize("name", WHOLE)
def test_families_whose_tokens_cannot_go_say_so(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"cannot be dropped.*use a model of type llava"):
        backend(name).answer(seen(1), prune=BEFORE, max_new_tokens=2)


def test_padding_at_the_right_is_refused() -> None:
    opened = backend("llava")
    inputs = dict(opened.lay_out(seen()).inputs)
    inputs["attention_mask"] = inputs["attention_mask"].clone()
    inputs["attention_mask"][:, -1] = 0
    with pytest.raises(InputError, match="padding_side = 'left'"):
        prefill_pruned(opened, inputs, BEFORE)


@pytest.mark.parametrize("wrong", [KeepFirst, "cdpruner", 64])
def test_what_is_no_pruner_is_refused(wrong: Any, unchecked: None) -> None:
    with pytest.raises(InputError, match=r"prune=.* cannot be used: pass prune=CDPruner"):
        backend("llava").answer(seen(), prune=wrong)


def test_a_model_of_a_fixed_number_of_tokens_says_so() -> None:
    with pytest.raises(InputError, match="makes a fixed number of tokens"):
        backend("llava").answer(seen(), num_visual_tokens=8)
