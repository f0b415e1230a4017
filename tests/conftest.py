"""What every test may rely on: no network, no downloads, one small bundled model.

The package is imported inside the fixtures only: jaxtyping's import hook has to be in place before it.
"""

import importlib.util
import ipaddress
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait must not keep a busy machine's cores

import pytest

if TYPE_CHECKING:
    from qr_integrations.backend import Backend

ATTEMPTS = pytest.StashKey[list[str]]()
PATCHED = ("connect", "connect_ex")


class NetworkRefused(RuntimeError):
    """A test reached for another machine."""


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in ("", "localhost")


def pytest_configure(config: pytest.Config) -> None:
    """Refuse connections to other machines from here on, so that imports during collection are covered too."""
    attempts = config.stash[ATTEMPTS] = []
    undo = pytest.MonkeyPatch()
    config.add_cleanup(undo.undo)

    def refuse(host: object) -> None:
        name = host.decode() if isinstance(host, bytes) else str(host or "")
        if not is_loopback(name):
            attempts.append(name)
            raise NetworkRefused(f"a test tried to reach {name!r}: tests use bundled files, or the `weights` marker")

    def guarded(original: Any) -> Any:
        def connect(self: socket.socket, address: Any) -> Any:
            if self.family in (socket.AF_INET, socket.AF_INET6):
                refuse(address[0])
            return original(self, address)

        return connect

    resolve = socket.getaddrinfo

    def getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        refuse(host)
        return resolve(host, *args, **kwargs)

    for name in PATCHED:
        undo.setattr(socket.socket, name, guarded(getattr(socket.socket, name)))
    undo.setattr(socket, "getaddrinfo", getaddrinfo)


def pytest_report_header() -> str:
    """Which copy is under test: the installed one, or the tree (`python -m pytest`, an editable install)."""
    found = importlib.util.find_spec("qr_integrations")
    return f"qr_integrations: {found.origin if found else 'not found: pip install .'}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, and say what would make it run."""
    if not os.environ.get("QR_TEST_WEIGHTS"):
        skip(items, "weights", "needs a checkpoint: set QR_TEST_WEIGHTS to its folder or to a cached hub id")
    if any(item.get_closest_marker("gpu") for item in items):
        import torch

        if not torch.cuda.is_available():
            skip(items, "gpu", "needs a CUDA device: torch.cuda.is_available() is False")


def skip(items: list[pytest.Item], marker: str, reason: str) -> None:
    for item in items:
        if item.get_closest_marker(marker):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def network_attempts(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """Hosts this test tried to reach. Fails the test even if the code under test swallowed the refusal."""
    attempts = request.config.stash[ATTEMPTS]
    attempts.clear()
    yield attempts
    assert not attempts, f"tried to reach {attempts}"


@pytest.fixture(scope="session")
def qr_mini() -> "Backend":
    """The smallest bundled model, loaded once for all tests. Leave it as you found it."""
    from qr_integrations.backend import Backend

    return Backend.load("qr-mini")


@pytest.fixture(scope="session")
def qr_mini_vl() -> "Backend":
    """The bundled vision-language model, loaded once for all tests. Leave it as you found it."""
    from qr_integrations.backend import Backend

    return Backend.load("qr-mini-vl")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """The models are tiny: more threads only wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Call the package as a user does, without shape and type checks: for input of the wrong type."""
    from jaxtyping import config

    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def weights_name() -> str:
    """For tests marked `weights`: the folder or hub id in QR_TEST_WEIGHTS."""
    return os.environ["QR_TEST_WEIGHTS"]


@pytest.fixture
def texts() -> list[str]:
    """Text number i answers query number i."""
    return [
        "Cats sleep most of the day.",
        "Dracula is an 1897 Gothic novel by the Irish author Bram Stoker.",
        "The Danube flows through Vienna and Budapest.",
        "Frankenstein was written by Mary Shelley.",
    ]


@pytest.fixture
def queries() -> list[str]:
    return ["what do cats do", "who wrote dracula", "which river flows through vienna", "author of frankenstein"]


@pytest.fixture(scope="session")
def ranked(qr_mini: Any) -> Callable[..., list[tuple[int, float]]]:
    """The numbers to compare with: index and score by `QRHeadReranker`, best first."""
    from qr_integrations import QRHeadReranker

    made: dict[str, Any] = {}

    def rank(query: str, texts: Sequence[str], **options: Any) -> list[tuple[int, float]]:
        options = {"truncation": "head", **options}
        key = repr(options)
        if key not in made:
            made[key] = QRHeadReranker(qr_mini, **options)
        return [(item.index, item.score) for item in made[key].rank(query, list(texts))]

    return rank


@pytest.fixture
def lengths_read(qr_mini: "Backend", monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each pass through the decoder of `qr_mini` reads, from here on."""
    lengths: list[int] = []
    decoder = type(qr_mini.decoder)
    forward: Any = decoder.forward

    def counted(self: Any, input_ids: Any = None, **kwargs: Any) -> Any:
        lengths.append(input_ids.shape[1])
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(decoder, "forward", counted)
    return lengths


@pytest.fixture
def in_fresh_python() -> Callable[[str], str]:
    """Run code in a new interpreter that sees the same package as this one; returns what it printed."""

    def run(code: str) -> str:
        import qr_integrations

        package = Path(qr_integrations.__file__).parent
        path = os.pathsep.join([str(package.parent), os.environ.get("PYTHONPATH", "")])
        command, environment = [sys.executable, "-P", "-c", code], {**os.environ, "PYTHONPATH": path}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run
