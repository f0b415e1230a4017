"""Rankings over HTTP, so that clients of Cohere, Jina and TEI work unchanged, given this server's address.

What each takes and answers is told in `rerank_shapes`. Errors have each API's own statuses and shapes, see
`http_errors`. Where this server differs from theirs:

- `relevance_score` and TEI's `score` are on the server's scale, by default a share of the list: they compare documents
  of one answer, not answers. `qr_score`, the attention itself, stands beside them.
- Any name of a model is taken.
- Cohere: of a document that is an object, the text that was read comes back, not its other fields; `index` finds them.
  On /v1/rerank documents come back unless told otherwise, which is Jina's default. No limit of 4096 tokens per document
  applies where none is asked for. The scores of `relevant_spans` are shares of the document's own score.
  `max_chunks_per_doc` and `priority` have no effect.
- TEI: texts that are not to be cut, or on the left, are read in pieces if they do not fit, and not refused or cut. What
  cannot be used is answered with status 422 in any case, an empty list too (there 400), and a failing model with 500
  or 503 (there 424). Notes have no place in the answer.
"""

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel

from qr_integrations.errors import InputError
from qr_integrations.reranking import Relevance
from qr_integrations.serving.connection import while_connected
from qr_integrations.serving.http_errors import UNKNOWN_KEY
from qr_integrations.serving.refusals import TooLarge
from qr_integrations.serving.rerank_shapes import (
    ApiVersion,
    BilledUnits,
    DocumentShape,
    Meta,
    Question,
    RelevantSpan,
    RelevantSpans,
    RerankError,
    RerankRequest,
    RerankResponse,
    RerankResult,
    SpanShape,
    TeiError,
    TeiRank,
    TeiRequest,
    TokenUsage,
)
from qr_integrations.serving.settings import ServerSettings
from qr_integrations.serving.work import Engine, RankWork
from qr_integrations.types import Document

_TITLE = "title"
_DOCUMENTS_PER_UNIT = 100  # of Cohere's search units
_THRESHOLD = 0.1  # of Cohere's relevant spans, where a request names none
_FIELDS_TOLD, _LONGEST_TOLD = 5, 60  # of rank_fields, in notes and errors; characters of each
_UNUSABLE = "Something in the request cannot be used."
_STATUSES: dict[int | str, str] = {
    401: UNKNOWN_KEY,
    413: "More than the server takes: bytes, documents or tokens.",
    429: "The queue is full.",
    500: "Something went wrong here.",
    503: "The models are being loaded, or the server is shutting down.",
    504: "It took longer than the server allows.",
}
_RETRY = {"Retry-After": {"description": "Seconds after which to ask again.", "schema": {"type": "integer"}}}


def rerank_routes(engine: Engine, settings: ServerSettings) -> APIRouter:
    """The routes ``/v1/rerank`` (Cohere, Jina), ``/v2/rerank`` (Cohere) and ``/rerank`` (TEI).

    Args:
        engine: ranks.
        settings: what is let in.
    """
    routes = APIRouter(tags=["rerank"])
    told: dict[str, Any] = {"response_model_exclude_none": True}

    @routes.post("/v1/rerank", responses=_errors(RerankError, 400), summary="Rank documents (Cohere v1, Jina)", **told)
    async def rerank_v1(body: RerankRequest, request: Request) -> RerankResponse:
        """Documents in the order of their relevance to a query."""
        return await _reranked(engine, settings, body, request, "1")

    @routes.post("/v2/rerank", responses=_errors(RerankError, 400), summary="Rank documents (Cohere v2)", **told)
    async def rerank_v2(body: RerankRequest, request: Request) -> RerankResponse:
        """As `/v1/rerank`; the documents come back if asked for only."""
        return await _reranked(engine, settings, body, request, "2")

    @routes.post("/rerank", responses=_errors(TeiError, 422), summary="Rank texts (TEI)", **told)
    async def rerank_tei(body: TeiRequest, request: Request) -> list[TeiRank]:
        """Texts in the order of their relevance to a query."""
        ranked = await while_connected(request, engine.rank(_tei_work(body, settings)))
        return [_tei_rank(relevance, body) for relevance in ranked.relevances]

    return routes


async def _reranked(
    engine: Engine, settings: ServerSettings, body: RerankRequest, request: Request, version: str
) -> RerankResponse:
    work, notes = _rerank_work(body, settings)
    ranked = await while_connected(request, engine.rank(work))
    wanted = version == "1" if body.return_documents is None else body.return_documents
    documents = work.documents if wanted else None
    said = [*notes, *ranked.notes] or None
    units = -(-len(work.documents) // _DOCUMENTS_PER_UNIT)
    return RerankResponse(
        id=str(uuid.uuid4()),
        model=settings.name,
        results=[_result(relevance, body, documents) for relevance in ranked.relevances],
        meta=Meta(api_version=ApiVersion(version=version), billed_units=BilledUnits(search_units=units), warnings=said),
        usage=TokenUsage(prompt_tokens=ranked.num_tokens, total_tokens=ranked.num_tokens),
        notes=said,
    )


def _rerank_work(body: RerankRequest, settings: ServerSettings) -> tuple[RankWork, list[str]]:
    """What is to be done, and what will be done otherwise than asked."""
    _check(body.query, body.instruction, "documents", len(body.documents), settings)
    fields = list(dict.fromkeys(body.rank_fields or ["text"]))
    documents = tuple(_document(place, given, fields) for place, given in enumerate(body.documents))
    work = RankWork(
        body.query,
        documents,
        top_n=None if body.top_n is None else min(body.top_n, len(documents)),
        instruction=body.instruction,
        explain=body.explain or body.spans_wanted is not None,
        max_spans=_most(body),
        max_doc_tokens=body.max_tokens_per_doc,
    )
    lacking = sum(isinstance(given, dict) and not _present(given, fields) for given in body.documents)
    note = f"none of the fields {_some(fields)} in {lacking} of the documents: their text was read"
    return work, [note] if lacking else []


def _some(fields: Sequence[str]) -> str:
    others = len(fields) - _FIELDS_TOLD
    named = [field[:_LONGEST_TOLD] for field in fields[:_FIELDS_TOLD]]
    return f"{named}" + (f" and {others} others" if others > 0 else "")


def _most(body: RerankRequest) -> int | None:
    """So many spans serve both who asks by `explain` and who asks by `relevant_spans`; None: all."""
    asked = [body.max_spans] if body.explain else []
    asked += [body.spans_wanted.max_spans] if body.spans_wanted is not None else []
    numbers = [number for number in asked if number is not None]
    return max(numbers, default=None) if len(numbers) == len(asked) else None


def _tei_work(body: TeiRequest, settings: ServerSettings) -> RankWork:
    _check(body.query, body.instruction, "texts", len(body.texts), settings)
    return RankWork(
        body.query,
        tuple(Document(_whole(f"text #{place}", text)) for place, text in enumerate(body.texts)),
        instruction=body.instruction,
        explain=body.explain,
        max_spans=body.max_spans,
        truncate=False if body.truncation_direction in ("Left", "left") else body.truncate,
        raw_scores=body.raw_scores,
    )


def _check(query: str, instruction: str | None, what: str, number: int, settings: ServerSettings) -> None:
    if not _whole("the query", query).strip():
        raise InputError("the query is empty: pass what is asked")
    _whole("the instruction", instruction or "")
    if number == 0:
        raise InputError(f"`{what}` is empty: pass at least one")
    if number > settings.max_documents:
        raise TooLarge(
            f"{number} {what} are more than the {settings.max_documents} that this server takes: send them in several "
            "requests, or start the server with a larger max_documents"
        )


def _document(place: int, given: str | dict[str, Any], fields: Sequence[str]) -> Document:
    if isinstance(given, str):
        return Document(_whole(f"document #{place}", given))
    named = _present(given, fields) or _present(given, ["text"])
    if not named:
        raise InputError(
            f"document #{place} has no text: pass a string, an object with `text`, or name its rank_fields"
        )
    for field in named:
        if not isinstance(given[field], str):
            raise InputError(f"document #{place}: {field[:_LONGEST_TOLD]!r} is no string: pass one")
        _whole(f"{field[:_LONGEST_TOLD]!r} of document #{place}", given[field])
    lines = [given[field] for field in named if field != _TITLE]
    return Document("\n".join(lines), given[_TITLE] if _TITLE in named else None) if lines else Document(given[_TITLE])


def _present(given: Mapping[str, Any], fields: Sequence[str]) -> list[str]:
    return [field for field in fields if given.get(field) is not None]


def _whole(what: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{what} holds half a character ({text[error.start]!r} at {error.start}): send both halves, or none"
        ) from error
    return text


def _result(relevance: Relevance, body: RerankRequest, documents: Sequence[Document] | None) -> RerankResult:
    return RerankResult(
        index=relevance.index,
        relevance_score=relevance.score,
        document=None if documents is None else DocumentShape(text=documents[relevance.index].text),
        relevant_spans=_relevant_spans(relevance, body.spans_wanted),
        **_own_fields(relevance, body),
    )


def _relevant_spans(relevance: Relevance, wanted: RelevantSpans | None) -> list[RelevantSpan] | None:
    if wanted is None or relevance.qr_score <= 0.0:
        return None
    least = _THRESHOLD if wanted.threshold is None else wanted.threshold
    shares = [(span.span, min(1.0, max(0.0, span.score / relevance.qr_score))) for span in relevance.spans or ()]
    strong = [RelevantSpan(start=span.start, end=span.stop, score=share) for span, share in shares if share >= least]
    return strong[: wanted.max_spans] or None


def _tei_rank(relevance: Relevance, body: TeiRequest) -> TeiRank:
    text = body.texts[relevance.index] if body.return_text else None
    return TeiRank(index=relevance.index, score=relevance.score, text=text, **_own_fields(relevance, body))


def _own_fields(relevance: Relevance, body: Question) -> dict[str, Any]:
    spans = list(relevance.spans or ())[: body.max_spans]
    return {
        "qr_score": relevance.qr_score,
        "qr_rank": relevance.rank,
        "qr_truncated": relevance.truncated,
        "qr_spans": [SpanShape(**span.as_dict()) for span in spans] if body.explain else None,
    }


def _errors(model: type[BaseModel], unusable: int) -> dict[int | str, dict[str, Any]]:
    """What is documented of errors; `unusable` is the status for requests that cannot be used."""
    statuses: dict[int | str, str] = {unusable: _UNUSABLE, **_STATUSES, "default": "Any other error."}
    return {
        status: {"model": model, "description": text, **({"headers": _RETRY} if status in (429, 503) else {})}
        for status, text in statuses.items()
    }
