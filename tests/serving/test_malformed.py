"""Thousands of requests that no client would send: the server refuses them, and is as before.

QR_TEST_REQUESTS=10000 sends more of them.
"""

import gzip
import json
import os
import random
import re
import socket
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serving.talking import Started, address_of, until

RERANK = {"query": "who wrote dracula", "documents": ["cats sleep", "Bram Stoker wrote Dracula"]}
GOOD: dict[str, dict[str, Any]] = {
    "/v1/rerank": {"model": "m", **RERANK},
    "/v2/rerank": {"model": "m", **RERANK, "top_n": 1},
    "/rerank": {"query": "who?", "texts": ["cats", "dogs"], "raw_scores": False},
    "/v1/chat/completions": {
        "model": "qr-mini",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "who?"}]}],
        "max_tokens": 1,
    },
}
ODD = [
    "",
    "\x00",
    "\ud800",
    [],
    {},
    [[]],
    -1,
    0,
    2**63,
    10**400,
    1e308,
    float("nan"),
    float("inf"),
    True,
    None,
    "9" * 5000,
]
COUNT = int(os.environ.get("QR_TEST_REQUESTS", "1200"))
MIB = 2**20
# What is loaded on first use comes with the first of each kind; the allocator's heaps take longer to reach their size.
WARM_UP = max(300, COUNT // 5)
# Not nothing: several of the largest bodies at a time make the heaps larger now and then, by 15 MiB in 10,000 requests
# where this was measured, and by 60 MiB for a moment, for which the memory is read twice. Of 10,000 requests that each
# leave 3 KiB behind, which is less than most bodies here take when they are read, nothing goes away again.
GROWTH = 30 * MIB


def request(path: str, body: bytes, *headers: bytes, method: bytes = b"POST") -> bytes:
    if not any(header.lower().startswith((b"content-length", b"transfer-encoding")) for header in headers):
        headers += (b"Content-Length: %d" % len(body),)
    if not any(header.lower().startswith(b"content-type") for header in headers):
        headers += (b"Content-Type: application/json",)
    lines = [b"%s %s HTTP/1.1" % (method, path.encode()), b"Host: localhost", b"Connection: close", *headers]
    return b"\r\n".join([*lines, b"", body])


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


# ---- each makes one request; what they are given is drawn by `draw`


def noise(draw: random.Random, path: str) -> bytes:
    return draw.randbytes(draw.randint(1, 3000))


def noise_as_body(draw: random.Random, path: str) -> bytes:
    return request(path, draw.randbytes(draw.randint(0, 3000)))


def cut_short(draw: random.Random, path: str) -> bytes:
    body = as_json(GOOD[path])
    return request(path, body[: draw.randrange(len(body))])


def deep(draw: random.Random, path: str) -> bytes:
    depth = draw.choice([100, 1000, 100_000])
    opening, closing = draw.choice([(b"[", b"]"), (b'{"query":', b"}"), (b'{"messages":[', b"]}")])
    return request(path, opening * depth + b"1" + closing * draw.choice([0, depth]))


def of_other_types(draw: random.Random, path: str) -> bytes:
    body = json.loads(json.dumps(GOOD[path]))
    place: Any = body
    while True:
        key = draw.choice(list(place) if isinstance(place, dict) else range(len(place)))
        if not isinstance(place[key], dict | list) or not place[key] or draw.random() < 0.5:
            break
        place = place[key]
    place[key] = draw.choice(ODD)
    return request(path, as_json(body))


def with_more_in_it(draw: random.Random, path: str) -> bytes:
    names = [
        "top_n",
        "top_k",
        "n",
        "stop",
        "tools",
        "crop",
        "max_tokens",
        "temperature",
        "stream",
        "\ud800",
        "x" * 3000,
    ]
    names += [
        "documents",
        "texts",
        "messages",
        "truncate",
        "return_documents",
        "max_tokens_per_doc",
        "seed",
        "logprobs",
    ]
    return request(path, as_json({**GOOD[path], draw.choice(names): draw.choice(ODD)}))


def numbers_without_end(draw: random.Random, path: str) -> bytes:
    number = draw.choice(
        [b"1e999", b"-1e999", b"9" * 6000, b"NaN", b"-Infinity", b"0x10", b"1e-999", b"00", b"1" * 4000]
    )
    return request(path, b'{"query": "q", "documents": ["a"], "texts": ["a"], "top_n": %s}' % number)


def broken_letters(draw: random.Random, path: str) -> bytes:
    letters = draw.choice([rb"\ud800", rb"\udc00\ud800", b"\xff\xfe", b"\xc0\x80", b"\xed\xa0\x80", rb"\u00", b"\x00"])
    return request(path, as_json(GOOD[path]).replace(b"who", letters).replace(b"cats", letters))


def of_other_media(draw: random.Random, path: str) -> bytes:
    media = [b"text/plain", b"multipart/form-data; boundary=x", b"application/x-www-form-urlencoded", b"", b"\xff/;;="]
    media += [b"application/json; charset=utf-16", b"application/json; charset=nonesuch", b"image/png"]
    return request(path, as_json(GOOD[path]), b"Content-Type: " + draw.choice(media))


def in_broken_chunks(draw: random.Random, path: str) -> bytes:
    body = as_json(GOOD[path])
    chunks = [
        b"%x\r\n%s\r\n" % (len(body), body),  # without an end
        b"zz\r\n{}\r\n0\r\n\r\n",
        b"-5\r\n{}\r\n0\r\n\r\n",
        b"ffffffffffffffffffff\r\n{}",
        b"5;" + b"x" * 20_000 + b"\r\n{}",
        b"5\r\n{}\r\n0\r\n\r\n",
    ]
    return request(path, draw.choice(chunks), b"Transfer-Encoding: chunked")


def of_another_length(draw: random.Random, path: str) -> bytes:
    body = as_json(GOOD[path])
    lengths = [len(body) + 50, len(body) - 5, 0, 10**12, 10**30, -1, "1e3", "", "0x10", "5, 5", "٣"]
    return request(path, body, f"Content-Length: {draw.choice(lengths)}".encode())


def of_two_lengths(draw: random.Random, path: str) -> bytes:
    body = as_json(GOOD[path])
    ways = [(b"Content-Length: 4", b"Content-Length: 5"), (b"Content-Length: 4", b"Transfer-Encoding: chunked")]
    ways += [(b"Transfer-Encoding: chunked, identity",), (b"Transfer-Encoding: gzip",)]
    return request(path, body, *draw.choice(ways))


def by_other_methods(draw: random.Random, path: str) -> bytes:
    method = draw.choice(
        [b"GET", b"HEAD", b"PUT", b"DELETE", b"TRACE", b"CONNECT", b"BREW", b"options", b"P\xd6ST", b"X" * 500]
    )
    return request(draw.choice([path, "/", "/metrics", "*"]), as_json(GOOD[path]), method=method)


def elsewhere(draw: random.Random, path: str) -> bytes:
    paths = ["/%00", "/%ff%fe", "/../../etc/passwd", "/page/../../settings.py", "/page/%2e%2e%2fapp.py", "//", "/v1"]
    paths += ["/v1/models/%ed%a0%80", "/v1/models/" + "a/" * 500, "/?" + "a=b&" * 3000, "/" + "x" * 30_000, path + "/"]
    paths += ["/" + "y" * 70_000, "http://evil.example/ready", "/v1/models/%0d%0aSet-Cookie:x", "", "relative"]
    return request(draw.choice(paths), b"", method=draw.choice([b"GET", b"POST"]))


def under_odd_headers(draw: random.Random, path: str) -> bytes:
    odd = [
        b"X-Long: " + b"a" * 70_000,
        b"Authorization: " + b"B" * 9000,
        b"No colon",
        b": empty",
        b"Space : x",
        b"X: \x00",
    ]
    odd += [b"Host: evil.example", b"X-Request-Id: " + b"\xff" * 200, b"Expect: 100-continue", b"Expect: miracles"]
    odd += [b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: x", b"Range: bytes=0-1", b" folded"]
    odd += [b"\r\n".join(b"X-%d: y" % number for number in range(2000)), b"Connection: keep-alive, \xff"]
    return request(path, as_json(GOOD[path]), draw.choice(odd))


def compressed(draw: random.Random, path: str) -> bytes:
    bodies = [gzip.compress(b" " * 10 * MIB), gzip.compress(as_json(GOOD[path])), b"\x1f\x8b\x00"]
    return request(path, draw.choice(bodies), b"Content-Encoding: " + draw.choice([b"gzip", b"br", b"x" * 100]))


def of_another_protocol(draw: random.Random, path: str) -> bytes:
    firsts = [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /\r\n\r\n",
        b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n",
        b"\r\n" * 5000,
    ]
    firsts += [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/1.0\r\n\r\n",
        b"SSH-2.0-x\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
    ]
    return draw.choice(firsts)


KINDS: list[Callable[[random.Random, str], bytes]] = [
    *(noise, noise_as_body, cut_short, deep, of_other_types, with_more_in_it, numbers_without_end, broken_letters),
    *(of_other_media, in_broken_chunks, of_another_length, of_two_lengths, by_other_methods, elsewhere),
    *(under_odd_headers, compressed, of_another_protocol),
]


def answers(address: tuple[str, int], number: int) -> tuple[str, list[int]]:
    """What is sent as number so and so, and the statuses that come back; the sender then waits no longer."""
    draw = random.Random(number)
    kind = KINDS[number % len(KINDS)]
    said = b""
    with socket.create_connection(address, timeout=10) as connection:
        try:
            connection.sendall(kind(draw, draw.choice(list(GOOD))))
            connection.settimeout(0.3 if kind in UNFINISHED else 10)
            while piece := connection.recv(65536):
                said += piece
        except (TimeoutError, ConnectionError):
            pass
    return kind.__name__, [int(status) for status in re.findall(rb"^HTTP/1\.1 (\d{3})", said, re.MULTILINE)]


UNFINISHED = [noise, in_broken_chunks, of_another_length, of_two_lengths, under_odd_headers, of_another_protocol]


def resources(process: int) -> dict[str, int]:
    """Of a process: bytes in memory, open files and sockets, threads."""
    status = Path(f"/proc/{process}/status").read_text()
    found = {name: int(re.search(rf"^{name}:\s+(\d+)", status, re.MULTILINE)[1]) for name in ("VmRSS", "Threads")}  # type: ignore[index]
    return {
        "memory": found["VmRSS"] * 1024,
        "threads": found["Threads"],
        "files": len(os.listdir(f"/proc/{process}/fd")),
    }


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_nothing_malformed_harms_the_server(started: Callable[..., Started]) -> None:
    server = started("--max-body-bytes", "1000000", "--max-new-tokens", "4", "--cache-mib", "0")
    ask = partial(answers, address_of(server.url))
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(ask, range(COUNT, COUNT + WARM_UP)))
        assert httpx.post(f"{server.url}/v1/rerank", json=GOOD["/v1/rerank"]).status_code == 200
        before = resources(server.process.pid)
        told = list(pool.map(ask, range(COUNT * 4 // 5)))
        late = resources(server.process.pid)
        told += pool.map(ask, range(COUNT * 4 // 5, COUNT))
    statuses = Counter((kind, status) for kind, found in told for status in found)
    assert not [seen for seen in statuses if seen[1] >= 500], statuses
    assert sum(1 for _, found in told if found) > COUNT / 2
    best = httpx.post(f"{server.url}/v1/rerank", json=GOOD["/v1/rerank"]).json()["results"][0]
    assert best["index"] == 1
    numbers = httpx.get(f"{server.url}/metrics").text
    assert "qr_requests_in_flight 1.0" in numbers
    until(lambda: resources(server.process.pid)["files"] <= before["files"], 10)
    after = resources(server.process.pid)
    assert after["threads"] <= before["threads"] + 2
    assert min(late["memory"], after["memory"]) - before["memory"] < GROWTH
    assert "internal error" not in server.log.read_text()
