"""BM25, the words that query and text share, weighed: what retrieves first, and what to compare with."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from qr_integrations.errors import InputError, MissingExtra
from qr_integrations.types import Document

_K1, _B = 1.5, 0.75


class Bm25:
    """BM25 of texts, as Lucene counts it, with the library bm25s; k1 is 1.5 and b is 0.75.

    A word is a run of two or more letters, digits or underscores, in lower case; English stop words do not count, and
    nothing is stemmed. Where a script puts no spaces between words (Chinese, Japanese, Thai), all that stands between
    two punctuation marks is one word and hardly ever met again: put spaces between the words of texts and queries, or
    retrieve with something else.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        """Args:
        texts: what to search; see `document_text`.

        Raises:
            MissingExtra: bm25s is not installed.
        """
        try:
            import bm25s
        except ImportError as error:
            raise MissingExtra("BM25", "eval") from error
        self._num_texts, self._tokenize = len(texts), bm25s.tokenize
        tokens = bm25s.tokenize(list(texts), stopwords="en", show_progress=False)
        self._words = frozenset(tokens.vocab)
        self._index = bm25s.BM25(k1=_K1, b=_B, method="lucene")
        if self._words:  # bm25s cannot count nothing
            self._index.index(tokens, show_progress=False)

    def scores(self, query: str) -> Float[np.ndarray, "N"]:
        """The score of every text, 0 where it shares no word with the query."""
        words = self._tokenize([query], stopwords="en", return_ids=False, show_progress=False)[0]
        known = [word for word in words if word in self._words]
        return self._index.get_scores(known) if known else np.zeros(self._num_texts, dtype=np.float32)

    def top(self, query: str, k: int) -> list[int]:
        """The places of the `k` best texts, best first, the earlier first where scores are equal.

        All `k` of them, even where fewer share a word with the query; fewer only where there are fewer texts.

        Raises:
            InputError: `k` below 1.
        """
        return best_places(self.scores(query), k)


def best_places(scores: Float[np.ndarray, "N"], k: int) -> list[int]:
    """The places of the `k` highest scores, highest first, the earlier first where scores are equal.

    Raises:
        InputError: `k` below 1.
    """
    if k < 1:
        raise InputError(f"k is {k}: pass at least 1")
    if k < len(scores):
        lowest = np.partition(scores, len(scores) - k)[len(scores) - k]
        places = np.flatnonzero(scores >= lowest)
    else:
        places = np.arange(len(scores))
    return places[np.argsort(-scores[places], kind="stable")][:k].tolist()


def document_text(document: Document) -> str:
    """Title and text, with a space between, as BM25 usually reads them."""
    return document.text if document.title is None else f"{document.title} {document.text}"
