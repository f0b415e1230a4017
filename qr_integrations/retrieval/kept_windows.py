"""Windows of documents whose keys and values are kept: read, filled up, taken out of, put together.

An index is made of them; which documents it has, and what is asked, is not known here.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise

import torch

from qr_integrations.backend import KeptDtype, Piece, Prefix, cut, in_line, join, key_rotation, pack
from qr_integrations.backend.blocks import check_reach
from qr_integrations.retrieval.layout import PromptLayout, Query
from qr_integrations.retrieval.reranker import AttentionReranker, Progress
from qr_integrations.retrieval.token_scores import Reading
from qr_integrations.retrieval.windows import Candidate
from qr_integrations.retrieval.windows import pack as pack_windows
from qr_integrations.types import Document, Span

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


class WindowReader:
    """Reads documents as one reranker does, and keeps keys and values as they are to be kept."""

    def __init__(self, reranker: AttentionReranker, kept: KeptDtype, *, whole: bool) -> None:
        self.reranker, self.kept, self.whole = reranker, kept, whole
        self.blocks = reranker.refinements.layout == "block"
        self._scorer = reranker.scorer

    @cached_property
    def _top_heads(self) -> tuple[int, ...] | None:
        return None if self.whole else _read_keys(self.reranker)

    def parts(self, given: Sequence[Document], first: int, last: Window | None) -> list[tuple[bool, list[Candidate]]]:
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

    def grown(self, window: Window | None, part: Sequence[Candidate], tell: "Told") -> Window:
        """The window with further candidates behind; a new one of them."""
        candidates = (*(() if window is None else window.candidates), *part)
        known = None if window is None else window.reading
        reading = self._scorer.lay_out([candidate.read for candidate in candidates], known)
        if self.blocks:
            new = self._read_blocks(part, tell)
            old = new[:1] if window is None else cut(window.prefix, window.spans)
            reading.prefix = self.side_by_side([*old, *new[1:]])
        else:
            reuse = None if window is None else window.prefix
            prefix = self._scorer.prefill(reading.layout, reuse, whole=self.whole, progress=tell)
            reading.prefix = self._packed(prefix)
        return Window(candidates, reading)

    def shrunk(self, window: Window, places: Mapping[int, int]) -> Window | None:
        """The window with the documents that are left, at their new places."""
        left = [i for i, candidate in enumerate(window.candidates) if candidate.index in places]
        if not left:
            return None
        candidates = tuple(replace(window.candidates[i], index=places[window.candidates[i].index]) for i in left)
        if len(left) == len(window.candidates):
            return replace(window, candidates=candidates)
        reading = self._scorer.lay_out([candidate.read for candidate in candidates])
        if self.blocks:
            beginning, *pieces = cut(window.prefix, window.spans)
            reading.prefix = self.side_by_side([beginning, *(pieces[i] for i in left)])
        else:
            prefix = self._packed(self._scorer.prefill(reading.layout, window.prefix, whole=self.whole))
            reading.prefix = self.side_by_side([piece.own() for piece in cut(prefix, [Span(0, len(prefix))])])
        return Window(candidates, reading)

    def _read_blocks(self, part: Sequence[Candidate], tell: "Told") -> list[Piece]:
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

    def side_by_side(self, pieces: Sequence[Piece], *, next_position: int | None = None) -> Prefix:
        """A beginning, and behind it pieces at the positions that they have; blocks where the refinements want them."""
        num_heads = self.reranker.backend.attention_layers[pieces[0].top_layer].num_kv_heads
        dtype: torch.dtype = self.reranker.backend.model.dtype
        if self.blocks:
            check_reach(sum(map(len, pieces)), self.reranker.backend.config)
            if self.reranker.refinements.positions == "in_line":
                pieces = in_line(pieces, key_rotation(self.reranker.backend).moved)
        return join(
            pieces,
            dtype=dtype,
            next_position=next_position,
            top_heads=self._top_heads,
            num_top_heads=num_heads,
        )


class Told:
    """Counts tokens for the caller's bar."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self, num_tokens: int) -> None:
        """So many more were read."""
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
    """The key/value heads of the deepest layer that are read; None if all are, or where what is kept is not keys."""
    top_layer = reranker.heads.top_layer
    top = reranker.backend.attention_layers[top_layer]
    sample = reranker.backend.prefill((0,), top_layer=top_layer)
    if not sample.is_plain or cut(sample, [Span(0, 1)])[0].keys[-1].steps.shape[1] != top.num_kv_heads:
        return None  # latent attention keeps one vector for all heads
    shared = top.num_heads // top.num_kv_heads
    read = {head // shared for layer, head in reranker.heads.heads if layer == top_layer}
    return tuple(sorted(read)) if len(read) < top.num_kv_heads else None
