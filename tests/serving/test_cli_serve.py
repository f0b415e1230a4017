"""`qr-integrations serve`: what it takes, what it says, how it ends."""

import asyncio
import json
import os
import re
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serving.talking import Started, until

RERANK = {"model": "m", "query": "who wrote dracula", "documents": ["cats sleep", "Bram Stoker wrote Dracula"]}


def parsed(*argv: str) -> Any:
    from qr_integrations.cli import _parser
    from qr_integrations.cli.serve import settings_of

    return settings_of(_parser().parse_args(["serve", *argv]))


def run(*argv: str) -> int:
    from qr_integrations.cli import main

    return main(["serve", *argv])


# ---- what it takes


def test_what_is_left_out_is_as_the_settings_have_it() -> None:
    from qr_integrations.serving import ServerSettings

    assert parsed() == ServerSettings(model="qr-mini")


def test_every_setting_has_an_option() -> None:
    from qr_integrations.serving import ServerSettings

    given = parsed(
        *("--model", "a", "--vision-model", "b", "--model-id", "A", "--vision-model-id", "B", "--device", "cpu"),
        *("--dtype", "float32", "--device-map", "auto", "--icr", "--heads", "all", "--layout", "block"),
        *("--normalize", "none", "--truncation", "chunk", "--max-context-tokens", "1", "--cache-mib", "2"),
        *(
            "--cache-disk-mib",
            "5",
            "--cache-dtype",
            "int8",
            "--cache-folder",
            "c",
            "--queue-size",
            "3",
            "--max-batch",
            "4",
            "--deadline",
            "5.5",
            "--grace",
            "6",
        ),
        *("--allowed-host", "x", "--allowed-host", "y", "--host", "::1", "--port", "7", "--max-body-bytes", "8"),
        *("--max-documents", "9", "--max-request-tokens", "10", "--max-new-tokens", "11"),
        *("--default-new-tokens", "12", "--max-pictures", "13", "--max-picture-bytes", "14"),
        *("--max-picture-pixels", "15", "--allow-urls", "--picture-timeout", "16", "--log-text"),
    )
    assert given.allowed_hosts == ("x", "y")
    assert (given.cache_bytes, given.cache_disk_bytes, given.cache_dtype) == (2 * 2**20, 5 * 2**20, "int8")
    assert given.cache_folder == Path("c")
    assert given.normalize is None
    assert given.method == "icr"
    same = {name for name in ServerSettings.model_fields if getattr(given, name) == getattr(parsed(), name)}
    assert same == {"api_keys"}


def test_keys_come_from_the_environment_and_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "keys").write_text("# whose: Ann\nthird\n\n fourth \n", encoding="utf-8")
    monkeypatch.setenv("QR_API_KEYS", "first, second,")
    keys = [key.get_secret_value() for key in parsed("--api-keys-file", str(tmp_path / "keys")).api_keys]
    assert keys == ["first", "second", "third", "fourth"]


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--max-batch", "0"], "--max-batch"),
        (["--port", "65536"], "--port"),
        (["--vision-model", "qr-mini"], "vision_model_id"),
        (["--api-keys-file", "/nonesuch"], "/nonesuch"),
        (["--api-keys-file", os.devnull], "no key"),
        (["--host", "nonesuch.invalid"], "--host"),
        (["--replicas", "2"], "--ray"),
    ],
)
def test_what_cannot_be_is_an_error_in_one_line(
    capsys: pytest.CaptureFixture[str], argv: list[str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: Any, **__: Any) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)  # tests ask no name server
    assert run(*argv) == 2
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if not line.startswith("warning:")]
    assert len(errors) == 1 and errors[0].startswith("error: ") and told in errors[0]
    assert captured.out == ""


def test_a_port_that_is_taken_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        assert run("--port", port) == 2
    assert port in capsys.readouterr().err


def test_who_lets_everybody_in_is_warned() -> None:
    from qr_integrations.serving.run import warnings_about

    open_to_all = parsed("--host", "0.0.0.0")
    assert len(list(warnings_about(open_to_all))) == 1
    assert not list(warnings_about(open_to_all.model_copy(update={"api_keys": ("key",)})))
    assert not list(warnings_about(parsed("--host", "::1")))


def test_all_addresses_of_a_name_share_a_port() -> None:
    from qr_integrations.serving.run import listen

    sockets = listen("localhost", 0)
    try:
        assert len({one.getsockname()[1] for one in sockets}) == 1
        for one in sockets:
            with socket.create_connection(one.getsockname()[:2], timeout=1):
                pass
    finally:
        for one in sockets:
            one.close()


# ---- how it ends


def test_it_finishes_what_has_begun_when_it_is_told_to_stop(started: Callable[..., Started]) -> None:
    server = started("--vision-model", "qr-mini-vl", "--cache-mib", "0", QR_API_KEYS="key")
    assert re.fullmatch(r"serving qr-mini and qr-mini-vl at http://127.0.0.1:\d+ \(page: /, .*\)\n", server.said)
    long = {**RERANK, "documents": [f"Number {n}: " + "a cat sleeps all day long. " * 12 for n in range(120)]}
    answers: list[httpx.Response] = []
    with httpx.Client(base_url=server.url, headers={"Authorization": "Bearer key"}, timeout=60) as client:
        asking = threading.Thread(target=lambda: answers.append(client.post("/v1/rerank", json=long)))
        asking.start()
        until(lambda: 'qr_model_running{model="qr-mini"} 1.0' in client.get("/metrics").text)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: client.get("/ready").status_code == 503)
        late = client.post("/v1/rerank", json=RERANK)
        asking.join()
    assert late.status_code == 503
    assert int(late.headers["Retry-After"]) >= 1
    assert answers[0].status_code == 200
    assert len(answers[0].json()["results"]) == 120
    code, lines = server.ended()
    assert code == 0
    assert {json.loads(line)["event"] for line in lines} == {"request"}


class Endless:
    """An engine that never comes to an end by itself."""

    state: Any = "ready"

    async def models(self) -> tuple[Any, ...]:
        return ()

    async def rank(self, work: Any) -> Any:
        raise NotImplementedError

    async def chat(self, work: Any) -> Any:
        raise NotImplementedError

    def stream(self, work: Any) -> Any:
        raise NotImplementedError

    async def start(self) -> None:
        pass

    async def stop(self, grace: float) -> None:
        await asyncio.sleep(grace)


def test_a_second_signal_does_not_wait() -> None:
    from qr_integrations.serving import ServerSettings
    from qr_integrations.serving.app import create_app
    from qr_integrations.serving.run import listen, server_of

    settings = ServerSettings(model="qr-mini", grace=60)
    (listener,) = listen("127.0.0.1", 0)
    server = server_of(create_app(settings, Endless()), settings)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    until(lambda: server.started)
    server.handle_exit(signal.SIGTERM, None)
    thread.join(0.5)
    assert thread.is_alive()
    server.handle_exit(signal.SIGTERM, None)
    thread.join(5)
    assert not thread.is_alive()


def test_a_model_that_is_not_there_is_an_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    assert run("--model", str(tmp_path), "--port", "0") == 2
    captured = capsys.readouterr()
    told = [line for line in captured.err.splitlines() if not line.startswith("{")]
    assert captured.out == ""
    assert len(told) == 1 and told[0].startswith("error: ") and str(tmp_path) in told[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
