"""A door without a framework, in the shape of sentence-transformers' `CrossEncoder`."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor, tensor

from qr_integrations.errors import InputError
from qr_integrations.retrieval.given import DocumentLike
from qr_integrations.retrieval.reranker import AttentionReranker

Pair = Sequence[str]


class QRCrossEncoder:
    """Takes the place of a sentence-transformers `CrossEncoder` where pairs are scored or documents ranked.

    Its reranking evaluators accept it. A cross-encoder reads each pair alone; attention compares. So all texts that are
    paired with the same query are ranked together, and scores compare between texts of one query only.

    Example:
        >>> from qr_integrations import QRCrossEncoder, QRHeadReranker
        >>> encoder = QRCrossEncoder(QRHeadReranker("qr-mini"))
        >>> encoder.rank("who wrote dracula", ["Cats sleep.", "Bram Stoker wrote it."], top_k=1)[0]["corpus_id"]
        1
    """

    num_labels = 1

    def __init__(self, reranker: AttentionReranker) -> None:
        self.reranker = reranker
        self.model_card_data = _ModelCardData()

    def predict(
        self,
        inputs: Sequence[Pair] | Pair,
        *,
        show_progress_bar: bool | None = None,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        **ignored: Any,
    ) -> Float[np.ndarray, "*N"] | Tensor | list[Tensor]:
        """One score per pair of query and text, in the given order.

        Args:
            inputs: pairs, or a single pair, which gives a single number.
            show_progress_bar: a bar over the queries.
            convert_to_numpy, convert_to_tensor: what to return; neither gives a list of tensors.
            ignored: `batch_size` and what else a cross-encoder knows and attention has no use for.
        """
        single = len(inputs) > 0 and isinstance(inputs[0], str)
        pairs: Any = [inputs] if single else inputs
        scores = tensor(score_pairs(pairs, self._scores, show_progress=bool(show_progress_bar)))
        scores = scores[0] if single else scores
        if convert_to_tensor or (single and not convert_to_numpy):
            return scores
        return scores.numpy() if convert_to_numpy else list(scores)

    def rank(
        self,
        query: str,
        documents: Sequence[DocumentLike],
        top_k: int | None = None,
        return_documents: bool = False,
        **ignored: Any,
    ) -> list[dict[str, Any]]:
        """The documents, best first: ``{"corpus_id": ..., "score": ...}``, with `return_documents` also ``"text"``."""
        ranking = self.reranker.rank(query, documents, top_k)
        return [
            {"corpus_id": item.index, "score": item.score} | ({"text": item.document.text} if return_documents else {})
            for item in ranking
        ]

    def _scores(self, query: str, texts: Sequence[str]) -> list[float]:
        ranking = self.reranker.rank(query, texts)
        return [score for _, score in sorted((item.index, item.score) for item in ranking)]


class _ModelCardData:
    """Where sentence-transformers' evaluators leave what they measured."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, Any]] = []

    def set_evaluation_metrics(self, evaluator: Any, metrics: dict[str, Any], epoch: int = 0, step: int = 0) -> None:
        """Called by an evaluator at its end."""
        self.metrics.append(dict(metrics))


def score_pairs(
    pairs: Sequence[Pair], scores_of: Callable[[str, Sequence[str]], Sequence[float]], *, show_progress: bool = False
) -> list[float]:
    """Score pairs of query and text, all texts of one query together.

    Args:
        pairs: in any order; the scores come in the same.
        scores_of: scores texts for a query, in the order of the texts.
        show_progress: a bar over the queries.

    Raises:
        InputError: names the first entry that is no pair of strings.
    """
    groups: dict[str, list[int]] = {}
    for number, pair in enumerate(pairs):
        fits = (
            isinstance(pair, list | tuple | np.ndarray)
            and len(pair) == 2
            and all(isinstance(text, str) for text in pair)
        )
        if not fits:
            raise InputError(f"pair #{number} is {pair!r}: pass (query, text), two strings")
        groups.setdefault(pair[0], []).append(number)
    scores = [0.0] * len(pairs)
    for query, numbers in _watched(groups, show_progress):
        for number, score in zip(numbers, scores_of(query, [pairs[n][1] for n in numbers]), strict=True):
            scores[number] = score
    return scores


def _watched(groups: dict[str, list[int]], show: bool) -> Any:
    if not show:
        return groups.items()
    from tqdm import tqdm

    return tqdm(groups.items(), desc="Ranking", unit="query")
