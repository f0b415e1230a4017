"""CLIP's text encoder, and the two layers that bring a picture's patches to where its texts are.

Legend: M segments of a text, N patches, w width of the tower, d of what both are compared in.
"""

import threading
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, CLIPModel, PreTrainedTokenizerBase

from qr_integrations.backend.loading import resolve_name
from qr_integrations.errors import LoadError, UnsupportedModelError

_LOADING = threading.Lock()


class ClipText:
    """A CLIP model without its vision tower, in fp32."""

    def __init__(self, model: CLIPModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self._text, self._text_projection = model.text_model, model.text_projection
        self._norm, self._visual_projection = model.vision_model.post_layernorm, model.visual_projection
        self._tokenizer = tokenizer
        self.window = int(model.config.text_config.max_position_embeddings)

    def segments(self, text: str, *, published: bool = False) -> list[list[int]]:
        """The tokens of a text, in as many segments as it takes.

        Every segment begins and ends like a text of its own. `published` cuts the whole text as it is: then the first
        of several segments has no end, and what CLIP makes of it does not depend on the text.
        """
        ids: list[int] = self._tokenizer(text, add_special_tokens=published).input_ids
        size = self.window if published else self.window - 2
        parts = [ids[start : start + size] for start in range(0, max(1, len(ids)), size)]
        if published:
            return parts
        return [[self._tokenizer.bos_token_id, *part, self._tokenizer.eos_token_id] for part in parts]

    @torch.no_grad()
    def texts(self, text: str, *, published: bool = False) -> Float[Tensor, "M d"]:
        """Embeddings of the segments of a text, not normalised."""
        parts = self.segments(text, published=published)
        longest = max(len(part) for part in parts)
        padded = [part + [0] * (longest - len(part)) for part in parts]
        mask = [[1] * len(part) + [0] * (longest - len(part)) for part in parts]
        device = self._text_projection.weight.device
        ids, seen = torch.tensor(padded, device=device), torch.tensor(mask, device=device)
        embeddings: Tensor = self._text_projection(self._text(input_ids=ids, attention_mask=seen).pooler_output)
        return embeddings

    @torch.no_grad()
    def patches(self, features: Float[Tensor, "N w"], norm: nn.LayerNorm | None = None) -> Float[Tensor, "N d"]:
        """Embeddings of patches, not normalised.

        Args:
            features: what a vision tower made of them.
            norm: the tower's last norm; None takes that of this CLIP model.

        Raises:
            UnsupportedModelError: a tower of another width.
        """
        width = self._visual_projection.in_features
        if features.shape[1] != width:
            raise UnsupportedModelError(
                f"the vision tower is {features.shape[1]} wide and the text encoder belongs to one of {width}: pass as "
                "text_encoder the CLIP model that the tower was taken from, or relevance='language'"
            )
        norm = norm or self._norm
        weight, bias = norm.weight.float(), norm.bias.float()
        normed = nn.functional.layer_norm(features.float(), norm.normalized_shape, weight, bias, norm.eps)
        embeddings: Tensor = self._visual_projection(normed)
        return embeddings


def clip_text(name_or_path: str, device: torch.device) -> ClipText:
    """A CLIP model's text half, loaded once for each device.

    Raises:
        LoadError: no such model, not CLIP, or weights are missing.
    """
    with _LOADING:
        return _load(resolve_name(name_or_path), str(device))


@lru_cache(maxsize=2)
def _load(name: str, device: str) -> ClipText:
    try:
        config = AutoConfig.from_pretrained(name)
        if config.model_type != "clip":
            raise LoadError(f"{name!r} is {config.model_type!r}, not CLIP: pass the CLIP model of the vision tower")
        model, info = CLIPModel.from_pretrained(
            name, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        text = " ".join(f"{error}".split())[:300]
        raise LoadError(
            f"the text encoder {name!r} cannot be loaded ({text}): pass a folder or hub id of a CLIP model with "
            "safetensors, or relevance='language'"
        ) from error
    if info["missing_keys"]:
        raise LoadError(f"{name!r} lacks {sorted(info['missing_keys'])[:3]}: pass a whole CLIP model")
    return ClipText(model.to(device).eval(), tokenizer)


def tower_norm(model: Any) -> nn.LayerNorm | None:
    """The last norm of a model's vision tower; None where there is none, or where the checkpoint left it untouched."""
    norm = getattr(getattr(model.base_model, "vision_tower", None), "post_layernorm", None)
    if not isinstance(norm, nn.LayerNorm) or (bool((norm.weight == 1).all()) and not bool(norm.bias.any())):
        return None
    return norm
