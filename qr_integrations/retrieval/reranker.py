"""Rank documents by the attention that a query pays to them: the road that QRHead and ICR share.

documents -> windows that fit -> token scores -> document scores -> `Ranking`
"""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from qr_integrations.backend import Backend
from qr_integrations.errors import InputError
from qr_integrations.retrieval.explain import attended_words
from qr_integrations.retrieval.heads import HeadSet
from qr_integrations.retrieval.layout import PromptStyle
from qr_integrations.retrieval.scoring import score_documents, score_documents_per_head
from qr_integrations.retrieval.token_scores import Contents, TokenScorer, contents
from qr_integrations.retrieval.windows import Candidate, Overflow, fit
from qr_integrations.types import Document, Ranking, ScoredDocument, ScoredSpan

DocumentLike = str | Document | Mapping[str, Any]


class AttentionReranker:
    """Ranks documents; `QRHeadReranker` and `ICRReranker` say with which heads and which prompt."""

    def __init__(
        self,
        model: Backend | str | Path,
        heads: HeadSet | str | Path | Sequence[tuple[int, int]],
        style: PromptStyle,
        *,
        calibrated: bool = True,
        overflow: Overflow = "error",
        max_doc_tokens: int | None = None,
        max_tokens: int | None = None,
        keep_prefixes: int = 2,
    ) -> None:
        if overflow not in ("error", "head", "windows"):
            raise InputError(f"unknown overflow {overflow!r}: pass 'error', 'head' or 'windows'")
        for name, value in (("max_doc_tokens", max_doc_tokens), ("max_tokens", max_tokens)):
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}: pass None for no limit")
        self.backend = model if isinstance(model, Backend) else Backend.load(model)
        self.heads = HeadSet.resolve(heads, self.backend)
        self.overflow, self.max_doc_tokens = overflow, max_doc_tokens
        self.max_tokens = max_tokens or self.backend.max_tokens
        self._scorer = TokenScorer(self.backend, self.heads, style, calibrated=calibrated, keep_prefixes=keep_prefixes)

    def rank(self, query: str, documents: Sequence[DocumentLike], top_k: int | None = None) -> Ranking:
        """Order `documents` by how much the query looks at them.

        Args:
            query: what is asked.
            documents: strings, `Document`s, or mappings with ``text`` and perhaps ``title``, ``id``, ``metadata``. Not
                changed.
            top_k: return the best `top_k` only; None returns all. All are scored either way.

        Returns:
            Best first; ties keep the given order. No documents give an empty ranking without running the model.

        Raises:
            InputError: no query, or something that is no document.
            WindowError: the prompt does not fit and `overflow` is ``"error"``, or the query alone does not fit.
            ScoreError: the model computed NaN.
        """
        given = as_documents(documents)
        _check_query(query, top_k)
        if not given:
            return Ranking(query, ())
        windows = self._fit(query, given, self.overflow)
        items = self._score(query, windows[0], 0) if len(windows) == 1 else self._play_off(query, windows)
        return Ranking(query, tuple(items)).top(top_k)

    def rank_batch(
        self, queries: Sequence[str], documents: Sequence[Sequence[DocumentLike]], top_k: int | None = None
    ) -> list[Ranking]:
        """One ranking per query, over its own list of documents. Equal lists are read once, wherever they stand.

        Raises:
            InputError: not as many lists as queries; and what `rank` raises.
        """
        if isinstance(queries, str) or len(queries) != len(documents):
            raise InputError(f"{len(queries)} queries and {len(documents)} document lists: pass one list per query")
        groups: dict[Contents, list[int]] = {}
        for i, given in enumerate(documents):
            groups.setdefault(contents(as_documents(given)), []).append(i)
        rankings = {i: self.rank(queries[i], documents[i], top_k) for group in groups.values() for i in group}
        return [rankings[i] for i in range(len(queries))]

    async def arank(self, query: str, documents: Sequence[DocumentLike], top_k: int | None = None) -> Ranking:
        """`rank` in a worker thread, off the event loop."""
        return await asyncio.to_thread(self.rank, query, documents, top_k)

    async def arank_batch(
        self, queries: Sequence[str], documents: Sequence[Sequence[DocumentLike]], top_k: int | None = None
    ) -> list[Ranking]:
        """`rank_batch` in a worker thread, off the event loop."""
        return await asyncio.to_thread(self.rank_batch, queries, documents, top_k)

    def score_per_head(self, query: str, documents: Sequence[DocumentLike]) -> Float[Tensor, "K N"]:
        """Score every document by every head alone (equation 4, the detection path), in the given order.

        Raises:
            WindowError: the documents do not fit into one window.
        """
        given = as_documents(documents)
        _check_query(query, None)
        read = [candidate.read for candidate in self._fit(query, given, "error")[0]]
        layout, scores_KT = self._scorer.score(query, read, per_head=True)
        return score_documents_per_head(scores_KT, layout.documents)

    def explain(self, query: str, documents: Sequence[DocumentLike], index: int) -> list[ScoredSpan]:
        """The words of document `index` (position in `documents`) with the part of its score that fell on each.

        Call it after `rank` with the same documents: they are not read again.

        Raises:
            WindowError: the documents do not fit into one window, and `overflow` does not allow cutting them.
        """
        given = as_documents(documents)
        if not 0 <= index < len(given):
            raise InputError(
                f"there is no document #{index} among {len(given)}: pass ScoredDocument.index of a ranking"
            )
        _check_query(query, None)
        window = next(w for w in self._fit(query, given, self.overflow) if any(c.index == index for c in w))
        layout, scores_KT = self._scorer.score(query, [candidate.read for candidate in window])
        return attended_words(layout, scores_KT, [candidate.index for candidate in window].index(index))

    def forget(self) -> None:
        """Free the kept prefixes."""
        self._scorer.forget()

    def _fit(self, query: str, documents: Sequence[Document], overflow: Overflow) -> list[list[Candidate]]:
        return fit(
            documents,
            lambda read: self._scorer.layout(query, read),
            max_tokens=self.max_tokens,
            max_doc_tokens=self.max_doc_tokens,
            overflow=overflow,
        )

    def _score(self, query: str, candidates: Sequence[Candidate], window: int) -> list[ScoredDocument]:
        """One prompt, best first. Python's sort is stable, so ties keep their order."""
        layout, scores_KT = self._scorer.score(query, [candidate.read for candidate in candidates])
        scores = score_documents(scores_KT, layout.documents).tolist()
        items = [
            ScoredDocument(c.index, score, c.given, c.num_tokens, c.num_tokens_cut, window)
            for c, score in zip(candidates, scores, strict=True)
        ]
        return sorted(items, key=lambda item: -item.score)

    def _play_off(self, query: str, windows: Sequence[Sequence[Candidate]]) -> list[ScoredDocument]:
        """Scores of different windows are shares of different wholes, so the best of each window meet in a final one.

        As many as fit go on, the windows taking turns; the others follow by their place in their own window.
        """
        candidates = {candidate.index: candidate for window in windows for candidate in window}
        heats = [self._score(query, window, number) for number, window in enumerate(windows)]
        places = sorted(
            ((place, -item.score, item) for heat in heats for place, item in enumerate(heat)),
            key=lambda entry: entry[:2],
        )
        in_turn = [item for _, _, item in places]
        room = max(sum(candidate.num_tokens for candidate in window) for window in windows)
        final: list[ScoredDocument] = []
        for item in in_turn:
            if sum(other.num_tokens for other in final) + item.num_tokens > room:
                break
            final.append(item)
        met = self._score(
            query, [candidates[item.index] for item in sorted(final, key=lambda i: i.index)], len(windows)
        )
        return met + in_turn[len(final) :]


def as_documents(documents: Sequence[DocumentLike]) -> list[Document]:
    """What a caller may pass, as `Document`s.

    Raises:
        InputError: names the first entry that is none.
    """
    if isinstance(documents, str | Mapping | Document):
        raise InputError("documents is a single document: pass a list of them")
    return [_as_document(index, document) for index, document in enumerate(documents)]


def _as_document(index: int, given: DocumentLike) -> Document:
    document: Any = given
    if isinstance(given, str):
        document = Document(given)
    elif isinstance(given, Mapping) and "text" in given:
        document = Document(**{name: given[name] for name in ("text", "title", "id", "metadata") if name in given})
    good = isinstance(document, Document) and isinstance(document.text, str) and isinstance(document.title, str | None)
    if not good:
        raise InputError(
            f"document #{index} has no text: pass a string, a Document, or a mapping with 'text' (and 'title')"
        )
    return document


def _check_query(query: str, top_k: int | None) -> None:
    if not isinstance(query, str) or not query.strip():
        raise InputError(f"the query is empty ({query!r}): pass what is asked as a string")
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k must be at least 1, got {top_k}: pass None for all documents")
