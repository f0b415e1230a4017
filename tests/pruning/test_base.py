"""How many tokens stay, which places these are, and what is noted about it."""

import json
from typing import Any

import pytest
import torch

from tests.pruning.seen import prompts

WRONG = [0, -1, 1.5, 0.0, -0.5, "a", True, None, float("nan")]


@pytest.mark.parametrize("keep", WRONG)
def test_what_cannot_be_kept_is_refused(keep: Any, unchecked: None) -> None:
    from qr_integrations.errors import InputError
    from qr_integrations.pruning import CDPruner, ClassAttention, LastTokenAttention, RandomTokens, UniformGrid

    for kind in (CDPruner, ClassAttention, LastTokenAttention, RandomTokens, UniformGrid):
        with pytest.raises(InputError, match=r"pass a whole number from 1"):
            kind(keep=keep)


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
        {"picture": 0, "view": 0, "cells": [1, 3], "of": 4},
        {"picture": 1, "view": 1, "cells": [1], "of": 2},
    ]


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
