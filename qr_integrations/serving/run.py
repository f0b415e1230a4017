"""A server process: listens, tells when it is ready, and ends without losing work that has begun."""

import asyncio
import contextlib
import math
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from pydantic import ValidationError
from uvicorn.protocols.http.h11_impl import H11Protocol

from qr_integrations.errors import InputError, QRError
from qr_integrations.serving.app import create_app
from qr_integrations.serving.guards import is_loopback
from qr_integrations.serving.request_log import logged_to_stderr
from qr_integrations.serving.settings import ServerSettings
from qr_integrations.serving.work import Engine

_MOST_HEADER_BYTES = 32 * 2**10
_SECONDS_BETWEEN_REQUESTS = 15
_SECONDS_FOR_A_HEAD = 20.0


def serve(
    settings: ServerSettings, *, engine: Engine | None = None, announce: Callable[[str], None] | None = None
) -> None:
    """Serve until the process is told to stop (SIGTERM or SIGINT); a second signal does not wait for work.

    Args:
        settings: what is served, and where.
        engine: does the work; None loads the models of the settings in this process.
        announce: called with the address as soon as there is work to be had.

    Raises:
        InputError: the address cannot be listened at.
        QRError: the models cannot be loaded; the process is not left listening.
    """
    listeners = listen(settings.host, settings.port)
    server = server_of(create_app(settings, engine), settings, announce)
    try:
        with logged_to_stderr(settings):
            server.run(sockets=listeners)
    finally:
        for listener in listeners:
            listener.close()
    if (failure := server.failure) is not None:
        raise failure


def server_of(app: FastAPI, settings: ServerSettings, announce: Callable[[str], None] | None = None) -> "ModelServer":
    """A server of an application, not yet started."""
    config = uvicorn.Config(
        app,
        http=HeadsInTime,
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # the log names who connected, not whom they name
        timeout_keep_alive=_SECONDS_BETWEEN_REQUESTS,
        timeout_graceful_shutdown=max(1, math.ceil(settings.grace)),
        h11_max_incomplete_event_size=_MOST_HEADER_BYTES,
    )
    return ModelServer(config, app.state.engine, settings.grace, announce)


def listen(host: str, port: int) -> list[socket.socket]:
    """Sockets at all addresses that `host` stands for; port 0 is any that is free, the same at each.

    Raises:
        InputError: there is no such address here, or somebody else listens there.
    """
    with contextlib.ExitStack() as opened:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            sockets: list[socket.socket] = []
            for family, address in dict.fromkeys((family, address) for family, *_, address in found):
                tcp = socket.IPPROTO_TCP  # without it asyncio lets small packets wait for 40 ms on kept connections
                sockets.append(opened.enter_context(socket.socket(family, proto=tcp)))
                sockets[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    sockets[-1].setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                sockets[-1].bind((address[0], port, *address[2:]))
                sockets[-1].listen(2048)
                port = sockets[-1].getsockname()[1]
        except OSError as error:
            told = error.strerror or error
            raise InputError(f"cannot listen at {host}, port {port} ({told}): pass another --host or --port") from error
        opened.pop_all()
        return sockets


class ModelServer(uvicorn.Server):
    """Uvicorn's, which watches the engine.

    Told to stop, it first lets the engine finish: whoever comes meanwhile hears that the server is shutting down.

    Attributes:
        failure: why the engine could not start; None: it could, or may still.
    """

    def __init__(
        self, config: uvicorn.Config, engine: Engine, grace: float, announce: Callable[[str], None] | None
    ) -> None:
        super().__init__(config)
        self._engine, self._grace, self._announce = engine, grace, announce
        self._told_to_stop = False
        self._draining: asyncio.Future[None] | None = None
        self._end = 0.0

    @property
    def failure(self) -> Exception | None:
        """Why the engine could not start."""
        failure = getattr(self._engine, "failure", None)
        if failure is None and self._engine.state == "failed":
            return QRError("the models could not be loaded: see the log")
        return failure

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: finish what has begun; the second one: at once."""
        self.should_exit = self.force_exit = self._told_to_stop
        self._told_to_stop = True

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to end."""
        if self._announce is not None and self._engine.state == "ready":
            self._announce(self.address)
            self._announce = None
        if self._told_to_stop and self._draining is None:
            self._end = time.monotonic() + self._grace
            self._draining = asyncio.ensure_future(self._engine.stop(self._grace))
        if self._draining is not None and self._draining.done():
            left = math.ceil(self._end - time.monotonic())
            self.config.timeout_graceful_shutdown = max(1, left)  # for what has been done and is not sent yet
            self.should_exit = True
        return await super().on_tick(counter) or self.failure is not None

    @property
    def address(self) -> str:
        """Where it listens, as clients write it."""
        host, port, *_ = self.servers[0].sockets[0].getsockname()
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class HeadsInTime(H11Protocol):
    """A connection that ends when the head of a request does not arrive in time."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Somebody is there."""
        super().connection_made(transport)
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        """Somebody says something."""
        super().data_received(data)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nobody is there any more."""
        self._forget()
        super().connection_lost(exc)

    def _wait_for_head(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._forget()
        elif self._timer is None:
            self._timer = self.loop.call_later(_SECONDS_FOR_A_HEAD, self._give_up)

    def _give_up(self) -> None:
        self._timer = None
        if self.conn.their_state is h11.IDLE:
            self.transport.close()

    def _forget(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def read_settings(given: Mapping[str, Any]) -> ServerSettings:
    """Settings from what a command line says.

    Raises:
        InputError: one cannot be as it is; named as the command line calls it.
    """
    try:
        return ServerSettings(**given)
    except ValidationError as error:
        first = error.errors()[0]
        if isinstance(cause := first.get("ctx", {}).get("error"), QRError):
            raise cause from None
        name = str(first["loc"][0]).replace("_", "-")
        raise InputError(f"--{name}: {first['msg']}: see qr-integrations serve --help") from error


def warnings_about(settings: ServerSettings) -> Iterator[str]:
    """What whoever starts a server should know, a line each."""
    if not is_loopback(settings.host) and not settings.api_keys:
        yield (
            f"everybody who can reach {settings.host}:{settings.port} may use this server: set QR_API_KEYS or pass "
            "--api-keys-file"
        )
