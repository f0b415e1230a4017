"""What stands in front of every route: whom the server listens to, and how much of what they send."""

import asyncio
import hashlib
import hmac
import ipaddress
import re
import time
import uuid
from collections.abc import Iterable
from dataclasses import replace
from itertools import islice

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qr_integrations.serving.http_errors import SCHEMA_PATH, Trouble, as_response, current_request_id, trouble_of
from qr_integrations.serving.refusals import Overloaded
from qr_integrations.serving.room import Room, Share
from qr_integrations.serving.settings import ServerSettings

_PROBED_PATHS = frozenset({"/health", "/ready"})
PUBLIC_PATHS = frozenset({"/", SCHEMA_PATH, *_PROBED_PATHS})
PUBLIC_FOLDER = "/page/"
_READING = ("GET", "HEAD")
_QUOTE = ord('"')
_BODIES_AT_ONCE = 8  # of the longest; shorter ones may be more
_SHORT_BODY, _REQUESTS_AT_ONCE = 64 * 2**10, 1000  # short bodies need no room: so many of them take little
_BYTES_A_SECOND, _SECONDS_BEHIND = 64 * 2**10, 10.0  # how fast bodies come at least, and how long they may stop
_SANE_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}")
_FEWEST_VALUES, _VALUES_PER_DOCUMENT = 50_000, 20  # beyond, reading the JSON alone would hold up everybody else
_JSON_PARTS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[,\[{]', re.DOTALL)
_MOST_DRAINED, _SECONDS_DRAINED = 64 * 2**20, 5.0
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; frame-ancestors 'none'"
    ),
}


async def refuse(scope: Scope, receive: Receive, send: Send, trouble: Trouble) -> None:
    """Answer a request with an error in the shape of its path; log and metrics learn the code."""
    scope["state"]["code"] = trouble.code
    await as_response(scope["path"], trouble)(scope, receive, send)


async def refuse_unread(scope: Scope, receive: Receive, send: Send, trouble: Trouble) -> None:
    """Refuse a request whose body has not been read, and throw away what is still coming for a while.

    Who is cut off while sending hears no answer. Afterwards the connection is closed: nobody knows where the next
    request would begin.
    """
    if not _has_body(Headers(scope=scope)):
        return await refuse(scope, receive, send, trouble)

    async def lingering(message: Message) -> None:
        if message["type"] == "http.response.body":
            await send({**message, "more_body": True})
            await _drain(receive)
            message = {"type": "http.response.body"}
        await send(message)

    closing = replace(trouble, headers={**trouble.headers, "Connection": "close"})
    await refuse(scope, receive, lingering, closing)


def _has_body(headers: Headers) -> bool:
    return "transfer-encoding" in headers or headers.get("content-length", "0").strip("0") != ""


class RequestIds:
    """Every request has a number: the client's own if it is decent, else a new one; it goes back in the answer."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        given = Headers(scope=scope).get("x-request-id", "")
        number = given if _SANE_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = number

        async def numbered(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = number
            await send(message)

        before = current_request_id.set(number)
        try:
            await self.app(scope, receive, numbered)
        finally:
            current_request_id.reset(before)


class SecurityHeaders:
    """Browsers load nothing for this server's page from elsewhere, guess no types, and tell nobody about it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""

        async def secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self.app(scope, receive, secured if scope["type"] == "http" else send)


class AllowedHosts:
    """Requests must call the server by a name of its own.

    A web page whose name was bound to this machine's address meanwhile sends its own name. Addresses are no names:
    where one stands, nothing was looked up. Whether the server lives is told to everybody.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self.app = app
        given = {_plain(name) for name in settings.allowed_hosts}
        self.all = "*" in given or (not given and not is_loopback(settings.host))
        self.names = given

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http" or self.all or self._allows(Headers(scope=scope).get("host", "")):
            return await self.app(scope, receive, send)
        if scope["method"] in _READING and scope["path"] in _PROBED_PATHS:
            return await self.app(scope, receive, send)
        told = "this server is not called that: use its own name, or start it with --allowed-host"
        await refuse_unread(scope, receive, send, Trouble(421, told, "unknown_host"))

    def _allows(self, host: str) -> bool:
        name = _plain(host)
        return name in self.names or name == "localhost" or _address(name) is not None


def is_loopback(host: str) -> bool:
    """Whether a name or an address is this machine's own, which nobody else can reach."""
    name = _plain(host)
    address = _address(name)
    return name == "localhost" if address is None else address.is_loopback


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def _plain(host: str) -> str:
    """A Host header without port, brackets, capitals and the dot at the end."""
    bracketed = re.fullmatch(r"\[(.*)\](:\d*)?", host.strip())
    name = bracketed[1] if bracketed else host.strip()
    if not bracketed and name.count(":") == 1:
        name = name.partition(":")[0]
    return name.removesuffix(".").lower()


class ApiKeys:
    """Whoever brings one of the keys is let in; all are where there are none.

    Health, the page and the schema are for everybody.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self.app = app
        self.digests = [_digest(key.get_secret_value().encode()) for key in settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http" or not self.digests or _is_public(scope) or self._knows(scope["headers"]):
            return await self.app(scope, receive, send)
        told = "no valid API key: send the header `Authorization: Bearer KEY`"
        trouble = Trouble(401, told, "invalid_api_key", {"WWW-Authenticate": "Bearer"})
        await refuse_unread(scope, receive, send, trouble)

    def _knows(self, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        given = next((value for name, value in headers if name == b"authorization"), b"")
        scheme, _, key = given.strip().partition(b" ")
        brought, known = _digest(key.strip()), False
        for digest in self.digests:  # all of them: how long it takes tells nothing
            known |= hmac.compare_digest(digest, brought)
        return known and scheme.lower() == b"bearer"


def _is_public(scope: Scope) -> bool:
    return scope["method"] in _READING and (scope["path"] in PUBLIC_PATHS or scope["path"].startswith(PUBLIC_FOLDER))


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class Bodies:
    """Bodies are read before anything else is done: only so long, only so much, and as they are, not compressed.

    Who sends a long one slowly keeps others' out, and is given up soon.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self.app = app
        self.limit, self.seconds = settings.max_body_bytes, settings.deadline
        self.most_values = max(_FEWEST_VALUES, _VALUES_PER_DOCUMENT * settings.max_documents)
        self.room = Room(_BODIES_AT_ONCE * settings.max_body_bytes, "bytes of requests")
        self.places = Room(_REQUESTS_AT_ONCE, "places")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        if headers.get("content-encoding", "identity").lower() != "identity":
            told = "compressed bodies are not read: send it without Content-Encoding"
            return await refuse_unread(scope, receive, send, Trouble(415, told, "compressed_body"))
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self.limit:
            return await refuse_unread(scope, receive, send, self._too_large())
        with self.places.shared() as place, self.room.shared() as share:
            try:
                place.take(int(_has_body(headers)))
                body = await _whole(receive, self.limit, share, self.seconds)
            except Overloaded as error:
                trouble = trouble_of(error)
            except OverflowError:
                trouble = self._too_large()
            except TimeoutError:
                trouble = Trouble(408, "the request did not arrive in time: send it faster, or less", "slow_body")
            else:
                return await self._pass_on(body, scope, receive, send)
        await refuse_unread(scope, receive, send, trouble)  # and holds nothing meanwhile

    async def _pass_on(self, body: bytes | None, scope: Scope, receive: Receive, send: Send) -> None:
        if body is not None and b"\0" in body:  # values of another encoding could not be counted
            told = "the body is not UTF-8, or holds characters with the number 0: send the body as UTF-8"
            await refuse(scope, receive, send, Trouble(400, told, "not_utf8"))
        elif body is not None and holds_more_values(body, self.most_values):
            told = f"the request holds more than {self.most_values:,} values: send fewer documents or messages"
            await refuse(scope, receive, send, Trouble(413, told, "too_many_values"))
        elif body is not None:
            await self.app(scope, _replayed(body, receive), send)

    def _too_large(self) -> Trouble:
        told = f"the request has more than {self.limit} bytes: send fewer or shorter documents, or smaller pictures"
        return Trouble(413, told, "body_too_large")


async def _whole(receive: Receive, limit: int, share: Share, seconds: float) -> bytes | None:
    """The whole body; None if the client went away.

    Raises:
        OverflowError: it is longer than `limit`.
        Overloaded: all requests together are longer than there is room.
        TimeoutError: it took longer than `seconds`, or came more slowly than bodies must.
    """
    now = asyncio.get_running_loop().time
    end, due = now() + seconds, now() + _SECONDS_BEHIND
    parts, length, more = [], 0, True
    async with asyncio.timeout_at(min(due, end)) as timer:
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part, more = message.get("body", b""), message.get("more_body", False)
            length += len(part)
            if length > limit:
                raise OverflowError("the body is longer than it may be")
            if length > _SHORT_BODY:
                share.take(length - share.taken)
            parts.append(part)
            due = min(due + len(part) / _BYTES_A_SECOND, now() + _SECONDS_BEHIND)
            timer.reschedule(min(due, end))
    return b"".join(parts)


def holds_more_values(body: bytes, most: int) -> bool:
    """Whether JSON has more than so many values; the commas and brackets in its strings do not count."""
    if sum(map(body.count, (b",", b"[", b"{"))) <= most:
        return False
    enough = 4 * most  # JSON has at most two strings to a comma or bracket
    begins = [body[part.start()] for part in islice(_JSON_PARTS.finditer(body), enough)]
    return len(begins) == enough or len(begins) - begins.count(_QUOTE) > most


async def _drain(receive: Receive) -> None:
    """Read what comes, and forget it."""
    length, end = 0, time.monotonic() + _SECONDS_DRAINED
    try:
        while length < _MOST_DRAINED:
            async with asyncio.timeout(end - time.monotonic()):
                message = await receive()
            if not message.get("more_body", False):
                return
            length += len(message["body"])
    except TimeoutError:
        return


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The body once more, in one piece, and then what else the client does."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return waiting.pop() if waiting else await receive()

    return replay
