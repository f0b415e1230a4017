"""See otherwise: pictures in fewer tokens, or through other layers of the tower."""

from qr_integrations.backend.mqt_checkpoint import convert_mqt_llava
from qr_integrations.encoding.fusion import fuse, load_fusion, save_fusion
from qr_integrations.encoding.fusion_layers import FusionSpec
from qr_integrations.encoding.layer_probes import probe_layers
from qr_integrations.encoding.layers import LayerSimilarity, group_layers, layer_similarity, representatives
from qr_integrations.encoding.matryoshka import (
    Confidence,
    MQTEncoder,
    PrefillTimes,
    TimeBudget,
    TokenBudget,
    measure_prefill,
)
from qr_integrations.encoding.truncation import TruncatedTextEncoder, truncate_embeddings

__all__ = [
    "Confidence",
    "FusionSpec",
    "LayerSimilarity",
    "MQTEncoder",
    "PrefillTimes",
    "TimeBudget",
    "TokenBudget",
    "TruncatedTextEncoder",
    "convert_mqt_llava",
    "fuse",
    "group_layers",
    "layer_similarity",
    "load_fusion",
    "measure_prefill",
    "probe_layers",
    "representatives",
    "save_fusion",
    "truncate_embeddings",
]
