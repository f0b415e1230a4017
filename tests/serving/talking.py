"""Talking to a server without a client's help, and waiting for it."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

Serving = Callable[..., AbstractContextManager[str]]


def until(true: Callable[[], Any], seconds: float = 60.0) -> None:
    """Wait until something is true.

    Raises:
        TimeoutError: it did not become so.
    """
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds} seconds in vain")
        time.sleep(0.01)


def address_of(url: str) -> tuple[str, int]:
    host, _, port = url.removeprefix("http://").partition(":")
    return host, int(port)


def said_to(url: str, *parts: bytes, seconds: float = 10.0) -> bytes:
    """What the server answers to these bytes until it closes the connection; ask it to, by ``Connection: close``."""
    answer = b""
    with socket.create_connection(address_of(url), timeout=seconds) as connection:
        for part in parts:
            connection.sendall(part)
        while piece := connection.recv(65536):
            answer += piece
    return answer


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


class Started:
    """`qr-integrations serve` in a process of its own; `said` and `url` are there when it is ready."""

    def __init__(self, log: Path, argv: tuple[str, ...], environment: dict[str, str]) -> None:
        import qr_integrations

        package = Path(qr_integrations.__file__).parents[1]
        path = os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")])
        code = "import sys; from qr_integrations.cli import main; sys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-P", "-c", code, "serve", "--port", "0", "--device", "cpu", *argv]
        given = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
        self.log = log
        with log.open("w") as errors:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=given)
        assert self.process.stdout is not None
        self.said = self.process.stdout.readline()
        found = re.search(r"http://\S+", self.said)
        self.url = found[0] if found else ""

    def ended(self) -> tuple[int, list[str]]:
        """Its exit code and the lines on standard error."""
        self.process.communicate(timeout=60)
        return self.process.returncode, self.log.read_text().splitlines()
