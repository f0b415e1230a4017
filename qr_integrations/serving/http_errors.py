"""Errors as each API tells them: its status, its JSON. Messages are the package's own; nothing of what lies below them.

Where statuses differ between the APIs: what cannot be used is 400 for OpenAI's and Cohere's clients, 422 for TEI's.
"""

import logging
import math
import uuid
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from qr_integrations.errors import (
    Cancelled,
    InputError,
    MemoryLimitError,
    QRError,
    UnsupportedModelError,
    WindowError,
)
from qr_integrations.serving.refusals import (
    NotReady,
    OutOfTime,
    Overloaded,
    Refused,
    TooLarge,
    UnknownModel,
    WorkerLost,
)

SCHEMA_PATH = "/openapi.json"
UNKNOWN_KEY = "No API key, or one that is not known."
"""What the documentation of routes says about status 401."""

current_request_id: ContextVar[str] = ContextVar("current_request_id", default="without a number")
"""The number under which the client, the log and `trouble_of` speak of the request that is being answered."""

_log = logging.getLogger(__name__)
_STATUSES: dict[type[Exception], tuple[int, str]] = {  # the first that fits counts
    Overloaded: (429, "overloaded"),
    NotReady: (503, "not_ready"),
    OutOfTime: (504, "timeout"),
    WorkerLost: (503, "worker_lost"),
    TooLarge: (413, "too_large"),
    UnknownModel: (404, "model_not_found"),
    Cancelled: (499, "cancelled"),
    WindowError: (400, "context_length_exceeded"),
    InputError: (400, "invalid_input"),
    UnsupportedModelError: (400, "unsupported_by_model"),  # models that load rank and answer: a setting asked for more
    MemoryLimitError: (413, "out_of_memory"),
}

_CURES = {
    400: "the body cannot be read as JSON: send what /openapi.json describes",
    404: "there is nothing at this address: see /openapi.json for what there is",
    405: "this address does not take this method: see /openapi.json for the one it takes",
}


@dataclass(frozen=True, slots=True)
class Trouble:
    """An error on its way to a client.

    Attributes:
        status: of HTTP.
        message: what is wrong and what to do.
        code: one word for programs.
        headers: to be sent along.
    """

    status: int
    message: str
    code: str
    headers: Mapping[str, str] = field(default_factory=dict)


def trouble_of(error: Exception) -> Trouble:
    """What a client is told about an error; what was not raised on purpose stays in the log."""
    if isinstance(error, RequestValidationError):
        return Trouble(400, _told(error), "invalid_request")
    if isinstance(error, HTTPException):
        told = _CURES.get(error.status_code, f"{error.detail}: see /openapi.json")
        return Trouble(error.status_code, told, "http_error", error.headers or {})
    for kind, (status, code) in _STATUSES.items():
        if isinstance(error, kind):
            retry = error.retry_after if isinstance(error, Refused) else None
            return Trouble(status, str(error), code, _about_retries(status, retry))
    number = current_request_id.get()
    _log.error("internal error %s", number, exc_info=error)
    what = str(error) if isinstance(error, QRError) else f"internal error {number}: the server's log tells more"
    return Trouble(500, what, "internal_error", _about_retries(500, None))


def _about_retries(status: int, retry_after: float | None) -> dict[str, str]:
    """OpenAI's clients repeat every request that failed on the server's side unless they are told not to."""
    if retry_after is not None:
        return {"Retry-After": str(math.ceil(retry_after))}
    return {"x-should-retry": "false"} if status >= 500 else {}


def body_of(path: str, trouble: Trouble) -> dict[str, Any]:
    """The JSON of an error in the shape of the API that `path` belongs to."""
    if path == "/rerank":
        kinds = {429: "Overloaded", 503: "Unhealthy"}
        kind = kinds.get(trouble.status, "Validation" if trouble.status < 500 else "Backend")
        return {"error": trouble.message, "error_type": kind}
    if path.endswith("/rerank"):
        return {"id": uuid.uuid4().hex, "message": trouble.message, "detail": trouble.message}
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(trouble.status, "invalid_request_error" if trouble.status < 500 else "server_error")
    return {"error": {"message": trouble.message, "type": kind, "param": None, "code": trouble.code}}


def as_response(path: str, trouble: Trouble) -> JSONResponse:
    """An error as the answer to a request for `path`."""
    status = 422 if path == "/rerank" and trouble.status == 400 else trouble.status
    shown = Trouble(status, trouble.message, trouble.code)
    return JSONResponse(body_of(path, shown), status, headers=dict(trouble.headers))


def tell_errors(app: FastAPI) -> None:
    """Let the app answer with `as_response` what routes raise on purpose; `Watched` does so with all else."""

    async def handle(request: Request, error: Exception) -> JSONResponse:
        trouble = trouble_of(error)
        request.state.code = trouble.code
        return as_response(request.url.path, trouble)

    for kind in (QRError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, handle)


def _told(error: RequestValidationError) -> str:
    """The first mistake, without the value, which may be somebody's document; in brackets stand names of schemas."""
    if isinstance(error.body, bytes):
        return "the body is not announced as JSON: send Content-Type: application/json"
    first = error.errors()[0]
    parts = [part for part in first.get("loc", ()) if part != "body" and not str(part).startswith("(")]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).removeprefix(".")
    others = len(error.errors()) - 1
    more = f" (and {others} more)" if others else ""
    return f"{place or 'body'}: {first.get('msg', 'not valid')}{more}: correct the request, see /openapi.json"
