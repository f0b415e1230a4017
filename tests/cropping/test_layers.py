"""Which layer says where to look: published, stated, asked for, or found without labels."""

import math
from typing import Any

import pytest

from qr_integrations.backend import Backend
from qr_integrations.cropping.layers import QUESTIONS, choose_layers, layer_divergences, locate_layer
from qr_integrations.errors import HeadError, InputError, UnsupportedModelError
from tests.backend import tiny_vlms
from tests.backend.seeing import OTHER, QUESTION, backend, fresh, layers, pictures

ASKED = (QUESTION, OTHER, "left", "is the large square on the right of the small circle ?")


def deep(family: str, depth: int, monkeypatch: pytest.MonkeyPatch) -> Backend:
    monkeypatch.setattr(tiny_vlms, "LAYERS", depth)
    return fresh(family)


def seeing_from(layer: int) -> Backend:
    """A model whose layers below that one attend evenly, whatever is asked."""
    opened = fresh("llava")
    for below in list(layers(opened))[:layer]:
        below.self_attn.q_proj.weight.zero_()
    return opened


@pytest.mark.parametrize(
    ("family", "depth", "layer"),
    [("llava", 32, 14), ("qwen2_5_vl", 36, 22), ("instructblip", 32, 15), ("llava", 6, 3), ("qwen3_vl", 5, 2)],
)
def test_the_published_layer_or_the_one_in_the_middle(
    family: str, depth: int, layer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose_layers(deep(family, depth, monkeypatch), None) == (layer,)


def test_a_checkpoint_may_state_its_layer() -> None:
    opened = fresh("llava")
    opened.model.config.vicrop = {"layers": 3}
    assert choose_layers(opened, None) == (3,)
    assert choose_layers(opened, 1) == (1,)
    opened.model.config.vicrop = {"layers": [0, 2]}
    assert choose_layers(opened, None) == (0, 2)
    opened.model.config.vicrop = {"layers": "all"}
    assert choose_layers(opened, None) == (0, 1, 2, 3)


def test_layers_that_are_asked_for() -> None:
    opened = backend("llava")
    assert choose_layers(opened, 0) == (0,)
    assert choose_layers(opened, (3, 1)) == (3, 1)
    assert choose_layers(opened, "all") == (0, 1, 2, 3)


@pytest.mark.parametrize("wrong", [4, -1, (1, 7), ()])
def test_layers_that_are_not_there(wrong: Any) -> None:
    with pytest.raises(HeadError, match=r"pass layers among \[0, 1, 2, 3\], 'all' or None"):
        choose_layers(backend("llava"), wrong)


@pytest.mark.parametrize("asked", [None, 1, "all"])
def test_a_text_model_has_none(asked: Any, qr_mini: Backend) -> None:
    with pytest.raises(InputError, match="reads text only"):
        choose_layers(qr_mini, asked)


def test_nothing_is_published_for_a_family_without_a_row() -> None:
    opened = fresh("llava")
    opened.model.config.model_type = "sees_somehow"
    with pytest.raises(UnsupportedModelError, match="sees_somehow"):
        choose_layers(opened, None)


# ---- found without labels


@pytest.mark.parametrize("first", [1, 2, 3])
def test_layers_that_are_blind_to_the_question_do_not_diverge(first: int) -> None:
    found = layer_divergences(seeing_from(first), pictures(1)[0], ASKED)
    assert list(found) == [0, 1, 2, 3]
    assert all(found[layer] < 1e-9 for layer in range(first))
    assert all(found[layer] > 1e-4 for layer in range(first, 4))


def test_the_first_layer_that_follows_the_question_is_located() -> None:
    for first in (1, 2, 3):
        opened = seeing_from(first)
        found = layer_divergences(opened, pictures(1)[0], ASKED)
        located = locate_layer(opened, pictures(1)[0], ASKED)
        assert located >= first
        assert found[located] >= max(found.values()) / 2
        assert all(found[layer] < max(found.values()) / 2 for layer in range(located))
    assert locate_layer(seeing_from(3), pictures(1)[0], ASKED) == 3


def test_a_model_that_never_follows_the_question_has_some_layer() -> None:
    assert locate_layer(seeing_from(4), pictures(1)[0], ASKED) in range(4)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "paligemma"])
def test_divergences_lie_within_their_bounds(family: str) -> None:
    found = layer_divergences(backend(family), pictures(1)[0], ASKED)
    assert all(0 <= value <= math.log(2) for value in found.values())
    again = layer_divergences(backend(family), pictures(1)[0], ASKED[::-1])
    assert again == pytest.approx(found, rel=1e-3, abs=1e-9)


def test_divergences_are_means_over_pairs() -> None:
    opened, (picture,) = backend("llava"), pictures(1)
    pairs = [layer_divergences(opened, picture, (one, other)) for one, other in [ASKED[:2], ASKED[1:3], ASKED[0:3:2]]]
    three = layer_divergences(opened, picture, ASKED[:3])
    for layer, value in three.items():
        assert value == pytest.approx(sum(pair[layer] for pair in pairs) / 3, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("questions", [[], ["left ?"], ["left ?", "left ?"]])
def test_one_question_is_not_enough(questions: list[str]) -> None:
    for find in (layer_divergences, locate_layer):
        with pytest.raises(InputError, match="at least two different questions"):
            find(backend("llava"), pictures(1)[0], questions)


def test_the_default_questions_ask_for_different_things() -> None:
    assert len(set(QUESTIONS)) == len(QUESTIONS) > 2


def test_a_picture_that_no_layer_sees() -> None:
    """Gemma's sliding layers see nothing of a picture further back than their window."""
    opened = backend("gemma3")
    found = layer_divergences(opened, pictures(1)[0], tuple(f"{QUESTION} {one} {QUESTION}" for one in ASKED))
    assert all(math.isfinite(value) for value in found.values())
    assert found[0] == found[2] == 0.0 and found[1] > 0
    assert locate_layer(opened, pictures(1)[0], ASKED) in (1, 3)
