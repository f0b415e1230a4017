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
    Backend,
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
from qr_integrations.retrieval.refinements import PUBLISHED, Refinements, average_orders, orders_of, token_weights
from qr_integrations.retrieval.scoring import calibrate
from qr_integrations.retrieval.store import DocumentCache
from qr_integrations.types import Document, Span

NULL_QUERY = "N/A"
_OTHER_QUERY = "who?"  # shares nothing with the null query
_KEEP_LAYOUTS = 4
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
        cache: DocumentCache | None = None,
    ) -> None:
        self.backend, self.heads, self.calibrated = backend, heads, calibrated
        self.null_instruction, self.refinements, self.cache = null_instruction, refinements, cache
        self.style = replace(style, blocks=refinements.layout == "block")
        self._writer = PromptWriter(backend, self.style)
        self._keep = keep_prefixes * refinements.orders
        self._known: OrderedDict[Contents, Reading] = OrderedDict()
        self._lock = threading.Lock()

    def layout(self, query: Query, documents: Sequence[Document]) -> PromptLayout:
        """The prompt, without running the model."""
        return self.prompt(self._recall(documents), query)

    def score(
        self, query: Query, documents: Sequence[Document], *, per_head: bool = False
    ) -> tuple[PromptLayout, Float[Tensor, "K T"]]:
        """The prompt's layout, and the calibrated score of every token before the query.

        `per_head=False` sums over the heads, K is 1.
        """
        return self.score_batch([query], documents, per_head=per_head)[0]

    def score_batch(
        self, queries: Sequence[Query], documents: Sequence[Document], *, per_head: bool = False
    ) -> list[tuple[PromptLayout, Float[Tensor, "K _"]]]:
        """As `score`, for several queries, which go through the model together."""
        if self.refinements.orders == 1:
            found = self._score(queries, documents, per_head)
        else:
            orders = orders_of(documents, self.refinements.orders)
            by_order = [self._score(queries, [documents[i] for i in order], per_head) for order in orders]
            found = [
                average_orders([one for one, _ in read], [scores for _, scores in read], orders)
                for read in zip(*by_order, strict=True)
            ]
        return [
            (layout, self._weighted(layout, query, scores_KT))
            for query, (layout, scores_KT) in zip(queries, found, strict=True)
        ]

    def _score(
        self, queries: Sequence[Query], documents: Sequence[Document], per_head: bool
    ) -> list[tuple[PromptLayout, Tensor]]:
        """The documents read in one order."""
        reading = self._recall(documents)
        self.read(reading)
        with self._lock:
            self._trim()
        return self._of_reading(reading, queries, per_head)

    def lay_out(self, documents: Sequence[Document], known: Reading | None = None) -> Reading:
        """A prompt over documents, not yet read; the caller keeps it. `known` is one over the first of them."""
        given, null = tuple(documents), Query(NULL_QUERY)
        if known is None or known.documents != given[: len(known.documents)]:
            return Reading(given, self._writer.write(null, given))
        return Reading(given, self._writer.extend(known.layout, null, given))

    def prompt(self, reading: Reading, query: Query) -> PromptLayout:
        """The prompt of a query over documents that are laid out."""
        return self._writer.rewrite(reading.layout, query, reading.documents)

    def read(self, reading: Reading) -> None:
        """Compute its prefix, unless it is there: of several threads with the same documents, one reads them."""
        with self.backend.locked(), reading.lock:  # in this order: whoever holds the model may read, too
            if reading.prefix is None:
                reading.prefix = self._placed(self._looked_up(reading.layout))

    def _looked_up(self, layout: PromptLayout) -> Prefix:
        """What stands before the query; what the cache holds of it is not read."""
        if self.cache is None:
            return self.prefill(layout)
        return self.cache.read(self.backend, layout, top_layer=self.heads.top_layer)

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

    def _placed(self, prefix: Prefix) -> Prefix:
        """Blocks one behind the other, if they are to stand so."""
        if self.refinements.positions == "shared" or not prefix.blocks:
            return prefix
        pieces = cut(prefix, [Span(0, prefix.blocks[0].start), *prefix.blocks])
        return join(in_line(pieces, key_rotation(self.backend).moved), dtype=self.backend.model.dtype)

    def _of_reading(
        self, reading: Reading, queries: Sequence[Query], per_head: bool
    ) -> list[tuple[PromptLayout, Float[Tensor, "K _"]]]:
        """Calibrated scores of several queries over one window."""
        layouts = [self.prompt(reading, query) for query in queries]
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

    def _trunk(
        self, reading: Reading, per_head: bool, instruction: str | None, spans: tuple[Span, ...] = ()
    ) -> Trunk | None:
        """The words that all queries with this instruction begin with, read once; `spans` as in `Wanted`."""

        def read() -> Trunk | None:
            one, other = (_tail(self.prompt(reading, Query(q, instruction))) for q in (NULL_QUERY, _OTHER_QUERY))
            assert reading.prefix is not None
            wanted = Wanted(self.heads.heads, per_head, spans)
            return self.backend.read_trunk(_common(one, other), wanted, reading.prefix)

        kind = "trunk by document" if spans else "trunk"
        found: Trunk | None = self._once(reading, (kind, per_head, instruction), read)
        return found

    def _null(self, reading: Reading, per_head: bool, instruction: str | None) -> Float[Tensor, "K T"]:
        """What the null query attends to."""

        def read() -> Tensor:
            layout = self.prompt(reading, Query(NULL_QUERY, instruction))
            return self._attention(reading, [layout], instruction, per_head)[0]

        null_KT: Tensor = self._once(reading, ("null", per_head, instruction), read)
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
            next(found) if is_alike else self._alone(layout, reading.prefix, per_head)
            for layout, is_alike in zip(layouts, alike, strict=True)
        ]

    def _alone(self, layout: PromptLayout, known: Prefix, per_head: bool) -> Float[Tensor, "K _"]:
        return self._branches(self._placed(self.prefill(layout, known)), [layout], None, per_head)[0]

    def _branches(
        self, prefix: Prefix, layouts: Sequence[PromptLayout], trunk: Trunk | None, per_head: bool
    ) -> Float[Tensor, "B K T"]:
        tails, trunk = tails_of(layouts, trunk)
        return self.backend.forward_branches(tails, Wanted(self.heads.heads, per_head), prefix=prefix, trunk=trunk)

    def _once(self, reading: Reading, key: tuple[str, bool, str | None], make: Callable[[], Any]) -> Any:
        """What is made once per list of documents; the latest stand last."""
        with self.backend.locked(), reading.lock:
            if key not in reading.asked:
                made = make()
                while len(reading.asked) >= _KEEP_ASKED:
                    reading.asked.popitem(last=False)
                reading.asked[key] = made
            reading.asked.move_to_end(key)
            return reading.asked[key]

    def _weighted(self, layout: PromptLayout, query: Query, scores_KT: Float[Tensor, "K T"]) -> Float[Tensor, "K T"]:
        weights_T = token_weights(layout, query.text, self.refinements)
        return scores_KT if weights_T is None else scores_KT * weights_T.to(scores_KT.device)

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


def tails_of(layouts: Sequence[PromptLayout], trunk: Trunk | None) -> tuple[list[tuple[int, ...]], Trunk | None]:
    """What follows the documents; without the trunk if a query melts into one token with the words before it."""
    tails = [_tail(layout) for layout in layouts]
    shared = trunk.token_ids if trunk else ()
    fits = all(tail[: len(shared)] == shared and len(tail) > len(shared) for tail in tails)
    return tails, trunk if fits else None


def _tail(layout: PromptLayout) -> tuple[int, ...]:
    return layout.token_ids[layout.shared.stop :]


def _common(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    """What both begin with, without the last token of the shorter."""
    length = next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)) - 1
    )
    return one[:length]
