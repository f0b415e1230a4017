"""What requests for rankings and their answers look like in JSON: Cohere's and Jina's, and TEI's.

From the public references: docs.cohere.com/v1/reference/rerank and /v2/reference/rerank, jina.ai/reranker, and
docs/openapi.json of huggingface/text-embeddings-inference. Fields that begin with ``qr_``, and `explain`, `max_spans`,
`instruction` and `notes`, are this package's. A field that none of them knows is ignored, as their servers do.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

_STRICT = ConfigDict(strict=True, protected_namespaces=())  # "yes" is no boolean, and "3" no number
_LARGE = 2**31 - 1
_NOT_BLANK: dict[str, Any] = {"pattern": r"[^\s\x1c-\x1f\x85]"}  # what Python calls white space
_NOT_EMPTY: dict[str, Any] = {"minItems": 1}
_OBJECT = {
    "type": "object",
    "title": "Document",
    "description": "`text` is read, or the fields that `rank_fields` names, which are then all that is needed.",
    "properties": {"text": {"type": "string"}},
    "required": ["text"],
}


def _as_int(number: Any) -> Any:
    """JSON does not tell 2.0 from 2."""
    return int(number) if isinstance(number, float) and number.is_integer() else number


Whole = Annotated[int, BeforeValidator(_as_int)]
Count = Annotated[int, Field(ge=1, le=_LARGE), BeforeValidator(_as_int)]
DocumentObject = Annotated[dict[str, Any], WithJsonSchema(_OBJECT)]


class Question(BaseModel):
    """What a request of any of the APIs may say."""

    model_config = _STRICT

    query: str = Field(description="What is asked.", json_schema_extra=_NOT_BLANK, examples=["who wrote dracula"])
    instruction: str | None = Field(default=None, description="What counts as relevant, in words.")
    explain: bool = Field(default=False, description="Tell the stretches of text that a document was ranked by.")
    max_spans: Count | None = Field(default=3, description="So many of each document; null: all.")


class RelevantSpans(BaseModel):
    """Cohere's way to ask for the stretches of text that a document was ranked by."""

    model_config = _STRICT

    mode: Literal["enabled", "disabled"]
    threshold: float | None = Field(
        default=None,
        ge=0.0,
        le=1.0,
        description="Leave out stretches that hold less of the document's score; null: 0.1, a tenth of it.",
    )
    max_spans: Count | None = Field(default=None, description="So many of each document; null: all.")


class RerankRequest(Question):
    """A request as Cohere's and Jina's clients send it."""

    model: str | None = Field(
        default=None, description="Any name will do: there is one model for rankings, and the answer tells its name."
    )
    documents: list[str | DocumentObject] = Field(
        fail_fast=True,
        description="What is ranked; equal documents stay two.",
        json_schema_extra=_NOT_EMPTY,
        examples=[["Dracula is a novel by Bram Stoker.", {"text": "Cats sleep most of the day."}]],
    )
    top_n: Count | None = Field(default=None, description="The best so many come back; null: all.")
    rank_fields: Annotated[list[str], Field(max_length=64, fail_fast=True)] | None = Field(
        default=None,
        description="Of documents that are objects, read these fields in place of `text`, one after the other, each in "
        "a line of its own. `title` is read as a title, in front of all others.",
    )
    return_documents: bool | None = Field(
        default=None, description="Send along the text that was read. Null: on /v1/rerank yes, on /v2/rerank no."
    )
    max_tokens_per_doc: Count | None = Field(
        default=None,
        description="Read so many tokens of each document. Null is the server's own limit, which need not be Cohere's "
        "of 4096.",
    )
    relevant_spans: RelevantSpans | None = Field(
        default=None, description="As `explain`, in Cohere's shape: the answer has `relevant_spans`."
    )
    max_chunks_per_doc: Whole | None = Field(
        default=None, description="Has no effect: documents are read whole, not in chunks, wherever they fit."
    )
    priority: Whole | None = Field(default=None, description="Has no effect: first come, first served.")

    @property
    def spans_wanted(self) -> RelevantSpans | None:
        """`relevant_spans`, if it asks for any."""
        return self.relevant_spans if self.relevant_spans and self.relevant_spans.mode == "enabled" else None


class TeiRequest(Question):
    """A request as TEI's clients send it."""

    texts: list[str] = Field(
        fail_fast=True,
        description="What is ranked.",
        json_schema_extra=_NOT_EMPTY,
        examples=[["Dracula is a novel by Bram Stoker.", "Cats sleep most of the day."]],
    )
    raw_scores: bool = Field(default=False, description="`score` is the attention itself, not normalized.")
    return_text: bool = Field(default=False, description="Send the texts along.")
    truncate: bool | None = Field(
        default=None,
        description="Whether texts that do not fit may be cut at their ends; false: all is read, in several pieces if "
        "need be. Null: as the server is set.",
    )
    truncation_direction: Literal["Right", "right", "Left", "left"] = Field(
        default="Right",
        description="Where texts are cut. They can be cut on the right only: with `Left` all is read, as if `truncate` "
        "were false.",
    )


class SpanShape(BaseModel):
    """A stretch of text that a document was ranked by."""

    start: int = Field(ge=0, description="First character, in the text that was read.")
    end: int = Field(ge=0, description="The one after the last.")
    text: str
    score: float = Field(description="Its part of the document's `qr_score`.")


class RelevantSpan(BaseModel):
    """A stretch of text as Cohere's clients read it."""

    start: int = Field(ge=0, description="First character, in the text that was read.")
    end: int = Field(ge=0, description="The one after the last.")
    score: float = Field(ge=0.0, le=1.0, description="Its share of the document's score.")


class OwnFields(BaseModel):
    """What this package says about a document besides. As the first base, it comes last in JSON."""

    qr_score: float = Field(description="The attention itself, whatever the scale of the other score is.")
    qr_rank: int = Field(ge=1, description="From 1.")
    qr_truncated: bool = Field(description="The document was not read in full.")
    qr_spans: list[SpanShape] | None = Field(default=None, description="Strongest first; there if asked for.")


class DocumentShape(BaseModel):
    """The document as it was read."""

    text: str


class _Result(BaseModel):
    index: int = Field(ge=0, description="Position in the request's `documents`.")
    relevance_score: float = Field(description="Higher is better; on which scale, the server's settings say.")
    document: DocumentShape | None = Field(default=None, description="There if asked for.")
    relevant_spans: list[RelevantSpan] | None = Field(
        default=None, description="Strongest first; there if asked for, and if any is strong enough."
    )


class RerankResult(OwnFields, _Result):
    """A line of the ranking."""


class ApiVersion(BaseModel):
    """Which of Cohere's APIs answers."""

    version: str


class BilledUnits(BaseModel):
    """What Cohere would bill."""

    search_units: int = Field(description="One for every hundred documents. Nothing is billed here.")


class Meta(BaseModel):
    """Where Cohere's clients look for more."""

    api_version: ApiVersion
    billed_units: BilledUnits
    warnings: list[str] | None = Field(default=None, description="The same as `notes`.")


class TokenUsage(BaseModel):
    """Where Jina's clients look for it."""

    prompt_tokens: int = Field(ge=0, description="The same as `total_tokens`: nothing is written.")
    total_tokens: int = Field(ge=0, description="Of the documents and the query.")


class RerankResponse(BaseModel):
    """An answer as Cohere's and Jina's clients read it."""

    model_config = ConfigDict(protected_namespaces=())

    id: str
    model: str = Field(description="The model that ranked.")
    object: Literal["list"] = "list"
    results: list[RerankResult] = Field(description="Best first.")
    meta: Meta
    usage: TokenUsage
    notes: list[str] | None = Field(default=None, description="What had to be done otherwise than asked, in words.")


class _Rank(BaseModel):
    index: int = Field(ge=0, description="Position in the request's `texts`.")
    score: float = Field(description="Higher is better.")
    text: str | None = Field(default=None, description="There if asked for.")


class TeiRank(OwnFields, _Rank):
    """A line of the ranking as TEI's clients read it; all are sent, best first."""


class RerankError(BaseModel):
    """An error as Cohere's clients (`message`) and Jina's (`detail`) read it."""

    id: str
    message: str = Field(description="What is wrong and what to do.")
    detail: str = Field(description="The same.")


class TeiError(BaseModel):
    """An error as TEI's clients read it."""

    error: str = Field(description="What is wrong and what to do.")
    error_type: str = Field(examples=["Validation", "Overloaded", "Unhealthy", "Backend"])
