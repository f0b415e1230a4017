"""Several texts behind one prefix in one pass, against eager attention over each whole text by itself."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qr_integrations.backend import AttentionTap, Backend, Prefix, Trunk, Wanted, branches, cut, join, pack, reader
from qr_integrations.errors import HeadError, InputError, MemoryLimitError
from qr_integrations.types import Span
from tests.backend.architectures import SUPPORTED, Architecture
from tests.backend.measure import Bench, bench, difference, named, random_ids, random_model, reference, tiny_tokenizer

LIMIT = 1e-5
PREFIX, TRUNK = 14, 3
TEXTS = [random_ids(seed=seed)[: 4 + 2 * seed] for seed in (1, 2, 3)]


def behind(trunk: int = TRUNK) -> list[list[int]]:
    """Three texts of different length that begin alike."""
    return [random_ids()[PREFIX : PREFIX + trunk] + text for text in TEXTS]


def alone(on: Bench, texts: list[list[int]]) -> Tensor:
    """The mean over a text's rows of what they pay to the prefix, by the model's own eager attention: ``[N, K, P]``."""
    prefix = random_ids()[:PREFIX]
    return torch.stack([reference(on.eager, prefix + text)[0, :, PREFIX:, :PREFIX].mean(1) for text in texts])


def read(
    on: Bench, texts: list[list[int]], *, trunk: int = TRUNK, per_head: bool = True
) -> tuple[Tensor, Trunk | None]:
    prefix = on.backend.prefill(random_ids()[:PREFIX], top_layer=on.top_layer)
    wanted = Wanted(on.heads, per_head)
    shared = on.backend.read_trunk(random_ids()[PREFIX : PREFIX + trunk], wanted, prefix)
    return on.backend.forward_branches(texts, wanted, prefix=prefix, trunk=shared), shared


@pytest.mark.parametrize("architecture", SUPPORTED, ids=str)
def test_texts_side_by_side_attend_as_each_alone(architecture: Architecture) -> None:
    on = bench(architecture)
    found, _ = read(on, behind())
    assert difference(found, alone(on, behind())) < LIMIT


SIDE_BY_SIDE = ["Llama", "Qwen3", "Command R", "GLM", "GPT-NeoX", "GPT-2", "SmolLM3", "Granite"]


@pytest.mark.parametrize("name", SIDE_BY_SIDE)
def test_these_families_read_them_in_one_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    on = bench(named(name))
    read(on, behind())
    monkeypatch.setattr(on.backend, "forward", None)
    _, trunk = read(on, behind())
    assert trunk is not None and trunk.token_ids == tuple(random_ids()[PREFIX : PREFIX + TRUNK])


def test_capped_logits_and_sinks_are_counted_where_the_window_is_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("Gemma 2", "GPT-OSS"):
        wide = dataclasses.replace(named(name), kwargs={**named(name).kwargs, "sliding_window": 128})
        on = bench(wide)
        found, trunk = read(on, behind())
        assert trunk is not None
        assert difference(found, alone(on, behind())) < LIMIT


def test_without_a_trunk_and_with_the_heads_added_up() -> None:
    on = bench(named("Llama"))
    expected = alone(on, behind())
    prefix = on.backend.prefill(random_ids()[:PREFIX], top_layer=on.top_layer)
    plain = on.backend.forward_branches(behind(), Wanted(on.heads), prefix=prefix)
    assert difference(plain, expected) < LIMIT
    summed, _ = read(on, behind(), per_head=False)
    assert summed.shape == (3, 1, PREFIX)
    assert difference(summed, expected.sum(1, keepdim=True)) < LIMIT


def test_some_heads_in_the_order_asked_for() -> None:
    on = bench(named("Qwen3"))
    chosen = ((1, 3), (0, 2), (1, 0))
    prefix = on.backend.prefill(random_ids()[:PREFIX], top_layer=1)
    found = on.backend.forward_branches(behind(), Wanted(chosen), prefix=prefix)
    places = [on.heads.index(head) for head in chosen]
    assert difference(found, alone(on, behind())[:, places]) < LIMIT


@pytest.mark.parametrize("name", ["Llama", "Gemma 2"])
def test_many_passes_and_many_blocks_of_rows_give_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    on = bench(named(name))
    at_once, _ = read(on, behind())
    monkeypatch.setattr(branches, "_CPU_BYTES", 1)
    monkeypatch.setattr(branches, "_LEAST_ROWS", 3)
    monkeypatch.setattr(reader, "_BRANCH_TOKENS", 9)
    assert difference(read(on, behind())[0], at_once) < 1e-6


def test_a_text_sees_nothing_of_the_others() -> None:
    on = bench(named("Llama"))
    one, _ = read(on, behind())
    other, _ = read(on, [behind()[0], [*behind()[1][:TRUNK], *random_ids(seed=9)[:8]], behind()[2]])
    assert difference(one[[0, 2]], other[[0, 2]]) < 1e-7
    assert (one[1] - other[1]).abs().max() > 0.01


def test_a_prefix_is_left_as_it_was_also_by_an_error() -> None:
    on = bench(named("Llama"))
    prefix = on.backend.prefill(random_ids()[:PREFIX], top_layer=on.top_layer)
    before = on.backend.forward_branches(behind(), Wanted(on.heads), prefix=prefix)
    hook = on.backend.decoder.layers[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        on.backend.forward_branches(behind(), Wanted(on.heads), prefix=prefix)
    hook.remove()
    assert torch.equal(on.backend.forward_branches(behind(), Wanted(on.heads), prefix=prefix), before)
    assert (len(prefix), prefix.cache.layers[0].get_seq_length()) == (PREFIX, PREFIX)


def test_what_cannot_be_asked_says_so() -> None:
    on = bench(named("Llama"))
    prefix = on.backend.prefill(random_ids()[:PREFIX], top_layer=on.top_layer)
    wanted = Wanted(on.heads)
    trunk = on.backend.read_trunk([5, 6], wanted, prefix)
    for texts in ([[]], [[5, 6]], [[5, 7, 8]]):
        with pytest.raises(InputError, match="branch #0 has no token behind the trunk"):
            on.backend.forward_branches(texts, wanted, prefix=prefix, trunk=trunk)
    with pytest.raises(HeadError, match="has no head"):
        on.backend.forward_branches([[5]], Wanted(((99, 0),)), prefix=prefix)


def test_a_prefix_that_is_not_deep_enough_says_so() -> None:
    on = bench(named("Llama"))
    prefix = on.backend.prefill(random_ids()[:PREFIX], top_layer=0)
    for ask in (on.backend.forward_branches, on.backend.forward_branch_rows):
        with pytest.raises(InputError, match="prefill with top_layer"):
            ask([[5]], Wanted(on.heads), prefix=prefix)
    with pytest.raises(InputError, match="prefill with top_layer"):
        on.backend.read_trunk([5], Wanted(on.heads), prefix)
    assert on.backend.forward_branches([], Wanted(((0, 1),)), prefix=prefix).shape == (0, 1, PREFIX)


def test_a_trial_that_ran_out_of_memory_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latent attention keeps no keys of its own, so these texts must not be read side by side."""
    on = Bench(Backend(random_model(named("DeepSeek-V3")), tiny_tokenizer()), bench(named("DeepSeek-V3")).eager)

    def full(*_: Any) -> bool:
        raise MemoryLimitError("full")

    monkeypatch.setattr(reader, "try_branches", full)
    with pytest.raises(MemoryLimitError):
        read(on, behind())
    monkeypatch.undo()
    assert difference(read(on, behind())[0], alone(on, behind())) < LIMIT


# ---- prefixes that are kept in less, and in pieces


def kept(prefix: Prefix, how: str) -> Prefix:
    if how == "top head":
        return pack(prefix, top_heads=(1,))
    if how == "pieces":
        return join(cut(prefix, [Span(0, 5), Span(5, 6), Span(6, PREFIX)]), dtype=torch.float32)
    return pack(prefix, dtype=how)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("how", "limit"),
    [("auto", 1e-7), ("pieces", 1e-7), ("top head", 1e-7), ("float16", 2e-3), ("bfloat16", 2e-2), ("int8", 2e-2)],
)
def test_what_is_kept_is_read_as_it_was(how: Any, limit: float) -> None:
    on = bench(named("Llama"))  # two key/value heads, four heads
    prefix = on.backend.prefill(random_ids()[:PREFIX], top_layer=on.top_layer)
    heads = ((0, 0), (on.top_layer, 2), (on.top_layer, 3))  # those of the second key/value head at the top
    expected = on.backend.forward_branches(behind(), Wanted(heads), prefix=prefix)
    packed = kept(prefix, how)
    found = on.backend.forward_branches(behind(), Wanted(heads), prefix=packed)
    assert difference(found, expected) < limit
    assert (difference(found, expected) > 0) == (how in ("float16", "bfloat16", "int8"))
    sizes = {"auto": 1, "pieces": 1, "top head": 0.9, "float16": 0.5, "bfloat16": 0.5, "int8": 0.38}
    assert packed.num_bytes / prefix.num_bytes == pytest.approx(sizes[how], abs=0.02)


@pytest.mark.parametrize("dtype", ["auto", "int8"])
def test_what_is_kept_is_saved(dtype: Any, tmp_path: Path) -> None:
    on = bench(named("Llama"))
    prefix = on.backend.prefill(random_ids()[:PREFIX], top_layer=on.top_layer)
    packed = pack(prefix, dtype=dtype)
    packed.save(tmp_path / "it.safetensors")
    loaded = on.backend.load_prefix(tmp_path / "it.safetensors")
    one, other = (on.backend.forward_branches(behind(), Wanted(on.heads), prefix=p) for p in (packed, loaded))
    assert difference(one, other) < 1e-6
    with pytest.raises(InputError, match="lacks heads"):
        pack(prefix, top_heads=(1,)).save(tmp_path / "it.safetensors")


def test_what_is_kept_can_be_appended_to() -> None:
    on = bench(named("Llama"))
    whole = on.backend.prefill(random_ids()[:PREFIX], top_layer=on.top_layer)
    for how in ("auto", "pieces", "top head"):
        short = on.backend.prefill(random_ids()[: PREFIX - 4], top_layer=on.top_layer)
        short = pack(short, top_heads=(1,)) if how == "top head" else pack(short)
        grown = on.backend.prefill(random_ids()[:PREFIX], top_layer=on.top_layer, reuse=short)
        wanted = Wanted(((1, 0), (on.top_layer, 2)))
        one, other = (on.backend.forward_branches(behind(), wanted, prefix=p) for p in (whole, grown))
        assert difference(one, other) < 1e-6


def test_pieces_left_out_stay_where_they_stood() -> None:
    """Against a plain pass over the text in which nobody sees the tokens that were left out."""
    on = bench(named("Llama"))
    prefix = on.backend.prefill(random_ids()[:PREFIX], top_layer=0)
    left = join(cut(prefix, [Span(0, 4), Span(9, PREFIX)]), dtype=torch.float32, next_position=PREFIX)
    assert [left.position_of(token) for token in (3, 4, 8)] == [3, 9, 13]
    assert left.num_positions == PREFIX and not left.can_crop
    wanted = Wanted(tuple(head for head in on.heads if head[0] == 0))
    found = on.backend.forward_branches(behind(), wanted, prefix=left)
    places = [*range(4), *range(9, PREFIX)]
    for text, means in zip(behind(), found, strict=True):
        rows = reference(on.eager, random_ids()[:PREFIX] + text)[0, : len(wanted.heads), PREFIX:]
        rows[..., 4:9] = 0.0
        rows = rows / rows.sum(-1, keepdim=True)  # layer 0: what is seen does not depend on what was left out
        assert difference(means, rows.mean(1)[:, places]) < LIMIT


@pytest.mark.parametrize("name", ["Llama", "Gemma 2"])  # side by side, and one by one
@pytest.mark.parametrize("per_head", [True, False])
def test_single_rows_by_stretches_of_the_prefix(name: str, per_head: bool) -> None:
    on, spans = bench(named(name)), (Span(2, 5), Span(5, 6), Span(0, PREFIX))
    prefix = on.backend.prefill(random_ids()[:PREFIX], top_layer=on.top_layer)
    wanted = Wanted(on.heads, per_head, spans)
    trunk = on.backend.read_trunk(random_ids()[PREFIX : PREFIX + TRUNK], wanted, prefix)
    found = on.backend.forward_branch_rows(behind(), wanted, prefix=prefix, trunk=trunk)
    for text, (means, rows), expected in zip(behind(), found, alone(on, behind()), strict=True):
        whole = reference(on.eager, random_ids()[:PREFIX] + text)[0, :, PREFIX:]
        by_span = torch.stack([whole[..., span.slice()].sum(-1) for span in spans], dim=-1)
        assert difference(rows, by_span if per_head else by_span.sum(0, keepdim=True)) < LIMIT
        assert difference(means, expected if per_head else expected.sum(0, keepdim=True)) < LIMIT


def test_heads_whose_keys_are_not_kept_are_refused() -> None:
    on = bench(named("Llama"))
    packed = pack(on.backend.prefill(random_ids()[:PREFIX], top_layer=on.top_layer), top_heads=(1,))
    rows = Span(PREFIX, PREFIX + len(behind()[0]))
    for ask in (
        lambda: on.backend.forward_branches(behind(), Wanted(((on.top_layer, 0),)), prefix=packed),
        lambda: on.backend.forward(behind()[0], tap=AttentionTap(((on.top_layer, 1),), rows), prefix=packed),
    ):
        with pytest.raises(InputError, match="does not keep the keys that head"):
            ask()
    found = on.backend.forward(behind()[0], tap=AttentionTap(((on.top_layer, 2), (0, 0)), rows), prefix=packed)
    assert found.isfinite().all()
