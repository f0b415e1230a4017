"""A line of JSON for every request, on standard error, without anybody's text."""

import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from traceback import walk_tb
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qr_integrations.serving.counting import Cost, current_cost
from qr_integrations.serving.http_errors import SCHEMA_PATH, as_response, trouble_of
from qr_integrations.serving.metrics import Metrics
from qr_integrations.serving.settings import ServerSettings

_log = logging.getLogger(__name__)
_OURS = "qr_integrations.serving"
_LOGGERS = ("qr_integrations", "uvicorn", "asyncio")
_CLIENT_GONE = 499


class AnswerBroken(Exception):
    """An answer could not be brought to its end; what happened stands in the log."""


class Watched:
    """Every request is counted and logged, and every error becomes an answer."""

    def __init__(self, app: ASGIApp, metrics: Metrics, settings: ServerSettings) -> None:
        self.app, self.metrics, self.log_text = app, metrics, settings.log_text

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        cost, begun = Cost(), time.perf_counter()
        status, num_bytes = 0, 0

        async def watched(message: Message) -> None:
            nonlocal status, num_bytes
            status = message.get("status", status)
            num_bytes += len(message.get("body", b""))
            await send(message)

        before = current_cost.set(cost)
        self.metrics.in_flight.inc()
        try:
            await self.app(scope, receive, watched)
        except Exception as error:
            trouble = trouble_of(error)
            scope["state"]["code"] = trouble.code
            if status:
                raise AnswerBroken("see the line above in the log") from None
            await as_response(scope["path"], trouble)(scope, receive, watched)
        finally:
            current_cost.reset(before)
            self.metrics.in_flight.dec()
            self._tell(scope, status or _CLIENT_GONE, time.perf_counter() - begun, num_bytes, cost)

    def _tell(self, scope: Scope, status: int, seconds: float, num_bytes: int, cost: Cost) -> None:
        route, code = _route_of(scope), scope["state"].get("code")
        self.metrics.add(route, scope["method"], status, seconds, code, cost)
        fields = {
            "id": scope["state"].get("request_id"),
            "method": scope["method"],
            "route": route,
            "status": status,
            "seconds": round(seconds, 4),
            "bytes": num_bytes,
            "client": scope["client"][0] if scope.get("client") else None,
            "code": code,
            "documents": cost.documents or None,
            "tokens_read": cost.tokens_read or None,
            "tokens_written": cost.tokens_written or None,
            "texts": cost.texts or None,
        }
        level = logging.ERROR if status >= 500 else logging.INFO
        _log.log(level, "request", extra={"fields": {k: v for k, v in fields.items() if v is not None}})


def _route_of(scope: Scope) -> str:
    """The template of the path, of which there are only so many."""
    if scope["path"] == SCHEMA_PATH:
        return SCHEMA_PATH  # FastAPI leaves no note of this route
    return getattr(scope.get("route"), "path_format", "other")


class JsonLines(logging.Formatter):
    """Records as JSON; of errors the types and the places, and what they say only if texts may be logged.

    What an error says may hold somebody's document.
    """

    def __init__(self, *, log_text: bool) -> None:
        super().__init__()
        self.log_text = log_text

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        message = record.getMessage()
        if not (self.log_text or record.name.startswith(_OURS)):
            message = message.partition("\n")[0]  # asyncio shows the error itself in the second line
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": message,
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[1] is not None:
            entry["errors"] = list(self._told(record.exc_info[1]))
        return json.dumps(entry)

    def _told(self, error: BaseException) -> Iterator[dict[str, Any]]:
        """The error and those that led to it."""
        seen: set[int] = set()
        following: BaseException | None = error
        while following is not None and id(following) not in seen:
            seen.add(id(following))
            places = [
                f"{frame.f_code.co_filename}:{line} {frame.f_code.co_name}"
                for frame, line in walk_tb(following.__traceback__)
            ]
            told = {"message": str(following)} if self.log_text else {}
            yield {"type": type(following).__qualname__, **told, "at": places}
            following = following.__cause__ or following.__context__


@contextmanager
def logged_to_stderr(settings: ServerSettings) -> Iterator[None]:
    """Within the block, the server's log goes to standard error as JSON lines: requests, and what went wrong."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(log_text=settings.log_text))
    loggers, ours = [logging.getLogger(name) for name in _LOGGERS], logging.getLogger(_OURS)
    before = ours.level
    ours.setLevel(logging.INFO)
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        ours.setLevel(before)
        for logger in loggers:
            logger.removeHandler(handler)
