"""How many tokens stay, which places these are, and what is noted about it."""

import json
from typing import Any

import pytest
import torch

from tests.pruning.seen import prompts

WRONG = [0, -1, 1.5, 0.0, -0.5, "a", "4", True, None, [4], float("nan")]


@pytest.mark.parametrize("keep", WRONG)
def test_what_cannot_be_kept_is_refused(keep: Any, unchecked: None) -> None:
    from qr_integrations.errors import InputError
    from qr_integrations.pruning import CDPruner, ClassAttention, LastTokenAttention, RandomTokens, UniformGrid

    for kind in (CDPruner, ClassAttention, LastTokenAttention, RandomTokens, UniformGrid):
        with pytest.raises(InputError, match=r"pass a whole number from 1"):
            kind(keep=keep)


@pytest.mark.parametrize("positions", [3, None, True, ["kept"], "new"])
def test_positions_of_another_name_or_type_are_refused(positions: Any, unchecked: None) -> None:
    from qr_integrations.errors import InputError
    from qr_integrations.pruning import CDPruner, ClassAttention, LastTokenAttention, RandomTokens, UniformGrid

    for kind in (CDPruner, ClassAttention, LastTokenAttention, RandomTokens, UniformGrid):
        with pytest.raises(InputError, match=r"unknown positions .*: pass 'auto', 'compact' or 'kept'"):
            kind(4, positions=positions)


@pytest.mark.parametrize(
    ("wrong", "cure"),
    [
        ({"relevance": "clip"}, "text_encoder='openai/clip-vit-large-patch14-336'"),
        ({"relevance": "colour"}, "pass 'auto', 'clip', 'language' or None"),
        ({"relevance": ["clip"]}, "pass 'auto', 'clip', 'language' or None"),
        ({"sign": 0}, "pass -1, 1 or None"),
        ({"sign": True}, "pass -1, 1 or None"),
        ({"sign": "1"}, "pass -1, 1 or None"),
        ({"theta": 1.0}, "pass 0 or more and less than 1"),
        ({"theta": -0.1}, "pass 0 or more and less than 1"),
        ({"theta": "x"}, "pass 0 or more and less than 1"),
        ({"theta": False}, "pass 0 or more and less than 1"),
        ({"theta": float("nan")}, "pass 0 or more and less than 1"),
        ({"text_encoder": 3}, "pass a folder or hub id as a string"),
        ({"text_encoder": "", "relevance": "clip"}, "pass a folder or hub id as a string"),
        ({"published": "no"}, "pass True or False"),
        ({"published": 1}, "pass True or False"),
        ({"positions": "new"}, "pass 'auto', 'compact' or 'kept'"),
    ],
)
def test_wrong_settings_of_cdpruner_are_refused(wrong: dict[str, Any], cure: str, unchecked: None) -> None:
    from qr_integrations.errors import InputError
    from qr_integrations.pruning import CDPruner

    with pytest.raises(InputError, match=cure):
        CDPruner(4, **wrong)


def test_numbers_are_tokens_and_floats_are_shares() -> None:
    from qr_integrations.pruning.base import num_kept

    assert [num_kept(keep, 10) for keep in (1, 3, 10, 11, 0.01, 0.25, 0.5, 1.0)] == [1, 3, 10, 10, 1, 2, 5, 10]


def test_the_largest_stay_and_of_equal_ones_the_first() -> None:
    from qr_integrations.pruning.base import top_places

    assert top_places(torch.tensor([2.0, 3.0, 2.0, 1.0, 2.0]), 3).tolist() == [0, 1, 2]
    assert top_places(torch.zeros(4), 2).tolist() == [0, 1]


def test_words_stay_and_padding_goes() -> None:
    from qr_integrations.pruning.base import left_with

    seen = prompts([4, 2], words=3)
    left = left_with(seen, [torch.tensor([4, 2]), torch.tensor([], dtype=torch.long)])
    assert [places.tolist() for places in left.kept] == [[0, 2, 4, 5, 6], [2, 5, 6]]


def test_positions_are_counted_anew_unless_they_are_three() -> None:
    from qr_integrations.pruning.base import is_compact

    flat, three = prompts([4]), prompts([4], three=True)
    assert [is_compact(how, one) for how in ("auto", "compact", "kept") for one in (flat, three)] == [
        *(True, False),
        *(True, True),
        *(False, False),
    ]


def test_a_record_tells_cells_and_is_json() -> None:
    from qr_integrations.backend.visual_tokens import Left
    from qr_integrations.pruning import PruneRecord

    seen, record = prompts([4, 2], words=3), PruneRecord("Some")
    kept = [torch.tensor([0, 2, 4, 5, 6]), torch.tensor([2, 4, 5, 6])]
    record.note(None, seen, Left(kept))
    record.note(2, seen, Left(kept, [torch.zeros(2, 8), torch.zeros(1, 8)], [torch.tensor([2, 4]), torch.tensor([4])]))
    told = json.loads(json.dumps(record.as_dict()))
    assert told["method"] == "Some" and [stage["layer"] for stage in told["stages"]] == [None, 2]
    first, second = told["stages"]
    assert (first["kept"], first["of"], first["merged"], second["merged"]) == (3, 6, 0, 3)
    assert first["views"] == [
        {"picture": 0, "view": 0, "cells": [1, 3], "of": 4, "merged_before": 0},
        {"picture": 1, "view": 1, "cells": [1], "of": 2, "merged_before": 0},
    ]


def test_merged_tokens_that_stay_show_no_cell_and_are_counted_apart() -> None:
    from qr_integrations.backend.visual_tokens import Left
    from qr_integrations.pruning import PruneRecord

    seen, record = prompts([4], words=3), PruneRecord("Some")
    first = Left([torch.tensor([0, 2, 4, 5, 6])], [torch.zeros(2, 8)], [torch.tensor([1, 3])])
    record.note(0, seen, first)
    now = seen.take(first, compact=True)  # word, cells 1 and 3, two merged ones under cells 0 and 2, words
    assert now.cell.tolist() == [[-1, 1, 3, 0, 2, -1, -1]]
    record.note(1, now, Left([torch.tensor([0, 2, 3, 5, 6])], [torch.zeros(1, 8)], [torch.tensor([1])]))
    (view,) = record.stages[1].views
    assert (view.cells, view.merged_before, view.of) == ((3,), 1, 4)
    assert [(stage.of, stage.kept, stage.merged) for stage in record.stages] == [(4, 2, 2), (4, 1, 2)]
    told = json.loads(json.dumps(record.stages[1].as_dict()))
    assert (told["kept"], told["merged"], told["views"][0]["merged_before"]) == (1, 2, 1)


@pytest.mark.parametrize("budgets", [(12, 8, 4), (6, 4, 2), (5, 5, 5)])
def test_kept_and_merged_are_together_all_that_the_next_layer_reads(budgets: tuple[int, ...]) -> None:
    from qr_integrations.backend.surgery import prefill_pruned
    from qr_integrations.pruning import SparseVLM
    from tests.backend.seeing import backend, seen

    opened, pruner = backend("llava"), SparseVLM(budgets=budgets, layers=(0, 1, 2))
    prompt = opened.lay_out(seen(1))
    found = prefill_pruned(opened, prompt.inputs, pruner)
    left = [length - (len(prompt) - 16) for length in found.lengths]
    assert [stage.of for stage in found.record.stages] == left[:-1]
    assert [stage.kept + stage.merged for stage in found.record.stages] == left[1:]
    assert [stage.kept + stage.merged_before for stage in found.record.stages] == list(budgets)
    before: set[int] = set(range(16))
    for stage in found.record.stages:
        (view,) = stage.views
        assert len(set(view.cells)) == len(view.cells) and set(view.cells) <= before
        before = set(view.cells)


def test_without_pictures_nothing_is_chosen() -> None:
    from qr_integrations.pruning.base import choose_before

    pruning = choose_before("Some", prompts([0]), [torch.tensor([], dtype=torch.long)])
    assert pruning.before() is None and pruning.record.as_dict() == {"method": "Some", "stages": []}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_none_are_refused(value: float) -> None:
    from qr_integrations.errors import ScoreError
    from qr_integrations.pruning.base import check_finite

    check_finite(torch.zeros(3), "scores")
    with pytest.raises(ScoreError, match=r"scores hold NaN.*dtype='bfloat16'"):
        check_finite(torch.tensor([0.0, value]), "scores")
