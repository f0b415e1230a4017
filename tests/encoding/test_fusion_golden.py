"""Fusion as the authors' code computes it, from numbers that it gave."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, DynamicCache, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

FOLDER = Path(__file__).parents[1] / "golden/vision"
CASES = json.loads((FOLDER / "fusion.json").read_text())
EXTERNAL = [case for case in CASES["external_direct"] if "fused" in case]
INTERNAL = CASES["internal_direct_values"]


@pytest.fixture(scope="module")
def arrays() -> dict[str, torch.Tensor]:
    with np.load(FOLDER / "fusion.npz") as file:
        return {name: torch.from_numpy(file[name]).float() for name in file}


@pytest.mark.parametrize("case", EXTERNAL, ids=lambda case: case["id"])
def test_external_direct_fusion(case: dict[str, Any], arrays: dict[str, torch.Tensor]) -> None:
    """The first token goes, as by ``vision_feature_select_strategy="default"``: of SigLIP it is a patch, no class."""
    from qr_integrations.encoding.fusion_layers import FusionSpec, fusion_layers
    from qr_integrations.encoding.fusion_modules import FusionProjector, FusionSizes

    states = arrays[f"{case['encoder']}_hidden_states"][:, :, 1:]
    depth = len(states) - 1
    spec = FusionSpec(case["set_name"], siglip_layers=case["encoder"] == "siglip")
    layers = fusion_layers(spec, depth, 24)
    assert set(layers.read) == set(case["selected_hidden_states"])
    width = states.shape[-1]
    out_width = case.get("projected_shape", [10])[-1]
    projector = FusionProjector(spec, layers, FusionSizes(depth, width, 24, out_width, 1, 1, 1))
    features = torch.cat([states[layer] for layer in layers.read], -1)
    entered: list[torch.Tensor] = []
    projector.linear_1.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    if "projector_weights_prefix" in case:
        numbered = {"linear_1": 0, "linear_2": 2}
        names = {f"{mine}.{part}": f"{its}.{part}" for mine, its in numbered.items() for part in ("weight", "bias")}
        prefix = case["projector_weights_prefix"]
        projector.load_state_dict({mine: arrays[prefix + its] for mine, its in names.items()})
    projected = projector(features)
    torch.testing.assert_close(entered[0], arrays[case["fused"]], atol=1e-5, rtol=1e-5)
    if "projected" in case:
        torch.testing.assert_close(projected, arrays[case["projected"]], atol=1e-5, rtol=1e-5)


def language_model_of(depth: int, arrays: dict[str, torch.Tensor]) -> LlavaForConditionalGeneration:
    sizes = {"hidden_size": INTERNAL["hidden"], "intermediate_size": INTERNAL["intermediate"]}
    text = LlamaConfig(
        **sizes,
        vocab_size=8,
        num_hidden_layers=depth,
        num_attention_heads=INTERNAL["heads"],
        num_key_value_heads=INTERNAL["kv_heads"],
        rms_norm_eps=INTERNAL["rms_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": INTERNAL["rope_base"]},
        pad_token_id=0,
    )
    tower = CLIPVisionConfig(
        hidden_size=4, intermediate_size=4, num_hidden_layers=24, num_attention_heads=1, image_size=14, patch_size=14
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=tower, text_config=text, image_token_index=3, vision_feature_layer=-2)
    )
    decoder, prefix = model.get_decoder(), INTERNAL["weights_prefix"]
    for number, layer in enumerate(decoder.layers):
        own = f"{prefix}set{number % INTERNAL['weight_sets']}."
        layer.load_state_dict({n.removeprefix(own): v for n, v in arrays.items() if n.startswith(own)})
    decoder.norm.weight.data = arrays[f"{prefix}norm.weight"]
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("case", INTERNAL["cases"], ids=lambda case: case["id"])
def test_internal_direct_fusion(case: dict[str, Any], arrays: dict[str, torch.Tensor]) -> None:
    from qr_integrations.encoding.fusion import fuse, pictures_at
    from qr_integrations.encoding.fusion_layers import FusionSpec

    model = language_model_of(case["llm_layers"], arrays)
    embedded, projected = arrays[INTERNAL["x"]], arrays[INTERNAL["projected_features"]]
    places = torch.zeros(embedded.shape[:2], dtype=torch.bool)
    for row, start in enumerate(case["visual_start"]):
        places[row, start : start + case["visual_count"]] = True
    if case["set_name"] != "none":
        model = fuse(model, FusionSpec(case["set_name"], "internal_direct"))
        arriving = [projected[layer - 1] for layer, _ in model.model.multi_modal_projector.layers.arrivals]
        features = torch.cat([torch.zeros_like(projected[0]), *arriving], -1)
    else:
        features = projected[0]
    cache, given = DynamicCache(), embedded.clone()
    with pictures_at(model, places, features):
        states = model.get_decoder()(inputs_embeds=given, past_key_values=cache, use_cache=True).last_hidden_state
    torch.testing.assert_close(states, arrays[case["output"]], atol=1e-4, rtol=0)
    assert torch.equal(given, embedded)
    following = torch.linspace(-1, 1, INTERNAL["hidden"]).expand(2, 1, -1)
    states = model.get_decoder()(inputs_embeds=following, past_key_values=cache, use_cache=True).last_hidden_state
    torch.testing.assert_close(states, arrays[case["decode_output"]], atol=1e-4, rtol=0)
