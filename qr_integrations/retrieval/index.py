"""Documents that are read once and asked many times: their keys and values are kept, in memory and on disk.

A prompt is documents first, query last, so what the model computes of the documents does not depend on the query.

Legend: N documents.
"""

import operator
import threading
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from qr_integrations.backend import Backend, KeptDtype, Prefix, check_kept_dtype, cut
from qr_integrations.errors import InputError, WindowError
from qr_integrations.retrieval.answers import answer
from qr_integrations.retrieval.entrants import entrants, explained_only, num_explained
from qr_integrations.retrieval.given import DocumentLike, as_documents, check_max_spans, check_query
from qr_integrations.retrieval.index_files import IndexContents, read_index, write_index
from qr_integrations.retrieval.kept_windows import Told, Window, WindowReader
from qr_integrations.retrieval.layout import PromptLayout, Query
from qr_integrations.retrieval.merging import best_of_all
from qr_integrations.retrieval.qrhead import QRHeadReranker
from qr_integrations.retrieval.refinements import Refinements
from qr_integrations.retrieval.reranker import AttentionReranker, Progress
from qr_integrations.types import Document, GroundedAnswer, Ranking, ScoredDocument

_TOGETHER = 32  # queries at a time: the prompt and the scores of each are as long as the documents


class DocumentIndex:
    """Documents whose keys and values are kept, so that a query costs its own words only.

    Example:
        >>> from qr_integrations import DocumentIndex
        >>> index = DocumentIndex.build(["Cats sleep.", "Dracula was written by Bram Stoker."], "qr-mini")
        >>> [ranking[0].index for ranking in index.rank_batch(["who wrote dracula", "what do cats do"])]
        [1, 0]

    Make one with `build` or `load`. Any number of threads may ask it, also while documents are added or removed: each
    query is answered from the documents as they were when it came.

    Attributes:
        reranker: the model, its heads, the prompt and the settings that the documents were read with.
        kept: how keys and values are kept.
        whole: all layers are kept, so that the model can answer from its documents.
    """

    def __init__(self, reranker: AttentionReranker, kept: KeptDtype = "auto", *, whole: bool = False) -> None:
        check_kept_dtype(kept)
        if reranker.refinements.orders > 1:
            raise InputError("an index reads its documents in one order: leave out orders, or take layout='block'")
        if reranker.scorer.style.first_occurrence:
            raise InputError("an index knows where its documents stand: leave out first_occurrence")
        self.reranker, self.kept, self.whole = reranker, kept, whole
        self._reader = WindowReader(reranker, kept, whole=whole)
        self._contents: tuple[tuple[Window, ...], tuple[Document, ...]] = ((), ())  # replaced together
        self._changing = threading.Lock()

    @classmethod
    def build(
        cls,
        documents: Sequence[DocumentLike],
        model: Backend | str | Path | AttentionReranker,
        *,
        layout: Literal["joint", "block"] | None = None,
        kv_dtype: KeptDtype = "auto",
        answers: bool = False,
        progress: Progress | None = None,
        **options: Any,
    ) -> "DocumentIndex":
        """Read documents once.

        Args:
            documents: as `AttentionReranker.rank` takes them.
            model: a `Backend`, or a name for `Backend.load`; or a reranker, with all its settings.
            layout: ``"joint"`` (the default): each document sees those before it, as published; documents are added
                behind the others, and removing one reads those behind it again. ``"block"``: each is read by itself, so
                that any can be added, removed or left out, and their order makes no difference.
            kv_dtype: how keys and values are kept: as the model computes them, as ``"float32"``, ``"float16"``,
                ``"bfloat16"`` or ``"int8"``.
            answers: keep all layers, so that the model can answer from its documents; else only those up to the
                deepest head, and of the deepest layer only the keys that the heads read.
            progress: called with the tokens read and the tokens in all.
            options: of `QRHeadReranker`, with `model` a name or a backend. `max_context_tokens` limits a window; long
                documents are read in pieces (``truncation="chunk"``) unless it says otherwise.

        Raises:
            InputError: something that is no document, or options beside a reranker.
            WindowError: a document does not fit into a window, and `truncation` is ``"error"``.
            UnsupportedModelError: the model's layers keep more than keys and values of single tokens.
        """
        if isinstance(model, AttentionReranker):
            if options or layout is not None:
                raise InputError("the reranker has its settings: pass layout and options to it, or pass a model's name")
            reranker = model
        else:
            refinements = options.pop("refinements", {})
            if layout is not None:
                of_given = asdict(refinements) if isinstance(refinements, Refinements) else refinements
                refinements = {**of_given, "layout": layout}
            reranker = QRHeadReranker(model, refinements=refinements, **{"truncation": "chunk", **options})
        index = cls(reranker, kv_dtype, whole=answers)
        index.add(documents, progress=progress)
        return index

    def __len__(self) -> int:
        return len(self.documents)

    def __repr__(self) -> str:
        return (
            f"DocumentIndex({len(self)} documents, {len(self.windows)} windows, {self.num_bytes / 2**20:.1f} MiB, "
            f"layout={self.layout!r}, kept={self.kept!r}, model={self.backend.name!r})"
        )

    @property
    def backend(self) -> Backend:
        """The model."""
        return self.reranker.backend

    @property
    def layout(self) -> str:
        """``"joint"`` or ``"block"``."""
        return self.reranker.refinements.layout

    @property
    def documents(self) -> tuple[Document, ...]:
        """What is searched; `ScoredDocument.index` points here."""
        return self._contents[1]

    @property
    def windows(self) -> tuple[Window, ...]:
        """The prompts in which the documents stand."""
        return self._contents[0]

    @property
    def num_bytes(self) -> int:
        """Memory of the kept keys and values."""
        return sum(window.prefix.num_bytes for window in self.windows)

    def rank(
        self,
        query: str,
        top_k: int | None = None,
        *,
        instruction: str | None = None,
        explain: bool | int = False,
        max_spans: int | None = 3,
    ) -> Ranking:
        """Order the documents by how much the query looks at them; arguments as in `AttentionReranker.rank`.

        The numbers are those of a fresh ranking of the same documents, to rounding, where they fit into one window and
        are kept as the model computes them.

        Raises:
            InputError: no query, or `top_k` or `max_spans` below 1.
            WindowError: the query is longer than what the window leaves free.
        """
        check_max_spans(max_spans)
        return self._rank([query], top_k, instruction, explain, max_spans)[0]

    def rank_batch(
        self, queries: Sequence[str], top_k: int | None = None, *, instruction: str | None = None
    ) -> list[Ranking]:
        """A ranking for each of several queries, which go through the model together; the same as one by one.

        Raises:
            InputError: a single string, or an empty query.
            WindowError: a query is longer than what the window leaves free.
        """
        if isinstance(queries, str):
            raise InputError("queries is a single query: pass a list, or call rank")
        return self._rank(list(queries), top_k, instruction, False, None) if queries else []

    def _rank(
        self, queries: list[str], top_k: int | None, instruction: str | None, explain: bool | int, max_spans: int | None
    ) -> list[Ranking]:
        for query in queries:
            check_query(query, top_k)
        windows = self.windows
        if not windows:
            return [Ranking(query, ()) for query in queries]
        asked = [self.reranker.query(query, instruction) for query in queries]
        self._check_lengths(windows, asked)
        one_scale = self.reranker.limits.merge != "raw"
        readings = [window.reading for window in windows]
        explained = num_explained(explain, top_k, sum(len(w.candidates) for w in windows))
        rankings = []
        for start in range(0, len(asked), _TOGETHER):
            some = asked[start : start + _TOGETHER]
            found = self.reranker.scorer.score_windows(readings, some, one_scale=one_scale)
            rankings += [
                Ranking(query.text, tuple(_merged(windows, scored, explained, max_spans))).top(top_k)
                for query, scored in zip(some, found, strict=True)
            ]
        return rankings

    def _check_lengths(self, windows: Sequence[Window], queries: Iterable[Query]) -> None:
        """Whether every query fits behind the window whose documents reach furthest."""
        limit = self.reranker.limits.max_context_tokens
        fullest = max(windows, key=lambda window: window.prefix.num_positions)
        behind = fullest.prefix.num_positions
        longest = max(len(self.reranker.scorer.prompt(fullest.reading, query).query) for query in queries)
        if limit is not None and behind + longest > limit:
            raise WindowError(
                f"the query needs {longest:,} tokens behind {behind:,} of documents, the window holds {limit:,}: pass "
                "a shorter query, or build the index with a smaller max_context_tokens"
            )

    def add(self, documents: Sequence[DocumentLike], *, progress: Progress | None = None) -> None:
        """Read further documents, which stand behind the others. What is there is not read again.

        The last window is filled first. Rankings are those of an index that was built of all at once, to rounding, as
        long as there is one window; several may be filled differently.

        Raises:
            InputError, WindowError: as `build`; nothing is added then.
        """
        given = as_documents(documents)
        if not given:
            return
        with self._changing:
            windows = list(self.windows)
            parts = self._reader.parts(given, len(self.documents), windows[-1] if windows else None)
            tell = Told(progress, sum(candidate.cost for _, part in parts for candidate in part))
            for is_new, part in parts:
                grown = self._reader.grown(None if is_new else windows.pop(), part, tell)
                windows.append(grown)
            self._contents = tuple(windows), self.documents + tuple(given)

    def remove(self, indices: Iterable[int]) -> None:
        """Take documents out; those behind them move up.

        With ``layout="block"`` nothing is read again. With ``"joint"``, documents behind a removed one have seen it: in
        its window they are read again.

        Args:
            indices: positions in `documents`.

        Raises:
            InputError: there is no such document; nothing is removed then.
        """
        with self._changing:
            old, documents = self._contents
            gone = set(_positions(indices, len(documents)))
            left = [index for index in range(len(documents)) if index not in gone]
            places = {index: place for place, index in enumerate(left)}
            windows = [self._reader.shrunk(window, places) for window in old]
            kept = tuple(window for window in windows if window is not None)
            self._contents = kept, tuple(documents[index] for index in left)

    def prefix(self, indices: Sequence[int] | None = None) -> Prefix:
        """Keys and values of some documents, for `Backend.answer` to go on from.

        With ``layout="joint"`` they stay where they stood, and what stood between them is left out: they have seen
        documents that are not there any more. With ``"block"`` it is what the model computes of these documents alone.

        Args:
            indices: positions in `documents`; None takes all. With ``"joint"`` all in one window.

        Raises:
            InputError: no such document, documents of several windows, or an index without all layers.
        """
        if not self.whole:
            raise InputError("the upper layers are not kept: build the index with answers=True")
        windows, documents = self._contents
        chosen = _positions(range(len(documents)) if indices is None else indices, len(documents))
        holding = [(window, set(chosen) & {c.index for c in window.candidates}) for window in windows]
        holding = [(window, some) for window, some in holding if some]
        if not holding or (self.layout == "joint" and len(holding) > 1):
            raise InputError(
                f"{len(chosen)} documents of {len(holding)} windows: pass at least one, and with layout='joint' all of "
                "one window"
            )
        beginning, pieces = None, []
        for window, some in holding:
            beginning, *of_window = cut(window.prefix, window.spans)
            pieces += [
                (c.index, piece) for c, piece in zip(window.candidates, of_window, strict=True) if c.index in some
            ]
        assert beginning is not None
        if self.layout == "block":
            pieces.sort(key=lambda entry: chosen.index(entry[0]))
            return self._reader.side_by_side([beginning, *(piece for _, piece in pieces)])
        behind = holding[0][0].prefix.num_positions
        return self._reader.side_by_side([beginning, *(piece for _, piece in pieces)], next_position=behind)

    def answer(self, question: str, *, top_k: int = 3, **options: Any) -> GroundedAnswer:
        """Rank, and answer from the best `top_k`, which are not read again; see `qr_integrations.retrieval.answers`."""
        return answer(self, question, top_k=top_k, **options)

    def save(self, folder: str | Path) -> None:
        """Write the index, or what is new of it, into a folder of its own; a process that is killed leaves the old one.

        Raises:
            InputError: the folder holds something else, a document has metadata that JSON cannot hold, or the reranker
                is of a class of your own; nothing is written then.
        """
        with self._changing:
            windows, documents = self._contents
        write_index(folder, IndexContents(self.reranker, self.kept, self.whole, documents, windows))

    @classmethod
    def load(
        cls, folder: str | Path, model: Backend | str | Path | None = None, *, verify: bool = True
    ) -> "DocumentIndex":
        """Open what `save` wrote. On a CPU, keys and values stay on the disk until a query reads them.

        Args:
            folder: where.
            model: the one it was built with, or its name; None loads it by the name it had.
            verify: read all files once, and compare their digests; else their sizes only.

        Raises:
            LoadError: no index, a damaged one, or one of another model, tokenizer or version.
        """
        saved = read_index(folder, model, verify=verify)
        index = cls(saved.reranker, saved.kept, whole=saved.whole)
        index._contents = saved.windows, saved.documents
        return index


def _positions(indices: Iterable[int], count: int) -> list[int]:
    """Each once, in their order.

    Raises:
        InputError: one of `count` documents is meant that there is not, or none at all.
    """
    try:
        chosen = list(dict.fromkeys(map(operator.index, indices)))
    except TypeError as error:
        raise InputError(f"{indices!r} are no positions ({error}): pass a list of whole numbers") from error
    if wrong := [index for index in chosen if not 0 <= index < count]:
        raise InputError(f"there is no document #{wrong[0]} among {count}: pass positions in documents")
    return chosen


def _merged(
    windows: Sequence[Window],
    scored: Sequence[tuple[PromptLayout, Float[Tensor, "1 _"]]],
    explained: int,
    max_spans: int | None,
) -> list[ScoredDocument]:
    """The documents of all windows, best first."""
    heats = [
        entrants(window.candidates, layout, scores_KT, number, explained=explained, max_spans=max_spans)
        for number, (window, (layout, scores_KT)) in enumerate(zip(windows, scored, strict=True))
    ]
    return explained_only(best_of_all(heats), explained)
