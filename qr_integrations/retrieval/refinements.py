"""What the published method does not do; each an option that is off by default.

Legend: K kept heads, T tokens, N documents.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from hashlib import sha256
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from qr_integrations.errors import InputError, ModelError
from qr_integrations.retrieval.layout import PromptLayout
from qr_integrations.retrieval.words import WORD
from qr_integrations.types import Document, Span


@dataclass(frozen=True, slots=True)
class Refinements:
    """Other ways to read and to count than the published one, which this is as it stands.

    Attributes:
        layout: ``"block"``: documents do not see each other and stand at the same positions, so that their order makes
            no difference (the attention pattern of BlockRank, arXiv 2510.05396, without its training). ``"joint"``: as
            published, each sees those before it.
        positions: with ``"block"``: ``"shared"``: all documents stand at the same positions; ``"in_line"``: one behind
            the other, their keys turned to where they stand (TurboRAG, arXiv 2410.07590), so that their order makes a
            difference again.
        orders: read the documents in so many orders and take the mean of their tokens' scores. The orders follow from
            the documents' contents: from 2 on, the order in which the caller passes them makes no difference.
        length_power: divide a document's score by its number of tokens to this power: 0 takes the sum, as published, 1
            the mean.
        rare_words: how much less the words of the query count, 0 to 1, in proportion to how many of the documents hold
            them: with 1, a word that stands in every document counts nothing (the cross-document IDF of ReAttn, arXiv
            2602.19969, as its abstract describes it).
    """

    layout: Literal["joint", "block"] = "joint"
    positions: Literal["shared", "in_line"] = "shared"
    orders: int = 1
    length_power: float = 0.0
    rare_words: float = 0.0

    def __post_init__(self) -> None:
        if self.layout not in ("joint", "block"):
            raise InputError(f"unknown layout {self.layout!r}: pass 'joint' or 'block'")
        if self.positions not in ("shared", "in_line") or (self.positions == "in_line" and self.layout == "joint"):
            raise InputError(
                f"positions={self.positions!r}: pass 'shared' or 'in_line', the latter with layout='block'"
            )
        if self.orders < 1 or (self.orders > 1 and self.layout == "block"):
            raise InputError(f"orders is {self.orders}: pass 1 or more, and 1 with layout='block', which has no order")
        if not math.isfinite(self.length_power):
            raise InputError(f"length_power is {self.length_power}: pass 0 for the sum, 1 for the mean")
        if not 0.0 <= self.rare_words <= 1.0:
            raise InputError(f"rare_words is a share, got {self.rare_words}: pass a number from 0 to 1")

    @classmethod
    def of(cls, given: "Refinements | Mapping[str, Any]") -> "Refinements":
        """From its names and values, as a configuration file holds them.

        Raises:
            InputError: a name or a value that it does not have.
        """
        if isinstance(given, Refinements):
            return given
        known = [field.name for field in fields(cls)]
        if unknown := [name for name in given if name not in known]:
            raise InputError(f"there is no refinement {unknown[0]!r}: known are {', '.join(known)}")
        return cls(**given)


PUBLISHED = Refinements()


def orders_of(documents: Sequence[Document], count: int) -> list[list[int]]:
    """`count` orders of `documents`, the same whatever order they are passed in.

    They begin at places spread over a shuffled list and run in turn forwards and backwards, so that every document
    comes early, late, and between different others.
    """
    digests = [sha256(repr((d.title, d.text)).encode("utf-8", "surrogatepass")).digest() for d in documents]
    base = sorted(range(len(documents)), key=digests.__getitem__)
    starts = [turn * len(base) // count for turn in range(count)]
    turned = [base[start:] + base[:start] for start in starts]
    return [order[::-1] if turn % 2 else order for turn, order in enumerate(turned)]


def average_orders(
    layouts: Sequence[PromptLayout], scores: Sequence[Float[Tensor, "K _"]], orders: Sequence[Sequence[int]]
) -> tuple[PromptLayout, Float[Tensor, "K T"]]:
    """One layout, and the mean score of every token of its documents.

    Documents are matched token by token from their ends: numbers in front may differ in length, and keep the score of
    the first order. The documents of the layout stand in the caller's order.
    """
    first, places = layouts[0], [{document: place for place, document in enumerate(order)} for order in orders]
    mean_KT = scores[0].clone()
    for document, place in places[0].items():
        own = first.documents[place]
        for layout, scores_KT, where in zip(layouts[1:], scores[1:], places[1:], strict=True):
            other = layout.documents[where[document]]
            same = min(len(own), len(other))
            mean_KT[:, own.stop - same : own.stop] += scores_KT[:, other.stop - same : other.stop]
            mean_KT[:, own.start : own.stop - same] += scores[0][:, own.start : own.stop - same]
        mean_KT[:, own.slice()] /= len(orders)
    by_document = [places[0][document] for document in range(len(orders[0]))]
    in_order = replace(
        first,
        documents=tuple(first.documents[place] for place in by_document),
        texts=tuple(first.texts[place] for place in by_document),
    )
    return in_order, mean_KT


def token_weights(layout: PromptLayout, query: str, refinements: Refinements) -> Float[Tensor, "T"] | None:
    """What every token of the shared part is multiplied with; None for 1.

    Raises:
        ModelError: `rare_words`, and the tokenizer cannot tell which characters a token stands for.
    """
    if not refinements.length_power and not refinements.rare_words:
        return None
    weights_T = np.ones(len(layout.shared))
    if refinements.rare_words:
        weights_T = 1.0 - refinements.rare_words * (1.0 - _rarity(layout, query))
    if refinements.length_power:
        mean = sum(map(len, layout.documents)) / len(layout.documents)
        for span in layout.documents:
            weights_T[span.slice()] *= (mean / len(span)) ** refinements.length_power
    return torch.from_numpy(weights_T).float()


def _rarity(layout: PromptLayout, query: str) -> Float[np.ndarray, "T"]:
    """1 for a token, but for a word of the query that n of N documents hold: log(N / n) / log(N)."""
    if layout.offsets is None:
        raise ModelError("this tokenizer does not tell the characters of its tokens: leave out rare_words")
    rarity_T, asked = np.ones(len(layout.shared)), {word.lower() for word in WORD.findall(query)}
    found: list[tuple[int, str, Span]] = []  # document, word, tokens
    for number, tokens in enumerate(layout.documents):
        starts, stops = layout.offsets[tokens.slice()].T
        for match in WORD.finditer(layout.text, int(starts[0]), layout.texts[number].stop):
            if (word := match.group().lower()) in asked:
                first = int(np.searchsorted(stops, match.start(), side="right"))
                last = int(np.searchsorted(starts, match.end(), side="left"))
                found.append((number, word, Span(tokens.start + first, tokens.start + max(first, last))))
    held_by = Counter(word for _, word in {(number, word) for number, word, _ in found})
    whole = math.log(max(2, len(layout.documents)))
    for _, word, tokens in found:
        rarity_T[tokens.slice()] = math.log(max(2, len(layout.documents)) / held_by[word]) / whole
    return rarity_T
