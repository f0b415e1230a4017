"""Long chats and books with known evidence, of any length, made from short lists.

A list's relevant passage is the evidence, other passages of all lists are the filler. Both are dealt to the sessions
of a chat or to the chapters of a book; where the length asked for is reached, the filler is cut.
"""

import math
import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from random import Random
from statistics import median

from qr_integrations.errors import InputError
from qr_integrations.evaluation.chats_and_books import LARGEST_PART, Part, Written, write_book, write_chat
from qr_integrations.types import Document, JudgedList

_PASSAGES_PER_PART = 3  # of median length
_SLOTS = 365 * 14  # where a session or chapter may stand in time; a year of hours in which people chat
_SHORTEST_PIECE = 40  # characters; less of a passage is no piece of it worth having, and no sign of the same text
_SHORTFALL = 0.05  # of the length asked for, when no filler is left
Writer = Callable[[Sequence[Part], str], Written]


def estimated_tokens(text: str) -> int:
    """1.3 tokens for each word, about what large vocabularies make of English; small ones make more."""
    return math.ceil(1.3 * len(text.split()))


@dataclass(frozen=True, slots=True)
class LongContext:
    """How long a chat or a book is, and what it hides.

    The same settings with another `num_tokens` give nested inputs, so that quality differs by length only. Query and
    evidence stay, and every filler passage of the shorter one stands in the longer one. A chat's turns are those of the
    longer one, in the same order, with turns left out; one turn may be cut. A book's chapters are those of the longer
    one, but for their numbers, with chapters left out; one or two may hold other filler.

    Attributes:
        num_tokens: of all documents together. What is made is never longer, and shorter by less than two short turns,
            some 80 tokens. A prompt adds a few tokens per document.
        evidence: how many questions are joined into one query. Each has its own evidence, in a session or chapter of
            its own.
        seed: of all random choices.
        count: make so many, from the first lists; None makes one from every list. All lists give filler.
        count_tokens: the length of a text. Pass that of the model, such as
            ``lambda text: len(tokenizer.encode(text, add_special_tokens=False))``.

    Raises:
        InputError: a number below 1.
    """

    num_tokens: int
    evidence: int = 1
    seed: int = 0
    count: int | None = None
    count_tokens: Callable[[str], int] = estimated_tokens

    def __post_init__(self) -> None:
        for name, value in (("num_tokens", self.num_tokens), ("evidence", self.evidence), ("count", self.count)):
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}: pass at least 1")


def make_chats(lists: Sequence[JudgedList], settings: LongContext) -> list[JudgedList]:
    """Chats between a user and an assistant, one for each list: documents are turns, oldest first.

    A turn's text begins with time and speaker; its `body` is what was said. Sessions have up to ten turns. One turn
    of two carries a passage with its title, the other asks for it or says thanks. Relevant are the turns that carry
    the evidence: in any session, and at any place in it, with the same probability. ``metadata`` holds ``session``
    (from 1), ``speaker`` and ``time``.

    Args:
        lists: questions with passages. Of the relevant ones the best (the first of those with the highest grade) is
            the evidence. The others are left out, and so is a passage that contains a relevant one or is part of one.
        settings: how long, and what is hidden.

    Returns:
        Lists with the questions and ids of the first `lists`. With more than one piece of evidence, questions of
        other lists are added to each, and ids are joined with ``+``.

    Raises:
        InputError: no lists, or fewer than `count` or `evidence`; a list without a relevant passage; evidence longer
            than `num_tokens`; too little filler.

    Example:
        >>> from qr_integrations.bundled import read_detection_lists
        >>> from qr_integrations.evaluation.long_context import LongContext, make_chats
        >>> chat = make_chats(read_detection_lists(), LongContext(num_tokens=2000, count=1))[0]
        >>> print(chat.documents[0].text)
        2023-...
        >>> [chat.documents[place].metadata["session"] for place in chat.relevance]
        [...]
    """
    return _make(lists, settings, write_chat)


def make_books(lists: Sequence[JudgedList], settings: LongContext) -> list[JudgedList]:
    """Books, one for each list: documents are chapters of several passages, in order.

    As `make_chats`; a chapter's text is a heading, which is not part of its `body`, and passages under their titles.
    Chapters hold about as much as three passages of median length. ``metadata`` holds ``chapter``, from 1.

    Raises:
        InputError: as `make_chats`.
    """
    return _make(lists, settings, write_book)


def _make(lists: Sequence[JudgedList], settings: LongContext, write: Writer) -> list[JudgedList]:
    needed = max(settings.evidence, settings.count or 1)
    if len(lists) < needed:
        raise InputError(f"{needed} lists are needed, {len(lists)} were given: pass more lists")
    shelf = _Shelf(lists)
    return [_long(shelf, number, settings, write) for number in range(settings.count or len(lists))]


def _long(shelf: "_Shelf", number: int, settings: LongContext, write: Writer) -> JudgedList:
    """The chat or book of one list."""
    key = f"{settings.seed}-{number}"
    chosen = shelf.together(number, settings.evidence, Random(f"{key}-questions"))
    evidence, filler = [shelf.evidence[i] for i in chosen], shelf.filler(chosen)
    draw = Random(f"{key}-places")
    draw.shuffle(filler)
    parts = _dealt(evidence, filler, draw)
    questions = [shelf.lists[i].query.strip().removesuffix("?") for i in chosen]
    query = shelf.lists[number].query if len(chosen) == 1 else "? And also: ".join(questions) + "?"
    name = "+".join(shelf.lists[i].id or str(i) for i in chosen)

    def build(characters: int) -> JudgedList:
        documents, gold = write(_shortened(parts, characters), key)
        return JudgedList(query, documents, dict.fromkeys(gold, 1), id=name)

    return _longest(build, sum(len(passage.text) for passage in filler), settings)


class _Shelf:
    """All passages, and which of them answer which question."""

    def __init__(self, lists: Sequence[JudgedList]) -> None:
        self.lists = lists
        self.evidence = [_best(number, judged) for number, judged in enumerate(lists)]
        self._pool: dict[str, Document] = {}
        self._answers: dict[str, set[str]] = {}  # lists that ask the same share them
        for judged in lists:
            for place, document in enumerate(judged.documents):
                if not (plain := _plain(document.text)):
                    continue
                self._pool.setdefault(plain, document)
                if judged.relevance.get(place, 0) > 0:
                    self._answers.setdefault(_plain(judged.query), set()).add(plain)

    def together(self, number: int, evidence: int, draw: Random) -> list[int]:
        """A list and others for one query: no passage answers two of the questions."""
        others = [i for i in range(len(self.lists)) if i != number]
        draw.shuffle(others)
        chosen, answers = [number], set(self._answers_of(number))
        for other in others:
            if len(chosen) < evidence and not any(_overlap(a, b) for a in self._answers_of(other) for b in answers):
                chosen.append(other)
                answers |= self._answers_of(other)
        if len(chosen) < evidence:
            raise InputError(
                f"{self.lists[number].query!r} can be joined with {len(chosen) - 1} questions that have other "
                f"evidence, evidence={evidence} needs {evidence - 1}: pass more lists or a smaller number"
            )
        return chosen

    def filler(self, chosen: Sequence[int]) -> list[Document]:
        """The passages that answer none of the chosen questions."""
        answers = set().union(*(self._answers_of(number) for number in chosen))
        return [document for plain, document in self._pool.items() if not any(_overlap(plain, a) for a in answers)]

    def _answers_of(self, number: int) -> set[str]:
        return self._answers[_plain(self.lists[number].query)]


def _best(number: int, judged: JudgedList) -> Document:
    places = [place for place, grade in judged.relevance.items() if grade > 0 and judged.documents[place].text.strip()]
    if not places:
        raise InputError(
            f"list #{number} ({judged.query!r}) has no relevant passage: leave it out, or judge its passages"
        )
    return judged.documents[min(places, key=lambda place: (-judged.relevance[place], place))]


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def _overlap(one: str, other: str) -> bool:
    shorter, longer = sorted((one, other), key=len)
    return one == other or (len(shorter) >= _SHORTEST_PIECE and shorter in longer)


def _dealt(evidence: Sequence[Document], filler: Sequence[Document], draw: Random) -> list[Part]:
    """All passages in sessions or chapters of about the same length; the first begin with the evidence."""
    usual = float(_PASSAGES_PER_PART * median(len(passage.text) for passage in [*evidence, *filler]))
    parts = [[passage] for passage in evidence]
    number = 0
    for passage in filler:
        while number < len(parts) and _is_full(parts[number], passage, usual):
            number += 1
        if number == len(parts):
            parts.append([])
        parts[number].append(passage)
    slots = draw.sample(range(max(_SLOTS, len(parts))), len(parts))
    orders = [tuple(draw.sample(range(len(part)), len(part))) for part in parts]
    return [Part(slots[i], tuple(part), orders[i], i < len(evidence)) for i, part in enumerate(parts)]


def _is_full(part: Sequence[Document], following: Document, usual: float) -> bool:
    length = sum(len(passage.text) for passage in part)
    return len(part) == LARGEST_PART or abs(length + len(following.text) - usual) > abs(length - usual)


def _shortened(parts: Sequence[Part], characters: int) -> list[Part]:
    """All evidence, and the first `characters` of the filler in the order in which it was dealt."""
    kept = []
    for part in parts:
        passages = list(part.evidence)
        for passage in part.passages[len(passages) :]:
            if text := _head(passage.text, characters):
                passages.append(replace(passage, text=text))
            characters -= len(passage.text)
        if not passages:
            break
        kept.append(replace(part, passages=tuple(passages)))
    return kept


def _head(text: str, characters: int) -> str:
    if characters >= len(text):
        return text
    whole_words = re.sub(r"\s\S{0,30}\Z", "", text[: max(0, characters)])
    return whole_words if len(whole_words) >= _SHORTEST_PIECE else ""


def _longest(build: Callable[[int], JudgedList], available: int, settings: LongContext) -> JudgedList:
    """The longest of what `build` makes of a number of characters of filler that is not too long."""
    measure = cache(settings.count_tokens)

    def length(characters: int) -> int:
        return sum(measure(document.text) for document in build(characters).documents)

    def is_too_long(characters: int) -> bool:
        return length(characters) > settings.num_tokens

    shortest = build(0)
    if is_too_long(0):
        raise InputError(
            f"the evidence of {shortest.query!r} has {length(0):,} tokens: pass a num_tokens of at least that, "
            f"not {settings.num_tokens:,}"
        )
    upper = min(available, 4 * settings.num_tokens)
    while upper < available and not is_too_long(upper):
        upper = min(available, 2 * upper)
    characters = bisect_left(range(upper + 1), True, key=is_too_long) - 1
    if characters == available and (at_hand := length(available)) < (1 - _SHORTFALL) * settings.num_tokens:
        raise InputError(
            f"{shortest.query!r} has {at_hand:,} tokens of evidence and filler at hand, {settings.num_tokens:,} are "
            "wanted: pass more lists or a smaller num_tokens"
        )
    return build(characters)
