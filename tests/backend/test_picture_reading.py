"""What is read of pictures the short way is what the whole model computes, in every family.

Short: one row of attention, no layer above the deepest, the pictures read once for several questions.
"""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from qr_integrations.backend.picture_reading import (
    attention_to_pictures,
    continued_inputs,
    find_pictures,
    last_row,
    pixel_gradients,
    read_pictures,
)
from qr_integrations.errors import HeadError, InputError, UnsupportedModelError
from qr_integrations.types import Message
from tests.backend.found_pictures import TALL, WIDE, noise
from tests.backend.seeing import (
    OTHER,
    QUESTION,
    backend,
    breaking,
    counted,
    eager,
    equal,
    fresh,
    layers,
    pictures,
    seen,
)

FAMILIES = ["llava", "pixtral", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3"]
FAMILIES += ["idefics3", "internvl", "mistral3"]
ALL = (0, 1, 2, 3)
each_family = pytest.mark.parametrize("name", FAMILIES)


def reference(name: str, prompt: Any, *, weighed: bool = False) -> list[Tensor]:
    """For each picture, the last row of all layers out of full attention matrices; ``[L, rows, columns]``."""
    with torch.set_grad_enabled(weighed):
        output = eager(name)(**prompt.inputs, output_attentions=True, use_cache=False)
        best = output.logits[0, -1].log_softmax(-1).max()
    rows = torch.stack([one[0, :, -1] for one in output.attentions]).detach()
    if weighed:
        gradients = torch.autograd.grad(best, output.attentions)
        rows = rows * torch.stack([one[0, :, -1] for one in gradients]).relu()
    found = find_pictures(backend(name), prompt)
    means = rows.mean(1)
    return [means[:, list(one.positions)].unflatten(1, (one.grid.rows, one.grid.columns)) for one in found]


# ---- the same numbers


@each_family
def test_the_row_that_is_read_is_that_of_the_attention_matrices(name: str) -> None:
    opened = backend(name)
    prompt = opened.lay_out(seen())
    expected = reference(name, prompt)
    assert all(one.shape[0] == 4 and one.sum() > 0 for one in expected)
    equal(attention_to_pictures(opened, prompt, ALL), expected)
    equal(attention_to_pictures(opened, prompt, (3, 1)), [one[[3, 1]] for one in expected])
    equal(attention_to_pictures(opened, prompt, (1,)), [one[[1]] for one in expected])


@each_family
def test_a_weighed_row_is_that_of_full_gradients(name: str) -> None:
    opened = backend(name)
    prompt = opened.lay_out(seen())
    expected = reference(name, prompt, weighed=True)
    assert max(float(one.max()) for one in expected) > 0
    equal(attention_to_pictures(opened, prompt, ALL, weighed=True), expected, 1e-4)
    equal(attention_to_pictures(opened, prompt, (2,), weighed=True), [one[[2]] for one in expected], 1e-4)


@each_family
@pytest.mark.parametrize("weighed", [False, True])
def test_questions_share_what_was_read(name: str, weighed: bool) -> None:
    opened = backend(name)
    prompts = [opened.lay_out(seen(question=question)) for question in (QUESTION, OTHER)]
    read = read_pictures(opened, prompts[0])
    assert read is not None
    found = [attention_to_pictures(opened, prompt, ALL, weighed=weighed, read=read) for prompt in [*prompts, *prompts]]
    for shared, prompt in zip(found, [*prompts, *prompts], strict=True):
        equal(shared, attention_to_pictures(opened, prompt, ALL, weighed=weighed), 1e-4)
    with counted(layers(opened)[0]) as tokens:
        attention_to_pictures(opened, prompts[1], ALL, read=read)
    assert tokens == [len(prompts[1]) - len(read.prefix)]
    assert len(read.prefix) == read.prefix.cache.get_seq_length()  # as long as before


@each_family
def test_another_picture_of_the_same_size_is_read_anew(name: str) -> None:
    """Its placeholders are the same."""
    opened = backend(name)
    prompt, other = (opened.lay_out([Message.user(noise(WIDE, seed), QUESTION)]) for seed in (0, 5))
    assert prompt.token_ids == other.token_ids
    read = read_pictures(opened, prompt)
    equal(attention_to_pictures(opened, other, ALL, read=read), attention_to_pictures(opened, other, ALL))


@each_family
def test_a_picture_that_stands_first_is_shared_with_a_prompt_of_two(name: str) -> None:
    """LLaVA-OneVision's processor cuts a picture into tiles only where it stands alone: then it is read anew."""
    opened = backend(name)
    read = read_pictures(opened, opened.lay_out(seen(1)))
    two = opened.lay_out(seen(2))
    equal(attention_to_pictures(opened, two, ALL, read=read), attention_to_pictures(opened, two, ALL))


@pytest.mark.parametrize("weighed", [False, True])
def test_heads_that_share_keys_are_told_apart(weighed: bool) -> None:
    """4 heads, 2 of keys: the mean over heads is over all 4."""
    opened = backend("llava")
    assert {(one.num_heads, one.num_kv_heads) for one in opened.attention_layers.values()} == {(4, 2)}
    prompt = opened.lay_out(seen(1))
    given = dict(prompt.inputs)
    row = last_row(opened, given, (2,), len(prompt), weighed=weighed)
    assert row.shape == (1, len(prompt))
    if not weighed:
        torch.testing.assert_close(row.sum(-1), torch.ones(1))


# ---- what runs, and what is left behind


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3"])
def test_nothing_runs_above_the_deepest_layer(name: str) -> None:
    opened = backend(name)
    prompt = opened.lay_out(seen(1))
    with counted(layers(opened)[1]) as below, counted(layers(opened)[2]) as above, counted_mlp(opened, 1) as mlp:
        attention_to_pictures(opened, prompt, (0, 1))
    assert (len(below), len(above), len(mlp)) == (1, 0, 0)
    with counted(layers(opened)[3]) as above:
        attention_to_pictures(opened, prompt, (0,), weighed=True)
    assert len(above) == 1  # a gradient comes from the top


def counted_mlp(opened: Any, layer: int) -> Any:
    return counted(layers(opened)[layer].mlp)


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_a_pass_that_breaks_leaves_the_model_as_it_was(name: str, weighed: bool) -> None:
    opened = fresh(name)
    prompt = opened.lay_out(seen(1))
    before = attention_to_pictures(opened, prompt, ALL, weighed=weighed)
    before_that = list(standing(opened))
    with breaking(layers(opened)[2]), pytest.raises(ZeroDivisionError):
        attention_to_pictures(opened, prompt, ALL, weighed=weighed)
    assert list(standing(opened)) == before_that
    equal(attention_to_pictures(opened, prompt, ALL, weighed=weighed), before, 0.0)


def standing(opened: Any) -> Iterator[tuple[Any, ...]]:
    """What hangs on each module: its attributes, its config, its hooks."""
    for module in opened.model.modules():
        config, hooks = getattr(module, "config", None), (*module._forward_hooks, *module._forward_pre_hooks)
        yield tuple(vars(module)), id(config), getattr(config, "_attn_implementation", None), hooks


def test_parameters_get_no_gradients() -> None:
    opened = fresh("llava")
    opened.model.requires_grad_(True)  # as `from_pretrained` leaves them
    prompt = opened.lay_out(seen(1))
    read = read_pictures(opened, prompt)
    found = attention_to_pictures(opened, prompt, ALL, weighed=True, read=read)
    gradients = pixel_gradients(opened, prompt)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in opened.model.parameters())
    assert not any(one.requires_grad for one in (*found, *gradients))
    equal(found, attention_to_pictures(backend("llava"), prompt, ALL, weighed=True), 1e-4)


@torch.no_grad()
def test_gradients_are_had_where_the_caller_wants_none() -> None:
    opened = backend("llava")
    prompt = opened.lay_out(seen(1))
    equal(attention_to_pictures(opened, prompt, ALL, weighed=True), reference("llava", prompt, weighed=True), 1e-4)
    assert not torch.is_grad_enabled()


# ---- where there is nothing to share, or to read


@pytest.mark.parametrize("name", ["paligemma", "instructblip"])
def test_pictures_that_are_read_with_the_question_are_not_shared(name: str) -> None:
    opened = backend(name)
    assert read_pictures(opened, opened.lay_out(seen(1))) is None


def test_a_prompt_without_pictures() -> None:
    opened = backend("llava")
    prompt = opened.lay_out(QUESTION)
    assert find_pictures(opened, prompt) == ()
    assert read_pictures(opened, prompt) is None
    assert attention_to_pictures(opened, prompt, ALL) == ()


def test_paligemma_attends_in_both_directions() -> None:
    opened = backend("paligemma")
    prompt = opened.lay_out(seen(1))
    equal(attention_to_pictures(opened, prompt, ALL), reference("paligemma", prompt))


def test_layers_that_are_not_there_are_named() -> None:
    opened = backend("llava")
    with pytest.raises(HeadError, match=r"layer 9: pass layers among \[0, 1, 2, 3\]"):
        attention_to_pictures(opened, opened.lay_out(seen(1)), (1, 9))


def test_a_family_without_a_row_is_named() -> None:
    opened = fresh("llava")
    prompt = opened.lay_out(seen(1))
    opened.model.config.model_type = "sees_somehow"
    with pytest.raises(UnsupportedModelError, match="sees_somehow"):
        attention_to_pictures(opened, prompt, ALL)


# ---- going on


@each_family
def test_what_was_read_stays_as_it_was_while_answers_grow(name: str) -> None:
    opened = backend(name)
    prompt, two = opened.lay_out(seen(1)), opened.lay_out(seen(1, OTHER))
    read = read_pictures(opened, prompt)
    assert read is not None and read.prefix.cache is not None
    kept = copy.deepcopy(read.prefix.cache)
    for asked in (prompt, two, prompt):
        given = continued_inputs(opened, asked, read)
        assert given["past_key_values"].get_seq_length() == len(asked) - 1
        assert "pixel_values" not in given
    for mine, its in zip(read.prefix.cache.layers, kept.layers, strict=True):
        assert torch.equal(mine.keys, its.keys) and torch.equal(mine.values, its.values)


def test_a_prompt_that_begins_otherwise_is_given_whole() -> None:
    opened = backend("llava")
    read = read_pictures(opened, opened.lay_out(seen(1)))
    behind = opened.lay_out([Message.user(QUESTION, *pictures(1))])
    assert set(continued_inputs(opened, behind, read)) == set(behind.inputs)
    nothing_behind = opened.lay_out(seen(1))
    cut = type(nothing_behind)(
        nothing_behind.messages, nothing_behind.inputs, nothing_behind.token_ids[: len(read.prefix)]
    )
    assert not read.begins(cut, read.pictures, None)


# ---- pixels


@pytest.mark.parametrize("name", ["llava", "gemma3", "paligemma", "mistral3"])
def test_a_pixels_gradient_is_how_much_it_moves_the_answer(name: str) -> None:
    """By differences; norms and softmaxes are computed in single precision even so."""
    opened = fresh(name)
    opened.model.double()
    prompt = opened.lay_out(seen(2))
    found = pixel_gradients(opened, prompt)
    for picture, (row, column) in [(0, (20, 30)), (1, (11, 7))]:
        moved = [moves(opened, prompt, (picture, colour, row, column)) for colour in range(3)]
        expected = torch.tensor(moved).norm()
        assert expected > 0
        torch.testing.assert_close(found[picture][row, column].double(), expected.double(), rtol=0.05, atol=0.0)


def moves(opened: Any, prompt: Any, place: tuple[int, ...], step: float = 1e-2) -> float:
    best = []
    for by in (step, -step):
        pixels = prompt.inputs["pixel_values"].double().clone()
        pixels[place] += by
        logits = opened.model(**{**prompt.inputs, "pixel_values": pixels}).logits[0, -1]
        best.append(float(logits.log_softmax(-1).max()))
    return (best[0] - best[1]) / (2 * step)


@pytest.mark.parametrize("name", ["mistral3", "pixtral"])
def test_padding_between_pictures_is_no_picture(name: str) -> None:
    """The processor pads the pictures of a prompt to the largest; each has as many pixels as cells."""
    opened = backend(name)
    prompt = opened.lay_out(seen(2))
    found, where = pixel_gradients(opened, prompt), find_pictures(opened, prompt)
    assert found[0].shape != found[1].shape
    cell = 28 if name == "mistral3" else 14
    assert [tuple(one.shape) for one in found] == [(cell * one.grid.rows, cell * one.grid.columns) for one in where]


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision", "qwen2_5_vl", "idefics3", "internvl"])
def test_tiles_and_patches_form_no_picture(name: str) -> None:
    opened = backend(name)
    with pytest.raises(InputError, match="use the relative or gradient method"):
        pixel_gradients(opened, opened.lay_out([Message.user(noise(WIDE, 0), noise(TALL, 1), QUESTION)]))


def test_text_alone_has_no_pixels() -> None:
    opened = backend("llava")
    with pytest.raises(InputError, match="one square of pixels"):
        pixel_gradients(opened, opened.lay_out(QUESTION))
