"""Calibrated attention per token, with the documents read once and kept for the next query.

Legend: K kept heads, T tokens of the shared part (documents), N documents, B queries.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from qr_integrations.backend import (
    AttentionTap,
    Backend,
    KeyRotation,
    Prefix,
    Trunk,
    Wanted,
    cut,
    in_line,
    join,
    key_rotation,
)
from qr_integrations.retrieval.heads import HeadSet
from qr_integrations.retrieval.layout import PromptLayout, PromptStyle, PromptWriter, Query
from qr_integrations.retrieval.merging import Shares, on_one_scale
from qr_integrations.retrieval.refinements import PUBLISHED, Refinements, average_orders, orders_of, token_weights
from qr_integrations.retrieval.scoring import calibrate
from qr_integrations.types import Document, Span

NULL_QUERY = "N/A"
_OTHER_QUERY = "who?"  # shares nothing with the null query
_KEEP_LAYOUTS = 4
_ROWS = 2**27  # attention weights that are read at a time where rows are wanted apart: half a gigabyte
_KEEP_ASKED = 16  # per list of documents: with or without an instruction, summed or per head
Contents = tuple[tuple[str | None, str], ...]


def contents(documents: Sequence[Document]) -> Contents:
    """What of a list of documents is read: two lists with the same contents share a prefix."""
    return tuple((document.title, document.text) for document in documents)


@dataclass(slots=True)
class Reading:
    """One list of documents in a prompt, whatever the query. Its prefix, once there, is never changed.

    Attributes:
        documents: as they stand in the prompt.
        layout: with the null query.
        prefix: keys and values of everything before the query; None until they are needed.
    """

    documents: tuple[Document, ...]
    layout: PromptLayout
    prefix: Prefix | None = None
    asked: OrderedDict[tuple[str, bool, str | None], Any] = field(default_factory=OrderedDict, repr=False)
    lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    @property
    def shared_ids(self) -> tuple[int, ...]:
        """The tokens before the query."""
        return self.layout.token_ids[self.layout.shared.slice()]


@dataclass(frozen=True, slots=True)
class Asked:
    """What a query, and the null queries that go with it, pay to one window: everything that is kept of its pass."""

    layout: PromptLayout
    shares: Shares
    nulls: tuple[Shares, ...]


class TokenScorer:
    """Scores the tokens of documents for a query: the query's attention minus the null query's.

    `null_instruction` is the share of the null query that keeps the query's instruction (the lambda of arXiv
    2609.17764): 0 leaves it out, so that what the instruction asks for counts; 1 keeps it, so that only what the
    question adds to it counts; between, two null queries are mixed.

    The keys and values of the documents, the null query's scores, and what all queries begin with, are kept for the
    last `keep_prefixes` lists, so that another query over the same documents costs its own words only. Safe to share
    between threads.
    """

    def __init__(
        self,
        backend: Backend,
        heads: HeadSet,
        style: PromptStyle,
        *,
        calibrated: bool,
        null_instruction: float,
        keep_prefixes: int,
        refinements: Refinements = PUBLISHED,
    ) -> None:
        self.backend, self.heads, self.calibrated = backend, heads, calibrated
        self.null_instruction, self.refinements = null_instruction, refinements
        self.style = replace(style, blocks=refinements.layout == "block")
        self._writer = PromptWriter(backend, self.style)
        self._keep = keep_prefixes * refinements.orders
        self._known: OrderedDict[Contents, Reading] = OrderedDict()
        self._lock = threading.Lock()

    def layout(self, query: Query, documents: Sequence[Document]) -> PromptLayout:
        """The prompt, without running the model."""
        return self._layout(self._recall(documents), query)

    def score(
        self, query: Query, documents: Sequence[Document], *, per_head: bool = False
    ) -> tuple[PromptLayout, Float[Tensor, "K T"]]:
        """The prompt's layout, and the calibrated score of every token before the query.

        `per_head=False` sums over the heads, K is 1.
        """
        if self.refinements.orders == 1:
            layout, scores_KT = self._score(query, documents, per_head)
        else:
            orders = orders_of(documents, self.refinements.orders)
            read = [self._score(query, [documents[i] for i in order], per_head) for order in orders]
            layout, scores_KT = average_orders([one for one, _ in read], [scores for _, scores in read], orders)
        return layout, self._weighted(layout, query, scores_KT)

    def _score(self, query: Query, documents: Sequence[Document], per_head: bool) -> tuple[PromptLayout, Tensor]:
        """The documents read in one order."""
        reading = self._recall(documents)
        self.read(reading)
        with self._lock:
            self._trim()
        return self._of_reading(reading, [query], per_head)[0]

    def lay_out(self, documents: Sequence[Document]) -> Reading:
        """A prompt over documents, not yet read; the caller keeps it."""
        return Reading(tuple(documents), self._writer.write(Query(NULL_QUERY), documents))

    def read(self, reading: Reading) -> None:
        """Compute its prefix, unless it is there: of several threads with the same documents, one reads them."""
        with reading.lock:
            if reading.prefix is None:
                reading.prefix = self._placed(self.prefill(reading.layout))

    def prefill(
        self,
        layout: PromptLayout,
        reuse: Prefix | None = None,
        *,
        whole: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> Prefix:
        """Read what stands before the query.

        Args:
            layout: the prompt.
            reuse: what it begins with of these tokens is not read again.
            whole: through all layers, so that the model can answer behind it.
            progress: called with the number of tokens read by each pass.
        """
        shared = layout.token_ids[layout.shared.slice()]
        top_layer = max(self.backend.attention_layers) if whole else self.heads.top_layer
        if layout.blocks:
            return self.backend.prefill_blocks(shared, layout.blocks, top_layer=top_layer, values=whole)
        return self.backend.prefill(shared, top_layer=top_layer, reuse=reuse, values=whole, progress=progress)

    def rotation(self) -> KeyRotation:
        """What moves the model's keys to other positions."""
        return key_rotation(self.backend)

    def _placed(self, prefix: Prefix) -> Prefix:
        """Blocks one behind the other, if they are to stand so."""
        if self.refinements.positions == "shared" or not prefix.blocks:
            return prefix
        beginning, *pieces = cut(prefix, [Span(0, prefix.blocks[0].start), *prefix.blocks])
        placed = in_line(pieces, self.rotation().moved, start=len(beginning))
        return join([beginning, *placed], dtype=self.backend.model.dtype)

    def score_windows(
        self, readings: Sequence[Reading], queries: Sequence[Query], *, one_scale: bool = True
    ) -> list[list[tuple[PromptLayout, Float[Tensor, "1 _"]]]]:
        """As `score`, for several queries over windows that were read, in as few passes as possible.

        Args:
            readings: one or several windows, each with its prefix.
            queries: all go through the model together, window by window.
            one_scale: make the scores of several windows comparable, see `on_one_scale`.

        Returns:
            For each query, for each window.
        """
        if len(readings) == 1 or not one_scale:
            by_window = [self._of_reading(reading, queries, per_head=False) for reading in readings]
            found = [list(windows) for windows in zip(*by_window, strict=True)]
        else:
            found = [self._merged(query, [self._ask(reading, query) for reading in readings]) for query in queries]
        return [
            [(layout, self._weighted(layout, query, scores_KT)) for layout, scores_KT in windows]
            for query, windows in zip(queries, found, strict=True)
        ]

    def ask(self, query: Query, documents: Sequence[Document]) -> tuple[Asked, ...]:
        """One window of several, once for each of `Refinements.orders`, for `merge`."""
        asked = []
        for order in self._orders(documents):
            reading = self._recall([documents[i] for i in order])
            self.read(reading)
            with self._lock:
                self._trim()
            asked.append(self._ask(reading, query))
        return tuple(asked)

    def merge(
        self, query: Query, asked: Sequence[tuple[Asked, ...]], windows: Sequence[Sequence[Document]]
    ) -> list[tuple[PromptLayout, Float[Tensor, "1 _"]]]:
        """As `score`, for every window, with scores that can be compared; see `on_one_scale`.

        Args:
            query: as in `ask`.
            asked: what that returned for every window.
            windows: the documents of each.
        """
        by_order = [self._merged(query, window) for window in zip(*asked, strict=True)]
        if len(by_order) == 1:
            found = by_order[0]
        else:
            found = [
                average_orders([one for one, _ in read], [scores for _, scores in read], self._orders(documents))
                for documents, *read in zip(windows, *by_order, strict=True)
            ]
        return [(layout, self._weighted(layout, query, scores_KT)) for layout, scores_KT in found]

    def _orders(self, documents: Sequence[Document]) -> list[list[int]]:
        count = self.refinements.orders
        return [list(range(len(documents)))] if count == 1 else orders_of(documents, count)

    def _ask(self, reading: Reading, query: Query) -> Asked:
        layout = self._layout(reading, query)
        nulls = [self._null_shares(reading, text) for _, text in self._null_weights(query.instruction)]
        return Asked(layout, self._shares(reading, layout), tuple(nulls))

    def _merged(self, query: Query, windows: Sequence[Asked]) -> list[tuple[PromptLayout, Float[Tensor, "1 _"]]]:
        """The attention of the query, and that of each null query, on the scale of all windows; then the rest."""
        spans = [window.layout.documents for window in windows]
        scores = on_one_scale([window.shares for window in windows], spans)
        for number, (weight, _) in enumerate(self._null_weights(query.instruction)):
            nulls = on_one_scale([window.nulls[number] for window in windows], spans)
            scores = [calibrate(some, null, weight) for some, null in zip(scores, nulls, strict=True)]
        return [
            (window.layout, scores_KT.sum(0, keepdim=True)) for window, scores_KT in zip(windows, scores, strict=True)
        ]

    def _null_shares(self, reading: Reading, instruction: str | None) -> Shares:
        def read() -> Shares:
            return self._shares(reading, self._layout(reading, Query(NULL_QUERY, instruction)))

        shares: Shares = _once(reading, ("null shares", True, instruction), read)
        return shares

    def _shares(self, reading: Reading, layout: PromptLayout) -> Shares:
        """The attention of a query's rows, as many heads at a time as there is room for."""
        assert reading.prefix is not None
        prefix, shared = reading.prefix, layout.shared.slice()
        if layout.token_ids[shared] != prefix.token_ids:
            prefix = self.prefill(layout, prefix)
        at_once = max(1, _ROWS // (len(layout.query) * len(layout)))
        parts = []
        for first in range(0, len(self.heads.heads), at_once):
            tap = AttentionTap(self.heads.heads[first : first + at_once], layout.query, reduce="none")
            rows = self.backend.forward(layout.token_ids[len(prefix) :], tap=tap, prefix=prefix)
            parts.append(Shares.of(rows[0, ..., shared], layout.documents))
        return Shares.of_all_heads(parts)

    def _of_reading(
        self, reading: Reading, queries: Sequence[Query], per_head: bool
    ) -> list[tuple[PromptLayout, Float[Tensor, "K _"]]]:
        """Calibrated scores of several queries over one window."""
        layouts = [self._layout(reading, query) for query in queries]
        found = []
        rows = self._rows(reading, queries, layouts, per_head)
        for query, layout, scores_KT in zip(queries, layouts, rows, strict=True):
            for weight, text in self._null_weights(query.instruction):
                scores_KT = calibrate(scores_KT, self._null(reading, per_head, text), weight)
            found.append((layout, scores_KT))
        return found

    def _rows(
        self, reading: Reading, queries: Sequence[Query], layouts: Sequence[PromptLayout], per_head: bool
    ) -> list[Float[Tensor, "K _"]]:
        """What each query pays to the tokens before it; those with the same instruction share a pass."""
        rows: dict[int, Tensor] = {}
        for instruction in dict.fromkeys(query.instruction for query in queries):
            mine = [i for i, query in enumerate(queries) if query.instruction == instruction]
            some = self._attention(reading, [layouts[i] for i in mine], instruction, per_head)
            rows.update(zip(mine, some, strict=True))
        return [rows[i] for i in range(len(queries))]

    def forget(self) -> None:
        """Free what is kept."""
        with self._lock:
            self._known.clear()

    def _null_weights(self, instruction: str | None) -> list[tuple[float, str | None]]:
        """The null queries to subtract, by their instruction, and how much of each."""
        if not self.calibrated:
            return []
        kept = self.null_instruction if instruction else 0.0
        return [(weight, text) for weight, text in ((1.0 - kept, None), (kept, instruction)) if weight > 0.0]

    def _trunk(self, reading: Reading, per_head: bool, instruction: str | None) -> Trunk | None:
        """The words that all queries with this instruction begin with, read once."""

        def read() -> Trunk | None:
            one, other = (_tail(self._layout(reading, Query(q, instruction))) for q in (NULL_QUERY, _OTHER_QUERY))
            assert reading.prefix is not None
            return self.backend.read_trunk(_common(one, other), Wanted(self.heads.heads, per_head), reading.prefix)

        found: Trunk | None = _once(reading, ("trunk", per_head, instruction), read)
        return found

    def _null(self, reading: Reading, per_head: bool, instruction: str | None) -> Float[Tensor, "K T"]:
        """What the null query attends to."""

        def read() -> Tensor:
            layout = self._layout(reading, Query(NULL_QUERY, instruction))
            return self._attention(reading, [layout], instruction, per_head)[0]

        null_KT: Tensor = _once(reading, ("null", per_head, instruction), read)
        return null_KT

    def _attention(
        self, reading: Reading, layouts: Sequence[PromptLayout], instruction: str | None, per_head: bool
    ) -> list[Float[Tensor, "K _"]]:
        """What each query pays to the tokens before it; a query whose first token changes those reads its own."""
        assert reading.prefix is not None
        alike = [layout.token_ids[layout.shared.slice()] == reading.prefix.token_ids for layout in layouts]
        same = [layout for layout, is_alike in zip(layouts, alike, strict=True) if is_alike]
        trunk = self._trunk(reading, per_head, instruction)
        found: Iterator[Tensor] = iter(self._branches(reading.prefix, same, trunk, per_head) if same else ())
        return [
            next(found)
            if is_alike
            else self._branches(self.prefill(layout, reading.prefix), [layout], None, per_head)[0]
            for layout, is_alike in zip(layouts, alike, strict=True)
        ]

    def _alone(self, layout: PromptLayout, known: Prefix, per_head: bool) -> Float[Tensor, "K _"]:
        return self._branches(self._placed(self.prefill(layout, known)), [layout], None, per_head)[0]

    def _branches(
        self, prefix: Prefix, layouts: Sequence[PromptLayout], trunk: Trunk | None, per_head: bool
    ) -> Float[Tensor, "B K T"]:
        tails = [_tail(layout) for layout in layouts]
        shared = trunk.token_ids if trunk else ()
        if any(tail[: len(shared)] != shared or len(tail) == len(shared) for tail in tails):
            trunk = None  # a query that melts into one token with the words before it
        return self.backend.forward_branches(tails, Wanted(self.heads.heads, per_head), prefix=prefix, trunk=trunk)

    def _weighted(self, layout: PromptLayout, query: Query, scores_KT: Float[Tensor, "K T"]) -> Float[Tensor, "K T"]:
        weights_T = token_weights(layout, query.text, self.refinements)
        return scores_KT if weights_T is None else scores_KT * weights_T.to(scores_KT.device)

    def _layout(self, reading: Reading, query: Query) -> PromptLayout:
        return self._writer.rewrite(reading.layout, query, reading.documents)

    def _recall(self, documents: Sequence[Document]) -> Reading:
        key = contents(documents)
        with self._lock:
            reading = self._known.get(key)
        if reading is None:
            reading = self.lay_out(documents)
        with self._lock:
            reading = self._known.setdefault(key, reading)  # another thread may have laid out the same list meanwhile
            self._known.move_to_end(key)
            self._trim()
        return reading

    def _trim(self) -> None:
        """Drop the oldest lists beyond what may be kept. Lists that were only laid out, not read, count apart."""
        for is_read, limit in ((True, self._keep), (False, _KEEP_LAYOUTS)):
            keys = [key for key, reading in self._known.items() if (reading.prefix is not None) == is_read]
            for key in keys[: max(0, len(keys) - limit)]:
                del self._known[key]


def _once(reading: Reading, key: tuple[str, bool, str | None], make: Callable[[], Any]) -> Any:
    """What is made once per list of documents; the latest stand last."""
    with reading.lock:
        if key not in reading.asked:
            made = make()
            while len(reading.asked) >= _KEEP_ASKED:
                reading.asked.popitem(last=False)
            reading.asked[key] = made
        reading.asked.move_to_end(key)
        return reading.asked[key]


def _tail(layout: PromptLayout) -> tuple[int, ...]:
    return layout.token_ids[layout.shared.stop :]


def _common(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    """What both begin with, without the last token of the shorter."""
    length = next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)) - 1
    )
    return one[:length]
