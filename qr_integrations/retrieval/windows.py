"""What to do when the documents do not fit into the model's window. All lengths, caps and budgets are tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from qr_integrations.errors import WindowError
from qr_integrations.retrieval.layout import PromptLayout, shorten
from qr_integrations.types import Document

Overflow = Literal["error", "head", "windows"]
_TAIL_STEP = 64  # room for the query is rounded up to this, so that most queries cut documents alike and share a prefix
_MARGIN = 2  # tokens per document: a cut text may tokenize a little longer at its end
_PER_WINDOW = 4  # with overflow="windows", at least this many documents meet in a window
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


def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Consecutive documents into as few windows as they need, filled evenly; one longer than `budget` stands alone."""
    num_windows = _fill(lengths, budget, budget)
    low, high = max(1, sum(lengths) // max(1, len(num_windows))), budget
    while low < high:  # the smallest fill that needs no further window: the last one is not left almost empty
        middle = (low + high) // 2
        if len(_fill(lengths, middle, budget)) > len(num_windows):
            low = middle + 1
        else:
            high = middle
    return _fill(lengths, high, budget)


def _fill(lengths: Sequence[int], fill: int, budget: int) -> list[list[int]]:
    windows: list[list[int]] = []
    used = 0
    for index, length in enumerate(lengths):
        if not windows or used + length > min(fill, budget):
            windows.append([])
            used = 0
        windows[-1].append(index)
        used += length
    return windows


@dataclass(frozen=True, slots=True)
class Candidate:
    """A document on its way: where it came from, what is read of it, and how long that is."""

    index: int
    given: Document
    read: Document
    num_tokens: int
    num_tokens_cut: int = 0


def fit(
    documents: Sequence[Document],
    layout_of: Callable[[Sequence[Document]], PromptLayout],
    *,
    max_tokens: int | None,
    max_doc_tokens: int | None,
    overflow: Overflow,
) -> list[list[Candidate]]:
    """Spread documents over windows of at most `max_tokens`, cutting and splitting as `overflow` allows.

    Args:
        documents: what the caller gave.
        layout_of: writes the prompt of the query over some documents.
        max_tokens: the model's window; None for no limit.
        max_doc_tokens: cut every document to this.
        overflow: ``"error"``, ``"head"`` (cut the longest documents until all fit) or ``"windows"`` (several prompts).

    Raises:
        WindowError: it does not fit; the message does the arithmetic.
    """
    layout = whole = layout_of(documents)
    candidates = _cut(documents, whole, max_doc_tokens)
    if any(candidate.num_tokens_cut for candidate in candidates):
        layout = layout_of([candidate.read for candidate in candidates])
    if max_tokens is None or len(layout) <= max_tokens:
        return [candidates]
    if overflow == "error":
        raise WindowError(
            f"{_arithmetic(layout, max_tokens)}: pass overflow='head' to cut documents, overflow='windows' for several "
            "prompts, or max_doc_tokens=..."
        )
    lengths = [len(span) for span in layout.documents]
    tail = -(-len(layout.query) // _TAIL_STEP) * _TAIL_STEP
    room = max_tokens - tail - (len(layout.shared) - sum(lengths)) - _MARGIN * len(documents)
    cap = fair_cap(lengths, room) if overflow == "head" else room // _PER_WINDOW
    if cap < _LEAST:
        raise WindowError(
            f"{_arithmetic(layout, max_tokens)}, which leaves {max(0, cap)} per document; fewer than {_LEAST} are "
            "not worth reading: pass fewer documents, a shorter query, or overflow='windows'"
        )
    candidates = _cut(documents, whole, min(cap, max_doc_tokens or cap))
    if overflow == "head":
        return [candidates]
    return [[candidates[i] for i in window] for window in pack([c.num_tokens for c in candidates], room)]


def _cut(documents: Sequence[Document], layout: PromptLayout, cap: int | None) -> list[Candidate]:
    candidates = []
    for i, document in enumerate(documents):
        length = len(layout.documents[i])
        kept = length if cap is None else min(length, cap)
        read = shorten(layout, i, document, kept)
        candidates.append(Candidate(i, document, read, kept, length - kept))
    return candidates


def _arithmetic(layout: PromptLayout, max_tokens: int) -> str:
    lengths = [len(span) for span in layout.documents]
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    return (
        f"the prompt needs {len(layout):,} tokens ({len(lengths)} documents, longest #{longest} with "
        f"{lengths[longest]:,}; query and instruction {len(layout.query):,}), the model holds {max_tokens:,}"
    )
