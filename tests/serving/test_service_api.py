"""What the server tells about itself: over HTTP, and in its log."""

import asyncio
import json
import logging
import re
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.serving.talking import Serving, address_of, until

RERANK = {"model": "m", "query": "who wrote dracula", "documents": ["cats sleep", "Bram Stoker wrote Dracula"]}
SECRET = "the patient's name is Quintessa"


def settings(**more: Any) -> Any:
    from qr_integrations.serving import ServerSettings

    return ServerSettings(model="qr-mini", device="cpu", **more)


class Standing:
    """An engine that does nothing, in the way it is told: waits, or fails, or is not ready."""

    def __init__(self, state: str = "ready", failing: Exception | None = None) -> None:
        self.state: Any = state
        self.failing = failing
        self.begun, self.cancelled = threading.Event(), threading.Event()

    async def models(self) -> tuple[Any, ...]:
        return ()

    async def rank(self, work: Any) -> Any:
        if self.failing is not None:
            raise self.failing
        self.begun.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    async def chat(self, work: Any) -> Any:
        raise NotImplementedError

    async def stream(self, work: Any) -> AsyncIterator[Any]:
        yield "It is"
        raise RuntimeError(SECRET)

    async def start(self) -> None:
        pass

    async def stop(self, grace: float) -> None:
        pass


@pytest.fixture
def fresh(serving: Serving, qr_mini: Any) -> Iterator[str]:
    """A server that has not been asked anything yet but whether it is ready."""
    with serving(settings()) as url:
        yield url


def measured(url: str) -> dict[str, float]:
    """What stands at /metrics, by name and labels."""
    page = httpx.get(f"{url}/metrics").text
    return {name: float(value) for name, value in re.findall(r"^(\w+(?:\{.*\})?) (\S+)$", page, re.MULTILINE)}


# ---- health


@pytest.mark.parametrize(
    ("state", "status", "told"),
    [("loading", 503, "loading"), ("ready", 200, "ok"), ("draining", 503, "draining")],
)
def test_a_server_lives_before_it_is_ready(serving: Serving, state: str, status: int, told: str) -> None:
    engine = Standing()
    with serving(settings(), engine) as url:
        engine.state = state
        ready, health = httpx.get(f"{url}/ready"), httpx.get(f"{url}/health")
        engine.state = "ready"
    assert (ready.status_code, ready.json()["status"]) == (status, told)
    assert (health.status_code, health.json()["status"]) == (200, "ok")


def test_a_server_that_cannot_load_does_not_listen(serving: Serving) -> None:
    engine = Standing()
    with serving(settings(), engine) as url:
        engine.state = "failed"
        until(lambda: not is_listening(url), 5)


def is_listening(url: str) -> bool:
    try:
        socket.create_connection(address_of(url), timeout=1).close()
    except OSError:
        return False
    return True


def test_models_are_told_as_openai_tells_them(server_url: str) -> None:
    from openai import OpenAI

    with OpenAI(base_url=f"{server_url}/v1", api_key="none") as client:
        models = {model.id: model for model in client.models.list()}
        one = client.models.retrieve("qr-mini-vl")
    assert set(models) == {"qr-mini", "qr-mini-vl"}
    assert models["qr-mini-vl"] == one
    told = one.model_dump()
    assert (told["ranks"], told["chats"], told["sees_pictures"], told["object"]) == (False, True, True, "model")
    assert models["qr-mini"].model_dump()["max_tokens"] == 32768


@pytest.mark.parametrize("name", ["gpt-9", "meta-llama/Llama-3.1-8B-Instruct"])
def test_unknown_models_are_not_found(server_url: str, name: str) -> None:
    answer = httpx.get(f"{server_url}/v1/models/{name}")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"
    assert "qr-mini" in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/health", "/ready", "/v1/models", "/v1/models/qr-mini", "/metrics", "/openapi.json"])
def test_heads_can_be_asked_for_alone(server_url: str, path: str) -> None:
    head, whole = httpx.head(f"{server_url}{path}"), httpx.get(f"{server_url}{path}")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["Content-Type"] == whole.headers["Content-Type"]


# ---- errors


class Refusing(Standing):
    """As `Standing`, with a model that chats until it fails."""

    def __init__(self, failing: Exception) -> None:
        super().__init__(failing=failing)
        self.asked = 0

    async def models(self) -> tuple[Any, ...]:
        from qr_integrations.serving.work import ModelCard

        return (ModelCard("m", ranks=True, chats=True, sees_pictures=False),)

    async def chat(self, work: Any) -> Any:
        self.asked += 1
        assert self.failing is not None
        raise self.failing


def refusals() -> dict[str, Exception]:
    from qr_integrations import errors
    from qr_integrations.serving import refusals

    return {
        "unsupported": errors.UnsupportedModelError("this model has no pictures: leave out prune"),
        "bug": RuntimeError("x"),
        "late": refusals.OutOfTime("too late: ask for less"),
        "failed": refusals.NotReady("could not be loaded: see the log"),
        "loading": refusals.NotReady("not yet: ask again", retry_after=0.2),
        "full": refusals.Overloaded("full: ask again", retry_after=0.2),
    }


@pytest.mark.parametrize(
    ("kind", "status", "repeated"),
    [
        ("unsupported", 400, False),
        ("bug", 500, False),
        ("late", 504, False),
        ("failed", 503, False),
        ("loading", 503, True),
        ("full", 429, True),
    ],
)
def test_openais_client_repeats_what_may_succeed_later(
    serving: Serving, kind: str, status: int, repeated: bool
) -> None:
    from openai import APIStatusError, OpenAI

    engine = Refusing(refusals()[kind])
    with (
        serving(settings(), engine) as url,
        OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=1) as client,
        pytest.raises(APIStatusError) as refused,
    ):
        client.chat.completions.create(model="m", messages=[{"role": "user", "content": "who?"}])
    assert refused.value.status_code == status
    assert engine.asked == (2 if repeated else 1)


async def test_models_that_cannot_be_loaded_are_not_waited_for() -> None:
    from qr_integrations.serving.app import create_app

    app = create_app(settings(), Standing("failed"))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        said = {"model": "m", "messages": [{"role": "user", "content": "who?"}]}
        answer = await client.post("/v1/chat/completions", json=said)
    assert (answer.status_code, answer.headers.get("x-should-retry")) == (503, "false")
    assert "Retry-After" not in answer.headers


@pytest.mark.parametrize(
    ("statuses", "kind"),
    [
        ((401, 404, 405, 408, 413, 415, 421, 422), "Validation"),
        ((429,), "Overloaded"),
        ((500, 504), "Backend"),
        ((503,), "Unhealthy"),
    ],
)
def test_tei_knows_four_kinds_of_errors(statuses: tuple[int, ...], kind: str) -> None:
    from qr_integrations.serving.http_errors import Trouble, body_of

    assert {body_of("/rerank", Trouble(status, "x", "x"))["error_type"] for status in statuses} == {kind}


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/rerank", "/v1/chat/completions"])
@pytest.mark.parametrize("headers", [{}, {"Content-Type": "text/plain"}, {"Content-Type": "json"}])
def test_who_does_not_say_that_it_is_json_hears_of_it(server_url: str, path: str, headers: dict[str, str]) -> None:
    answer = httpx.post(f"{server_url}{path}", content=json.dumps(RERANK), headers=headers)
    assert answer.status_code in (400, 422)
    assert "send Content-Type: application/json" in answer.text


# ---- the schema


@pytest.mark.parametrize("keys", [(), ("key",)])
def test_the_schema_tells_where_a_key_is_wanted(serving: Serving, keys: tuple[str, ...]) -> None:
    with serving(settings(api_keys=keys), Standing()) as url:
        schema = httpx.get(f"{url}/openapi.json").json()
        operations = {path: next(iter(methods.items())) for path, methods in schema["paths"].items()}
        locked = {
            path for path, (method, _) in operations.items() if httpx.request(method, url + path).status_code == 401
        }
    assert {path for path, (_, told) in operations.items() if told.get("security")} == locked
    assert len(locked) == (7 if keys else 0)
    schemes = schema["components"].get("securitySchemes", {})
    assert [(scheme["type"], scheme["scheme"]) for scheme in schemes.values()] == [("http", "bearer")] * len(keys)
    for path in locked:
        assert "application/json" in operations[path][1]["responses"]["401"]["content"]


def test_the_schema_promises_no_errors_that_never_come(server_url: str) -> None:
    schema = httpx.get(f"{server_url}/openapi.json").json()
    assert "HTTPValidationError" not in schema["components"]["schemas"]
    assert [path for path, methods in schema["paths"].items() if "422" in str(methods)] == ["/rerank"]


# ---- counters


def test_requests_are_counted_by_route_not_by_path(fresh: str) -> None:
    for name in ("a", "b", "c"):
        httpx.get(f"{fresh}/v1/models/{name}")
    httpx.get(f"{fresh}/openapi.json")
    for path in ("/x", "/y"):
        httpx.request("BREW", f"{fresh}{path}")
    numbers = measured(fresh)
    assert numbers['qr_requests_total{method="GET",route="/v1/models/{model}",status="404"}'] == 3
    assert numbers['qr_requests_total{method="other",route="other",status="404"}'] == 2
    assert numbers['qr_requests_total{method="GET",route="/openapi.json",status="200"}'] == 1
    assert numbers['qr_refused_total{reason="model_not_found"}'] == 3
    assert numbers["qr_requests_in_flight"] == 1  # this one


def test_work_is_counted(fresh: str) -> None:
    assert httpx.post(f"{fresh}/v1/rerank", json=RERANK).status_code == 200
    first = measured(fresh)
    assert httpx.post(f"{fresh}/v1/rerank", json={**RERANK, "query": "what sleeps"}).status_code == 200
    second = measured(fresh)
    assert first["qr_documents_total"] == 2
    assert 10 < first["qr_tokens_read_total"] < 100
    assert first['qr_jobs_done_total{kind="rank",model="qr-mini"}'] == 1
    assert first["qr_batch_size_count"] == 1
    assert first["qr_cache_bytes"] > 0
    assert second["qr_documents_total"] == 4
    assert second["qr_cache_misses_total"] == first["qr_cache_misses_total"]
    assert second["qr_cache_hits_total"] >= first["qr_cache_hits_total"]
    assert second['qr_request_seconds_count{route="/v1/rerank"}'] == 2
    assert second['qr_model_loaded{model="qr-mini"}'] == second["qr_ready"] == 1


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_of_answers_are_counted(fresh: str, stream: bool) -> None:
    said = {"model": "qr-mini", "messages": [{"role": "user", "content": "who wrote dracula"}], "max_tokens": 3}
    usage = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    answer = httpx.post(f"{fresh}/v1/chat/completions", json={**said, **usage}, timeout=30).text
    tokens = {name: int(value) for name, value in re.findall(r'"(\w+)_tokens": ?(\d+)', answer)}
    numbers = measured(fresh)
    assert 1 <= numbers["qr_tokens_written_total"] == tokens["completion"] <= 3
    assert numbers["qr_tokens_read_total"] == tokens["prompt"] > 3
    assert numbers['qr_jobs_done_total{kind="chat",model="qr-mini"}'] == 1


def test_two_servers_count_for_themselves(fresh: str, serving: Serving) -> None:
    with serving(settings()) as other:
        httpx.get(f"{other}/nothing")
        assert 'qr_requests_total{method="GET",route="other",status="404"}' in measured(other)
        assert 'qr_requests_total{method="GET",route="other",status="404"}' not in measured(fresh)


def test_clients_that_leave_are_counted(serving: Serving) -> None:
    engine = Standing()
    body = json.dumps(RERANK).encode()
    head = (
        b"POST /v1/rerank HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    )
    with serving(settings(), engine) as url:
        with socket.create_connection(address_of(url)) as connection:
            connection.sendall(head % len(body) + body)
            assert engine.begun.wait(5)
            assert measured(url)["qr_requests_in_flight"] == 2
        assert engine.cancelled.wait(5)
        until(lambda: measured(url)["qr_clients_gone_total"] == 1, 5)
        assert measured(url)['qr_requests_total{method="POST",route="/v1/rerank",status="499"}'] == 1


def test_counters_stay_true_under_many_at_once(fresh: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(lambda _: httpx.get(f"{fresh}/health").status_code, range(60)))
    assert statuses == [200] * 60
    assert measured(fresh)['qr_requests_total{method="GET",route="/health",status="200"}'] == 60
    assert measured(fresh)["qr_requests_in_flight"] == 1


# ---- the log


def logged(serving: Serving, capsys: pytest.CaptureFixture[str], settings: Any, engine: Any, *asked: Any) -> Any:
    """The lines that a server writes while it is asked."""
    from qr_integrations.serving.request_log import logged_to_stderr

    with logged_to_stderr(settings), serving(settings, engine, wait=False) as url:
        for path, body in asked:
            with httpx.Client() as client:
                client.request("POST" if body else "GET", f"{url}{path}", json=body)
    err = capsys.readouterr().err
    return err, [json.loads(line) for line in err.splitlines()]


def test_a_request_is_a_line(serving: Serving, capsys: pytest.CaptureFixture[str], qr_mini: Any) -> None:
    engine = Standing(failing=LookupError("x"))
    _, (first, second) = logged(serving, capsys, settings(), engine, ("/health?q=secret", None), ("/v1/models/x", None))
    assert first["event"] == "request"
    assert (first["method"], first["route"], first["status"]) == ("GET", "/health", 200)
    assert first["level"] == "info"
    assert first["bytes"] == len('{"status":"ok"}')
    assert first["client"] == "127.0.0.1"
    assert 0 <= first["seconds"] < 5
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+\+00:00", first["time"])
    assert (second["route"], second["code"]) == ("/v1/models/{model}", "model_not_found")
    assert first["id"] != second["id"]


def test_nobody_says_who_somebody_else_is(serving: Serving, capsys: pytest.CaptureFixture[str]) -> None:
    from qr_integrations.serving.request_log import logged_to_stderr

    with logged_to_stderr(settings()), serving(settings(), Standing(), wait=False) as url:
        httpx.get(f"{url}/health", headers={"X-Forwarded-For": "203.0.113.7", "Forwarded": "for=203.0.113.7"})
    assert json.loads(capsys.readouterr().err)["client"] == "127.0.0.1"


def test_nobodys_text_is_in_the_log(serving: Serving, capsys: pytest.CaptureFixture[str]) -> None:
    failing = RuntimeError(SECRET)
    failing.__cause__ = KeyError(SECRET)
    request = {**RERANK, "query": SECRET, "documents": [SECRET], SECRET: 1}
    engine = Standing(failing=failing)
    asked = [("/v1/rerank", request), ("/v1/rerank", {**RERANK, "query": {SECRET: SECRET}}), (f"/{SECRET}", None)]
    text, lines = logged(serving, capsys, settings(), engine, *asked)
    assert "Quintessa" not in text
    internal = next(line for line in lines if line["event"].startswith("internal error"))
    assert [error["type"] for error in internal["errors"]] == ["RuntimeError", "KeyError"]
    assert any(place.endswith(" rank") for place in internal["errors"][0]["at"])
    assert [line["status"] for line in lines if line["event"] == "request"] == [500, 400, 404]
    assert next(line for line in lines if line.get("status") == 500)["level"] == "error"


def test_texts_are_logged_where_that_is_asked_for(serving: Serving, capsys: pytest.CaptureFixture[str]) -> None:
    engine = Standing(failing=RuntimeError("because"))
    request = {**RERANK, "documents": [SECRET]}
    _, lines = logged(serving, capsys, settings(log_text=True), engine, ("/v1/rerank", request))
    assert lines[0]["errors"][0]["message"] == "because"
    assert lines[1]["texts"] == [RERANK["query"], SECRET]


async def test_an_answer_that_breaks_off_is_not_brought_to_an_end(caplog: pytest.LogCaptureFixture) -> None:
    from qr_integrations.serving.metrics import Metrics
    from qr_integrations.serving.request_log import AnswerBroken, Watched

    async def breaking(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError(SECRET)

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/", "state": {}}
    with pytest.raises(AnswerBroken) as broken:
        await Watched(breaking, Metrics(Standing()), settings())(scope, send, send)
    assert [message["type"] for message in sent] == ["http.response.start"]
    assert broken.value.__suppress_context__ and "Quintessa" not in str(broken.value)
    assert "internal error" in caplog.text


async def test_an_answer_that_breaks_off_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    from starlette.responses import StreamingResponse

    from qr_integrations.serving.app import create_app

    async def pieces() -> AsyncIterator[str]:
        yield "a"
        raise RuntimeError(SECRET)

    async def breaking() -> Any:
        return StreamingResponse(pieces())

    app = create_app(settings(), Standing())
    app.add_api_route("/breaking", breaking)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        await client.get("/breaking")
    assert caplog.text.count("internal error") == 1


@pytest.mark.parametrize("given", [{}, {"X-Request-Id": "trace-7"}])
def test_internal_errors_are_not_told_to_clients(
    serving: Serving, caplog: pytest.LogCaptureFixture, given: dict[str, str]
) -> None:
    with serving(settings(), Standing(failing=RuntimeError(SECRET))) as url:
        answer = httpx.post(f"{url}/v1/rerank", json=RERANK, headers=given)
    assert answer.status_code == 500
    assert "Quintessa" not in answer.text
    number = answer.headers["X-Request-Id"]
    assert f"internal error {number}: " in answer.text
    assert f"internal error {number}" in caplog.text  # it can be found


def test_what_asyncio_says_of_lost_errors_is_cut() -> None:
    from qr_integrations.serving.request_log import JsonLines

    record = logging.LogRecord("asyncio", 40, "", 0, f"never retrieved\nfuture: {SECRET}", None, None)
    assert json.loads(JsonLines(log_text=False).format(record))["event"] == "never retrieved"
    assert SECRET in json.loads(JsonLines(log_text=True).format(record))["event"]


def test_logging_is_as_before_afterwards() -> None:
    from qr_integrations.serving.request_log import logged_to_stderr

    names = ("", "qr_integrations", "qr_integrations.serving", "uvicorn", "asyncio")
    before = [(logging.getLogger(name).level, list(logging.getLogger(name).handlers)) for name in names]
    with logged_to_stderr(settings()):
        pass
    assert [(logging.getLogger(name).level, list(logging.getLogger(name).handlers)) for name in names] == before
