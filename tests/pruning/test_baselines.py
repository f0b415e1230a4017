"""Chance, evenly spread cells, and two readings of attention."""

from typing import Any

import pytest
import torch

from qr_integrations.backend.surgery import prefill_pruned
from qr_integrations.errors import InputError, UnsupportedModelError
from qr_integrations.pruning import ClassAttention, LastTokenAttention, RandomTokens, UniformGrid
from qr_integrations.pruning.base import top_places
from qr_integrations.pruning.baselines import evenly_spread
from tests.backend.seeing import OTHER, QUESTION, backend, fresh, seen
from tests.backend.test_surgery import PRUNED, together
from tests.pruning.seen import prompts
from tests.pruning.test_cdpruner import cells, read


@pytest.mark.parametrize("name", PRUNED)
def test_keeping_all_changes_no_bit(name: str) -> None:
    opened = backend(name)
    laid = [opened.lay_out(seen(1, question)) for question in (QUESTION, OTHER)]
    batch = together(opened, laid)
    plain = opened.model(**batch, use_cache=True, logits_to_keep=1).logits[:, -1]
    for pruner in (RandomTokens(1.0), UniformGrid(1.0), LastTokenAttention(1.0, layer=1)):
        assert torch.equal(prefill_pruned(opened, batch, pruner).logits, plain)


def test_chance_begins_anew_with_each_prompt() -> None:
    def kept(counts: list[int], seed: int = 0) -> list[tuple[int, ...]]:
        record = RandomTokens(5, seed).start(None, prompts(counts)).record
        return [view.cells for view in record.stages[0].views]

    assert kept([30, 20]) == kept([30]) + kept([20])
    assert kept([30]) == kept([30]) and kept([30]) != kept([30], seed=1)
    assert len(set(kept([30])[0])) == 5


@pytest.mark.parametrize(("rows", "columns"), [(10, 10), (4, 9), (9, 4), (1, 7), (40, 3), (24, 24)])
def test_spread_cells_are_distinct_and_as_many_as_asked_for(rows: int, columns: int) -> None:
    for num in range(1, rows * columns + 1):
        spread = evenly_spread(rows, columns, num)
        assert len(set(spread)) == num and set(spread) <= set(range(rows * columns))


@pytest.mark.parametrize(
    ("rows", "columns", "num", "places"),
    [
        (100, 4, 1, [(50, 2)]),
        (40, 4, 2, [(10, 2), (30, 2)]),
        (4, 100, 1, [(2, 50)]),
        (90, 3, 3, [(15, 1), (45, 1), (75, 1)]),
    ],
)
def test_few_cells_of_a_long_grid_stand_in_the_middle_of_their_shares(
    rows: int, columns: int, num: int, places: list[tuple[int, int]]
) -> None:
    assert [divmod(cell, columns) for cell in evenly_spread(rows, columns, num)] == places


def test_spread_cells_are_far_from_each_other() -> None:
    places = torch.tensor([[cell // 24, cell % 24] for cell in evenly_spread(24, 24, 64)]).double()
    distances = torch.cdist(places, places) + 99 * torch.eye(64)
    assert float(distances.min()) >= 2.9  # 64 squares of 3 x 3 cells fill the grid
    counts = torch.tensor([[cell // 100, cell % 10] for cell in evenly_spread(10, 10, 30)])[:, 1].bincount(minlength=10)
    assert int(counts.max()) <= 6


def test_lines_are_as_long_as_the_pictures() -> None:
    opened = backend("qwen2_5_vl")
    inputs = opened.lay_out(seen(2)).inputs
    found = prefill_pruned(opened, inputs, UniformGrid(3))
    expected = [evenly_spread(int(rows) // 2, int(columns) // 2, 3) for _, rows, columns in inputs["image_grid_thw"]]
    assert cells(found) == [tuple(sorted(some)) for some in expected]
    opened = backend("mistral3")
    inputs = opened.lay_out(seen(2)).inputs
    found = prefill_pruned(opened, inputs, UniformGrid(3))
    expected = [evenly_spread(int(height) // 28, int(width) // 28, 3) for height, width in inputs["image_sizes"]]
    assert cells(found) == [tuple(sorted(some)) for some in expected]
    assert cells(read(backend("llava"), seen(1), UniformGrid(4))) == [(5, 7, 13, 15)]


@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_the_class_token_is_read_where_the_features_were_made(name: str) -> None:
    opened, other = backend(name), fresh(name)
    tower = other.model.model.vision_tower
    tower.set_attn_implementation("eager")
    inputs = opened.lay_out(seen(2)).inputs
    pixels = inputs["pixel_values"]
    if pixels.dim() == 5:
        pixels = pixels.flatten(0, 1)[pixels.flatten(0, 1).abs().flatten(1).amax(1) > 0]
    attention = tower(pixels, output_attentions=True).attentions[-2][:, :, 0, 1:].mean(1)
    whole = prefill_pruned(opened, inputs, ClassAttention(1.0))
    found = prefill_pruned(opened, inputs, ClassAttention(5))
    for view, there in zip(found.record.stages[0].views, whole.record.stages[0].views, strict=True):
        shown = torch.tensor(there.cells)
        expected = shown[top_places(attention[view.view, shown], 5)]
        assert list(view.cells) == expected.tolist()


@pytest.mark.parametrize("name", ["qwen2_5_vl", "pixtral", "internvl", "idefics3", "mqt_llava"])
def test_families_without_class_token_say_so(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"not patches beside a class token: use a model"):
        read(backend(name), seen(1), ClassAttention(3))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_the_last_token_is_read_in_its_layer(name: str) -> None:
    opened, other = backend(name), fresh(name)
    other.model.set_attn_implementation("eager")
    inputs = opened.lay_out(seen(1)).inputs
    attention = other.model(**inputs, output_attentions=True).attentions[1][0, :, -1].mean(0)
    places = (inputs["input_ids"][0] == opened.model.config.image_token_id).nonzero()[:, 0]
    found = prefill_pruned(opened, inputs, LastTokenAttention(5, layer=1))
    assert cells(found) == [tuple(top_places(attention[places], 5).tolist())]
    assert found.lengths[1] - found.lengths[2] == len(places) - 5


def test_a_padded_batch_is_read_at_its_own_last_tokens() -> None:
    opened, pruner = backend("llava"), LastTokenAttention(5, layer=1)
    asked = [seen(1), seen(1, "what ?")]
    batch = prefill_pruned(opened, together(opened, [opened.lay_out(one) for one in asked]), pruner)
    assert cells(batch) == [view for one in asked for view in cells(read(opened, one, pruner))]


@pytest.mark.parametrize("wrong", [-1, True, 1.5, "x", None, [0], 2**63])
def test_what_is_no_seed_is_refused(wrong: Any, unchecked: None) -> None:
    with pytest.raises(InputError, match=r"seed=.* cannot be: pass a whole number from 0 to 2\*\*63 - 1"):
        RandomTokens(4, seed=wrong)


def test_the_largest_seed_draws() -> None:
    assert RandomTokens(5, 2**63 - 1).start(None, prompts([30])).record.stages[0].kept == 5


@pytest.mark.parametrize("wrong", [-1, True, 1.5, "a", "2", None, [2]])
def test_what_is_no_layer_is_refused(wrong: Any, unchecked: None) -> None:
    with pytest.raises(InputError, match="pass the number of a layer"):
        LastTokenAttention(4, layer=wrong)


def test_a_layer_that_the_model_has_not_is_refused() -> None:
    with pytest.raises(InputError, match=r"layers 0 to 3: pass layer=2 or less"):
        read(backend("llava"), seen(1), LastTokenAttention(4, layer=3))


def test_without_a_picture_there_is_nothing_to_do() -> None:
    opened = backend("llava")
    for pruner in (RandomTokens(3), UniformGrid(3), ClassAttention(3), LastTokenAttention(3)):
        pruning = pruner.start(opened, prompts([0]))
        assert pruning.before() is None and pruning.layers == ()
