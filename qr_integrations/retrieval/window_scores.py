"""Token scores of several windows that can be compared. One window alone: `token_scores`.

Legend: K kept heads, T tokens of the shared part (documents).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from qr_integrations.backend import Prefix, Trunk, Wanted
from qr_integrations.retrieval.layout import PromptLayout, Query
from qr_integrations.retrieval.merging import Shares, on_one_scale
from qr_integrations.retrieval.refinements import average_orders, orders_of
from qr_integrations.retrieval.scoring import calibrate
from qr_integrations.retrieval.token_scores import NULL_QUERY, Reading, TokenScorer, tails_of
from qr_integrations.types import Document, Span

_ROOM = 2**25  # numbers


@dataclass(frozen=True, slots=True)
class Asked:
    """What a query, and the null queries that go with it, pay to one window: everything that is kept of its pass."""

    layout: PromptLayout
    shares: Shares
    nulls: tuple[Shares, ...]


class WindowScorer(TokenScorer):
    """Scores the tokens of documents that do not fit into one prompt, or of windows that are kept."""

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
            asked = zip(*(self._ask(reading, queries) for reading in readings), strict=True)
            found = [self._merged(query, of_query) for query, of_query in zip(queries, asked, strict=True)]
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
            asked += self._ask(reading, [query])
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

    def _ask(self, reading: Reading, queries: Sequence[Query]) -> list[Asked]:
        """Several queries over one window; those with the same instruction share a pass."""
        layouts = [self.prompt(reading, query) for query in queries]
        shares: dict[int, Shares] = {}
        for instruction in dict.fromkeys(query.instruction for query in queries):
            mine = [i for i, query in enumerate(queries) if query.instruction == instruction]
            shares.update(zip(mine, self._shares(reading, [layouts[i] for i in mine], instruction), strict=True))
        return [
            Asked(
                layout,
                shares[i],
                tuple(self._null_shares(reading, text) for _, text in self._null_weights(query.instruction)),
            )
            for i, (query, layout) in enumerate(zip(queries, layouts, strict=True))
        ]

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
            return self._shares(reading, [self.prompt(reading, Query(NULL_QUERY, instruction))], instruction)[0]

        shares: Shares = self._once(reading, ("null shares", True, instruction), read)
        return shares

    def _shares(self, reading: Reading, layouts: Sequence[PromptLayout], instruction: str | None) -> list[Shares]:
        """The attention of the rows of some queries, which go through the model together."""
        assert reading.prefix is not None
        found: list[Shares] = []
        for some in _few(layouts, len(self.heads)):
            if any(layout.token_ids[layout.shared.slice()] != reading.prefix.token_ids for layout in some):
                for layout in some:  # a query whose first token changes those before it
                    found += self._read_shares(self._placed(self.prefill(layout, reading.prefix)), [layout], None)
            else:
                trunk = self._trunk(reading, True, instruction, _spans(some[0], reading.prefix))
                found += self._read_shares(reading.prefix, some, trunk)
        return found

    def _read_shares(self, prefix: Prefix, layouts: Sequence[PromptLayout], trunk: Trunk | None) -> list[Shares]:
        tails, trunk = tails_of(layouts, trunk)
        wanted = Wanted(self.heads.heads, spans=_spans(layouts[0], prefix))
        rows = self.backend.forward_branch_rows(tails, wanted, prefix=prefix, trunk=trunk)
        return [Shares(means_KT, by_span[..., :-1], 1.0 - by_span[..., -1]) for means_KT, by_span in rows]


def _spans(layout: PromptLayout, prefix: Prefix) -> tuple[Span, ...]:
    """The documents, and all from the first one on: what is left beside that is common to all windows."""
    return (*layout.documents, Span(layout.documents[0].start, len(prefix)))


def _few(layouts: Sequence[PromptLayout], num_heads: int) -> Iterator[Sequence[PromptLayout]]:
    """As many prompts as there is room for, when all heads are kept apart and every row by document."""
    rows = max(len(layout.query) for layout in layouts)
    size = num_heads * (len(layouts[0].documents) * rows + len(layouts[0].shared))
    count = max(1, _ROOM // size)
    for start in range(0, len(layouts), count):
        yield layouts[start : start + count]
