"""What a vision tower's class token attends to.

Legend: n views, N patches, d width of the tower.
"""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from qr_integrations.backend.picture_families import picture_family
from qr_integrations.backend.visual_tokens import TowerView
from qr_integrations.errors import UnsupportedModelError


def class_attention(model: Any, tower: TowerView | None) -> Float[Tensor, "n N"]:
    """The mean over heads of the class token's attention to each patch, in the layer whose output is projected, fp32.

    Raises:
        UnsupportedModelError: a family without class token, or whose visual tokens are not patches.
    """
    layers = getattr(getattr(getattr(model.base_model, "vision_tower", None), "encoder", None), "layers", None)
    attended = None if tower is None else tower.attended
    if (
        tower is None
        or attended is None
        or layers is None
        or attended.shape[1] != tower.patches.shape[1] + 1
        or not picture_family(model.config).has_places
    ):
        raise UnsupportedModelError(
            f"visual tokens of {model.config.model_type!r} are not patches beside a class token: use a model with the "
            "tower of CLIP, or another pruner"
        )
    number = model.config.vision_feature_layer
    attention = layers[number - 1 if number > 0 else number].self_attn
    queries, keys = attention.q_proj(attended[:, :1]), attention.k_proj(attended)
    of_heads = (*keys.shape[:2], -1, attention.head_dim)
    queries_nHQD = queries.view(len(keys), 1, -1, attention.head_dim).transpose(1, 2).float()
    keys_nHTD = keys.view(of_heads).transpose(1, 2).float()
    weights: Tensor = (queries_nHQD @ keys_nHTD.transpose(-1, -2) * attention.scale).softmax(-1)
    return weights[:, :, 0, 1:].mean(1)
