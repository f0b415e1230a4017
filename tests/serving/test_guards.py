"""Who is let in, and with how much."""

import http.client
import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from tests.serving.talking import Serving, address_of, said_to, status_of, until

RERANK = {"model": "m", "query": "who wrote dracula", "documents": ["cats sleep", "Bram Stoker wrote Dracula"]}
KEYS = ("first-key", "zweiter-schlüssel")


def settings(**more: Any) -> Any:
    from qr_integrations.serving import ServerSettings

    return ServerSettings(model="qr-mini", device="cpu", **more)


@pytest.fixture(scope="module")
def narrow(serving: Serving, qr_mini: Any) -> Iterator[str]:
    """Takes 1,000 bytes."""
    with serving(settings(max_body_bytes=1000)) as url:
        yield url


@pytest.fixture(scope="module")
def locked(serving: Serving, qr_mini: Any) -> Iterator[str]:
    with serving(settings(api_keys=KEYS)) as url:
        yield url


def post(path: str, body: bytes, *headers: bytes) -> bytes:
    head = [b"POST %s HTTP/1.1" % path.encode(), b"Host: localhost", b"Content-Type: application/json", *headers]
    return b"\r\n".join([*head, b"", body])


# ---- how much


def padded(length: int) -> bytes:
    """A good request of so many bytes."""
    body = json.dumps(RERANK).encode()
    return body + b" " * (length - len(body))


def test_bodies_up_to_the_limit_are_read(narrow: str) -> None:
    json_type = {"Content-Type": "application/json"}
    assert httpx.post(f"{narrow}/v1/rerank", content=padded(1000), headers=json_type).status_code == 200
    assert httpx.post(f"{narrow}/v1/rerank", content=padded(1001), headers=json_type).status_code == 413


def rerank_of(url: str, body: bytes) -> httpx.Response:
    return httpx.post(f"{url}/v1/rerank", content=body, headers={"Content-Type": "application/json"})


def holding(url: str, count: int, *sent: bytes, stack: ExitStack) -> None:
    """So many clients send this, and then nothing."""
    for _ in range(count):
        connection = stack.enter_context(socket.create_connection(address_of(url)))
        for part in sent:
            connection.sendall(part)


def test_all_long_bodies_together_are_bounded(serving: Serving, qr_mini: Any) -> None:
    with serving(settings(max_body_bytes=100_000)) as url:
        with ExitStack() as stack:
            holding(url, 9, post("/v1/rerank", padded(99_990), b"Content-Length: 100000"), stack=stack)
            until(lambda: rerank_of(url, padded(99_000)).status_code == 429, 5)
            assert int(rerank_of(url, padded(99_000)).headers["Retry-After"]) >= 1
            assert rerank_of(url, padded(1000)).status_code == 200  # short ones are let in
        until(lambda: rerank_of(url, padded(99_000)).status_code == 200, 5)


def test_who_was_refused_holds_nothing(serving: Serving, qr_mini: Any) -> None:
    with serving(settings(max_body_bytes=400_000)) as url, ExitStack() as stack:
        holding(url, 8, post("/v1/rerank", padded(390_000), b"Content-Length: 400000"), stack=stack)
        until(lambda: rerank_of(url, padded(90_000)).status_code == 429, 5)
        refused = stack.enter_context(socket.create_connection(address_of(url), timeout=5))
        refused.sendall(post("/v1/rerank", padded(70_000), b"Content-Length: 400000"))
        until(lambda: rerank_of(url, padded(79_000)).status_code == 429, 5)
        refused.sendall(b" " * 20_000)
        assert status_of(refused.recv(65536)) == 429
        assert rerank_of(url, padded(79_000)).status_code == 200  # while the rest of the other is waited for


def test_so_many_requests_are_read_at_once(serving: Serving, qr_mini: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qr_integrations.serving.guards._REQUESTS_AT_ONCE", 2)
    with serving(settings()) as url:
        with ExitStack() as stack:
            holding(url, 2, post("/v1/rerank", b"{", b"Content-Length: 100"), stack=stack)
            until(lambda: rerank_of(url, padded(200)).status_code == 429, 5)
            assert httpx.get(f"{url}/health").status_code == 200  # or a busy server would be started anew
        until(lambda: rerank_of(url, padded(200)).status_code == 200, 5)


@pytest.mark.parametrize("dripping", [False, True])
def test_bodies_that_come_too_slowly_are_given_up(
    serving: Serving, qr_mini: Any, monkeypatch: pytest.MonkeyPatch, dripping: bool
) -> None:
    monkeypatch.setattr("qr_integrations.serving.guards._SECONDS_BEHIND", 0.4)
    with serving(settings()) as url, socket.create_connection(address_of(url), timeout=5) as connection:
        # What came fast before does not count.
        connection.sendall(post("/v1/rerank", padded(5_000_000), b"Content-Length: 5000100"))
        begun, answer = time.monotonic(), b""
        connection.settimeout(0.1 if dripping else 5)
        while not answer:
            assert time.monotonic() - begun < 4
            try:
                answer = connection.recv(65536)
            except TimeoutError:
                connection.sendall(b" ")
    assert status_of(answer) == 408


def test_bodies_that_come_steadily_are_read(serving: Serving, qr_mini: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qr_integrations.serving.guards._SECONDS_BEHIND", 0.5)
    monkeypatch.setattr("qr_integrations.serving.guards._BYTES_A_SECOND", 500)
    with serving(settings()) as url, socket.create_connection(address_of(url), timeout=5) as connection:
        connection.sendall(post("/v1/rerank", b"", b"Content-Length: 1200", b"Connection: close"))
        for begin in range(0, 1200, 100):
            connection.sendall(padded(1200)[begin : begin + 100])
            time.sleep(0.1)
        assert status_of(connection.recv(65536)) == 200


def test_bodies_without_a_length_are_counted(narrow: str) -> None:
    def pieces(count: int) -> Iterator[bytes]:
        yield padded(500)
        yield b" " * (count - 500)

    json_type = {"Content-Type": "application/json"}
    assert httpx.post(f"{narrow}/v1/rerank", content=pieces(1000), headers=json_type).status_code == 200
    assert httpx.post(f"{narrow}/v1/rerank", content=pieces(1001), headers=json_type).status_code == 413


def test_who_is_cut_off_while_sending_hears_why(narrow: str) -> None:
    answer = httpx.post(f"{narrow}/v1/rerank", content=b" " * 20_000_000)
    assert answer.status_code == 413
    assert "1000 bytes" in answer.json()["message"]


def test_who_asks_first_need_not_send(narrow: str) -> None:
    head = post("/v1/rerank", b"", b"Content-Length: 2000", b"Expect: 100-continue")
    with socket.create_connection(address_of(narrow), timeout=5) as connection:
        connection.sendall(head)
        assert status_of(connection.recv(65536)) == 413


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("/rerank", lambda body: body["error_type"] == "Validation" and "bytes" in body["error"]),
        ("/v2/rerank", lambda body: "bytes" in body["message"]),
        ("/v1/chat/completions", lambda body: body["error"]["code"] == "body_too_large"),
    ],
)
def test_refusals_have_the_shape_of_their_api(narrow: str, path: str, told: Any) -> None:
    assert told(httpx.post(f"{narrow}{path}", content=b" " * 1001).json())


def test_bodies_that_do_not_arrive_are_given_up(
    serving: Serving, qr_mini: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qr_integrations.serving.guards._SECONDS_DRAINED", 0.2)
    with serving(settings(deadline=0.5)) as url:
        begun = time.monotonic()
        answer = said_to(url, post("/v1/rerank", b'{"query":', b"Content-Length: 100"))
    assert status_of(answer) == 408
    assert time.monotonic() - begun < 3


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("count", [1, 200_000])
def test_bodies_in_other_encodings_are_not_read(server_url: str, encoding: str, count: int) -> None:
    body = ('{"query": "q", "documents": [%s"a"]}' % ('"",' * count)).encode(encoding)
    answer = rerank_of(server_url, body)
    assert answer.status_code == 400
    assert "send the body as UTF-8" in answer.json()["message"]
    assert answer.elapsed.total_seconds() < 3


def test_a_mark_that_says_utf8_does_no_harm(server_url: str) -> None:
    assert rerank_of(server_url, json.dumps(RERANK).encode("utf-8-sig")).status_code == 200


def test_compressed_bodies_are_not_unpacked(narrow: str) -> None:
    answer = httpx.post(f"{narrow}/v1/rerank", content=b"\x1f\x8b", headers={"Content-Encoding": "gzip"})
    assert answer.status_code == 415
    assert "Content-Encoding" in answer.json()["message"]


@pytest.mark.parametrize(
    "values",
    [b"0," * 1_000_000 + b"0", b'"",' * 500_000 + b"0", b"[" * 100_000 + b"]" * 100_000, b"{}," * 60_000 + b"0"],
)
def test_millions_of_small_values_do_not_hold_up_the_others(server_url: str, values: bytes) -> None:
    body = b'{"query": "q", "model": "m", "documents": [%s]}' % values
    answer = httpx.post(f"{server_url}/v1/rerank", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 413
    assert "values" in answer.json()["message"]
    assert answer.elapsed.total_seconds() < 3  # where it was read, minutes


@pytest.mark.parametrize(
    ("body", "more"),
    [
        (b'["a", "b", "c"]', False),  # a bracket and two commas
        (b'["a", "b", "c", "d"]', True),
        (b'["' + b",[{" * 1000 + b'"]', False),
        (rb'["\",,,,,\"", 1, 2]', False),
        (b'["' + b"," * 1000, False),  # one string without an end
        (b'{"a": {"b": {"c": {}}}}', True),
        (b"", False),
    ],
)
def test_values_are_counted_outside_of_strings(body: bytes, more: bool) -> None:
    from qr_integrations.serving.guards import holds_more_values

    assert holds_more_values(body, 3) == more


def test_long_texts_full_of_commas_are_read(server_url: str) -> None:
    documents = ["who, wrote, [this], {that}? " * 3000, "Dracula, a novel, by Bram Stoker, " * 3000]
    answer = httpx.post(f"{server_url}/v1/rerank", json={**RERANK, "documents": documents, "max_tokens_per_doc": 20})
    assert answer.status_code == 200


def test_heads_that_do_not_arrive_are_given_up(serving: Serving, qr_mini: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qr_integrations.serving.run._SECONDS_FOR_A_HEAD", 0.2)
    whole = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with serving(settings()) as url:
        assert said_to(url) == b""
        assert said_to(url, b"GET /heal") == b""
        with socket.create_connection(address_of(url), timeout=5) as connection:
            connection.sendall(whole)
            answer = b""
            while not answer.endswith(b"}"):
                answer += connection.recv(65536)
            connection.sendall(b"GET /heal")
            assert connection.recv(65536) == b""


# ---- who


def test_without_a_key_nothing_is_done(locked: str) -> None:
    answer = httpx.post(f"{locked}/v1/rerank", json=RERANK)
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert "Authorization" in answer.json()["message"]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
def test_every_key_opens(locked: str, key: str, scheme: str) -> None:
    headers = {"Authorization": f"{scheme} {key}".encode()}
    assert httpx.post(f"{locked}/v1/rerank", json=RERANK, headers=headers).status_code == 200


@pytest.mark.parametrize(
    "given", ["Bearer", "Bearer first", "Bearer first-keys", "Basic first-key", "first-key", "Bearer  x"]
)
def test_nothing_else_opens(locked: str, given: str) -> None:
    assert httpx.get(f"{locked}/v1/models", headers={"Authorization": given}).status_code == 401


@pytest.mark.parametrize("path", ["/health", "/ready", "/", "/page/page.css", "/openapi.json"])
def test_health_page_and_schema_are_for_everybody(locked: str, path: str) -> None:
    assert httpx.get(f"{locked}{path}").status_code == 200


@pytest.mark.parametrize(
    "path", ["/metrics", "/v1/models", "/page/../metrics", "/page/%2e%2e/metrics", "//metrics", "/health/../metrics"]
)
def test_no_path_leads_around_the_key(locked: str, path: str) -> None:
    connection = http.client.HTTPConnection(*address_of(locked), timeout=5)  # sends the path as it is
    connection.request("GET", path)
    answer = connection.getresponse()
    assert answer.status in (401, 404)
    assert b"qr_requests" not in answer.read()
    connection.close()


def test_what_needs_no_key_is_there(locked: str) -> None:
    from qr_integrations.serving.guards import PUBLIC_PATHS

    assert {httpx.get(f"{locked}{path}").status_code for path in PUBLIC_PATHS} == {200}


@pytest.mark.parametrize(
    ("status", "head"),
    [
        (401, [b"POST /v1/rerank HTTP/1.1", b"Host: localhost"]),
        (421, [b"POST /v1/rerank HTTP/1.1", b"Host: evil.example"]),
    ],
)
@pytest.mark.parametrize("length", [b"Content-Length: 1000", b"Transfer-Encoding: chunked"])
def test_connections_end_where_a_body_was_not_read(
    locked: str, monkeypatch: pytest.MonkeyPatch, status: int, head: list[bytes], length: bytes
) -> None:
    monkeypatch.setattr("qr_integrations.serving.guards._SECONDS_DRAINED", 0.2)
    answer = said_to(locked, b"\r\n".join([*head, length, b"", b"1"]), seconds=5)  # which waits until it is closed
    assert status_of(answer) == status
    assert b"connection: close" in answer.lower()


def test_connections_stay_where_there_was_no_body(locked: str) -> None:
    connection = http.client.HTTPConnection(*address_of(locked), timeout=5)
    for _ in range(2):
        connection.request("GET", "/v1/models")
        answer = connection.getresponse()
        answer.read()
        assert (answer.status, answer.getheader("Connection")) == (401, None)
    connection.close()


# ---- by which name


def as_host(url: str, *lines: bytes, asked: bytes = b"GET /v1/models") -> int:
    return status_of(said_to(url, b"\r\n".join([asked + b" HTTP/1.1", *lines, b"Connection: close", b"", b""])))


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST.:8000", 200),
        ("127.0.0.1:1", 200),
        ("127.8.8.8", 200),
        ("[::1]:8000", 200),
        ("[::1]", 200),
        ("evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("localhost.evil.example:8000", 421),
        ("192.168.0.7", 200),  # nobody has bound a name to it
        ("[fd00::7]:80", 200),
        ("192.168.0", 421),
        ("", 421),
    ],
)
def test_on_this_machine_only_its_own_names_are_heard(server_url: str, host: str, status: int) -> None:
    assert as_host(server_url, b"Host: " + host.encode()) == status


@pytest.mark.parametrize(
    ("allowed", "host", "status"),
    [
        (("qr.example",), "QR.example:80", 200),
        (("qr.example", "[fd00::7]"), "[fd00::7]:8000", 200),
        (("qr.example",), "localhost", 200),
        (("qr.example",), "127.0.0.1:8000", 200),
        (("qr.example",), "other.example", 421),
        (("*",), "whatever.example", 200),
        ((), "whatever.example", 200),
    ],
)
def test_elsewhere_the_names_that_were_given(
    serving: Serving, qr_mini: Any, allowed: tuple[str, ...], host: str, status: int
) -> None:
    from qr_integrations.serving import ServerSettings

    host_settings = {"allowed_hosts": allowed} if allowed else {"host": "0.0.0.0"}
    with serving(ServerSettings(model="qr-mini", device="cpu", **host_settings), wait=False) as url:
        answered = as_host(url, b"Host: " + host.encode())
    assert answered == status


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        (b"GET /health", 200),
        (b"HEAD /ready", 200),
        (b"POST /health", 421),
        (b"GET /metrics", 421),
        (b"GET /", 421),
        (b"GET /health/", 421),
    ],
)
def test_probes_may_call_the_server_what_they_like(server_url: str, asked: bytes, status: int) -> None:
    assert as_host(server_url, b"Host: evil.example", asked=asked) == status


# ---- what browsers are told


def test_other_pages_may_not_use_the_server(server_url: str) -> None:
    there = {"Origin": "http://evil.example"}
    asked = {**there, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    answers = [
        httpx.options(f"{server_url}/v1/rerank", headers=asked),
        httpx.get(f"{server_url}/v1/models", headers=there),
    ]
    assert not any(name.startswith("access-control") for answer in answers for name in answer.headers)
    plain = httpx.post(
        f"{server_url}/v1/rerank", content=json.dumps(RERANK), headers={**there, "Content-Type": "text/plain"}
    )
    assert 400 <= plain.status_code < 500  # what a page may send without asking first is not read


@pytest.mark.parametrize("path", ["/", "/health", "/nothing"])
def test_security_headers_are_everywhere(server_url: str, path: str) -> None:
    headers = httpx.get(f"{server_url}{path}").headers
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    policy = headers["Content-Security-Policy"]
    assert "'self'" in policy and "unsafe" not in policy and "img-src 'self' data: blob:" in policy
    assert "server" not in headers
    assert all(headers.get_list(name) == [headers[name]] for name in headers)


# ---- numbers


def test_the_clients_number_comes_back(server_url: str) -> None:
    given = httpx.get(f"{server_url}/health", headers={"X-Request-Id": "trace-7.a:b_c"})
    assert given.headers["X-Request-Id"] == "trace-7.a:b_c"


@pytest.mark.parametrize("number", ["", "x" * 129, "a b", 'a"b', "<script>", "ä"])
def test_indecent_numbers_are_replaced(server_url: str, number: str) -> None:
    answer = httpx.get(f"{server_url}/health", headers={"X-Request-Id": number.encode()})
    other = httpx.get(f"{server_url}/health")
    assert len(answer.headers.get_list("X-Request-Id")) == 1
    assert len(answer.headers["X-Request-Id"]) == 32
    assert answer.headers["X-Request-Id"] not in (number, other.headers["X-Request-Id"])


def test_refused_requests_have_numbers_too(locked: str) -> None:
    refused = httpx.get(f"{locked}/v1/models", headers={"X-Request-Id": "mine"})
    assert (refused.status_code, refused.headers["X-Request-Id"]) == (401, "mine")
