"""Many clients at once: nobody waits for ever, nobody gets another's answer, and nothing stays behind.

``QR_TEST_LOAD=256,120`` is for patient people: 256 clients for 120 seconds.
"""

import asyncio
import json
import os
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import httpx
import pytest

CLIENTS, SECONDS = map(int, os.environ.get("QR_TEST_LOAD", "64,4").split(","))
PATIENCE = 60.0  # seconds; who waits longer waits for ever
QUEUE = 12
CACHE_BYTES = 2**21  # the documents of the requests need more
CHAT = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}
NOTES = [f"Note {n}: " + "the river was calm and the boats were late. " * 400 for n in range(8)]


@dataclass(frozen=True)
class Running:
    """A server, and the engine in it."""

    url: str
    engine: Any
    tasks: Callable[[], int]

    @property
    def is_idle(self) -> bool:
        stats = self.engine.stats()
        return not any(stats["queue_depth"].values()) and not any(stats["running"].values())


@pytest.fixture(scope="module")
def running(serving: Any, qr_mini: Any) -> Iterator[Running]:
    from qr_integrations.serving import ServerSettings
    from qr_integrations.serving.engine import LocalEngine

    loops: list[asyncio.AbstractEventLoop] = []

    class Engine(LocalEngine):
        async def start(self) -> None:
            loops.append(asyncio.get_running_loop())
            await super().start()

    settings = ServerSettings(
        model="qr-mini", device="cpu", queue_size=QUEUE, max_batch=4, cache_bytes=CACHE_BYTES, deadline=PATIENCE
    )
    engine = Engine(settings)
    with serving(settings, engine) as url:
        yield Running(url, engine, lambda: len(asyncio.all_tasks(loops[0])))


# ---- what is asked, and what is answered


@dataclass(frozen=True)
class Ask:
    path: str
    body: dict[str, Any]

    @property
    def streams(self) -> bool:
        return bool(self.body.get("stream"))

    @property
    def sent(self) -> bytes:
        return json.dumps(self.body).encode()

    @property
    def request(self) -> bytes:
        """As it goes over the wire."""
        head = f"POST {self.path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        return f"{head}Content-Length: {len(self.sent)}\r\n\r\n".encode() + self.sent


def asks() -> list[Ask]:
    """Rankings of lists of their own, rankings of the same list, and chats."""
    from qr_integrations.bundled import read_detection_lists

    lists = [(one.query, [document.text[:200] for document in one.documents[:5]]) for one in read_detection_lists()[:5]]
    shared = lists[0][1]
    rankings = [
        ask
        for query, texts in [*lists, *((query, shared) for query, _ in lists)]
        for ask in (
            Ask("/v1/rerank", {"query": query, "documents": texts, "explain": True}),
            Ask("/v2/rerank", {"model": "rerank-v3.5", "query": query, "documents": texts, "top_n": 3}),
            Ask("/rerank", {"query": query, "texts": texts, "return_text": True}),
        )
    ]
    said = [[{"role": "user", "content": query}] for query, _ in lists[:2]]
    chats = [{"model": "qr-mini", "messages": messages, "max_tokens": 6} for messages in said]
    return [*rankings, *(Ask(CHAT, {**chat, "stream": stream}) for chat in chats * 2 for stream in (False, True))]


def told(ask: Ask, content: bytes) -> list[tuple[Any, float]]:
    """What counts of an answer, and numbers that may differ by rounding."""
    if ask.streams:
        *events, end = [line.removeprefix("data: ") for line in content.decode().split("\n\n") if line]
        assert end == "[DONE]", events[-1]
        choices = [json.loads(event)["choices"][0] for event in events]
        return [("".join(choice["delta"].get("content", "") for choice in choices), 0.0)]
    answer = json.loads(content)
    if ask.path == CHAT:
        return [(answer["choices"][0]["message"]["content"], 0.0), (answer["usage"]["total_tokens"], 0.0)]
    results = answer if ask.path == "/rerank" else answer["results"]
    places = [(one["index"], [(span["start"], span["end"]) for span in one.get("qr_spans", ())]) for one in results]
    shares = [one.get("relevance_score", one.get("score")) for one in results]
    whole = results[0]["qr_score"] / shares[0] if shares[0] else 0.0  # what shares are shares of
    scores = [one["qr_score"] for one in results]
    return [*zip(places, scores, strict=True), *(("share", whole * share) for share in shares)]


def differences(one: list[tuple[Any, float]], other: list[tuple[Any, float]]) -> list[Any]:
    """What is not the same; numbers may be off by 1e-6."""
    pairs = zip_longest(one, other, fillvalue=(None, 0.0))
    return [(mine, its) for mine, its in pairs if mine[0] != its[0] or abs(mine[1] - its[1]) > 1e-6]


# ---- clients


@dataclass
class Seen:
    """What all clients have seen."""

    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    left: int = 0

    def note(self, ask: Ask, status: int, headers: httpx.Headers, content: bytes, expected: Any) -> None:
        self.statuses[status] += 1
        if status == 200 and (other := differences(told(ask, content), expected)):
            self.wrong.append(f"{ask.path}: {other}")
        if status == 429 and int(headers["retry-after"]) < 1:
            self.wrong.append(f"retry after {headers['retry-after']}")


async def pieces(sent: bytes, pause: float) -> AsyncIterator[bytes]:
    for start in range(0, len(sent), 1 + len(sent) // 5):
        yield sent[start : start + 1 + len(sent) // 5]
        await asyncio.sleep(pause)


async def answered(client: httpx.AsyncClient, ask: Ask, pause: float) -> tuple[int, httpx.Headers, bytes]:
    """Send and read; with a pause between any two pieces, if there is one."""
    content = pieces(ask.sent, pause) if pause else ask.sent
    async with client.stream("POST", ask.path, content=content, headers=JSON) as response:
        read = b""
        async for piece in response.aiter_raw(None if not pause else 512):
            read += piece
            await asyncio.sleep(pause / 10)
        return response.status_code, response.headers, read


async def leave(url: str, ask: Ask, rng: random.Random) -> None:
    """Ask, and go: while sending, while waiting, or after the first bytes of the answer."""
    host, _, port = url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    how = rng.randrange(3)
    writer.write(ask.request[: len(ask.request) // 2] if how == 0 else ask.request)
    await writer.drain()
    if how == 2:
        await reader.read(64)
    else:
        await asyncio.sleep(rng.random() / 5)
    writer.transport.abort()


async def client(url: str, number: int, until: float, known: list[tuple[Ask, Any]], seen: Seen) -> None:
    """One of many: most are quick, some are slow, some go away."""
    rng = random.Random(number)
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, verify=False, trust_env=False) as connection:
        while time.monotonic() < until:
            ask, expected = rng.choice(known)
            started = time.monotonic()
            async with asyncio.timeout(PATIENCE):
                if rng.random() < 0.15:
                    await leave(url, ask, rng)
                    seen.left += 1
                    continue
                status, headers, content = await answered(connection, ask, 0.05 if rng.random() < 0.15 else 0.0)
            seen.note(ask, status, headers, content, expected)
            seen.seconds.append(time.monotonic() - started)
            await asyncio.sleep(0.02 * CLIENTS * rng.random() if status == 429 else 0.0)


def until(true: Callable[[], Any], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    assert true(), f"not after {seconds} seconds"


def open_files() -> int:
    return len(os.listdir("/dev/fd")) if os.path.exists("/dev/fd") else 0


def metric(url: str, name: str) -> float:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))


# ---- tests


@pytest.fixture(scope="module")
def known(running: Running) -> list[tuple[Ask, Any]]:
    """Every request, and what a client is answered who is alone."""
    with httpx.Client(base_url=running.url, timeout=PATIENCE) as alone:
        answers = [(ask, alone.post(ask.path, content=ask.sent, headers=JSON)) for ask in asks()]
    assert {answer.status_code for _, answer in answers} == {200}
    return [(ask, told(ask, answer.content)) for ask, answer in answers]


async def test_all_at_once(running: Running, known: list[tuple[Ask, Any]]) -> None:
    before = open_files(), threading.active_count(), running.tasks()
    seen, end = Seen(), time.monotonic() + SECONDS
    async with asyncio.timeout(SECONDS + PATIENCE), asyncio.TaskGroup() as clients:
        for number in range(CLIENTS):
            clients.create_task(client(running.url, number, end, known, seen))
    assert not seen.wrong, f"{len(seen.wrong)} answers are wrong, such as {seen.wrong[0]}"
    assert set(seen.statuses) == {200, 429} and seen.statuses[200] >= 10 and seen.left
    until(lambda: running.is_idle)
    until(lambda: running.tasks() <= before[2])
    until(lambda: open_files() <= before[0])
    until(lambda: threading.active_count() <= before[1])
    assert metric(running.url, "qr_queue_depth") == 0 and metric(running.url, "qr_model_running") == 0
    assert metric(running.url, "qr_requests_in_flight") == 1  # this one
    stats = running.engine.stats()
    assert 0 < stats["cache_bytes"] <= CACHE_BYTES and max(stats["batches"]) > 1
    print(f"{dict(seen.statuses)}, {seen.left} left, longest {max(seen.seconds):.1f} s, {stats['batches']} batches")


async def test_who_dawdles_holds_up_nobody(running: Running, known: list[tuple[Ask, Any]]) -> None:
    host, _, port = running.url.removeprefix("http://").partition(":")
    ask, expected = known[0]
    dawdlers = [await asyncio.open_connection(host, int(port)) for _ in range(4 * QUEUE)]
    for _, writer in dawdlers:
        writer.write(ask.request[:-1])
    async with httpx.AsyncClient(base_url=running.url, timeout=PATIENCE) as quick:
        status, _, content = await answered(quick, ask, 0.0)
    assert status == 200 and not differences(told(ask, content), expected)
    reader, writer = dawdlers[0]
    writer.write(ask.request[-1:])
    assert (await reader.readline()).split()[1] == b"200"
    for _, writer in dawdlers:
        writer.transport.abort()


def test_a_ranking_that_nobody_waits_for_ends_with_its_chunk(running: Running, lengths_read: list[int]) -> None:
    host, _, port = running.url.removeprefix("http://").partition(":")
    ask = Ask("/v2/rerank", {"query": "boats", "documents": NOTES})
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(ask.request)
        until(lambda: len(lengths_read) >= 2)
    passes = len(lengths_read)
    until(lambda: running.is_idle, 5)
    assert len(lengths_read) <= passes + 2  # one that was running, one that began before anybody could tell
    assert sum(lengths_read) < 10_000  # of more than 30,000


async def test_an_answer_that_nobody_reads_ends_with_its_token(running: Running, lengths_read: list[int]) -> None:
    chat = {"model": "qr-mini", "messages": [{"role": "user", "content": "boats"}], "stream": True}
    ask = Ask(CHAT, {**chat, "max_tokens": 4000, "stop": ["\x00"]})
    gone = metric(running.url, "qr_clients_gone_total")
    async with (
        httpx.AsyncClient(base_url=running.url, timeout=PATIENCE) as listener,
        listener.stream("POST", ask.path, content=ask.sent, headers=JSON) as response,
        aclosing(response.aiter_lines()) as lines,
    ):
        await anext(lines)
    passes = len(lengths_read)
    await asyncio.to_thread(until, lambda: running.is_idle, 5)
    assert len(lengths_read) - passes < 200  # of 4,000
    assert metric(running.url, "qr_clients_gone_total") == gone + 1
