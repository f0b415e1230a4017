"""The cellar: loads a Hugging Face model once and reads its insides. The only room that imports transformers.

To serve a new model family, add a row to `families.py` if its published prompt differs; reading attention needs no row,
only attention that goes through transformers' attention interface.
"""

from qr_integrations.backend.attention_tap import AttentionTap
from qr_integrations.backend.backend import Backend
from qr_integrations.backend.prefix import Prefix

__all__ = ["AttentionTap", "Backend", "Prefix"]
