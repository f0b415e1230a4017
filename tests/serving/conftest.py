"""A real server on this machine for the tests: uvicorn in a thread, on a port that is free."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serving.talking import Serving, Started, until


@pytest.fixture(scope="session")
def serving() -> Serving:
    """``with serving(settings) as url:`` a server that runs until the block ends; `url` is ``http://127.0.0.1:PORT``.

    ``engine=`` does the work in place of models of the settings; ``wait=False`` does not wait until it is ready.
    """

    @contextmanager
    def serve(settings: Any, engine: Any = None, *, wait: bool = True) -> Iterator[str]:
        from qr_integrations.serving.app import create_app
        from qr_integrations.serving.run import server_of

        listener = socket.socket(proto=socket.IPPROTO_TCP)  # as `run.listen` does
        listener.bind(("127.0.0.1", 0))
        server = server_of(create_app(settings, engine), settings)
        thread = threading.Thread(target=server.run, args=([listener],), name="server", daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            until(lambda: server.started or not thread.is_alive())
            assert server.started, "the server did not start"
            if wait:
                until(lambda: httpx.get(f"{url}/ready").status_code == 200)
            yield url
        finally:
            server.should_exit = True
            thread.join(20)
            listener.close()
            assert not thread.is_alive(), "the server did not stop"

    return serve


@pytest.fixture(scope="module")
def server_url(serving: Serving, qr_mini: Any, qr_mini_vl: Any) -> Iterator[str]:
    """A server of qr-mini, which ranks and answers, and qr-mini-vl, which sees pictures."""
    from qr_integrations.serving import ServerSettings

    with serving(ServerSettings(model="qr-mini", vision_model="qr-mini-vl", device="cpu")) as url:
        yield url


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[..., Started]]:
    """Run `qr-integrations serve` with these arguments, and with these variables in its environment."""
    processes: list[Started] = []

    def start(*argv: str, **environment: str) -> Started:
        processes.append(Started(tmp_path / f"log{len(processes)}", argv, environment))
        return processes[-1]

    yield start
    for one in processes:
        one.process.kill()
        one.process.communicate()
