"""Generated histories of several people's talk with an assistant, and questions about who said what, and when.

What people say of themselves is dealt over a year of other talk (`long_context.make_chats`). Every question about it
has turns beside its evidence that differ from it in one respect only: what is said, who says it, or when.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from random import Random
from typing import Literal, NamedTuple

from qr_integrations.evaluation.long_context import LongContext, estimated_tokens, make_chats
from qr_integrations.types import Document, JudgedList

Kind = Literal["passage", "fact", "speaker", "time", "latest"]
KINDS: tuple[Kind, ...] = ("passage", "fact", "speaker", "time", "latest")
_START, _MINUTES = datetime(2023, 1, 1, 8), 365 * 24 * 60
_TIME = "%Y-%m-%d %H:%M"
_SPEAKERS = ("Anna", "Ben", "Carla", "David", "Emma", "Frank", "Grace", "Henry", "Julia", "Karl", "Laura", "Martin")
_OTHERS = ("Alice", "Oliver", "Sophie", "Victor", "Helen", "Simon", "Nora", "Peter", "Rose", "Thomas")


class _Topic(NamedTuple):
    """Something that can be said of a person in several ways, and the question that it answers."""

    question: str
    own: tuple[str, ...]
    others: tuple[str, ...]
    values: tuple[str, ...]


_TOPICS = (
    _Topic(
        "Which city does {name} live in?",
        ("I live in {value}, close to the station.", "My flat in {value} is small but bright."),
        ("{name} lives in {value}, close to the station.", "{name} has a small flat in {value}."),
        ("Oslo", "Lisbon", "Toronto", "Dublin", "Vienna", "Chicago", "Madrid", "Boston", "Prague", "Sydney"),
    ),
    _Topic(
        "What does {name} do for a living?",
        ("I work as a {value}, mostly in the evening.", "My job as a {value} keeps me busy."),
        ("{name} works as a {value}, mostly in the evening.", "{name} has a job as a {value}."),
        ("nurse", "baker", "lawyer", "teacher", "pilot", "farmer", "painter", "driver", "doctor", "writer"),
    ),
    _Topic(
        "What is the name of {name}'s dog?",
        ("I took {value}, my dog, to the park.", "My dog is called {value}, did I say that?"),
        ("{name} took {value}, the dog, to the park.", "{name} has a dog called {value}."),
        ("Rex", "Max", "Bella", "Lucky", "Rocky", "Daisy", "Oscar", "Toby", "Molly", "Buddy"),
    ),
    _Topic(
        "Which instrument does {name} play?",
        ("I play the {value} in a small band.", "I have practised the {value} for an hour."),
        ("{name} plays the {value} in a small band.", "{name} practises the {value} a lot."),
        ("piano", "violin", "guitar", "drums", "flute", "trumpet", "cello", "harp", "organ", "saxophone"),
    ),
    _Topic(
        "What colour is {name}'s kitchen?",
        ("I have painted my kitchen {value}.", "My kitchen is all {value}, walls and doors."),
        ("{name} has painted the kitchen {value}.", "{name} has a kitchen that is all {value}."),
        ("green", "yellow", "blue", "red", "white", "orange", "grey", "purple", "brown", "pink"),
    ),
    _Topic(
        "What is {name} allergic to?",
        ("No {value} for me please, I am allergic.", "I have an allergy: {value}."),
        ("No {value} for {name} please, who is allergic.", "{name} has an allergy: {value}."),
        ("nuts", "milk", "eggs", "fish", "wheat", "honey", "soy", "apples", "cheese", "garlic"),
    ),
    _Topic(
        "What does {name} drink in the morning?",
        ("In the morning I drink nothing but {value}.", "A cup of {value}, and my morning can begin."),
        ("In the morning {name} drinks nothing but {value}.", "{name} begins the morning with {value}."),
        ("coffee", "tea", "water", "juice", "cocoa", "lemonade", "wine", "beer", "milk", "soda"),
    ),
)
_EVENTS = (
    _Topic(
        "What did {name} have for lunch on {day}?",
        ("For lunch I had {value}.", "I had {value} for lunch and liked it."),
        (),
        ("soup", "pizza", "rice", "salad", "pasta", "fish", "eggs", "chicken", "bread", "beans"),
    ),
    _Topic(
        "Which town did {name} visit on {day}?",
        ("I am on a visit to {value} today.", "A whole day in {value}, I like visits like this."),
        (),
        ("Oxford", "Venice", "Bristol", "Geneva", "Salzburg", "Seville", "Bergen", "Verona", "Dresden", "Cork"),
    ),
    _Topic(
        "Which book did {name} finish on {day}?",
        ("I have just finished the book {value}.", "I read the last page of the book {value} just now."),
        (),
        ("Emma", "Dracula", "Ulysses", "Walden", "Hamlet", "Candide", "Persuasion", "Ivanhoe", "Macbeth", "Beowulf"),
    ),
)


@dataclass(frozen=True, slots=True)
class HistoryQuestion:
    """A question about a history.

    Attributes:
        kind: what tells the evidence from other turns. ``"passage"``: what it is about; a question of the given lists.
            ``"fact"``: what is said; the person has a name in the text. ``"speaker"``: who says it; the text says "I".
            ``"time"``: on which day. ``"latest"``: that it was said last, of three times by the same person.
        text: what is asked.
        evidence: the place of the turn that answers it.
    """

    kind: Kind
    text: str
    evidence: int


@dataclass(frozen=True, slots=True)
class History:
    """What was said, oldest first, and questions about it.

    Attributes:
        turns: what was said; ``metadata`` holds ``speaker`` and ``time`` (``"2023-05-03 14:12"``), the text does not.
        questions: of all kinds.
    """

    turns: tuple[Document, ...]
    questions: tuple[HistoryQuestion, ...]

    def judged(self, kinds: Sequence[Kind] = KINDS) -> list[JudgedList]:
        """The questions of some kinds as judged lists over the same turns."""
        return [JudgedList(q.text, self.turns, {q.evidence: 1}, id=q.kind) for q in self.questions if q.kind in kinds]


def make_histories(
    lists: Sequence[JudgedList],
    num_tokens: int,
    *,
    count: int = 10,
    seed: int = 0,
    count_tokens: Callable[[str], int] = estimated_tokens,
) -> list[History]:
    """Histories of about `num_tokens` tokens, never more, with 16 questions each.

    The same settings with another `num_tokens` ask the same questions of nested histories: a longer one has more of the
    same filler.

    Args:
        lists: at least `count`. Their passages are the filler; the relevant passage of the history's own list is the
            evidence of its first question.
        num_tokens: of all texts together, at least 1,000 or so.
        count: how many histories.
        seed: of all random choices.
        count_tokens: the length of a text.

    Raises:
        InputError: what `make_chats` raises; `num_tokens` leaves no room for filler.

    Example:
        >>> from qr_integrations.bundled import read_detection_lists
        >>> from qr_integrations.evaluation.chat_histories import make_histories
        >>> history = make_histories(read_detection_lists(), 2000, count=1)[0]
        >>> question = history.questions[0]
        >>> question.kind, history.turns[question.evidence].metadata["time"]
        ('passage', ...)
    """
    told = [_told(Random(f"{seed}-{number}-facts")) for number in range(count)]
    lengths = [sum(count_tokens(said.text) for said in some) for some in told]
    room = LongContext(
        max(1, num_tokens - max(lengths)),
        seed=seed,
        count=count,
        count_tokens=lambda text: count_tokens(text.partition(": ")[2]),  # without time and speaker
    )
    chats = make_chats(lists, room)
    return [_history(*both, f"{seed}-{number}") for number, both in enumerate(zip(told, chats, strict=True))]


class _Said(NamedTuple):
    """A turn, and what it answers; a turn without a question stands beside others."""

    speaker: str
    time: datetime
    text: str
    kind: Kind
    question: str | None = None


def _told(draw: Random) -> list[_Said]:
    """All that is said about people in a history."""
    topics, people = draw.sample(_TOPICS, len(_TOPICS)), draw.sample(_SPEAKERS, 6)
    told = _facts(topics[:3], people[0], draw)
    told += _of_speakers(topics[3:5], people[1:4], draw)
    told += _on_days(draw.choice(_EVENTS), people[4:6], draw)
    return told + _changing(topics[5:7], people[1:3], draw)


def _facts(topics: Sequence[_Topic], speaker: str, draw: Random) -> list[_Said]:
    name = draw.choice(_OTHERS)
    return [
        _Said(
            speaker,
            _moment(draw),
            draw.choice(topic.others).format(name=name, value=draw.choice(topic.values)),
            "fact",
            topic.question.format(name=name),
        )
        for topic in topics
    ]


def _of_speakers(topics: Sequence[_Topic], people: Sequence[str], draw: Random) -> list[_Said]:
    told = []
    for topic in topics:
        for name, value in zip(people, draw.sample(topic.values, len(people)), strict=True):
            text = draw.choice(topic.own).format(value=value)
            told.append(_Said(name, _moment(draw), text, "speaker", topic.question.format(name=name)))
    return told


def _on_days(topic: _Topic, people: Sequence[str], draw: Random) -> list[_Said]:
    """Three days of one person, and one of them of another."""
    times = [_START + timedelta(days=day, minutes=draw.randrange(600)) for day in draw.sample(range(365), 3)]
    who = [(people[0], time) for time in times] + [(people[1], times[0] + timedelta(minutes=7))]
    told = []
    for (name, time), value in zip(who, draw.sample(topic.values, len(who)), strict=True):
        day = draw.choice((f"{time:%Y-%m-%d}", f"{time.day} {time:%B %Y}"))
        text, question = draw.choice(topic.own).format(value=value), topic.question.format(name=name, day=day)
        told.append(_Said(name, time, text, "time", question))
    return told


def _changing(topics: Sequence[_Topic], people: Sequence[str], draw: Random) -> list[_Said]:
    """Of each person three statements; the last one holds."""
    told = []
    for topic, name in zip(topics, people, strict=True):
        times, question = sorted(_moment(draw) for _ in range(3)), topic.question.format(name=name)
        question = f"As of now, {question[0].lower()}{question[1:]}"
        for number, (time, value) in enumerate(zip(times, draw.sample(topic.values, 3), strict=True)):
            text = draw.choice(topic.own).format(value=value)
            told.append(_Said(name, time, text, "latest", question if number == 2 else None))
    return told


def _moment(draw: Random) -> datetime:
    return _START + timedelta(minutes=draw.randrange(_MINUTES))


def _history(told: Sequence[_Said], chat: JudgedList, key: str) -> History:
    """What was told, between the turns of a chat."""
    said = [*_of_chat(chat, key), *told]
    order = sorted(range(len(said)), key=lambda number: said[number].time)
    turns = [said[number] for number in order]
    documents = tuple(
        Document(turn.text, metadata={"speaker": turn.speaker, "time": f"{turn.time:{_TIME}}"}) for turn in turns
    )
    places = {number: place for place, number in enumerate(order)}
    asked = [(turn, places[number]) for number, turn in enumerate(said) if turn.question]
    return History(documents, tuple(HistoryQuestion(turn.kind, turn.question or "", place) for turn, place in asked))


def _of_chat(chat: JudgedList, key: str) -> list[_Said]:
    """The turns of a chat, whose user is another person from day to day."""
    said = []
    for place, document in enumerate(chat.documents):
        assert document.body is not None
        time, speaker = datetime.strptime(document.metadata["time"], _TIME), document.metadata["speaker"]
        if speaker == "user":
            speaker = Random(f"{key}-{time:%Y-%m-%d}").choice(_SPEAKERS)
        question = chat.query if place in chat.relevance else None
        said.append(_Said(speaker, time, document.text[document.body.slice()], "passage", question))
    return said
