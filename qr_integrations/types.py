"""The nouns that cross the rooms: frozen, small, without torch.

Spans are half-open. Ranks and indices are zero-based.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from PIL import Image


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """A half-open range ``[start, stop)`` of tokens or characters; the user of the span says which."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise ValueError(f"a span needs 0 <= start <= stop, got [{self.start}, {self.stop})")

    def __len__(self) -> int:
        return self.stop - self.start

    def slice(self) -> slice:
        """For indexing: ``tensor[..., span.slice()]``."""
        return slice(self.start, self.stop)


@dataclass(frozen=True, slots=True)
class Document:
    """A text to rank.

    Attributes:
        text: what is read.
        title: stands in a line of its own in front; None leaves that line out.
        id, metadata: the caller's; they come back as given.
        body: the characters of `text` that explanations are about; None is all of it.
    """

    text: str
    title: str | None = None
    id: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    body: Span | None = None


@dataclass(frozen=True, slots=True)
class JudgedList:
    """A question, documents, and which of them answer it.

    Attributes:
        query: the question.
        documents: in the order in which they were retrieved.
        relevance: position in `documents` -> grade; above 0 is relevant, what is left out counts 0.
        id: of the question.
        missed: grades of relevant documents that were not retrieved; they count in what could have been reached.
    """

    query: str
    documents: tuple[Document, ...]
    relevance: Mapping[int, int]
    id: str = ""
    missed: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if bad := [place for place in self.relevance if not 0 <= place < len(self.documents)]:
            raise ValueError(f"there is no document #{bad[0]} among {len(self.documents)}: judge the documents given")


@dataclass(frozen=True, slots=True)
class ScoredSpan:
    """A piece of a document's text, by its characters, and its part of the document's score."""

    span: Span
    text: str
    score: float

    def moved(self, by: int) -> "ScoredSpan":
        """The same piece, counted from a character `by` further to the left."""
        return ScoredSpan(Span(self.span.start + by, self.span.stop + by), self.text, self.score)

    def as_dict(self) -> dict[str, Any]:
        """``{"start", "end", "text", "score"}``, as it stands in JSON and in the adapters' metadata."""
        return {"start": self.span.start, "end": self.span.stop, "text": self.text, "score": self.score}


@dataclass(frozen=True, slots=True)
class ScoredDocument:
    """One line of a `Ranking`.

    Attributes:
        index: position in the list the caller passed; two equal documents stay two.
        score: calibrated attention mass, a share of one query row's attention, no unit. May be negative: the query
            looked less at this document than the null query did. Comparable within one ranking only. Of several prompts
            it is, unless told otherwise, the share that the document would have among 16 average others.
        document: what the caller passed, as a `Document`.
        num_tokens: tokens of the document in the prompt.
        num_tokens_cut: tokens left out to fit the window; 0 when the document was read whole.
        window: which prompt the score comes from, 0 when all documents fitted into one.
        spans: where in the document's text the score fell, strongest first; empty unless asked for.
    """

    index: int
    score: float
    document: Document
    num_tokens: int
    num_tokens_cut: int = 0
    window: int = 0
    spans: tuple[ScoredSpan, ...] = ()


@dataclass(frozen=True, slots=True)
class Ranking(Sequence[ScoredDocument]):
    """A sequence of `ScoredDocument`, most relevant first; ties keep the caller's order.

    Attributes:
        query: what was asked.
        items: the documents.
        notes: what had to be done otherwise than asked, in words; empty if nothing had.
    """

    query: str
    items: tuple[ScoredDocument, ...]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: Any) -> Any:
        return self.items[key]

    def __iter__(self) -> Iterator[ScoredDocument]:
        return iter(self.items)

    def _repr_html_(self) -> str:
        from qr_integrations.highlighting import ranking_html

        return ranking_html(self.query, self.items)

    @property
    def order(self) -> list[int]:
        """Indices into the caller's list, best first."""
        return [item.index for item in self.items]

    def top(self, k: int | None) -> "Ranking":
        """The first `k` documents; None keeps all."""
        return self if k is None else Ranking(self.query, self.items[:k], self.notes)


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle of a picture in whole pixels, half-open like Pillow's: right and bottom lie just outside."""

    left: int
    top: int
    right: int
    bottom: int

    def __post_init__(self) -> None:
        if not (self.left < self.right and self.top < self.bottom):
            raise ValueError(f"a box needs left < right and top < bottom, got {self.as_tuple()}")

    @property
    def width(self) -> int:
        """In pixels."""
        return self.right - self.left

    @property
    def height(self) -> int:
        """In pixels."""
        return self.bottom - self.top

    def as_tuple(self) -> tuple[int, int, int, int]:
        """``(left, top, right, bottom)``, as Pillow's ``crop`` takes it."""
        return self.left, self.top, self.right, self.bottom


@dataclass(frozen=True, slots=True)
class Grid:
    """How many rows and columns of cells a picture is told in."""

    rows: int
    columns: int


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: ``"system"``, ``"user"`` or ``"assistant"``.
        content: texts and pictures in the order in which the model reads them.
    """

    role: str
    content: tuple[str | Image.Image, ...]

    def __post_init__(self) -> None:
        if isinstance(self.content, str | Image.Image):  # one part, not letters
            object.__setattr__(self, "content", (self.content,))

    @classmethod
    def user(cls, *content: str | Image.Image) -> "Message":
        """What the user says and shows."""
        return cls("user", content)

    @classmethod
    def assistant(cls, text: str) -> "Message":
        """What the model said."""
        return cls("assistant", (text,))

    @classmethod
    def system(cls, text: str) -> "Message":
        """What the model is told first."""
        return cls("system", (text,))

    @property
    def text(self) -> str:
        """The texts, a line each."""
        return "\n".join(part for part in self.content if isinstance(part, str))

    @property
    def pictures(self) -> tuple[Image.Image, ...]:
        """The pictures, in order."""
        return tuple(part for part in self.content if not isinstance(part, str))


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens read and tokens written; a picture counts as many tokens as the model reads of it."""

    prompt_tokens: int
    completion_tokens: int

    @property
    def total_tokens(self) -> int:
        """Both."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model answered, and how.

    Attributes:
        text: the answer, without what the tokenizer adds and without the stop sequence that ended it.
        finish_reason: ``"stop"``: the model or a stop sequence ended it; ``"length"``: it was cut.
        usage: tokens of the prompt that was answered, crops included, and of the answer.
        steps: what each step did, by its argument in `Backend.answer`.
        seconds: what took how long: ``"crop"``, ``"generate"``, and of that ``"first_token"``.
    """

    text: str
    finish_reason: Literal["stop", "length"]
    usage: Usage
    steps: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AnswerPiece:
    """A piece of a streamed answer: its new text, and at the end the whole."""

    delta: str
    answer: Answer | None = None


@dataclass(frozen=True, slots=True)
class GroundedAnswer:
    """An answer from documents that were ranked for its question.

    Attributes:
        answer: what the model said, and how.
        ranking: of all documents.
        used: which of them the model answered from, as `ScoredDocument.index` counts them.
    """

    answer: Answer
    ranking: Ranking
    used: tuple[int, ...]

    @property
    def text(self) -> str:
        """The answer's text."""
        return self.answer.text

    @property
    def sources(self) -> tuple[ScoredDocument, ...]:
        """The documents that the model answered from, best first."""
        return tuple(item for item in self.ranking if item.index in self.used)
