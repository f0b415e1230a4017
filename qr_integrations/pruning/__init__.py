"""Keep less: a picture is told in fewer tokens, chosen before the language model or within it.

To add a method write ``x.py`` with a settings class whose ``start`` returns a `Pruning`, ``tests/pruning/test_x.py``,
and one line here. `base` has what methods share.
"""

from qr_integrations.pruning.base import KeptCells, PruneRecord, PruneStage
from qr_integrations.pruning.baselines import ClassAttention, LastTokenAttention, RandomTokens, UniformGrid
from qr_integrations.pruning.cdpruner import CDPruner
from qr_integrations.pruning.sparsevlm import SparseVLM

__all__ = [
    "CDPruner",
    "ClassAttention",
    "KeptCells",
    "LastTokenAttention",
    "PruneRecord",
    "PruneStage",
    "RandomTokens",
    "SparseVLM",
    "UniformGrid",
]
