"""For components of LangChain that take a cross-encoder."""

from langchain_core.cross_encoders import BaseCrossEncoder

from qr_integrations.reranking import RerankSettings
from qr_integrations.types import Document


class QRCrossEncoder(RerankSettings, BaseCrossEncoder):
    """Score pairs of query and text.

    A cross-encoder reads each pair alone; attention compares. So all texts that are paired with the same query are
    ranked together, and scores compare between texts of one query only.

    Example:
        >>> from qr_integrations.langchain import QRCrossEncoder
        >>> encoder = QRCrossEncoder(model="qr-mini")
        >>> query = "who wrote dracula"
        >>> cats, book = encoder.score([(query, "Cats sleep."), (query, "Dracula was written by Bram Stoker.")])
        >>> book > cats
        True

    Parameters are those of `RerankSettings`; `score_threshold` and `explain` have no effect.
    """

    def score(self, text_pairs: list[tuple[str, str]]) -> list[float]:
        """One score per pair, in the given order."""
        from qr_integrations.retrieval.cross_encoder import score_pairs

        return score_pairs(text_pairs, lambda query, texts: self.scores(query, [Document(text) for text in texts]))
