"""What to do when the documents do not fit into the model's window. All lengths, caps and budgets are tokens."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from numbers import Integral
from typing import Literal, get_args

import numpy as np

from qr_integrations.errors import InputError, WindowError
from qr_integrations.retrieval.chunks import chunk
from qr_integrations.retrieval.layout import PromptLayout, num_title_tokens, shorten, shorten_title, title_room
from qr_integrations.types import Document, Span

Truncation = Literal["error", "head", "chunk"]
Merge = Literal["one_scale", "final", "raw"]
_TAIL_STEP = 64  # room for the query is rounded up to this, so that most queries cut documents alike and share a prefix
_MARGIN = 2  # tokens per document: a cut text may tokenize a little longer at its end
_PER_WINDOW = 4  # where several prompts are needed, at least this many documents or pieces meet in one
_LEAST_HEAD = 256  # rather several prompts than cut documents below this, where a window has room for it
_LEAST = 8  # a document of fewer tokens is not worth reading


def fair_cap(lengths: Sequence[int], budget: int) -> int:
    """The largest c with ``sum(min(length, c)) <= budget``: long documents are cut, short ones stay whole."""
    remaining, left = budget, len(lengths)
    for length in sorted(lengths):
        if length * left > remaining:
            return remaining // left
        remaining -= length
        left -= 1
    return max(lengths, default=0)


def pack(lengths: Sequence[int], budget: int, max_count: int | None = None) -> list[list[int]]:
    """Consecutive documents into as few windows as they need, filled evenly; one longer than `budget` stands alone.

    `max_count` limits the documents per window.
    """
    upto = list(accumulate(lengths, initial=0))
    num_windows = len(_starts(upto, budget, max_count))
    low, high = max(1, upto[-1] // max(1, num_windows)), budget
    while low < high:  # the smallest fill that needs no further window: the last one is not left almost empty
        middle = (low + high) // 2
        if len(_starts(upto, middle, max_count)) > num_windows:
            low = middle + 1
        else:
            high = middle
    starts = _starts(upto, high, max_count)
    return [list(range(*window)) for window in pairwise([*starts, len(lengths)])]


def _starts(upto: Sequence[int], fill: int, max_count: int | None) -> list[int]:
    """The first document of every window; `upto` are the sums of the lengths before each document, and of all."""
    starts, first = [], 0
    while first < len(upto) - 1:
        starts.append(first)
        fits = bisect_right(upto, upto[first] + fill) - 1
        first = max(first + 1, min(fits, first + (max_count or len(upto))))
    return starts


@dataclass(frozen=True, slots=True)
class Candidate:
    """A document, or a piece of one, on its way into a prompt.

    Attributes:
        index: which of the caller's documents.
        given: that document.
        read: what of it is read.
        num_tokens: how long that is.
        cost: what it takes of a prompt, with what stands between documents.
        document_tokens: how much of the document is read in all pieces together.
        num_tokens_cut: how much is not read.
        start: the character of the given text at which `read` begins.
    """

    index: int
    given: Document
    read: Document
    num_tokens: int
    cost: int
    document_tokens: int
    num_tokens_cut: int = 0
    start: int = 0


@dataclass(frozen=True, slots=True)
class Limits:
    """How much is read at a time. None: no limit.

    Attributes:
        max_context_tokens: the window.
        max_doc_tokens: the most that is read of one document, or of a piece.
        batch_size: the most documents or pieces in one prompt.
        truncation: ``"error"`` cuts nothing and takes one prompt; ``"head"`` cuts the longest documents at their ends
            until all fit into one prompt, or into several if that would leave little of them; ``"chunk"`` cuts nothing:
            long documents are ranked in pieces, in as many prompts as they need.
        merge: how several prompts become one ranking. ``"one_scale"``: as if every document had stood among the same
            others, see `on_one_scale`; ``"final"``: the best of every prompt are read again, in a last one;
            ``"raw"``: by scores that are shares of different prompts.
    """

    max_context_tokens: int | None = None
    max_doc_tokens: int | None = None
    batch_size: int | None = None
    truncation: Truncation = "error"
    merge: Merge = "one_scale"

    def __post_init__(self) -> None:
        if self.merge not in get_args(Merge):
            raise InputError(f"unknown merge {self.merge!r}: pass 'one_scale', 'final' or 'raw'")
        if self.truncation not in ("error", "head", "chunk"):
            raise InputError(f"unknown truncation {self.truncation!r}: pass 'error', 'head' or 'chunk'")
        for name in ("max_context_tokens", "max_doc_tokens", "batch_size"):
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, Integral) or value < 1:
                raise InputError(f"{name} must be at least 1, a whole number, got {value!r}: pass None for no limit")
            object.__setattr__(self, name, int(value))  # numpy's numbers would go into files


def fit(
    documents: Sequence[Document], layout_of: Callable[[Sequence[Document]], PromptLayout], limits: Limits
) -> list[list[Candidate]]:
    """Spread documents over windows, cutting and splitting as `limits` allow.

    Args:
        documents: what the caller gave.
        layout_of: writes the prompt of the query over some documents.
        limits: how much is read at a time.

    Raises:
        WindowError: it does not fit; the message does the arithmetic.
    """
    layout = whole = layout_of(documents)
    gap = _widest_gap(whole)
    candidates = _limited(documents, whole, limits, limits.max_doc_tokens, gap)
    if len(candidates) > len(documents) or any(candidate.num_tokens_cut for candidate in candidates):
        layout = layout_of([candidate.read for candidate in candidates])
    if _fits(layout, limits):
        return [candidates]
    window = limits.max_context_tokens
    if limits.truncation == "error" and window is not None and len(layout) > window:
        raise WindowError(
            f"{_arithmetic(layout, window)}: pass truncation='head' to cut documents, truncation='chunk' for pieces in "
            "several prompts, or fewer documents"
        )
    if window is None:
        room = sum(len(span) + gap for span in layout.documents)
    else:
        tail = -(-len(layout.query) // _TAIL_STEP) * _TAIL_STEP
        room = window - tail - whole.documents[0].start - gap
    cap = _cap([candidate.cost for candidate in candidates], room, limits) - gap
    if cap < _LEAST and window is not None:
        raise WindowError(
            f"{_arithmetic(layout, window)}, which leaves {max(0, cap)} per document; fewer than {_LEAST} are "
            "not worth reading: pass a shorter query, or a larger max_context_tokens"
        )
    if limits.truncation != "error":
        candidates = _limited(documents, whole, limits, min(cap, limits.max_doc_tokens or cap), gap)
    costs = [candidate.cost for candidate in candidates]
    return [[candidates[i] for i in numbers] for numbers in pack(costs, room, limits.batch_size)]


def longest_of(windows: Sequence[Sequence[Candidate]]) -> int:
    """Tokens of the documents in the longest window."""
    return max(sum(candidate.cost for candidate in window) for window in windows)


def _fits(layout: PromptLayout, limits: Limits) -> bool:
    window, count = limits.max_context_tokens, limits.batch_size
    return (window is None or len(layout) <= window) and (count is None or len(layout.documents) <= count)


def _widest_gap(layout: PromptLayout) -> int:
    """Tokens that a document needs beside its own: what stands between documents, and a margin."""
    ends = [*(span.start for span in layout.documents[1:]), layout.query.start]
    return _MARGIN + max(after - span.stop for span, after in zip(layout.documents, ends, strict=True))


def _cap(costs: Sequence[int], room: int, limits: Limits) -> int:
    """The most that is read of one document, its gap included."""
    if limits.max_context_tokens is None:
        return room
    several = room // min(_PER_WINDOW, limits.batch_size or _PER_WINDOW)
    if limits.truncation == "head" and len(costs) <= (limits.batch_size or len(costs)):
        fair = fair_cap(costs, room)
        if fair >= min(_LEAST_HEAD, several):
            return fair
    return several


def _limited(
    documents: Sequence[Document], layout: PromptLayout, limits: Limits, cap: int | None, gap: int
) -> list[Candidate]:
    """Every document whole, or as much of it as `cap` allows: its head, or its pieces one after the other."""
    candidates = []
    for i, document in enumerate(documents):
        length = len(layout.documents[i])
        if cap is None or length <= cap:
            candidates.append(Candidate(i, document, document, length, length + gap, length))
        elif limits.truncation == "head":
            read = shorten(layout, i, document, cap)
            candidates.append(Candidate(i, document, read, cap, cap + gap, cap, length - cap))
        elif limits.truncation == "chunk":
            candidates += _pieces(layout, i, document, cap, gap)
        else:
            raise WindowError(
                f"document #{i} has {length:,} tokens, more than max_doc_tokens={cap:,}: pass truncation='head' to cut "
                "it or truncation='chunk' to read it in pieces"
            )
    return candidates


def _pieces(layout: PromptLayout, index: int, document: Document, cap: int, gap: int) -> list[Candidate]:
    """Consecutive pieces of a document, each under its title."""
    span, chars = layout.documents[index], layout.texts[index]
    text, whole_title = layout.text[chars.slice()], num_title_tokens(layout, index)
    title = title_room(layout, index, document, cap)
    if layout.offsets is None:
        starts = np.arange(len(span)) * len(text) // len(span)
    else:
        starts = layout.offsets[span.start + whole_title : span.stop, 0] - chars.start
    titled = shorten_title(layout, index, document, title)
    before = document.text.index(text)  # white space that the prompt leaves out
    read, cut = title + len(starts), whole_title - title
    candidates = []
    for piece in chunk(text, starts, max(1, cap - title)) or [Span(0, 0)]:
        length = title + int(((starts >= piece.start) & (starts < piece.stop)).sum())
        part = replace(titled, text=text[piece.slice()])
        candidates.append(Candidate(index, document, part, length, length + gap, read, cut, before + piece.start))
    return candidates


def _arithmetic(layout: PromptLayout, max_tokens: int) -> str:
    lengths = [len(span) for span in layout.documents]
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    return (
        f"the prompt needs {len(layout):,} tokens ({len(lengths)} documents, longest #{longest} with "
        f"{lengths[longest]:,}; query and instruction {len(layout.query):,}), the model holds {max_tokens:,}"
    )
