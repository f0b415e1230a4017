"""Open up a locally loaded language model for RAG and chat: rank, look again, speak carefully, keep less.

The front door. Importing it loads neither torch nor a framework; a name is imported when it is first used.
"""

from importlib import import_module
from typing import Any

from qr_integrations.version import __version__ as __version__

_EXPORTS = {
    "Answer": "qr_integrations.types",
    "Backend": "qr_integrations.backend",
    "CDPruner": "qr_integrations.pruning",
    "ChatMemory": "qr_integrations.retrieval",
    "DeCo": "qr_integrations.decoding",
    "Document": "qr_integrations.types",
    "DocumentCache": "qr_integrations.retrieval",
    "DocumentIndex": "qr_integrations.retrieval",
    "HeadDetector": "qr_integrations.retrieval",
    "HeadSet": "qr_integrations.retrieval",
    "ICRReranker": "qr_integrations.retrieval",
    "JudgedList": "qr_integrations.types",
    "MQTEncoder": "qr_integrations.encoding",
    "Message": "qr_integrations.types",
    "PromptLayout": "qr_integrations.retrieval",
    "QRCrossEncoder": "qr_integrations.retrieval",
    "QRHeadReranker": "qr_integrations.retrieval",
    "Ranking": "qr_integrations.types",
    "Refinements": "qr_integrations.retrieval",
    "ScoredDocument": "qr_integrations.types",
    "Span": "qr_integrations.types",
    "SparseVLM": "qr_integrations.pruning",
    "ViCrop": "qr_integrations.cropping",
    "highlight_html": "qr_integrations.highlighting",
}

__all__ = [
    "Answer",
    "Backend",
    "CDPruner",
    "ChatMemory",
    "DeCo",
    "Document",
    "DocumentCache",
    "DocumentIndex",
    "HeadDetector",
    "HeadSet",
    "ICRReranker",
    "JudgedList",
    "MQTEncoder",
    "Message",
    "PromptLayout",
    "QRCrossEncoder",
    "QRHeadReranker",
    "Ranking",
    "Refinements",
    "ScoredDocument",
    "Span",
    "SparseVLM",
    "ViCrop",
    "highlight_html",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
