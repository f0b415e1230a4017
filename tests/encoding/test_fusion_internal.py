"""Fusion inside the language model: starts as the old model, and reads the same in pieces, batches and beams."""

from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from tests.encoding.fusing import (
    IMAGE,
    INTERNAL,
    direct,
    each_internal,
    fused,
    gated,
    inputs,
    old_projector,
    randomize,
    stacked,
    tiny_llava,
)

WIRINGS = ("pre", "post", "parallel")


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    return tiny_llava()


# ---- internal


def test_internal_direct_fusion_starts_as_the_model_it_was_made_of(model: Any) -> None:
    for layers in ("single", "double", "triple", "former", "latter", "all"):
        made = fused(model, layers, "internal_direct")
        old_projector(model, made)
        assert torch.equal(made(**inputs(2)).logits, model(**inputs(2)).logits), layers


@pytest.mark.parametrize("wiring", WIRINGS)
def test_internal_modular_fusion_starts_as_the_model_it_was_made_of(model: Any, wiring: str) -> None:
    made = fused(model, "all", "internal_modular", wiring)
    old_projector(model, made)
    assert torch.equal(made(**inputs(2)).logits, model(**inputs(2)).logits)


def test_the_wirings_differ(model: Any) -> None:
    logits = [make(model)(**inputs()).logits for make in INTERNAL.values()]
    for i, one in enumerate(logits):
        for other in logits[:i]:
            assert (one - other).abs().max() > 1e-2


def test_internal_direct_fusion_adds_to_the_rows_of_pictures_alone(model: Any) -> None:
    made = fused(model, "single", "internal_direct")  # layer 9 of 12 arrives at layer 2 of 4
    old_projector(model, made)
    randomize(made.model.multi_modal_projector.projectors)
    states, places = [], inputs(2)["input_ids"][0] == IMAGE
    for one in (model, made):
        made_states = one(**inputs(2), output_hidden_states=True).hidden_states
        states.append(made_states)
        entered: list[torch.Tensor] = []
        hook = one.model.language_model.layers[2].input_layernorm.register_forward_pre_hook(
            lambda module, args, entered=entered: entered.append(args[0])
        )
        one(**inputs(2))
        hook.remove()
        states[-1] = (*made_states[:3], entered[0])
    for before in range(3):
        assert torch.equal(states[0][before], states[1][before])  # also what is recorded: nothing changes in place
    change = states[1][3] - states[0][3]
    assert torch.equal(change[0, ~places], torch.zeros_like(change[0, ~places]))
    assert bool((change[0, places].abs().sum(-1) > 0).all())


@each_internal
def test_tokens_that_follow_one_by_one_get_what_they_get_at_once(model: Any, make: Any) -> None:
    made, given = make(model), inputs(2, behind=8)
    whole = made(**given).logits
    cut = given["input_ids"].shape[1] - 3
    beginning = {name: given[name][:, :cut] for name in ("input_ids", "attention_mask")}
    output = made(**beginning, pixel_values=given["pixel_values"], use_cache=True)
    rest = []
    for place in range(cut, cut + 3):
        ids, mask = given["input_ids"][:, place : place + 1], given["attention_mask"][:, : place + 1]
        step = made(input_ids=ids, attention_mask=mask, past_key_values=output.past_key_values, use_cache=True)
        rest.append(step.logits)
    torch.testing.assert_close(torch.cat(rest, 1), whole[:, cut:], atol=2e-5, rtol=1e-4)


@each_internal
def test_a_prefix_takes_the_pictures_along(model: Any, make: Any) -> None:
    from transformers import DynamicCache

    from qr_integrations.backend.prefix import Prefix

    made, given, cache = make(model), inputs(2, behind=8), DynamicCache()
    cut = given["input_ids"].shape[1] - 3
    made(input_ids=given["input_ids"][:, :cut], pixel_values=given["pixel_values"], past_key_values=cache)
    prefix = Prefix(tuple(given["input_ids"][0, :cut].tolist()), 3, cache)
    whole = made(**given).logits[:, cut:]
    for continued in (prefix.branch(), prefix.growing()):
        rest = made(input_ids=given["input_ids"][:, cut:], past_key_values=continued).logits
        torch.testing.assert_close(rest, whole, atol=2e-5, rtol=1e-4)


@each_internal
def test_a_cache_that_was_emptied_forgets_its_pictures(model: Any, make: Any) -> None:
    from transformers import DynamicCache

    made, cache = make(model), DynamicCache()
    made(**inputs(1), past_key_values=cache)
    cache.reset()
    cache.layers.clear()
    made(**inputs(0), past_key_values=cache)
    following = made(input_ids=torch.tensor([[9]]), past_key_values=cache).logits
    fresh = DynamicCache()
    made(**inputs(0), past_key_values=fresh)
    assert torch.equal(following, made(input_ids=torch.tensor([[9]]), past_key_values=fresh).logits)


@each_internal
def test_prompts_in_a_batch_are_read_as_alone(model: Any, make: Any) -> None:
    """Two pictures, one, none; padded at the left."""
    made = make(model)
    prompts = [inputs(2, 3), inputs(1, 9), inputs(0, 6)]
    prompts[1]["pixel_values"] = prompts[1]["pixel_values"] * 0.5
    together = made(**stacked(*prompts)).logits
    for row, prompt in zip(together, prompts, strict=True):
        alone = made(**prompt).logits[0]
        torch.testing.assert_close(row[-len(alone) :], alone, atol=2e-5, rtol=1e-4)


@each_internal
def test_what_is_passed_by_position_counts_as_well(model: Any, make: Any) -> None:
    made, given = make(model).model, inputs(2, padding=3)
    by_position = made(given["input_ids"], given["pixel_values"], given["attention_mask"]).last_hidden_state
    assert torch.equal(by_position[:, 3:], made(**given).last_hidden_state[:, 3:])


@each_internal
def test_text_is_read_as_by_the_model_it_was_made_of(model: Any, make: Any) -> None:
    made = make(model)
    made(**inputs(1))
    assert torch.equal(made(**inputs(0)).logits, model(**inputs(0)).logits)


@each_internal
def test_beams_and_chunks_carry_the_pictures_along(model: Any, make: Any) -> None:
    made, prompts = make(model), stacked(inputs(2, 3), inputs(1, 7))
    options: dict[str, Any] = dict(max_new_tokens=4, do_sample=False, suppress_tokens=[IMAGE, 2], length_penalty=0.0)
    several = dict(num_beams=3, num_return_sequences=3, return_dict_in_generate=True, output_scores=True)
    beams = made.generate(**prompts, **options, **several)
    for number in range(3):
        scores = total_score(made, prompts, beams.sequences.view(2, 3, -1)[:, number])
        torch.testing.assert_close(beams.sequences_scores.view(2, 3)[:, number], scores, atol=1e-4, rtol=1e-4)
    chunked = made.generate(**prompts, **options, prefill_chunk_size=40)
    assert torch.equal(chunked, made.generate(**prompts, **options))


def total_score(made: Any, prompts: dict[str, Any], ids: torch.Tensor) -> torch.Tensor:
    """Log probability of what was generated, by a pass over all of it."""
    length = prompts["input_ids"].shape[1]
    mask = torch.cat([prompts["attention_mask"], torch.ones_like(ids[:, length:])], 1)
    logits = made(input_ids=ids, attention_mask=mask, pixel_values=prompts["pixel_values"]).logits[:, length - 1 : -1]
    return logits.log_softmax(-1).gather(-1, ids[:, length:, None]).sum((1, 2))


def test_chunks_may_cut_through_pictures_in_internal_direct_fusion(model: Any) -> None:
    made, prompts = direct(model), stacked(inputs(2, 3), inputs(1, 7))
    options: dict[str, Any] = dict(max_new_tokens=4, do_sample=False, suppress_tokens=[IMAGE, 2])
    whole = made.generate(**prompts, **options)
    assert torch.equal(made.generate(**prompts, **options, prefill_chunk_size=5), whole)


def test_all_rows_see_all_patches_in_internal_modular_fusion(model: Any) -> None:
    """The published mask lets a row at place p see the first p patches only."""
    made = gated(model, layers="single")
    given = inputs()
    changed = {**given, "pixel_values": given["pixel_values"].clone()}
    changed["pixel_values"][..., 28:, 28:] += 1.0  # the last patch, and what the tower makes of the others
    first = [made(**one).logits[0, 0] for one in (given, changed)]
    assert not torch.allclose(*first, atol=1e-4)


def test_gradient_checkpointing_gives_the_same_gradients_or_is_refused(model: Any) -> None:
    """Within internal modular fusion layers would be computed again without their pictures."""
    from qr_integrations.errors import InputError

    gradients = []
    for checkpointing in (False, True):
        made = direct(model).train()
        projector = made.model.multi_modal_projector.requires_grad_(True)
        if checkpointing:
            made.gradient_checkpointing_enable({"use_reentrant": False})
        made(**inputs(), use_cache=False).logits.square().sum().backward()
        gradients.append([parameter.grad for parameter in projector.parameters()])
    torch.testing.assert_close(*gradients)
    for wiring in WIRINGS:
        made = gated(model, wiring).train()
        made.gradient_checkpointing_enable({"use_reentrant": False})
        with pytest.raises(InputError, match="gradient_checkpointing_disable"):
            made(**inputs(), use_cache=False)
        made.eval()(**inputs())


@each_internal
def test_a_pass_that_fails_leaves_nothing_behind(model: Any, make: Any) -> None:
    made = make(model)
    before = made(**inputs(0)).logits
    with pytest.raises(Exception, match=r"do not match|not fit"):
        made(**{**inputs(2), "pixel_values": torch.randn(1, 3, 42, 42)})
    assert torch.equal(made(**inputs(0)).logits, before)


def test_only_internal_direct_fusion_refuses_to_be_pruned(qr_mini_vl: Any) -> None:
    from PIL import Image

    from qr_integrations.backend import Backend
    from qr_integrations.errors import InputError
    from qr_integrations.pruning.cdpruner import CDPruner
    from qr_integrations.types import Message

    question = [Message.user("what color is the box ?", Image.new("RGB", (140, 140), "red"))]
    for strategy in ("external_modular", "internal_modular", "internal_direct"):
        made = fused(qr_mini_vl, "triple", strategy)
        old_projector(qr_mini_vl.model, made)
        backend = Backend(made, qr_mini_vl.tokenizer, processor=qr_mini_vl.processor)
        if strategy == "internal_direct":
            with pytest.raises(InputError, match="every token of a picture"):
                backend.answer(question, prune=CDPruner(keep=50))
        else:
            pruned = backend.answer(question, prune=CDPruner(keep=50)).text
            assert pruned == qr_mini_vl.answer(question, prune=CDPruner(keep=50)).text
