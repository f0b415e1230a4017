"""Lines that ask for fewer visual tokens, and how many of them the layers of a model then read."""

from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

if TYPE_CHECKING:
    from qr_integrations.backend import Backend


def question(text: str = "What?") -> Any:
    from qr_integrations.evaluation.picture_questions import PictureQuestion

    return PictureQuestion(Image.new("RGB", (8, 8)), text, ("red",))


def steps(spec: str, text: str = "What?", seed: int = 0) -> Any:
    """What `Backend.answer` is passed."""
    from qr_integrations.evaluation.pictures import make_picture_systems

    system: Any = make_picture_systems([spec], seed=seed)[0]
    return system.steps(None, question(text), (8, 8))


def test_a_line_says_what_is_passed_to_answer(unchecked: None) -> None:
    from qr_integrations.pruning import CDPruner, ClassAttention, LastTokenAttention, SparseVLM, UniformGrid

    assert steps("mqt:tokens=16") == {"num_visual_tokens": 16}
    assert steps("mqt") == {"num_visual_tokens": None}
    assert steps("cdpruner:keep=0.33") == {"prune": CDPruner(keep=0.33)}
    assert steps("cdpruner:keep=64,theta=0.5,sign=1") == {"prune": CDPruner(keep=64, theta=0.5, sign=1)}
    assert steps("cdpruner:keep=9,relevance=none") == {"prune": CDPruner(keep=9, relevance=None)}
    assert steps("sparsevlm:keep=0.33,version=2.0") == {"prune": SparseVLM(keep=0.33, version="2.0")}
    assert steps("sparsevlm:keep=0.5,layers=2+4+6") == {"prune": SparseVLM(keep=0.5, layers=(2, 4, 6))}
    assert steps("uniform_grid:keep=9") == {"prune": UniformGrid(9)}
    assert steps("class_attention:keep=1.0") == {"prune": ClassAttention(1.0)}
    assert steps("last_token:keep=0.1,layer=3") == {"prune": LastTokenAttention(0.1, layer=3)}


def test_every_question_draws_its_own_random_tokens_and_always_the_same(unchecked: None) -> None:
    drawn = [steps("random_tokens:keep=7", text, seed)["prune"] for seed in (0, 1) for text in ("What?", "And?")]
    assert {one.keep for one in drawn} == {7} and len({one.seed for one in drawn}) == 4
    assert drawn[0] == steps("random_tokens:keep=7")["prune"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cdpruner", "write cdpruner:keep=0.33"),
        ("random_tokens:keep=0", "keep=0 cannot be"),
        ("uniform_grid:keep=half", "keep cannot be 'half'"),
        ("sparsevlm:keep=0.5,version=3", "unknown version '3'"),
        ("mqt:keep=0.5", "mqt has no setting 'keep': known are tokens"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_asked(unchecked: None, spec: str, message: str) -> None:
    from qr_integrations.errors import InputError
    from qr_integrations.evaluation.pictures import make_picture_systems

    with pytest.raises(InputError, match=message):
        make_picture_systems(["none", spec])


@pytest.mark.parametrize(
    ("method", "message"),
    [("mqt", "'mqt' is no system"), ("relative", "is no system"), ("cdpruner:keep=3", "leave keep out")],
)
def test_budgets_are_put_behind_methods_that_drop_tokens(method: str, message: str) -> None:
    from qr_integrations.errors import InputError
    from qr_integrations.evaluation.token_systems import PRUNING_METHODS, pruning_specs

    with pytest.raises(InputError, match=message):
        pruning_specs(method, ["0.5"])
    for known in PRUNING_METHODS:
        assert [steps(spec)["prune"].keep for spec in pruning_specs(known, ["0.5", "3"])] == [0.5, 3]


@pytest.mark.parametrize(
    ("spec", "visual"),
    [
        ("none", 100.0),
        ("cdpruner:keep=0.2", 20.0),
        ("random_tokens:keep=6", 6.0),
        ("last_token:keep=0.2,layer=2", (3 * 100 + 5 * 20) / 8),
    ],
)
def test_tokens_are_counted_by_the_layers_that_read_them(qr_mini_vl: "Backend", spec: str, visual: float) -> None:
    from qr_integrations.evaluation.drawn_world.data import drawn_questions
    from qr_integrations.evaluation.pictures import ask_pictures, make_picture_systems

    (run,) = ask_pictures(qr_mini_vl, make_picture_systems([spec]), drawn_questions(1)[:1])
    assert run.visual_tokens == pytest.approx(visual)
    assert 0 < run.first_token <= run.seconds


def test_a_crop_shows_a_second_picture(qr_mini_vl: "Backend") -> None:
    from qr_integrations.evaluation.drawn_world.data import drawn_questions
    from qr_integrations.evaluation.pictures import ask_pictures, make_picture_systems

    asked = next(one for one in drawn_questions(1, shares=(0.1,)) if one.box is not None)
    (run,) = ask_pictures(qr_mini_vl, make_picture_systems(["oracle"]), [asked])
    assert run.box is not None and run.visual_tokens == 200


def test_merged_tokens_count_and_a_budget_of_sparsevlm_is_booked_lower_than_what_is_read(qr_mini_vl: "Backend") -> None:
    from qr_integrations.evaluation.token_systems import mean_visual_tokens, num_words
    from qr_integrations.pruning import SparseVLM
    from qr_integrations.types import Message

    message = Message.user(Image.effect_noise((140, 140), 90).convert("RGB"), "What color is the ball?")
    answer = qr_mini_vl.answer([message], prune=SparseVLM(keep=0.33), max_new_tokens=1)
    words = num_words(qr_mini_vl, message)
    stages = answer.steps["prune"].stages
    left, read, now = {one.layer: one.kept + one.merged for one in stages}, [], 100
    for layer in range(8):
        read.append(now)
        now = left.get(layer, now)
    assert any(one.merged for one in stages)
    assert mean_visual_tokens(answer, words, 8) == pytest.approx(sum(read) / 8)
    assert sum(read) / 8 > 33
