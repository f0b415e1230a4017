"""The tap reads what eager attention computes, in every architecture of the table, and leaves no trace."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from qr_integrations.backend import AttentionTap, Backend, attention_tap
from qr_integrations.errors import UnsupportedModelError
from qr_integrations.types import Span
from tests.backend.architectures import SUPPORTED, UNSUPPORTED, WINDOW, Architecture
from tests.backend.measure import (
    NUM_PREFIX,
    NUM_TOKENS,
    Bench,
    bench,
    decoder_layers,
    difference,
    measure,
    plain_error,
    random_ids,
    random_model,
    reference,
    tap_all,
    tiny_tokenizer,
)

LIMIT = 1e-5
ALL = Span(0, NUM_TOKENS)
LATER = Span(NUM_PREFIX, NUM_TOKENS)


@pytest.fixture(scope="module", params=SUPPORTED, ids=str)
def architecture(request: pytest.FixtureRequest) -> Architecture:
    return request.param


@pytest.fixture
def on(architecture: Architecture) -> Bench:
    return bench(architecture)


def test_rows_are_those_of_eager_attention(architecture: Architecture, architecture_table: list[Any]) -> None:
    measured = measure(architecture)
    architecture_table.append(measured)
    assert measured.plain < LIMIT
    assert measured.padded is None or measured.padded < LIMIT
    assert measured.cached < LIMIT


def test_the_comparison_can_fail(on: Bench) -> None:
    expected = reference(on.eager, random_ids())[0]
    assert NUM_TOKENS - NUM_PREFIX > WINDOW
    evenly = torch.ones(NUM_TOKENS, NUM_TOKENS).tril() / torch.arange(1, NUM_TOKENS + 1)[:, None]
    assert (expected - evenly).abs().amax((-1, -2)).min() > 0.05, "a head looks everywhere alike"
    apart = (expected[:, None] - expected[None]).abs().amax((-1, -2)) + torch.eye(len(expected))
    assert apart.min() > 0.01, "two heads look alike"
    assert (expected - reference(on.eager, random_ids(seed=2))[0]).abs().max() > 0.05


def test_eager_attention_underneath_runs_in_blocks(architecture: Architecture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_tap, "_EAGER_BLOCK", 5)
    assert plain_error(bench(architecture, "eager")) < LIMIT


def test_mean_of_the_rows(on: Bench) -> None:
    tap = AttentionTap(on.heads[::-1], LATER)
    rows = on.backend.forward(random_ids(), tap=tap)
    assert difference(rows, reference(on.eager, random_ids())[:, :, NUM_PREFIX:].mean(2).flip(1)) < LIMIT


def test_a_branch_leaves_the_prefix_as_it_was(on: Bench) -> None:
    prefix = on.backend.prefill(random_ids()[:NUM_PREFIX], top_layer=on.top_layer)
    size = prefix.num_bytes
    rows = on.backend.forward(random_ids()[NUM_PREFIX:], tap=tap_all(on, LATER), prefix=prefix)
    on.backend.forward(random_ids(seed=3)[NUM_PREFIX:], tap=tap_all(on, LATER), prefix=prefix)
    again = on.backend.forward(random_ids()[NUM_PREFIX:], tap=tap_all(on, LATER), prefix=prefix)
    assert torch.equal(rows, again)
    assert prefix.num_bytes == size


@pytest.mark.parametrize("kept", [6, NUM_PREFIX])
def test_a_prefix_is_cut_where_texts_part_and_extended(on: Bench, kept: int) -> None:
    first = on.backend.prefill(random_ids()[:NUM_PREFIX], top_layer=on.top_layer)
    ids = random_ids()[:kept] + random_ids(seed=4)[kept:]
    second = on.backend.prefill(ids[: NUM_PREFIX + 3], top_layer=on.top_layer, reuse=first, chunk_tokens=4)
    rows = Span(NUM_PREFIX + 3, NUM_TOKENS)
    found = on.backend.forward(ids[NUM_PREFIX + 3 :], tap=tap_all(on, rows), prefix=second)
    assert difference(found, reference(on.eager, ids)[:, :, rows.slice()]) < LIMIT
    untouched = on.backend.forward(random_ids()[NUM_PREFIX:], tap=tap_all(on, LATER), prefix=first)
    assert difference(untouched, reference(on.eager, random_ids())[:, :, LATER.slice()]) < LIMIT


def test_the_pass_ends_where_reading_ends(on: Bench) -> None:
    whole = on.backend.forward(random_ids(), tap=tap_all(on, ALL))
    for layer in on.backend.attention_layers:
        below = [i for i, head in enumerate(on.heads) if head[0] <= layer]
        with calls_per_layer(on.backend) as calls:
            rows = on.backend.forward(random_ids(), tap=AttentionTap(tuple(on.heads[i] for i in below), ALL, "none"))
        assert difference(rows, whole[:, below]) <= 1e-6
        assert set(calls) == set(range(layer + 1))


@contextmanager
def calls_per_layer(backend: Backend) -> Iterator[list[int]]:
    calls: list[int] = []
    hooks = [
        layer.register_forward_pre_hook(lambda *_, i=i: calls.append(i))
        for i, layer in enumerate(decoder_layers(backend))
    ]
    yield calls
    for hook in hooks:
        hook.remove()


def test_an_exception_in_the_middle_leaves_no_trace(on: Bench) -> None:
    before, rows = configs(on.backend), on.backend.forward(random_ids(), tap=tap_all(on, ALL))
    first, *_, last = on.backend.attention_layers
    middle = decoder_layers(on.backend)[first]

    def fail(*_: Any) -> Tensor:
        assert on.backend.attention_layers[last].module.config is not before[f"{last}"], "the tap is in place"
        raise ZeroDivisionError

    hook = middle.register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        on.backend.forward(random_ids(), tap=tap_all(on, ALL))
    with pytest.raises(ZeroDivisionError):
        on.backend.prefill(random_ids(), top_layer=on.top_layer, chunk_tokens=5)
        on.backend.forward(random_ids(), tap=tap_all(on, ALL))
    hook.remove()
    after = configs(on.backend)
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)
    assert all("qr_pass" not in vars(config) for config in after.values())
    assert all(type(config._attn_implementation) is str for config in after.values())
    assert torch.equal(on.backend.forward(random_ids(), tap=tap_all(on, ALL)), rows)


def configs(backend: Backend) -> dict[str, Any]:
    named = {name: m.config for name, m in backend.model.named_modules() if hasattr(m, "config")}
    return named | {f"{i}": layer.module.config for i, layer in backend.attention_layers.items()}


@pytest.mark.parametrize("architecture", UNSUPPORTED, ids=str)
def test_what_cannot_be_read_says_so(architecture: Architecture) -> None:
    backend = Backend(random_model(architecture), tiny_tokenizer())
    before = {name: m.config for name, m in backend.model.named_modules() if hasattr(m, "config")}
    with pytest.raises(UnsupportedModelError, match="use a model from the README's table of architectures"):
        backend.forward(random_ids(), tap=AttentionTap(((0, 0),), ALL))
    assert all(m.config is before[name] for name, m in backend.model.named_modules() if hasattr(m, "config"))
