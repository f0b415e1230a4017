"""Fused models: what is native to transformers, what is left alone, what is refused, and what goes to disk."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from tests.encoding.fusing import (
    CELLS,
    IMAGE,
    direct,
    each_internal,
    fused,
    gated,
    inputs,
    old_projector,
    randomize,
    tiny_llava,
)

EXTERNAL = ("linear", "external_direct", "external_modular")


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    return tiny_llava()


# ---- external


@pytest.mark.parametrize("layers", ["double", "triple", (4, 7)])
def test_external_direct_fusion_of_single_layers_is_transformers_own(model: Any, layers: Any) -> None:
    made = fused(model, layers)
    config = copy.deepcopy(model.config)
    config.vision_feature_layer = [4, 7, 11] if layers == (4, 7) else [2, 9, 11]
    native = LlavaForConditionalGeneration(config).eval()
    native.load_state_dict(made.state_dict())  # strict: the same names and shapes
    assert torch.equal(native(**inputs(2)).logits, made(**inputs(2)).logits)


def test_means_of_groups_are_a_concatenation_of_all_layers_with_folded_weights(model: Any) -> None:
    from qr_integrations.encoding.fusion_layers import FusionSpec, fusion_layers

    made = fused(model, "all")
    layers = fusion_layers(FusionSpec("all"), 12, 4)
    assert [len(group) for group in layers.groups] == [6, 6, 1]
    config = copy.deepcopy(model.config)
    config.vision_feature_layer = [v for group in layers.groups for v in group]
    native = LlavaForConditionalGeneration(config).eval()
    state = made.state_dict()
    name = "model.multi_modal_projector.linear_1.weight"
    parts = state[name].split(32, dim=1)
    folded = [part / len(group) for part, group in zip(parts, layers.groups, strict=True) for _ in group]
    native.load_state_dict({**state, name: torch.cat(folded, dim=1)})
    torch.testing.assert_close(native(**inputs()).logits, made(**inputs()).logits, atol=1e-5, rtol=1e-5)


def test_the_order_within_a_group_does_not_matter(model: Any) -> None:
    made = fused(model, "former")
    projector = made.model.multi_modal_projector
    torch.manual_seed(0)
    parts = list(torch.randn(2, CELLS, 7 * 32).split(32, -1))
    shuffled = [*parts[5::-1], parts[6]]
    tokens = [projector(torch.cat(p, -1)) for p in (parts, shuffled)]
    torch.testing.assert_close(*tokens, atol=1e-6, rtol=1e-6)
    moved = projector(torch.cat([parts[6], *parts[1:6], parts[0]], -1))
    assert not torch.allclose(tokens[0], moved, atol=1e-3)


def test_external_modular_fusion_starts_as_the_plain_projector(model: Any) -> None:
    made = fused(model, "all", "external_modular")
    old_projector(model, made)
    assert torch.equal(made(**inputs(2)).logits, model(**inputs(2)).logits)
    randomize(made.model.multi_modal_projector.fuser)
    assert not torch.allclose(made(**inputs(2)).logits, model(**inputs(2)).logits, atol=1e-2)


def test_linear_fusion_is_one_linear_layer(model: Any) -> None:
    made = fused(model, "triple", "linear")
    assert set(made.model.multi_modal_projector.state_dict()) == {"linear_1.weight", "linear_1.bias"}
    torch.manual_seed(0)
    one, two = torch.randn(2, 1, CELLS, 96)
    tokens = made.model.multi_modal_projector
    torch.testing.assert_close(tokens(one) + tokens(two), tokens(one + two) + tokens(one * 0), atol=1e-5, rtol=1e-5)


# ---- all


def test_a_gradient_reaches_every_new_weight(model: Any) -> None:
    for make in (
        direct,
        gated,
        lambda model: fused(model, "all"),
        lambda model: fused(model, "all", "external_modular"),
    ):
        made = make(model)
        projector = made.model.multi_modal_projector.requires_grad_(True)
        if hasattr(projector, "fuser"):
            randomize(projector.fuser, 0.3)
        made(**inputs(), labels=inputs()["input_ids"]).loss.backward()
        assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in projector.parameters())


def test_pictures_and_text_may_be_read_one_by_one(model: Any) -> None:
    """As a training loop does that packs many questions into one sequence."""
    from qr_integrations.encoding.fusion import pictures_at

    for made in (direct(model), gated(model), fused(model, "triple")):
        given = inputs(2)
        features = torch.stack(made.get_image_features(given["pixel_values"], return_dict=True).pooler_output)
        places = given["input_ids"] == IMAGE
        with pictures_at(made, places, features) as tokens:
            assert tokens.shape == (2, CELLS, 24)
            embedded = made.get_input_embeddings()(given["input_ids"])
            embedded = embedded.masked_scatter(places[..., None], tokens.flatten(0, 1))
            states = made.model.language_model(inputs_embeds=embedded).last_hidden_state
        torch.testing.assert_close(made.lm_head(states), made(**given).logits, atol=1e-5, rtol=1e-5)


# ---- what is left alone


@each_internal
def test_the_old_model_stays_as_it_is(model: Any, make: Any) -> None:
    before, weights = model(**inputs(2)).logits, {k: v.clone() for k, v in model.state_dict().items()}
    made = make(model)
    made(**inputs(2))
    assert torch.equal(model(**inputs(2)).logits, before)
    assert model.config.vision_feature_layer == -2
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    shared = {p.data_ptr() for p in model.parameters()}
    own = [n for n, p in made.named_parameters() if p.data_ptr() not in shared]
    assert all(name.startswith("model.multi_modal_projector.") for name in own)


# ---- refused


def test_what_cannot_be_fused_is_refused(model: Any, qr_mini: Any) -> None:
    from qr_integrations.encoding.fusion import save_fusion
    from qr_integrations.errors import InputError, UnsupportedModelError

    with pytest.raises(InputError, match="fused already"):
        fused(fused(model, "triple"), "triple")
    with pytest.raises(UnsupportedModelError, match="LLaVA"):
        fused(qr_mini, "triple")
    with pytest.raises(InputError, match="hidden states 0 to 12"):
        fused(model, (3, 14))
    with pytest.raises(InputError, match="is not fused"):
        save_fusion(model, "nowhere")
    several = copy.copy(model.config)
    several.vision_feature_layer = [3, 11]
    other = copy.copy(model)
    other.config = several
    with pytest.raises(InputError, match="final"):
        fused(other, "triple")


def test_tokens_of_another_projector_are_refused(model: Any) -> None:
    from qr_integrations.errors import InputError

    given = inputs(1)
    pixels = given.pop("pixel_values")
    encoded = model.model.get_image_features(pixels, return_dict=True)
    with pytest.raises(InputError, match="get_image_features"):
        direct(model)(**given, mm_encoder_outputs={"image": encoded})
    made = direct(model)
    encoded = made.model.get_image_features(pixels, return_dict=True)
    given = inputs(1)
    assert torch.equal(
        made(input_ids=given["input_ids"], mm_encoder_outputs={"image": encoded}).logits,
        made(input_ids=given["input_ids"], pixel_values=given["pixel_values"]).logits,
    )


# ---- on disk


@pytest.mark.parametrize("strategy", [*EXTERNAL, "internal_direct", "internal_modular"])
def test_a_fusion_is_written_and_read(model: Any, strategy: str, tmp_path: Path) -> None:
    from qr_integrations.encoding.fusion import load_fusion, save_fusion

    made = fused(model, "triple", strategy)
    randomize(made.model.multi_modal_projector)
    save_fusion(made, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fusion.json", "fusion.safetensors"]
    again = load_fusion(model, tmp_path)
    assert torch.equal(made(**inputs(2)).logits, again(**inputs(2)).logits)


def test_a_trained_language_model_travels_along(model: Any, tmp_path: Path) -> None:
    from qr_integrations.encoding.fusion import load_fusion, save_fusion

    trained = copy.deepcopy(model)
    made = gated(trained)
    randomize(trained.model.language_model)
    save_fusion(made, tmp_path, language_model=True)
    before = model(**inputs()).logits
    again = load_fusion(model, tmp_path)
    assert torch.equal(made(**inputs()).logits, again(**inputs()).logits)
    assert torch.equal(model(**inputs()).logits, before)


def test_an_output_layer_of_its_own_travels_with_the_language_model(model: Any, tmp_path: Path) -> None:
    from qr_integrations.encoding.fusion import load_fusion, save_fusion

    made = fused(copy.deepcopy(model), "triple")
    assert made.lm_head.weight is not made.get_input_embeddings().weight
    with torch.no_grad():
        made.lm_head.weight.neg_()
    save_fusion(made, tmp_path, language_model=True)
    before = model(**inputs()).logits
    assert torch.equal(made(**inputs()).logits, load_fusion(model, tmp_path)(**inputs()).logits)
    assert torch.equal(model(**inputs()).logits, before)


def test_foreign_and_missing_tensors_are_refused(model: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from qr_integrations.encoding.fusion import load_fusion, save_fusion
    from qr_integrations.errors import LoadError

    save_fusion(fused(model, "triple"), tmp_path)
    weights = load_file(tmp_path / "fusion.safetensors")
    for changed in (
        {**weights, "foreign": torch.zeros(1)},
        {name: value for name, value in weights.items() if name != "linear_2.bias"},
        {**weights, "linear_2.bias": torch.zeros(3)},
    ):
        save_file(changed, tmp_path / "fusion.safetensors")
        with pytest.raises(LoadError, match=r"1 tensors .* 'foreign'|'linear_2.bias'"):
            load_fusion(model, tmp_path)
    for broken in ("{", "{}", '{"spec": {"layers": "most"}, "read": []}', '{"spec": {"colour": 1}, "read": []}'):
        (tmp_path / "fusion.json").write_text(broken)
        with pytest.raises(LoadError, match="save_fusion"):
            load_fusion(model, tmp_path)
    with pytest.raises(LoadError, match="no fusion"):
        load_fusion(model, tmp_path / "nowhere")


# ---- in the house


def test_a_fused_model_answers_in_a_backend(qr_mini_vl: Any) -> None:
    from PIL import Image

    from qr_integrations.backend import Backend
    from qr_integrations.types import Message

    made = fused(qr_mini_vl, "triple", "internal_modular")
    old_projector(qr_mini_vl.model, made)
    backend = Backend(made, qr_mini_vl.tokenizer, processor=qr_mini_vl.processor)
    question = [Message.user("what color is the box ?", Image.new("RGB", (200, 140), "red"))]
    assert backend.answer(question).text == qr_mini_vl.answer(question).text
