"""Calibrated attention per token, with the documents read once and kept for the next query.

Legend: K kept heads, T tokens of the shared part (documents), N documents.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from jaxtyping import Float
from torch import Tensor

from qr_integrations.backend import AttentionTap, Backend, Prefix
from qr_integrations.retrieval.heads import HeadSet
from qr_integrations.retrieval.layout import PromptLayout, PromptStyle, PromptWriter, Query
from qr_integrations.retrieval.refinements import PUBLISHED, Refinements, average_orders, orders_of, token_weights
from qr_integrations.retrieval.scoring import calibrate
from qr_integrations.types import Document, Span

NULL_QUERY = "N/A"
_KEEP_LAYOUTS = 4
_KEEP_NULLS = 8  # per list of documents: one per instruction, and those per head
Contents = tuple[tuple[str | None, str], ...]


def contents(documents: Sequence[Document]) -> Contents:
    """What of a list of documents is read: two lists with the same contents share a prefix."""
    return tuple((document.title, document.text) for document in documents)


@dataclass(slots=True)
class _Known:
    """What is known about one list of documents, whatever the query."""

    documents: tuple[Document, ...]
    layout: PromptLayout  # of the null query
    prefix: Prefix | None = None
    null: dict[tuple[bool, str | None], Tensor] = field(default_factory=dict)  # per head?, instruction -> scores


class TokenScorer:
    """Scores the tokens of documents for a query: the query's attention minus the null query's.

    `null_instruction` is the share of the null query that keeps the query's instruction (the lambda of arXiv
    2609.17764): 0 leaves it out, so that what the instruction asks for counts; 1 keeps it, so that only what the
    question adds to it counts; between, two null queries are mixed.

    The keys and values of the documents, and the null query's scores, are kept for the last `keep_prefixes` lists, so
    that another query over the same documents costs its own tokens only. Safe to share between threads.
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
        self._writer = PromptWriter(backend, replace(style, blocks=refinements.layout == "block"))
        self._keep = keep_prefixes * refinements.orders
        self._known: OrderedDict[Contents, _Known] = OrderedDict()
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
        weights_T = token_weights(layout, query.text, self.refinements)
        return layout, scores_KT if weights_T is None else scores_KT * weights_T.to(scores_KT.device)

    def _score(self, query: Query, documents: Sequence[Document], per_head: bool) -> tuple[PromptLayout, Tensor]:
        """The documents read in one order."""
        known = self._recall(documents)
        layout = self._layout(known, query)
        with self._lock:  # of several threads with the same documents, one reads them
            shared = layout.token_ids[layout.shared.slice()]
            if known.prefix is None or known.prefix.token_ids != shared:
                known.prefix = self._read(shared, layout.blocks)
            nulls = [(w, self._null(known, per_head, text)) for w, text in self._null_weights(query)]
            prefix = known.prefix
            self._trim()
        scores_KT = self._attention(layout, prefix, per_head)
        for weight, null_KT in nulls:
            scores_KT = calibrate(scores_KT, null_KT, weight)
        return layout, scores_KT

    def _read(self, shared: tuple[int, ...], blocks: tuple[Span, ...]) -> Prefix:
        top_layer = self.heads.top_layer
        if blocks:
            return self.backend.prefill_blocks(shared, blocks, top_layer=top_layer)
        return self.backend.prefill(shared, top_layer=top_layer)

    def forget(self) -> None:
        """Free what is kept."""
        with self._lock:
            self._known.clear()

    def _null_weights(self, query: Query) -> list[tuple[float, str | None]]:
        """The null queries to subtract, by their instruction, and how much of each."""
        if not self.calibrated:
            return []
        kept = self.null_instruction if query.instruction else 0.0
        return [(weight, text) for weight, text in ((1.0 - kept, None), (kept, query.instruction)) if weight > 0.0]

    def _null(self, known: _Known, per_head: bool, instruction: str | None) -> Float[Tensor, "K T"]:
        """What the null query attends to, computed once per list of documents and instruction."""
        key = per_head, instruction
        if key not in known.null:
            assert known.prefix is not None
            layout = self._layout(known, Query(NULL_QUERY, instruction)) if instruction else known.layout
            known.null[key] = self._attention(layout, known.prefix, per_head)
        known.null[key] = scores_KT = known.null.pop(key)  # the latest stands last
        while len(known.null) > _KEEP_NULLS:
            del known.null[next(iter(known.null))]
        return scores_KT

    def _attention(self, layout: PromptLayout, prefix: Prefix, per_head: bool) -> Float[Tensor, "K T"]:
        tap = AttentionTap(self.heads.heads, layout.query)
        rows = self.backend.forward(layout.token_ids[len(prefix) :], tap=tap, prefix=prefix)
        scores_KT = rows[0, :, layout.shared.slice()]
        return scores_KT if per_head else scores_KT.sum(0, keepdim=True)

    def _layout(self, known: _Known, query: Query) -> PromptLayout:
        return self._writer.rewrite(known.layout, query, known.documents)

    def _recall(self, documents: Sequence[Document]) -> _Known:
        key = contents(documents)
        with self._lock:
            known = self._known.get(key)
        if known is None:
            known = _Known(tuple(documents), self._writer.write(Query(NULL_QUERY), documents))
        with self._lock:
            known = self._known.setdefault(key, known)  # another thread may have laid out the same list meanwhile
            self._known.move_to_end(key)
            self._trim()
        return known

    def _trim(self) -> None:
        """Drop the oldest lists beyond what may be kept. Lists that were only laid out, not read, count apart."""
        for is_read, limit in ((True, self._keep), (False, _KEEP_LAYOUTS)):
            keys = [key for key, known in self._known.items() if (known.prefix is not None) == is_read]
            for key in keys[: max(0, len(keys) - limit)]:
                del self._known[key]
