"""What somebody said, and which of it is wanted: the turns of a chat, in every form in which callers hold them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, time
from typing import Any

from qr_integrations.errors import InputError
from qr_integrations.types import Document, Message

_SPEAKER, _TIME = "speaker", "time"
Moment = datetime | date | str
"""A time, or a day for its first moment; as a string in ISO format."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What somebody said.

    Attributes:
        text: what was said.
        speaker: who said it, a name or a role; None if that is not known.
        time: when; None if that is not known.
        id, metadata: the caller's; they come back as given.

    Raises:
        InputError: no text; a speaker that is no line of text; metadata named ``speaker`` or ``time``.
    """

    text: str
    speaker: str | None = None
    time: datetime | None = None
    id: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not self.text.strip():
            raise InputError(f"a turn says nothing ({self.text!r}): pass what was said as a string")
        if self.speaker is not None and (not isinstance(self.speaker, str) or len(f"{self.speaker}.".splitlines()) > 1):
            raise InputError(f"{self.speaker!r} is no speaker: pass a name in one line, or None")
        if taken := {_SPEAKER, _TIME} & set(self.metadata):
            raise InputError(f"{min(taken)!r} is no name for a turn's metadata: pass {min(taken)}=, or name it else")

    @property
    def title(self) -> str | None:
        """What the model reads in front: ``"Anna, 2024-05-03 14:12"``, or what of it is known."""
        when = None if self.time is None else self.time.replace(tzinfo=None).isoformat(" ", "minutes")
        return ", ".join(part for part in (self.speaker, when) if part) or None

    def document(self) -> Document:
        """As it is ranked. Speaker and time stand in the metadata too, the time in ISO format."""
        known = {_SPEAKER: self.speaker, _TIME: None if self.time is None else self.time.isoformat()}
        said = {name: value for name, value in known.items() if value is not None}
        return Document(self.text, self.title, self.id, {**self.metadata, **said})

    @classmethod
    def of_document(cls, document: Document) -> "Turn":
        """The turn that `document` was made of."""
        rest = {name: value for name, value in document.metadata.items() if name not in (_SPEAKER, _TIME)}
        when = _perhaps(document.metadata.get(_TIME))
        return cls(document.text, document.metadata.get(_SPEAKER), when, document.id, rest)

    @classmethod
    def of(cls, given: "TurnLike") -> "Turn":
        """From a string, a `Message` (its texts, and its role for the speaker), or a mapping.

        A mapping has ``text`` or ``content`` (a string, or the parts of a chat message, of which the texts count), and
        perhaps ``speaker``, ``name`` or ``role``, ``time``, ``id`` and ``metadata``.

        Raises:
            InputError: there is no text, or a time that cannot be read.
        """
        if isinstance(given, Turn):
            return given
        if isinstance(given, Message):
            return cls(given.text, given.role)
        if not isinstance(given, Mapping):
            return cls(given)
        speaker = next((given[name] for name in ("speaker", "name", "role") if given.get(name)), None)
        when, text = given.get("time"), given.get("text", given.get("content"))
        if isinstance(text, list | tuple):
            parts = [part.get("text") if isinstance(part, Mapping) else part for part in text]
            text = "\n".join(part for part in parts if isinstance(part, str))
        return cls(text or "", speaker, _perhaps(when), given.get("id"), given.get("metadata") or {})


TurnLike = str | Turn | Message | Mapping[str, Any]


def as_moment(given: Moment) -> datetime:
    """A time.

    Raises:
        InputError: it cannot be read.
    """
    if isinstance(given, datetime):
        return given
    if isinstance(given, date):
        return datetime.combine(given, time())
    try:
        return datetime.fromisoformat(given)
    except (TypeError, ValueError) as error:
        raise InputError(f"{given!r} is no time: pass a datetime, or a string like '2024-05-03 14:12'") from error


def _perhaps(given: Moment | None) -> datetime | None:
    return None if given is None else as_moment(given)


def is_earlier(one: datetime, other: datetime) -> bool:
    """Whether `one` lies before `other`.

    Raises:
        InputError: one has a time zone, the other has none.
    """
    try:
        return one < other
    except TypeError as error:
        raise InputError(f"{one} and {other} cannot be compared: give all times a time zone, or none") from error


@dataclass(frozen=True, slots=True)
class TurnFilter:
    """Which turns are wanted.

    Attributes:
        speakers: those of one of them, capitals aside; None: of anybody.
        since, before: those of that time and later, and of earlier times. Turns without a time are not wanted then.
        where: those for which it is true.
    """

    speakers: frozenset[str] | None = None
    since: datetime | None = None
    before: datetime | None = None
    where: Callable[[Turn], bool] | None = None

    @classmethod
    def of(
        cls,
        speaker: str | Sequence[str] | None,
        since: Moment | None,
        before: Moment | None,
        where: Callable[[Turn], bool] | None,
    ) -> "TurnFilter":
        """As a caller says it.

        Raises:
            InputError: a time that cannot be read.
        """
        names = None if speaker is None else [speaker] if isinstance(speaker, str) else speaker
        speakers = None if names is None else frozenset(name.casefold() for name in names)
        return cls(speakers, _perhaps(since), _perhaps(before), where)

    def wants(self, turn: Turn) -> bool:
        """Whether it is one of them.

        Raises:
            InputError: of its time and the filter's, one has a time zone and the other has none.
        """
        if self.speakers is not None and (turn.speaker or "").casefold() not in self.speakers:
            return False
        if turn.time is None and not (self.since is None and self.before is None):
            return False
        if turn.time is not None and self.since is not None and is_earlier(turn.time, self.since):
            return False
        if turn.time is not None and self.before is not None and not is_earlier(turn.time, self.before):
            return False
        return self.where is None or self.where(turn)
