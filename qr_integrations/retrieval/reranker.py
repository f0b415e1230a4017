"""Rank documents by the attention that a query pays to them: the road that QRHead and ICR share.

documents -> windows that fit -> token scores -> document scores -> `Ranking`
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, stack

from qr_integrations.backend import Backend
from qr_integrations.backend.memory import free_memory
from qr_integrations.errors import InputError, MemoryLimitError, WindowError
from qr_integrations.retrieval.entrants import entrants, explained_only, num_explained, words_of
from qr_integrations.retrieval.given import DocumentLike, as_documents, check_max_spans, check_query
from qr_integrations.retrieval.heads import HeadSet
from qr_integrations.retrieval.layout import PromptLayout, PromptStyle, Query
from qr_integrations.retrieval.merging import Entrant, behind_the_final, best_of_all, finalists
from qr_integrations.retrieval.refinements import PUBLISHED, Refinements
from qr_integrations.retrieval.scoring import score_documents, score_documents_per_head
from qr_integrations.retrieval.store import DocumentCache
from qr_integrations.retrieval.token_scores import Contents, contents
from qr_integrations.retrieval.window_scores import WindowScorer
from qr_integrations.retrieval.windows import Candidate, Limits, Merge, Truncation, fit, longest_of
from qr_integrations.types import Document, Ranking, ScoredDocument, ScoredSpan

_log = logging.getLogger(__name__)
_LEAST_WINDOW = 512  # tokens; where a shorter prompt does not fit into memory, nothing will
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class _Job:
    """One call of `rank`: what it needs on its way through the windows. `explained` documents of each get spans."""

    query: Query
    explained: int = 0
    max_spans: int | None = None


class AttentionReranker:
    """Ranks documents; `QRHeadReranker` and `ICRReranker` say with which heads and which prompt."""

    def __init__(
        self,
        model: Backend | str | Path,
        heads: HeadSet | str | Path | Sequence[tuple[int, int]],
        style: PromptStyle,
        *,
        calibrated: bool = True,
        instruction: str | None = None,
        null_instruction: float = 0.0,
        truncation: Truncation = "error",
        max_doc_tokens: int | None = None,
        max_context_tokens: int | None = None,
        batch_size: int | None = None,
        merge: Merge = "one_scale",
        keep_prefixes: int = 2,
        refinements: Refinements | Mapping[str, Any] = PUBLISHED,
        cache: DocumentCache | None = None,
    ) -> None:
        if not 0.0 <= null_instruction <= 1.0:
            raise InputError(f"null_instruction is a share, got {null_instruction}: pass a number from 0 to 1")
        limits = Limits(max_context_tokens, max_doc_tokens, batch_size, truncation, merge)
        self.backend = model if isinstance(model, Backend) else Backend.load(model)
        self.heads = HeadSet.resolve(heads, self.backend)
        self.instruction = instruction
        self.limits = replace(limits, max_context_tokens=max_context_tokens or self.backend.max_tokens)
        self.scorer = WindowScorer(
            self.backend,
            self.heads,
            style,
            calibrated=calibrated,
            null_instruction=null_instruction,
            keep_prefixes=keep_prefixes,
            refinements=Refinements.of(refinements),
            cache=cache,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "AttentionReranker":
        """The same object: it has no settings that change, and weights are not to be copied."""
        return self

    def rank(
        self,
        query: str,
        documents: Sequence[DocumentLike],
        top_k: int | None = None,
        *,
        instruction: str | None = None,
        explain: bool | int = False,
        max_spans: int | None = 3,
        truncation: Truncation | None = None,
        max_doc_tokens: int | None = None,
        progress: Progress | None = None,
    ) -> Ranking:
        """Order `documents` by how much the query looks at them.

        Args:
            query: what is asked.
            documents: strings, `Document`s, or mappings with ``text`` and perhaps ``title``, ``id``, ``metadata``. Not
                changed.
            top_k: return the best `top_k` only; None returns all. All are scored either way.
            instruction: what counts as relevant, in words; instead of the reranker's own, which ``""`` leaves out.
            explain: find the `spans` of each returned document, from the scores that rank it; a number: of the best so
                many only.
            max_spans: the strongest so many per document; None for all.
            truncation, max_doc_tokens: instead of the reranker's own.
            progress: called with the prompts done and the prompts in all; there are several where the documents do not
                fit into one.

        Returns:
            Best first; ties keep the given order. No documents give an empty ranking without running the model. Where
            memory ran out and shorter prompts did, `Ranking.notes` says so.

        Raises:
            InputError: no query, or something that is no document.
            WindowError: the prompt does not fit and `truncation` is ``"error"``, or the query alone does not fit.
            MemoryLimitError: it does not fit into the device's memory, not even (unless `truncation` is ``"error"``) in
                prompts of half the length, or half of that.
            ScoreError: the model computed NaN.
        """
        given = as_documents(documents)
        check_query(query, top_k)
        check_max_spans(max_spans)
        if not given:
            return Ranking(query, ())
        explained = num_explained(explain, top_k, len(given))
        job = _Job(self.query(query, instruction), explained, max_spans)
        limits = self._limits(truncation, max_doc_tokens)
        notes: tuple[str, ...] = ()
        while True:
            windows = self.fit(job.query, given, limits)
            try:
                items = self._rank(job, windows, progress or _silent)
                return Ranking(query, tuple(explained_only(items, job.explained)), notes).top(top_k)
            except MemoryLimitError:
                if limits.truncation == "error" or (longest := longest_of(windows)) < 2 * _LEAST_WINDOW:
                    raise
            # out of the except block, whose traceback holds on to the tensors
            limits = replace(limits, max_context_tokens=longest // 2)
            notes = (f"out of memory: ranking again in prompts of {longest // 2:,} tokens",)
            _log.warning(notes[0])
            self.forget()
            free_memory()

    def rank_batch(
        self,
        queries: Sequence[str],
        documents: Sequence[Sequence[DocumentLike]],
        top_k: int | None = None,
        **options: Any,
    ) -> list[Ranking]:
        """One ranking per query, over its own list of documents.

        Lists with equal texts are read once, wherever they stand, and the queries over them go through the model
        together where one prompt holds them. `options` are those of `rank`.

        Raises:
            InputError: not as many lists as queries; and what `rank` raises.
        """
        if isinstance(queries, str) or len(queries) != len(documents):
            raise InputError(f"{len(queries)} queries and {len(documents)} document lists: pass one list per query")
        lists = [as_documents(given) for given in documents]
        groups: dict[Contents, list[int]] = {}
        for i, given in enumerate(lists):
            groups.setdefault(contents(given), []).append(i)
        rankings: dict[int, Ranking] = {}
        for group in groups.values():
            asked = [(queries[i], lists[i]) for i in group]
            rankings.update(zip(group, self._rank_group(asked, top_k, options), strict=True))
        return [rankings[i] for i in range(len(queries))]

    def _rank_group(
        self, asked: Sequence[tuple[str, list[Document]]], top_k: int | None, options: Mapping[str, Any]
    ) -> list[Ranking]:
        """Queries over lists with equal texts."""
        if len(asked) > 1 and asked[0][1]:
            with suppress(MemoryLimitError):
                together = self._rank_together(asked, top_k, **options)
                if together is not None:
                    return together
        return [self.rank(query, given, top_k, **options) for query, given in asked]

    def _rank_together(
        self,
        asked: Sequence[tuple[str, list[Document]]],
        top_k: int | None,
        *,
        instruction: str | None = None,
        explain: bool | int = False,
        max_spans: int | None = 3,
        truncation: Truncation | None = None,
        max_doc_tokens: int | None = None,
        progress: Progress | None = None,
    ) -> list[Ranking] | None:
        """In one pass; None where they do not all fit into the same single prompt."""
        check_max_spans(max_spans)
        for query, _ in asked:
            check_query(query, top_k)
        limits = self._limits(truncation, max_doc_tokens)
        queries = [self.query(query, instruction) for query, _ in asked]
        fitted = [self.fit(query, given, limits) for query, (_, given) in zip(queries, asked, strict=True)]
        read = [[candidate.read for candidate in windows[0]] for windows in fitted]
        if any(len(windows) > 1 for windows in fitted) or len({contents(some) for some in read}) > 1:
            return None
        explained = num_explained(explain, top_k, len(asked[0][1]))
        rankings = []
        for windows, one, scored in zip(fitted, queries, self.scorer.score_batch(queries, read[0]), strict=True):
            found = entrants(windows[0], *scored, 0, explained=explained, max_spans=max_spans)
            rankings.append(Ranking(one.text, tuple(entrant.item for entrant in found)).top(top_k))
        if progress is not None:
            progress(1, 1)
        return rankings

    def _limits(self, truncation: Truncation | None, max_doc_tokens: int | None) -> Limits:
        """The reranker's own, but for what a call says."""
        given: dict[str, Any] = {"truncation": truncation, "max_doc_tokens": max_doc_tokens}
        return replace(self.limits, **{name: value for name, value in given.items() if value is not None})

    async def arank(
        self, query: str, documents: Sequence[DocumentLike], top_k: int | None = None, **options: Any
    ) -> Ranking:
        """`rank` in a worker thread, off the event loop."""
        return await asyncio.to_thread(self.rank, query, documents, top_k, **options)

    async def arank_batch(
        self,
        queries: Sequence[str],
        documents: Sequence[Sequence[DocumentLike]],
        top_k: int | None = None,
        **options: Any,
    ) -> list[Ranking]:
        """`rank_batch` in a worker thread, off the event loop."""
        return await asyncio.to_thread(self.rank_batch, queries, documents, top_k, **options)

    def score_per_head(self, query: str, documents: Sequence[DocumentLike]) -> Float[Tensor, "K N"]:
        """Score every document by every head alone (equation 4, the detection path), in the given order.

        Raises:
            InputError: no query, or no documents.
            WindowError: the documents do not fit into one window.
        """
        layout, scores_KT = self._per_head(query, documents)
        return score_documents_per_head(scores_KT, layout.documents)

    def score_subsets(
        self, query: str, documents: Sequence[DocumentLike], subsets: Sequence[Sequence[int]]
    ) -> Float[Tensor, "S N"]:
        """Score every document by several choices among the heads, in one pass; each as a reranker of its own would.

        Args:
            query, documents: as in `rank`.
            subsets: positions in ``heads.heads``.

        Raises:
            InputError: no query, or no documents.
            WindowError: the documents do not fit into one window.
        """
        layout, scores_KT = self._per_head(query, documents)
        return stack([score_documents(scores_KT[list(subset)], layout.documents) for subset in subsets])

    def _per_head(self, query: str, documents: Sequence[DocumentLike]) -> tuple[PromptLayout, Float[Tensor, "K T"]]:
        given = as_documents(documents)
        check_query(query, None)
        if not given:
            raise InputError("there are no documents to score: pass at least one")
        asked = self.query(query, None)
        windows = self.fit(asked, given, self.limits)
        if len(windows) > 1 or len(windows[0]) > len(given):
            raise WindowError(
                f"{len(given)} documents need {len(windows)} prompts, but heads are compared within one: pass fewer "
                "documents, or truncation='head' with a smaller max_doc_tokens"
            )
        return self.scorer.score(asked, [candidate.read for candidate in windows[0]], per_head=True)

    def explain(
        self, query: str, documents: Sequence[DocumentLike], index: int, *, instruction: str | None = None
    ) -> list[ScoredSpan]:
        """Every word of document `index` (position in `documents`) with the part of its score that fell on it.

        Call it after `rank` with the same documents: they are not read again. Of a long document in pieces, the words
        of its first piece; of several prompts, the score that the document has in its own.
        """
        given = as_documents(documents)
        if not 0 <= index < len(given):
            raise InputError(
                f"there is no document #{index} among {len(given)}: pass ScoredDocument.index of a ranking"
            )
        check_query(query, None)
        asked = self.query(query, instruction)
        window = next(w for w in self.fit(asked, given, self.limits) if any(c.index == index for c in w))
        layout, scores_KT = self.scorer.score(asked, [candidate.read for candidate in window])
        place = [candidate.index for candidate in window].index(index)
        return words_of(layout, scores_KT, place, window[place])

    @property
    def refinements(self) -> Refinements:
        """What differs from the published method."""
        return self.scorer.refinements

    def forget(self) -> None:
        """Free the kept prefixes."""
        self.scorer.forget()

    def query(self, query: str, instruction: str | None) -> Query:
        """With the reranker's own instruction, unless one is given."""
        return Query(query, self.instruction if instruction is None else instruction)

    def fit(self, query: Query, documents: Sequence[Document], limits: Limits) -> list[list[Candidate]]:
        """Documents, or what is read of them, by window."""
        return fit(documents, lambda read: self.scorer.layout(query, read), limits)

    def _rank(self, job: _Job, windows: Sequence[Sequence[Candidate]], progress: Progress) -> Sequence[ScoredDocument]:
        if len(windows) == 1:
            return [entrant.item for entrant in self._score(job, windows[0], 0)]
        if self.limits.merge == "final":
            return self._play_off(job, windows, progress)
        return best_of_all(self._heats(job, windows, progress))

    def _score(self, job: _Job, candidates: Sequence[Candidate], window: int) -> list[Entrant]:
        """One prompt, best first; of a document in several pieces, the best."""
        layout, scores_KT = self.scorer.score(job.query, [candidate.read for candidate in candidates])
        return entrants(candidates, layout, scores_KT, window, explained=job.explained, max_spans=job.max_spans)

    def _heats(self, job: _Job, windows: Sequence[Sequence[Candidate]], progress: Progress) -> list[list[Entrant]]:
        """Every window, best first, with scores as `Limits.merge` wants them."""
        read = [[candidate.read for candidate in window] for window in windows]
        scored, asked = [], []
        for number, documents in enumerate(read):
            if self.limits.merge == "one_scale":
                asked.append(self.scorer.ask(job.query, documents))
            else:
                scored.append(self.scorer.score(job.query, documents))
            progress(number + 1, len(windows) + (self.limits.merge == "final"))
        return [
            entrants(window, layout, scores_KT, number, explained=job.explained, max_spans=job.max_spans)
            for number, (window, (layout, scores_KT)) in enumerate(
                zip(windows, scored or self.scorer.merge(job.query, asked, read), strict=True)
            )
        ]

    def _play_off(self, job: _Job, windows: Sequence[Sequence[Candidate]], progress: Progress) -> list[ScoredDocument]:
        """The best of each window meet in a final one: as many as fit, the windows taking turns.

        The others follow, by their scores times what the finalists of their window gained or lost in the final, and
        never above the last finalist.
        """
        heats = self._heats(job, windows, progress)
        chosen = finalists(heats, longest_of(windows), self.limits.batch_size)
        final = [e.item for e in self._score(job, sorted(chosen, key=lambda c: (c.index, c.start)), len(windows))]
        progress(len(windows) + 1, len(windows) + 1)
        return final + behind_the_final(heats, final)


def _silent(done: int, total: int) -> None:
    pass
