"""See otherwise: pictures in fewer tokens, or through other layers of the tower."""

from qr_integrations.backend.mqt_checkpoint import convert_mqt_llava
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
    "MQTEncoder",
    "PrefillTimes",
    "TimeBudget",
    "TokenBudget",
    "TruncatedTextEncoder",
    "convert_mqt_llava",
    "measure_prefill",
    "truncate_embeddings",
]
