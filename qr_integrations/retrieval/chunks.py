"""A long text in pieces that end where a reader would pause. Sizes are tokens, spans are characters of the text."""

import re

import numpy as np
import regex
from jaxtyping import Int

from qr_integrations.errors import InputError
from qr_integrations.types import Span

# Where a piece may end, best first: after an empty line, a line, a sentence (Latin, Chinese, Indic), a word.
_PAUSES = (
    re.compile(r"\n\s*\n\s*"),
    re.compile(r"\n\s*"),
    re.compile(
        r"(?<![.!?\u2026])[.!?\u2026]+[\"'\u2019\u201d)\]]*\s+|[\u3002\uff01\uff1f\u0964]+[\u300d\u300f\u201d]*\s*"
    ),
    re.compile(r"\s+"),
)
# What counts as a token where no tokenizer is at hand: a short word, six letters of a long one, a sign.
_ROUGH_TOKEN = regex.compile(
    r"\p{Ideographic}|[\p{Hiragana}\p{Katakana}\p{Thai}]|[\p{L}\p{N}\p{M}_]{1,6}|[^\s\p{L}\p{N}\p{M}_]"
)
_LEAST_FILL = 0.5  # a better pause is taken only where the piece is at least this full
_WORD_START, _SPACE = re.compile(r"(?<=\s)\S"), re.compile(r"\s+")


def chunk(text: str, token_starts: Int[np.ndarray, "token"], chunk_size: int, chunk_overlap: int = 0) -> list[Span]:
    """Cut `text` into pieces of at most `chunk_size` tokens, at the best pause that leaves a piece half full.

    Args:
        text: may be empty.
        token_starts: the character at which each token of the text starts, ascending.
        chunk_size: tokens per piece.
        chunk_overlap: a piece repeats at most this many tokens of the one before, from the start of a word.

    Returns:
        Character spans in order, without the white space at their ends; together they hold every other character.
        White space alone gives none.

    Raises:
        InputError: sizes that cannot be.
    """
    if chunk_size < 1 or not 0 <= chunk_overlap < chunk_size:
        raise InputError(
            f"chunk_size {chunk_size} with chunk_overlap {chunk_overlap} cannot be: pass chunk_size >= 1 and "
            "0 <= chunk_overlap < chunk_size"
        )
    starts = np.append(token_starts, len(text))
    spans: list[Span] = []
    position = 0  # everything before it is in a piece
    while position < len(text):
        begin = position
        if chunk_overlap and spans:
            begin = _overlapping(text, spans[-1], _earliest(starts, position, chunk_overlap), position)
        limit = _limit(starts, begin, chunk_size)
        if limit <= position:  # the repeated words alone fill the piece
            begin, limit = position, _limit(starts, position, chunk_size)
        end = limit if limit == len(text) else _pause(text, position, limit)
        piece = text[begin:end]
        if text[position:end].strip():
            spans.append(Span(begin + len(piece) - len(piece.lstrip()), begin + len(piece.rstrip())))
        position = end
    return spans


def rough_token_starts(text: str) -> Int[np.ndarray, "token"]:
    """Where tokens start, about: no model's tokenizer is asked, so that texts can be cut before one is loaded."""
    return np.array([match.start() for match in _ROUGH_TOKEN.finditer(text)], dtype=np.int64)


def _token_at(starts: Int[np.ndarray, "token"], position: int) -> int:
    """The first token of the character; a character may be in several. Before the first token, the first."""
    last = max(0, int(np.searchsorted(starts, position, side="right")) - 1)
    return int(np.searchsorted(starts, starts[last]))


def _earliest(starts: Int[np.ndarray, "token"], position: int, overlap: int) -> int:
    """The first whole character among the `overlap` tokens before `position`."""
    first = max(0, _token_at(starts, position) - overlap)
    if first and starts[first - 1] == starts[first]:  # in the middle of a character
        return int(starts[np.searchsorted(starts, starts[first], side="right")])
    return int(starts[first])


def _limit(starts: Int[np.ndarray, "token"], begin: int, chunk_size: int) -> int:
    """Where a piece from `begin` must stop: after `chunk_size` tokens, or one character if that has more."""
    limit = int(starts[min(_token_at(starts, begin) + chunk_size, len(starts) - 1)])
    return limit if limit > begin else int(starts[np.searchsorted(starts, begin, side="right")])


def _overlapping(text: str, before: Span, earliest: int, position: int) -> int:
    """The first word from `earliest` on, but within the piece before and not all of it."""
    word = _WORD_START.search(text, max(earliest, before.start + 1), position)
    return word.start() if word else position


def _pause(text: str, begin: int, limit: int) -> int:
    """The end of a piece that starts at `begin` and must stop by `limit`."""
    least = begin + int((limit - begin) * _LEAST_FILL)
    space = _SPACE.match(text, limit)  # of a sentence that ends at the limit
    for pause in _PAUSES:
        ends = [match.end() for match in pause.finditer(text, least, space.end() if space else limit)]
        if ends:
            return ends[-1]
    return limit
