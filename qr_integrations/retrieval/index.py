"""Documents that are read once and asked many times: their keys and values are kept, in memory and on disk.

A prompt is documents first, query last, so what the model computes of the documents does not depend on the query.

Legend: N documents.
"""

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from qr_integrations.backend import Backend, KeptDtype, Piece, Prefix, check_kept_dtype, cut, in_line, join, pack
from qr_integrations.errors import InputError, WindowError
from qr_integrations.retrieval.layout import PromptLayout, Query
from qr_integrations.retrieval.qrhead import QRHeadReranker
from qr_integrations.retrieval.refinements import Refinements
from qr_integrations.retrieval.reranker import (
    AttentionReranker,
    DocumentLike,
    Progress,
    as_documents,
    check_query,
    entrants,
    explained_only,
)
from qr_integrations.retrieval.token_scores import Reading
from qr_integrations.retrieval.windows import Candidate
from qr_integrations.retrieval.windows import pack as pack_windows
from qr_integrations.types import Document, Ranking, ScoredDocument, Span

_ROOM_FOR_QUERY = 256  # tokens that are left free behind the documents
_BLOCK_TOKENS = 8192  # of documents that are read before their keys and values are packed away


@dataclass(frozen=True, slots=True)
class Window:
    """Documents that stand in one prompt.

    Attributes:
        candidates: what is read of which document, in order.
        reading: the prompt, and its prefix of kept keys and values.
    """

    candidates: tuple[Candidate, ...]
    reading: Reading

    @property
    def prefix(self) -> Prefix:
        """Keys and values of everything before the query."""
        assert self.reading.prefix is not None
        return self.reading.prefix

    @property
    def spans(self) -> list[Span]:
        """The tokens before the first document, and those of each candidate with what stands behind it."""
        layout = self.reading.layout
        return [Span(0, layout.documents[0].start), *_spans(layout)]


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
        self._scorer = reranker.scorer
        self._top_heads = None if whole else _read_keys(reranker)
        self._windows: tuple[Window, ...] = ()
        self._documents: tuple[Document, ...] = ()
        self._changing = threading.Lock()

    @classmethod
    def build(
        cls,
        documents: Sequence[DocumentLike],
        model: Backend | str | Path | AttentionReranker,
        *,
        layout: Literal["joint", "block"] = "joint",
        kv_dtype: KeptDtype = "auto",
        answers: bool = False,
        progress: Progress | None = None,
        **options: Any,
    ) -> "DocumentIndex":
        """Read documents once.

        Args:
            documents: as `AttentionReranker.rank` takes them.
            model: a `Backend`, or a name for `Backend.load`; or a reranker, with all its settings.
            layout: ``"joint"``: each document sees those before it, as published; documents are added behind the
                others, and removing one reads those behind it again. ``"block"``: each is read by itself, so that any
                can be added, removed or left out, and their order makes no difference.
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
            if options or layout != "joint":
                raise InputError("the reranker has its settings: pass layout and options to it, or pass a model's name")
            reranker = model
        else:
            refinements = replace(Refinements.of(options.pop("refinements", {})), layout=layout)
            reranker = QRHeadReranker(model, refinements=refinements, **{"truncation": "chunk", **options})
        index = cls(reranker, kv_dtype, whole=answers)
        index.add(documents, progress=progress)
        return index

    def __len__(self) -> int:
        return len(self._documents)

    def __repr__(self) -> str:
        return (
            f"DocumentIndex({len(self)} documents, {len(self._windows)} windows, {self.num_bytes / 2**20:.1f} MiB, "
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
        return self._documents

    @property
    def windows(self) -> tuple[Window, ...]:
        """The prompts in which the documents stand."""
        return self._windows

    @property
    def num_bytes(self) -> int:
        """Memory of the kept keys and values."""
        return sum(window.prefix.num_bytes for window in self._windows)

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
            InputError: no query.
            WindowError: the query is longer than what the window leaves free.
        """
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
        windows = self._windows
        if not windows:
            return [Ranking(query, ()) for query in queries]
        asked = [self.reranker.query(query, instruction) for query in queries]
        found = self._scorer.score_windows([window.reading for window in windows], asked)
        self._check_lengths([layout for scored in found for layout, _ in scored])
        explained = int(explain) if explain is not True else top_k or sum(len(w.candidates) for w in windows)
        return [
            Ranking(query, tuple(_merged(windows, scored, explained, max_spans))).top(top_k)
            for query, scored in zip(queries, found, strict=True)
        ]

    def _check_lengths(self, layouts: Iterable[PromptLayout]) -> None:
        limit = self.reranker.limits.max_context_tokens
        longest = max(layouts, key=len)
        if limit is not None and self.layout == "joint" and len(longest) > limit:
            raise WindowError(
                f"the query needs {len(longest.query):,} tokens behind {len(longest.shared):,} of documents, the "
                f"window holds {limit:,}: pass a shorter query, or build the index with a smaller max_context_tokens"
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
            windows = list(self._windows)
            parts = self._parts(given, len(self._documents), windows[-1] if windows else None)
            tell = _Told(progress, sum(candidate.cost for _, part in parts for candidate in part))
            for is_new, part in parts:
                grown = self._grown(None if is_new else windows.pop(), part, tell)
                windows.append(grown)
            self._windows, self._documents = tuple(windows), self._documents + tuple(given)

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
            gone = set(indices)
            if wrong := [index for index in gone if not 0 <= index < len(self._documents)]:
                raise InputError(f"there is no document #{wrong[0]} among {len(self)}: pass positions in documents")
            left = [index for index in range(len(self._documents)) if index not in gone]
            places = {index: place for place, index in enumerate(left)}
            windows = [self._shrunk(window, places) for window in self._windows]
            self._windows = tuple(window for window in windows if window is not None)
            self._documents = tuple(self._documents[index] for index in left)

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
        windows = self._windows
        chosen = list(range(len(self._documents)) if indices is None else dict.fromkeys(indices))
        if wrong := [index for index in chosen if not 0 <= index < len(self._documents)]:
            raise InputError(f"there is no document #{wrong[0]} among {len(self)}: pass positions in documents")
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
            return self._side_by_side([beginning, *(piece for _, piece in pieces)])
        behind = holding[0][0].prefix.num_positions
        return join([beginning, *(piece for _, piece in pieces)], dtype=self._dtype, next_position=behind)

    # ---- reading

    def _parts(self, given: Sequence[Document], first: int, last: Window | None) -> list[tuple[bool, list[Candidate]]]:
        """New documents by window: whether it is a new one, and what goes into it."""
        limits = self.reranker.limits
        window = limits.max_context_tokens
        room = None if window is None else max(window - _ROOM_FOR_QUERY, window // 2)
        fitted = self.reranker.fit(Query("?"), given, replace(limits, max_context_tokens=room))
        if last is None:
            return [(True, part) for part in fitted]
        candidates = [replace(one, index=one.index + first) for part in fitted for one in part]
        used, many = len(last.reading.layout.shared), len(last.candidates)
        count = 0
        for count, ends in enumerate(accumulate(candidate.cost for candidate in candidates), start=1):
            full = room is not None and used + ends > room
            if full or (limits.batch_size is not None and many + count > limits.batch_size):
                count -= 1
                break
        rest = candidates[count:]
        budget = sum(candidate.cost for candidate in rest) if room is None else room - last.spans[0].stop
        packed = pack_windows([candidate.cost for candidate in rest], budget, limits.batch_size) if rest else []
        parts = [(True, [rest[i] for i in numbers]) for numbers in packed]
        return [(False, candidates[:count]), *parts] if count else parts

    def _grown(self, window: Window | None, part: Sequence[Candidate], tell: "_Told") -> Window:
        """The window with further candidates behind; a new one of them."""
        candidates = (*(() if window is None else window.candidates), *part)
        reading = self._scorer.lay_out([candidate.read for candidate in candidates])
        if self.layout == "block":
            new = self._read_blocks(part, tell)
            old = new[:1] if window is None else cut(window.prefix, window.spans)
            behind = new[1:]
            if self.reranker.refinements.positions == "in_line":
                behind = in_line(behind, self._scorer.rotation().moved, start=old[-1].position + len(old[-1]))
            reading.prefix = self._side_by_side([*old, *behind])
        else:
            reuse = None if window is None else window.prefix
            prefix = self._scorer.prefill(reading.layout, reuse, whole=self.whole, progress=tell)
            reading.prefix = self._packed(prefix)
        return Window(candidates, reading)

    def _shrunk(self, window: Window, places: Mapping[int, int]) -> Window | None:
        """The window with the documents that are left, at their new places."""
        left = [i for i, candidate in enumerate(window.candidates) if candidate.index in places]
        if not left:
            return None
        candidates = tuple(replace(window.candidates[i], index=places[window.candidates[i].index]) for i in left)
        if len(left) == len(window.candidates):
            return replace(window, candidates=candidates)
        reading = self._scorer.lay_out([candidate.read for candidate in candidates])
        if self.layout == "block":
            beginning, *pieces = cut(window.prefix, window.spans)
            reading.prefix = self._side_by_side([beginning, *(pieces[i] for i in left)])
        else:
            reading.prefix = self._packed(self._scorer.prefill(reading.layout, window.prefix, whole=self.whole))
        return Window(candidates, reading)

    def _read_blocks(self, part: Sequence[Candidate], tell: "_Told") -> list[Piece]:
        """The beginning and each document; some documents at a time, packed away before the next ones are read."""
        pieces: list[Piece] = []
        for some in _batches(part):
            reading = self._scorer.lay_out([candidate.read for candidate in some])
            prefix = self._scorer.prefill(reading.layout, whole=self.whole)
            read = cut(self._packed(prefix), Window(tuple(some), reading).spans)
            pieces += read[1:] if pieces else read
            tell(sum(map(len, read[1:])))
        return pieces

    def _packed(self, prefix: Prefix) -> Prefix:
        return pack(prefix, dtype=self.kept, top_heads=self._top_heads)

    def _side_by_side(self, pieces: Sequence[Piece]) -> Prefix:
        """A beginning, and behind it blocks at the positions that they have."""
        num_heads = self.backend.attention_layers[pieces[0].top_layer].num_kv_heads
        return join(pieces, dtype=self._dtype, top_heads=self._top_heads, num_top_heads=num_heads)

    @property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.backend.model.dtype
        return dtype


def _merged(
    windows: Sequence[Window],
    scored: Sequence[tuple[PromptLayout, Float[Tensor, "1 _"]]],
    explained: int,
    max_spans: int | None,
) -> list[ScoredDocument]:
    """The documents of all windows, best first; of one in several pieces, the best."""
    best: dict[int, ScoredDocument] = {}
    for number, (window, (layout, scores_KT)) in enumerate(zip(windows, scored, strict=True)):
        for entrant in entrants(window.candidates, layout, scores_KT, number, explained=explained, max_spans=max_spans):
            known = best.get(entrant.item.index)
            if known is None or known.score < entrant.item.score:
                best[entrant.item.index] = entrant.item
    return explained_only(sorted(best.values(), key=lambda item: (-item.score, item.index)), explained)


class _Told:
    """Counts tokens for the caller's bar."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self, num_tokens: int) -> None:
        self.done = min(self.done + num_tokens, self.total)
        if self.progress is not None:
            self.progress(self.done, self.total)


def _spans(layout: PromptLayout) -> list[Span]:
    starts = [span.start for span in layout.documents]
    return [Span(*span) for span in pairwise([*starts, layout.shared.stop])]


def _batches(part: Sequence[Candidate]) -> Iterator[list[Candidate]]:
    """Documents that are read before any is packed away."""
    some: list[Candidate] = []
    for candidate in part:
        if some and sum(one.cost for one in some) + candidate.cost > _BLOCK_TOKENS:
            yield some
            some = []
        some.append(candidate)
    if some:
        yield some


def _read_keys(reranker: AttentionReranker) -> tuple[int, ...] | None:
    """The key/value heads of the deepest layer that are read; None if all are."""
    top = reranker.backend.attention_layers[reranker.heads.top_layer]
    shared = top.num_heads // top.num_kv_heads
    read = {head // shared for layer, head in reranker.heads.heads if layer == reranker.heads.top_layer}
    return tuple(sorted(read)) if len(read) < top.num_kv_heads else None
