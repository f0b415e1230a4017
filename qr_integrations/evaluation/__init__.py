"""How good a ranking is."""

from qr_integrations.evaluation.metrics import ndcg_at_k, random_ndcg_at_k

__all__ = ["ndcg_at_k", "random_ndcg_at_k"]
