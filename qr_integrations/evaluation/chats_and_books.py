"""How passages become the turns of a chat or the chapters of a book. What is written of a passage does not depend on
which others are there, but for the numbers of sessions and chapters."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from random import Random
from typing import NamedTuple

from qr_integrations.types import Document, Span

LARGEST_PART = 5  # passages; their ten turns take up to an hour
_START, _HOURS_A_DAY = datetime(2023, 1, 1, 8), 14
_MINUTES_A_TURN = 6

_REQUESTS = (
    "Tell me about {title}.",
    "What did we say about {title}?",
    "I was thinking about {title} today. Can you remind me of what you know?",
    "Hi again! Could you look up {title} for me?",
)
_ANSWERS = ("{title}: {text}", "Here is what I found about {title}: {text}", "Sure. {title}, in short: {text}")
_STORIES = ("I read this about {title} today: {text}", "For later, my notes on {title}: {text}")
_THANKS = (
    "Thank you, I will keep that in mind.",
    "Interesting! I have made a note of it.",
    "Good to know. Shall we come back to it another day?",
)
_ASKED = 0.7  # the share of passages that the user asks for; the others the user tells


class Written(NamedTuple):
    """Documents in the order of time, and which of them carry evidence."""

    documents: tuple[Document, ...]
    gold: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """A session or a chapter.

    Attributes:
        slot: where it stands in time; no two have the same.
        passages: what it holds; the evidence first, if it has any.
        order: the order in which they are read, as places in `passages`; places beyond its end are skipped.
        has_evidence: whether the first passage is evidence.
    """

    slot: int
    passages: tuple[Document, ...]
    order: tuple[int, ...]
    has_evidence: bool

    @property
    def evidence(self) -> tuple[Document, ...]:
        """The passages that are evidence: one or none."""
        return self.passages[: int(self.has_evidence)]

    @property
    def characters(self) -> int:
        """The length of its passages."""
        return sum(len(passage.text) for passage in self.passages)


def write_chat(parts: Sequence[Part], key: str) -> Written:
    """Two turns for each passage; `key` chooses the words."""
    documents: list[Document] = []
    gold = []
    for session, part in enumerate(sorted(parts, key=lambda part: part.slot), start=1):
        day, hour = divmod(part.slot, _HOURS_A_DAY)
        for position, number in enumerate(part.order):
            if number >= len(part.passages):
                continue
            draw = Random(f"{key}-{part.slot}-{number}")
            turns, carrier = _exchange(part.passages[number], draw)
            for turn, (speaker, said) in enumerate(turns, start=2 * position):
                minutes = _MINUTES_A_TURN * turn + draw.randrange(_MINUTES_A_TURN)
                time = f"{_START + timedelta(days=day, hours=hour, minutes=minutes):%Y-%m-%d %H:%M}"
                documents.append(_turn(time, speaker, said, session))
            if part.has_evidence and number == 0:
                gold.append(len(documents) - len(turns) + carrier)
    return Written(tuple(documents), tuple(gold))


def _exchange(passage: Document, draw: Random) -> tuple[list[tuple[str, str]], int]:
    """Who says what, and which of the turns carries the passage."""
    is_asked = draw.random() < _ASKED
    request, answer = draw.choice(_REQUESTS), draw.choice(_ANSWERS if is_asked else _STORIES)
    if not passage.title:
        request, answer = "Tell me something else.", "{text}"
    carried = answer.format(title=passage.title, text=passage.text)
    if is_asked:
        return [("User", request.format(title=passage.title)), ("Assistant", carried)], 1
    return [("User", carried), ("Assistant", draw.choice(_THANKS))], 0


def _turn(time: str, speaker: str, said: str, session: int) -> Document:
    head = f"{time} {speaker}: "
    metadata = {"session": session, "speaker": speaker.lower(), "time": time}
    return Document(head + said, metadata=metadata, body=Span(len(head), len(head) + len(said)))


def write_book(parts: Sequence[Part], key: str) -> Written:
    """A chapter for each part, but for a last one of less than half the length, which joins the one before it."""
    parts = list(parts)
    if len(parts) > 1 and not parts[-1].has_evidence and parts[-1].characters < parts[-2].characters / 2:
        last, before = parts.pop(), parts.pop()
        moved = tuple(len(before.passages) + number for number in last.order)
        parts.append(replace(before, passages=before.passages + last.passages, order=before.order + moved))
    parts.sort(key=lambda part: part.slot)
    chapters = tuple(_chapter(number, part) for number, part in enumerate(parts, start=1))
    return Written(chapters, tuple(place for place, part in enumerate(parts) if part.has_evidence))


def _chapter(number: int, part: Part) -> Document:
    head = f"Chapter {number}\n\n"
    present = [part.passages[place] for place in part.order if place < len(part.passages)]
    body = "\n\n".join(f"{passage.title}\n{passage.text}" if passage.title else passage.text for passage in present)
    return Document(head + body, metadata={"chapter": number}, body=Span(len(head), len(head) + len(body)))
