"""Keys moved to other positions are those that the model computes there, or the model says that they cannot move."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qr_integrations.backend import Backend, Prefix
from qr_integrations.backend.rotation import KeyRotation, key_rotation
from qr_integrations.errors import UnsupportedModelError
from qr_integrations.types import Span
from tests.backend.architectures import SUPPORTED, Architecture, row
from tests.backend.measure import Bench, bench, difference, named, random_ids, random_model, tap_all, tiny_tokenizer

NUM_TOKENS = 7  # shorter than the sliding windows, whose caches forget
FIXED = {
    "RecurrentGemma": "its state is reset at position 0",
    "GPT-2": "learned positions",
    "GPTBigCode": "learned positions",
    "OPT": "learned positions",
    "BioGPT": "learned positions",
    "DeepSeek-V2": "keeps rotated keys among its values",
    "DeepSeek-V3": "keeps rotated keys among its values",
    "DeepSeek-V3.2": "keeps rotated keys among its values",
    "MiniCPM3": "keeps rotated keys among its values",
    "MiniMax": "a cache of its own",
    "Hunyuan": "a norm with weights after the rotation",
}
WITHOUT_POSITIONS = {"SmolLM3": {1}, "Command R7B": {1}, "EXAONE 4": {1}, "Jamba": {1, 3}, "Nemotron-H": {1, 3}}
LONG = dict(max_position_embeddings=2048)
ROPES: dict[str, dict[str, Any]] = {
    "linear": dict(factor=4.0),
    "llama3": dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    "yarn": dict(factor=4.0, original_max_position_embeddings=512),
    "dynamic": dict(factor=2.0),
    "longrope": dict(
        factor=4.0, short_factor=[1.0] * 4, long_factor=[1.0, 2.0, 3.0, 4.0], original_max_position_embeddings=512
    ),
}


def with_rope(kind: str) -> Backend:
    rope = dict(rope_type=kind, rope_theta=1e4, **ROPES[kind])
    llama = named("Llama")
    changed = replace(llama, name=kind, kwargs=llama.kwargs | LONG | dict(rope_parameters=rope))
    return Backend(random_model(changed), tiny_tokenizer(), name=kind)


@torch.no_grad()
def keys_at(backend: Backend, ids: Sequence[int], position: int) -> dict[int, Tensor]:
    """The keys of each attention layer, from a plain pass of the model's own decoder."""
    positions = torch.arange(position, position + len(ids))[None]
    cache = backend.decoder(input_ids=torch.tensor([ids]), position_ids=positions, use_cache=True).past_key_values
    layers = {i: layer for i, layer in enumerate(cache.layers) if i in backend.attention_layers}
    return {i: layer.keys for i, layer in layers.items() if isinstance(layer.keys, Tensor)}


def error(rotation: KeyRotation, before: dict[int, Tensor], after: dict[int, Tensor], by: int) -> float:
    """The largest difference of any moved key, relative to the largest key of its layer."""
    assert before and before.keys() == after.keys()
    return max(
        difference(rotation.moved(before[layer], layer, by), after[layer]) / after[layer].abs().max().item()
        for layer in before
    )


@pytest.mark.parametrize("architecture", SUPPORTED, ids=str)
def test_moved_keys_are_those_computed_there(architecture: Architecture) -> None:
    backend, ids = bench(architecture).backend, random_ids(NUM_TOKENS, seed=5)
    if architecture.name in FIXED:
        with pytest.raises(UnsupportedModelError, match=r"leave out what moves texts .* positions='shared'$"):
            key_rotation(backend)
        return
    rotation, at = key_rotation(backend), {p: keys_at(backend, ids, p) for p in (0, 1, 40, 103)}
    for start, stop in [(0, 1), (0, 40), (1, 103), (103, 40), (40, 0)]:
        assert error(rotation, at[start], at[stop], stop - start) < 1e-4
    turned = {i for i in at[0] if difference(at[0][i], at[103][i]) > 0.1}
    assert {i for i in at[0] if rotation.moved(at[0][i], i, 103) is not at[0][i]} == turned
    if architecture.name in WITHOUT_POSITIONS:
        assert set(at[0]) - turned == WITHOUT_POSITIONS[architecture.name]


def test_the_rotation_of_complex_numbers() -> None:
    backend = bench(named("Llama")).backend
    config = backend.config
    width = config.hidden_size // config.num_attention_heads
    keys = torch.randn(2, 3, 5, width, generator=torch.Generator().manual_seed(0))
    expected = np.empty(keys.shape)
    for place in np.ndindex(2, 3, 5):
        for pair in range(width // 2):
            number = complex(keys[place][pair], keys[place][pair + width // 2])
            number *= np.exp(-90j * config.rope_parameters["rope_theta"] ** (-2 * pair / width))
            expected[(*place, pair)], expected[(*place, pair + width // 2)] = number.real, number.imag
    moved = key_rotation(backend).moved(keys, 2, -90)
    assert np.abs(moved.numpy() - expected).max() < 1e-5


def test_each_token_by_its_own_number() -> None:
    backend = bench(named("Gemma 3")).backend
    rotation, keys = key_rotation(backend), keys_at(backend, random_ids(NUM_TOKENS), 0)[1]
    by = torch.tensor([0, 5, 5, -3, 1000, 0, 64])
    alone = [rotation.moved(keys[:, :, i : i + 1], 1, int(d)) for i, d in enumerate(by)]
    assert difference(rotation.moved(keys, 1, by), torch.cat(alone, dim=2)) < 1e-6


def test_what_stays_is_not_copied() -> None:
    backend = bench(named("SmolLM3")).backend
    rotation, keys = key_rotation(backend), keys_at(backend, random_ids(NUM_TOKENS), 0)
    assert rotation.moved(keys[0], 0, 0) is keys[0]
    assert rotation.moved(keys[1], 1, 50) is keys[1]
    assert not torch.equal(rotation.moved(keys[0], 0, 50), keys[0])


@pytest.mark.parametrize("name", ["Llama", "Gemma 3", "Command R7B", "GPT-NeoX"])
def test_a_query_sees_a_moved_text_as_before(name: str) -> None:
    on, ids, by = bench(named(name)), random_ids(18), 50
    rotation, tap = key_rotation(on.backend), tap_all(on, Span(NUM_TOKENS, 18))
    prefix = on.backend.prefill(ids[:NUM_TOKENS], top_layer=on.top_layer)
    before = on.backend.forward(ids[NUM_TOKENS:], tap=tap, prefix=prefix)
    cache = prefix.growing()
    assert cache is not None
    for i, layer in enumerate(cache.layers):
        layer.keys = rotation.moved(layer.keys, i, by)
    assert difference(behind(on, Prefix(prefix.token_ids, prefix.top_layer, cache), ids, by), before) < 1e-5
    assert difference(behind(on, prefix, ids, by), before) > 0.01, "it matters where the text is"


def behind(on: Bench, prefix: Prefix, ids: Sequence[int], by: int) -> Tensor:
    """Attention of the tokens after `prefix`, read `by` positions further on."""
    tap, rest = tap_all(on, Span(len(prefix), len(ids))), torch.tensor([ids[len(prefix) :]])
    with torch.no_grad():
        rows = on.backend._run(rest, prefix.branch(), len(prefix), None, tap=tap, stop_after=on.top_layer, skipped=-by)
    assert rows is not None
    return rows


def test_to_the_end_of_the_bundled_models_window(qr_mini: Backend) -> None:
    rotation, ids = key_rotation(qr_mini), random_ids(12)
    first = keys_at(qr_mini, ids, 0)
    assert error(rotation, first, keys_at(qr_mini, ids, 1000), 1000) < 1e-4
    end = (qr_mini.max_tokens or 0) - len(ids)
    assert end > 30_000
    assert error(rotation, first, keys_at(qr_mini, ids, end), end) < 2e-3  # the model's own angles are fp32


@pytest.mark.parametrize("name", ["Llama", "Gemma 2", "GLM", "Phi", "GPT-OSS"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    backend = Backend(copy.deepcopy(bench(named(name)).backend.model).to(dtype), tiny_tokenizer())
    rotation = key_rotation(backend)
    ids = random_ids(1)
    first, later = keys_at(backend, ids, 0), keys_at(backend, ids, 90)
    assert all(rotation.moved(keys, i, 90).dtype == dtype for i, keys in first.items())
    as_fp32 = [{i: keys.float() for i, keys in at.items()} for at in (first, later)]
    assert error(rotation, *as_fp32, 90) < 2e-2


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn", "dynamic"])
def test_stretched_windows(kind: str) -> None:
    backend, ids = with_rope(kind), random_ids(NUM_TOKENS)
    rotation, first = key_rotation(backend), keys_at(backend, ids, 0)
    assert error(rotation, first, keys_at(backend, ids, 2000), 2000) < 1e-4


def test_speeds_that_depend_on_the_length() -> None:
    backend, ids = with_rope("longrope"), random_ids(NUM_TOKENS)
    before = keys_at(backend, ids, 3)
    with pytest.raises(UnsupportedModelError, match=r"in layer 0 .* positions='shared'$"):
        key_rotation(backend)
    after = keys_at(backend, ids, 3)
    assert all(torch.equal(after[i], before[i]) for i in before), "the trial leaves the model as it was"


def test_attention_that_depends_on_the_position() -> None:
    scale = dict(rope_type="default", rope_theta=1e4, llama_4_scaling_beta=3.0, original_max_position_embeddings=16)
    scaled = row("scaled queries", "Ministral3Config", head_dim=8, rope_parameters=scale)
    backend = Backend(random_model(scaled), tiny_tokenizer())
    with pytest.raises(UnsupportedModelError, match="attends in another way"):
        key_rotation(backend)


def test_a_model_is_tried_once() -> None:
    backend = Backend(copy.deepcopy(bench(named("Llama")).backend.model), tiny_tokenizer())
    passes: list[int] = []
    hook = backend.decoder.register_forward_pre_hook(lambda *_: passes.append(1))
    first = key_rotation(backend)
    tried = len(passes)
    assert key_rotation(Backend(backend.model, tiny_tokenizer())) is first
    hook.remove()
    assert tried == len(passes) > 0
    assert all(not module._forward_pre_hooks for module in backend.model.modules())
