"""Rank: a query and documents in, a `Ranking` out, by a model's own attention.

To add a method, write ``x.py`` with a class that has ``rank(query, documents, top_k=None) -> Ranking``, its test, and a
line here.
"""

from qr_integrations.retrieval.cross_encoder import QRCrossEncoder
from qr_integrations.retrieval.detection import HeadDetector
from qr_integrations.retrieval.heads import HeadSet
from qr_integrations.retrieval.icr import ICRReranker
from qr_integrations.retrieval.index import DocumentIndex
from qr_integrations.retrieval.layout import PromptLayout
from qr_integrations.retrieval.memory import ChatMemory
from qr_integrations.retrieval.qrhead import QRHeadReranker
from qr_integrations.retrieval.refinements import Refinements
from qr_integrations.retrieval.store import CacheStats, DocumentCache

__all__ = [
    "CacheStats",
    "ChatMemory",
    "DocumentCache",
    "DocumentIndex",
    "HeadDetector",
    "HeadSet",
    "ICRReranker",
    "PromptLayout",
    "QRCrossEncoder",
    "QRHeadReranker",
    "Refinements",
]
