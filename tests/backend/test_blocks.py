"""Texts that do not see each other, against a plain forward pass with the mask and the positions written out."""

from pathlib import Path

import pytest
import torch

from qr_integrations.errors import InputError, UnsupportedModelError
from qr_integrations.types import Span
from tests.backend.measure import Bench, bench, difference, named, random_ids, tap_all

FAMILIES = ["Llama", "Qwen3", "GPT-NeoX", "GPT-2", "OLMo 2", "DeepSeek-V3"]
BLOCKS = (Span(4, 11), Span(11, 13), Span(13, 18))
START, STOP, TOTAL = 4, 18, 24


def plainly(on: Bench, ids: list[int], blocks: tuple[Span, ...], start: int, stop: int) -> torch.Tensor:
    """All rows of all heads: no token of a block sees another block, and all blocks begin at the same position."""
    total = len(ids)
    visible = torch.ones(total, total).tril().bool()
    positions = torch.arange(total)
    for block in blocks:
        visible[block.slice(), start : block.start] = False
        positions[block.slice()] = torch.arange(start, start + len(block))
    positions[stop:] = torch.arange(start + max(map(len, blocks)), start + max(map(len, blocks)) + total - stop)
    mask = torch.zeros(total, total).masked_fill(~visible, torch.finfo(torch.float32).min)[None, None]
    with torch.no_grad():
        out = on.eager(
            input_ids=torch.tensor([ids]),
            attention_mask=mask,
            position_ids=positions[None],
            use_cache=False,
            output_attentions=True,
        )
    return torch.cat(list(out.attentions), dim=1).float()


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_attend_as_a_plain_pass_with_their_mask(name: str) -> None:
    on, ids = bench(named(name)), random_ids(TOTAL)
    prefix = on.backend.prefill_blocks(ids[:STOP], BLOCKS, top_layer=on.top_layer)
    rows = on.backend.forward(ids[STOP:], tap=tap_all(on, Span(STOP, TOTAL)), prefix=prefix)
    assert difference(rows, plainly(on, ids, BLOCKS, START, STOP)[:, :, STOP:]) < 1e-5
    assert (len(prefix), prefix.num_positions) == (STOP, START + 7)


def test_one_block_is_the_text_itself() -> None:
    on, ids = bench(named("Llama")), random_ids(TOTAL)
    block = on.backend.prefill_blocks(ids[:STOP], [Span(START, STOP)], top_layer=on.top_layer)
    tap = tap_all(on, Span(STOP, TOTAL))
    plain = on.backend.forward(ids[STOP:], tap=tap, prefix=on.backend.prefill(ids[:STOP], top_layer=on.top_layer))
    assert difference(on.backend.forward(ids[STOP:], tap=tap, prefix=block), plain) < 1e-5


def test_the_order_of_blocks_makes_no_difference() -> None:
    on, ids = bench(named("Llama")), random_ids(TOTAL)
    turned = ids[:4] + ids[13:18] + ids[4:11] + ids[11:13]
    places = torch.tensor([*range(4), *range(9, 16), *range(16, 18), *range(4, 9), *range(18, 24)])
    tap = tap_all(on, Span(STOP, TOTAL))
    one = on.backend.prefill_blocks(ids[:STOP], BLOCKS, top_layer=on.top_layer)
    other = on.backend.prefill_blocks(turned, (Span(4, 9), Span(9, 16), Span(16, 18)), top_layer=on.top_layer)
    rows = on.backend.forward(ids[STOP:], tap=tap, prefix=other)[..., places]
    assert difference(rows, on.backend.forward(ids[STOP:], tap=tap, prefix=one)) < 1e-5


def test_passes_of_few_blocks_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    on, ids = bench(named("Llama")), random_ids(TOTAL)
    tap = tap_all(on, Span(STOP, TOTAL))
    together = on.backend.forward(
        ids[STOP:], tap=tap, prefix=on.backend.prefill_blocks(ids[:STOP], BLOCKS, top_layer=on.top_layer)
    )
    monkeypatch.setattr("qr_integrations.backend.blocks._PASS_TOKENS", 1)
    alone = on.backend.prefill_blocks(ids[:STOP], BLOCKS, top_layer=on.top_layer)
    assert difference(on.backend.forward(ids[STOP:], tap=tap, prefix=alone), together) < 1e-5


def test_the_beginning_stays_as_it_was() -> None:
    on, ids = bench(named("Llama")), random_ids(TOTAL)
    prefix = on.backend.prefill_blocks(ids[:STOP], BLOCKS, top_layer=on.top_layer)
    assert prefix.cache is not None
    before = [layer.keys.clone() for layer in prefix.cache.layers]
    on.backend.forward(ids[STOP:], tap=tap_all(on, Span(STOP, TOTAL)), prefix=prefix)
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(prefix.cache.layers, before, strict=True))


def test_blocks_are_not_the_beginning_of_another_text(tmp_path: Path) -> None:
    """Their tokens would be taken for a text in which each sees the ones before."""
    on, ids = bench(named("Llama")), random_ids(TOTAL)
    prefix = on.backend.prefill_blocks(ids[:STOP], BLOCKS, top_layer=on.top_layer)
    assert not prefix.can_crop and prefix.beginning_of(ids) is None
    with pytest.raises(UnsupportedModelError, match="keep the text"):
        prefix.save(tmp_path / "prefix.safetensors")
    with pytest.raises(InputError, match="one row"):
        on.backend.forward(torch.tensor([ids[STOP:]] * 2), tap=tap_all(on, Span(STOP, TOTAL)), prefix=prefix)


@pytest.mark.parametrize("blocks", [[Span(4, 10), Span(11, 18)], [Span(4, 11), Span(11, 17)]])
def test_blocks_must_leave_nothing_out(blocks: list[Span]) -> None:
    on = bench(named("Llama"))
    with pytest.raises(InputError, match="pass all of them"):
        on.backend.prefill_blocks(random_ids(TOTAL)[:STOP], blocks, top_layer=on.top_layer)


@pytest.mark.parametrize("name", ["Bamba", "Qwen3-Next", "LFM2", "Jamba"])
def test_recurrent_layers_say_that_they_cannot(name: str) -> None:
    on = bench(named(name))
    with pytest.raises(UnsupportedModelError, match="one after the other"):
        on.backend.prefill_blocks(random_ids(TOTAL)[:STOP], BLOCKS, top_layer=on.top_layer)


def test_a_window_that_is_too_short_is_an_error() -> None:
    on = bench(named("Mistral"))
    window = on.backend.config.sliding_window
    ids = random_ids(window + 10)
    with pytest.raises(UnsupportedModelError, match="tokens back"):
        on.backend.prefill_blocks(ids, [Span(4, len(ids))], top_layer=on.top_layer)


@pytest.mark.parametrize("blocks", [(), (Span(0, 5), Span(5, 18))])
def test_blocks_need_something_in_front(blocks: tuple[Span, ...]) -> None:
    on = bench(named("Llama"))
    with pytest.raises(InputError, match="pass at least one token, then at least one block"):
        on.backend.prefill_blocks(random_ids(TOTAL)[:STOP], blocks, top_layer=on.top_layer)
