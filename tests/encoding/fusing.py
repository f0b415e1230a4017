"""Tiny models to fuse, fused ones, and what they read."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

IMAGE, CELLS = 4, 9


def tiny_llava() -> LlavaForConditionalGeneration:
    """Random weights, twelve layers in the tower and four in the language model."""
    tower = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=12, num_attention_heads=2, image_size=42, patch_size=14
    )
    sizes: dict[str, Any] = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=4, num_attention_heads=4)
    text = LlamaConfig(vocab_size=40, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes)
    config = LlavaConfig(vision_config=tower, text_config=text, image_token_index=IMAGE, vision_feature_layer=-2)
    torch.manual_seed(0)
    made = LlavaForConditionalGeneration(config).float().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
    return made.requires_grad_(False)


def fused(model: Any, *settings: Any, **more: Any) -> Any:
    from qr_integrations.encoding.fusion import fuse
    from qr_integrations.encoding.fusion_layers import FusionSpec

    return fuse(model, FusionSpec(*settings, **more))


def inputs(pictures: int = 1, behind: int = 5, padding: int = 0) -> dict[str, Any]:
    torch.manual_seed(1)
    ids = [1] + [IMAGE] * (CELLS * pictures) + [7 + i for i in range(behind)]
    given: dict[str, Any] = {"input_ids": torch.tensor([[0] * padding + ids])}
    given["attention_mask"] = torch.tensor([[0] * padding + [1] * len(ids)])
    if pictures:
        given["pixel_values"] = torch.randn(pictures, 3, 42, 42)
    return given


def stacked(*prompts: dict[str, Any]) -> dict[str, Any]:
    """One batch, padded at the left."""
    longest = max(p["input_ids"].shape[1] for p in prompts)
    rows = {
        name: torch.cat([torch.nn.functional.pad(p[name], (longest - p[name].shape[1], 0)) for p in prompts])
        for name in ("input_ids", "attention_mask")
    }
    return {**rows, "pixel_values": torch.cat([p["pixel_values"] for p in prompts if "pixel_values" in p])}


def randomize(module: Any, scale: float = 1.0) -> None:
    """Everything that starts at zero gets something to say."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, scale * (parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.5))


def old_projector(model: Any, made: Any) -> None:
    """The fused model makes tokens of the final layer as the model that it was made of."""
    for name in ("linear_1", "linear_2"):
        old = getattr(model.model.multi_modal_projector, name).state_dict()
        getattr(made.model.multi_modal_projector, name).load_state_dict(old)


def gated(model: Any, wiring: str = "pre", layers: str = "triple") -> Any:
    made = fused(model, layers, "internal_modular", wiring)
    randomize(made.model.multi_modal_projector)
    return made


def direct(model: Any) -> Any:
    made = fused(model, "triple", "internal_direct")
    randomize(made.model.multi_modal_projector)
    return made


INTERNAL: dict[str, Callable[[Any], Any]] = {
    "direct": direct,
    "pre": gated,
    "post": lambda model: gated(model, "post"),
    "parallel": lambda model: gated(model, "parallel"),
}
each_internal = pytest.mark.parametrize("make", INTERNAL.values(), ids=INTERNAL.keys())
