"""Look again at the part of a picture that matters (ViCrop, arXiv 2502.17422)."""

from qr_integrations.cropping.asking import GENERIC, SHORT_ANSWER
from qr_integrations.cropping.boxes import FoundBox, find_box, search_box
from qr_integrations.cropping.gradient_attention import GradientAttention
from qr_integrations.cropping.high_pass import high_pass, high_pass_mask
from qr_integrations.cropping.importance import ImportanceMap
from qr_integrations.cropping.input_gradient import InputGradient
from qr_integrations.cropping.layers import choose_layers, layer_divergences, locate_layer
from qr_integrations.cropping.relative_attention import RelativeAttention
from qr_integrations.cropping.tiling import Tiling, merge_maps, tile_picture
from qr_integrations.cropping.vicrop import Look, ViCrop, crop_side

__all__ = [
    "GENERIC",
    "SHORT_ANSWER",
    "FoundBox",
    "GradientAttention",
    "ImportanceMap",
    "InputGradient",
    "Look",
    "RelativeAttention",
    "Tiling",
    "ViCrop",
    "choose_layers",
    "crop_side",
    "find_box",
    "high_pass",
    "high_pass_mask",
    "layer_divergences",
    "locate_layer",
    "merge_maps",
    "search_box",
    "tile_picture",
]
