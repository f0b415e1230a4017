"""The cellar: loads a Hugging Face model once and reads its insides. The only room that imports transformers.

To serve a new model family, add a row to `families.py` if its published prompt differs; reading attention needs no row,
only attention that goes through transformers' attention interface.
"""

from qr_integrations.backend.attention_tap import AttentionTap
from qr_integrations.backend.backend import Backend
from qr_integrations.backend.branches import Trunk, Wanted
from qr_integrations.backend.identity import ModelIdentity
from qr_integrations.backend.interruptions import interruptible
from qr_integrations.backend.pieces import Piece, cut, in_line, join, moved, pack
from qr_integrations.backend.prefix import Prefix
from qr_integrations.backend.rotation import KeyRotation, key_rotation
from qr_integrations.backend.stored import KeptDtype, Stored, check_kept_dtype

__all__ = [
    "AttentionTap",
    "Backend",
    "KeptDtype",
    "KeyRotation",
    "ModelIdentity",
    "Piece",
    "Prefix",
    "Stored",
    "Trunk",
    "Wanted",
    "check_kept_dtype",
    "cut",
    "in_line",
    "interruptible",
    "join",
    "key_rotation",
    "moved",
    "pack",
]
