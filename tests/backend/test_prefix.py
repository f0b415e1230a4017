"""What a prefix keeps, how it is used again, and that it never changes."""

from pathlib import Path

import pytest
import torch

from qr_integrations.backend import AttentionTap, Backend, Prefix
from qr_integrations.errors import HeadError, LoadError, UnsupportedModelError
from qr_integrations.types import Span
from tests.backend.measure import (
    Bench,
    bench,
    decoder_layers,
    difference,
    named,
    random_ids,
    random_model,
    reference,
    tap_all,
    tiny_tokenizer,
)

PLAIN = ["Llama", "Mistral", "GPT-OSS", "GPT-2"]
HYBRID = ["Bamba", "Falcon-H1", "Qwen3-Next", "LFM2"]


def snapshot(prefix: Prefix) -> list[torch.Tensor]:
    assert prefix.cache is not None
    kept = [vars(layer) for layer in prefix.cache.layers]
    kept += [value for values in kept for value in values.values() if isinstance(value, dict)]
    return [value.clone() for values in kept for value in values.values() if isinstance(value, torch.Tensor)]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.mark.parametrize("name", PLAIN + HYBRID)
def test_nothing_changes_a_prefix(name: str) -> None:
    on = bench(named(name))
    prefix = on.backend.prefill(random_ids()[:13], top_layer=on.top_layer)
    before = snapshot(prefix)
    on.backend.forward(random_ids()[13:], tap=tap_all(on, Span(13, 24)), prefix=prefix)
    longer = on.backend.prefill(random_ids(), top_layer=on.top_layer, reuse=prefix)
    shorter = on.backend.prefill(random_ids()[:5], top_layer=on.top_layer, reuse=prefix)
    assert (len(shorter), len(prefix), len(longer)) == (5, 13, 24)
    assert before and same(snapshot(prefix), before)


@pytest.mark.parametrize("name", PLAIN + HYBRID)
def test_reused_and_fresh_prefixes_are_one(name: str) -> None:
    on = bench(named(name))
    first = on.backend.prefill(random_ids()[:13], top_layer=on.top_layer)
    reused = on.backend.prefill(random_ids(), top_layer=on.top_layer, reuse=first)
    fresh = on.backend.prefill(random_ids(), top_layer=on.top_layer)
    for one, other in zip(snapshot(reused), snapshot(fresh), strict=True):
        assert torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("name", PLAIN)
def test_memory_is_keys_and_values_below_the_top_and_keys_at_the_top(name: str) -> None:
    on = bench(named(name))
    layer = on.backend.attention_layers[0]
    width = on.backend.config.hidden_size // layer.num_heads
    width = getattr(on.backend.config, "head_dim", None) or width
    for top_layer in on.backend.attention_layers:
        prefix = on.backend.prefill(random_ids(), top_layer=top_layer)
        assert prefix.num_bytes == 24 * layer.num_kv_heads * width * 4 * (2 * top_layer + 1)
        assert prefix.cache is not None and len(prefix.cache.layers) == top_layer + 1


def test_layers_above_the_top_do_not_run() -> None:
    backend = Backend(random_model(named("Llama")), tiny_tokenizer())
    calls: list[int] = []
    backend.prefill(random_ids()[:13], top_layer=1)  # the first one also tries out how the model goes on
    for i, layer in enumerate(decoder_layers(backend)):
        layer.register_forward_hook(lambda *_, i=i: calls.append(i))
    prefix = backend.prefill(random_ids()[:13], top_layer=1)
    backend.forward(random_ids()[13:], tap=AttentionTap(((1, 0),), Span(13, 24)), prefix=prefix)
    assert set(calls) == {0}, "layer 1 is left in its attention, layer 2 is never entered"


@pytest.mark.parametrize("name", PLAIN)
def test_cropping_shares_memory_and_stays_exact(name: str) -> None:
    on = bench(named(name))
    whole = on.backend.prefill(random_ids(), top_layer=on.top_layer)
    assert whole.can_crop
    part = whole.crop(13)
    assert part.token_ids == whole.token_ids[:13] and part.num_bytes < whole.num_bytes
    assert part.cache.layers[0].keys.data_ptr() == whole.cache.layers[0].keys.data_ptr()
    rows = on.backend.forward(random_ids()[13:], tap=tap_all(on, Span(13, 24)), prefix=part)
    assert difference(rows, reference(on.eager, random_ids())[:, :, 13:]) < 1e-5


@pytest.mark.parametrize("name", HYBRID)
def test_recurrent_states_cannot_be_cropped(name: str) -> None:
    on = bench(named(name))
    prefix = on.backend.prefill(random_ids(), top_layer=on.top_layer)
    assert not prefix.can_crop


def test_a_model_that_cannot_continue_reads_its_prefix_again(caplog: pytest.LogCaptureFixture) -> None:
    architecture = named("Jamba")
    on = Bench(Backend(random_model(architecture), tiny_tokenizer(), name="Jamba"), bench(architecture).eager)
    prefix = on.backend.prefill(random_ids()[:13], top_layer=on.top_layer)
    assert prefix.cache is None and prefix.num_bytes == 0 and prefix.crop(5).token_ids == prefix.token_ids[:5]
    assert "Jamba cannot continue from a cache" in caplog.text
    rows = on.backend.forward(random_ids()[13:], tap=tap_all(on, Span(13, 24)), prefix=prefix)
    assert difference(rows, reference(on.eager, random_ids())[:, :, 13:]) < 1e-5


@pytest.mark.parametrize("name", [*PLAIN, "DeepSeek-V3", "Gemma 3n", "Jamba"])
def test_a_saved_prefix_is_read_as_it_was(name: str, tmp_path: Path) -> None:
    on = bench(named(name))
    on.backend.prefill(random_ids()[:13], top_layer=on.top_layer).save(tmp_path / "it.safetensors")
    prefix = on.backend.load_prefix(tmp_path / "it.safetensors")
    rows = on.backend.forward(random_ids()[13:], tap=tap_all(on, Span(13, 24)), prefix=prefix)
    assert difference(rows, reference(on.eager, random_ids())[:, :, 13:]) < 1e-5
    longer = on.backend.prefill(random_ids()[:20], top_layer=on.top_layer, reuse=prefix)
    rows = on.backend.forward(random_ids()[20:], tap=tap_all(on, Span(20, 24)), prefix=longer)
    assert difference(rows, reference(on.eager, random_ids())[:, :, 20:]) < 1e-5


@pytest.mark.parametrize("name", HYBRID)
def test_recurrent_states_cannot_be_saved(name: str, tmp_path: Path) -> None:
    on = bench(named(name))
    with pytest.raises(UnsupportedModelError, match="prefill it again"):
        on.backend.prefill(random_ids(), top_layer=on.top_layer).save(tmp_path / "it.safetensors")


def test_a_prefix_of_another_model_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "it.safetensors"
    bench(named("Llama")).backend.prefill(random_ids(), top_layer=2).save(file)
    for name in ("Qwen2", "GPT-2", "Bamba", "Gemma"):
        with pytest.raises((LoadError, HeadError)):
            bench(named(name)).backend.load_prefix(file)
    file.write_bytes(file.read_bytes()[:-7])
    for broken in (file, tmp_path / "gone.safetensors", tmp_path):
        with pytest.raises(LoadError, match="prefill and save it again"):
            bench(named("Llama")).backend.load_prefix(broken)


def test_common_length() -> None:
    prefix = bench(named("Llama")).backend.prefill([5, 6, 7, 8], top_layer=0)
    assert [prefix.common_length(ids) for ids in ([], [9], [5, 6, 9], [5, 6, 7, 8, 9])] == [0, 0, 2, 4]


def test_a_batch_shares_a_prefix() -> None:
    on = bench(named("Llama"))
    prefix = on.backend.prefill(random_ids()[:13], top_layer=on.top_layer)
    later = torch.tensor([random_ids()[13:], random_ids(seed=8)[13:]])
    rows = on.backend.forward(later, tap=tap_all(on, Span(13, 24)), prefix=prefix)
    for row, ids in zip(rows, later, strict=True):
        expected = reference(on.eager, random_ids()[:13] + ids.tolist())[0, :, 13:]
        assert difference(row, expected) < 1e-5
