"""The server on Ray: one command, two processes with models, and one of them killed.

Ray and all of its processes run beside the tests, never in them.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest

pytestmark = [
    pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray: pip install 'qr-integrations[ray]'"),
    pytest.mark.skipif(sys.platform != "linux", reason="kills a process as on Linux"),
]
PATIENCE = 300  # seconds; a busy machine takes long to start processes
ONE_COMMAND = """
import json, sys, threading
from ray import serve
from qr_integrations.serving import ServerSettings
from qr_integrations.serving.ray_app import NAME, run

def answer_questions():
    replicas = serve.get_deployment_handle("ModelReplica", NAME)
    for line in sys.stdin:
        told = replicas.broadcast("tell").results(timeout_s=60, return_exceptions=True)
        alive = [one for one in told if not isinstance(one, Exception)]
        sums = {one.replica: [sum(one.stats[name].values()) for name in ("done", "running")] for one in alive}
        print(json.dumps(sums), flush=True)

def announce(url):
    print(json.dumps(url), flush=True)
    threading.Thread(target=answer_questions, daemon=True).start()

settings = ServerSettings(
    model="qr-mini", device="cpu", port=0, max_batch=4, queue_size=6, max_request_tokens=3000, grace=10
)
run(settings, replicas=2, num_cpus=1, announce=announce)
"""
ON_A_CLUSTER = """
import json, os, signal, sys
import ray
from ray import serve
from qr_integrations.serving.ray_app import ClusterSettings, app

ray.init(address="local", include_dashboard=False, num_cpus=2, object_store_memory=10**8, _node_ip_address="127.0.0.1")
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
serve.run(app(ClusterSettings(model="qr-mini", device="cpu", num_cpus=1)))
print(json.dumps(f"http://127.0.0.1:{sys.argv[1]}"), flush=True)
sys.stdin.read()
"""


class Driver:
    """A process that starts Ray and a server; it tells where that listens."""

    def __init__(self, code: str, folder: Path, *arguments: str, **environment: str) -> None:
        import qr_integrations

        package = str(Path(qr_integrations.__file__).parents[1])
        ours = {
            "PYTHONPATH": package,
            "OMP_NUM_THREADS": "1",
            "HOME": str(folder),
            "RAY_ADDRESS": "",
            "RAY_worker_niceness": "0",
        }
        self.log = folder / "log.txt"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", code, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **ours, **environment},
            )
        self.url: str = self._line()

    def _line(self) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line[0] in '"{':  # the others are Ray's own
                return json.loads(line)
        raise AssertionError(f"it ended: {self.log.read_text()[-2000:]}")

    def done(self) -> dict[str, int]:
        """Jobs that each replica has done so far, by machine and number of the process."""
        return {name: done for name, (done, _) in self._told().items()}

    def busy(self) -> list[str]:
        """Replicas that are at work."""
        return [name for name, (_, running) in self._told().items() if running]

    def _told(self) -> dict[str, list[int]]:
        assert self.process.stdin is not None
        print("?", file=self.process.stdin, flush=True)
        told: dict[str, list[int]] = self._line()
        return told

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(PATIENCE)
        finally:
            self.process.kill()
            self.process.communicate()

    def ask(self, query: str, texts: list[str], **more: Any) -> httpx.Response:
        asked = {"model": "any", "query": query, "documents": texts}
        return httpx.post(f"{self.url}/v2/rerank", json=asked, timeout=PATIENCE, **more)


@contextmanager
def driving(*args: Any, **kwargs: Any) -> Iterator[Driver]:
    driver = Driver(*args, **kwargs)
    try:
        yield driver
    finally:
        driver.stop()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    with driving(ONE_COMMAND, tmp_path_factory.mktemp("ray")) as driver:
        yield driver


def scores(response: httpx.Response) -> list[tuple[int, float]]:
    assert response.status_code == 200, response.text
    return [(item["index"], item["qr_score"]) for item in response.json()["results"]]


def same(found: list[tuple[int, float]], expected: list[tuple[int, float]]) -> bool:
    return len(found) == len(expected) and all(
        index == place and score == pytest.approx(value, rel=1e-3, abs=1e-6)
        for (index, score), (place, value) in zip(found, expected, strict=True)
    )


def until(true: Callable[[], Any]) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def test_it_ranks_as_the_reranker_does(
    server: Driver, queries: list[str], texts: list[str], ranked: Callable[..., list[tuple[int, float]]]
) -> None:
    for query in queries:
        assert same(scores(server.ask(query, texts)), ranked(query, texts))


def test_the_same_documents_go_to_the_same_replica(server: Driver, texts: list[str]) -> None:
    chosen = []
    for number in range(16):
        before = server.done()
        for query in ("what do cats do", "who wrote dracula"):
            assert server.ask(query, [*texts, f"Number {number}."]).status_code == 200
        work = {name: count - before[name] for name, count in server.done().items() if count != before[name]}
        assert list(work.values()) == [2]
        chosen += work
    assert len(set(chosen)) == 2, "all lists went to one replica"


def test_metrics_are_those_of_both_replicas(server: Driver) -> None:
    total = sum(server.done().values())

    def counted() -> float:
        lines = httpx.get(f"{server.url}/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("qr_jobs_done_total"))

    assert total > 0
    until(lambda: counted() == total)


def test_refusals_of_a_replica_arrive_as_they_are(server: Driver) -> None:
    response = server.ask("who?", ["many words " * 4000])
    assert response.status_code == 413
    assert "3,000 tokens" in response.json()["message"]


def test_more_than_can_wait_is_refused(server: Driver, queries: list[str], texts: list[str]) -> None:
    with ThreadPoolExecutor(40) as clients:
        responses = list(clients.map(lambda number: server.ask(queries[number % 4], texts * 4), range(40)))
    assert {response.status_code for response in responses} == {200, 429}
    assert all("retry-after" in response.headers for response in responses if response.status_code == 429)


def test_answers_are_streamed(server: Driver) -> None:
    asked = {"model": "qr-mini", "messages": [{"role": "user", "content": "Once upon a time"}], "max_tokens": 8}
    url = f"{server.url}/v1/chat/completions"
    whole = httpx.post(url, json=asked, timeout=PATIENCE).json()["choices"][0]["message"]["content"]
    lines = httpx.post(url, json={**asked, "stream": True}, timeout=PATIENCE).text.splitlines()
    pieces = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    told = [piece["choices"][0]["delta"].get("content") or "" for piece in pieces if piece["choices"]]
    assert "".join(told) == whole
    assert len([piece for piece in told if piece]) > 1


def test_who_goes_away_frees_the_model(server: Driver) -> None:
    def cancelled() -> float:
        lines = httpx.get(f"{server.url}/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("qr_jobs_cancelled_total"))

    before = cancelled()
    asked = {"model": "qr-mini", "messages": [{"role": "user", "content": "Once"}], "max_tokens": 4000}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/chat/completions", json=asked, timeout=0.5)
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json={**asked, "stream": True}, timeout=60) as lines:
        next(lines.iter_lines())
    until(lambda: cancelled() == before + 2)


def test_a_killed_replica_takes_nothing_with_it(
    server: Driver, queries: list[str], texts: list[str], ranked: Callable[..., list[tuple[int, float]]]
) -> None:
    lists = [[*texts, f"Letter {letter}."] for letter in "abcd"]
    expected = {(query, place): ranked(query, given) for query in queries for place, given in enumerate(lists)}
    statuses: list[int] = []
    wrong: list[Any] = []
    streamed: list[str] = []
    enough = threading.Event()

    def ask(number: int) -> None:
        turn = number
        while not enough.is_set():
            query, place = queries[turn % len(queries)], turn // 2 % len(lists)
            response = server.ask(query, lists[place])
            statuses.append(response.status_code)
            if response.status_code == 200:
                wrong.extend([] if same(scores(response), expected[query, place]) else [response.text])
            elif response.status_code not in (429, 503) or "retry-after" not in response.headers:
                wrong.append(response.text)
            turn += 1

    def listen() -> None:
        asked = {"model": "qr-mini", "messages": [{"role": "user", "content": "Once"}], "max_tokens": 4000}
        url = f"{server.url}/v1/chat/completions"
        with httpx.stream("POST", url, json={**asked, "stream": True}, timeout=PATIENCE) as response:
            streamed.extend(line for line in response.iter_lines() if line.startswith("data: "))

    clients = [threading.Thread(target=ask, args=(number,), daemon=True) for number in range(8)]
    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    until(lambda: len(server.busy()) == 1)
    victim = server.busy()[0]
    for client in clients:
        client.start()
    until(lambda: len(statuses) > 20)
    os.kill(int(victim.rpartition(":")[2]), signal.SIGKILL)
    after = len(statuses)
    until(lambda: len(statuses) > after + 60)
    enough.set()
    for client in (*clients, listener):
        client.join(PATIENCE)
        assert not client.is_alive()
    assert not wrong
    assert statuses.count(200) > 0.8 * len(statuses)
    assert json.loads(streamed[-1].removeprefix("data: "))["error"]["code"] == "worker_lost"
    until(lambda: len(now := server.done()) == 2 and victim not in now)
    for given in lists:
        assert same(scores(server.ask(queries[0], given)), ranked(queries[0], given))


def test_it_ends_when_told_to(server: Driver) -> None:
    assert server.stop() == 0
    assert "Traceback" not in server.log.read_text()


def test_http_is_spoken_in_a_replica_of_its_own_on_a_cluster(
    tmp_path: Path, free_port: int, texts: list[str], ranked: Callable[..., list[tuple[int, float]]]
) -> None:
    query = "who wrote dracula"
    with driving(ON_A_CLUSTER, tmp_path, str(free_port), QR_API_KEYS="first, second") as cluster:
        until(lambda: httpx.get(f"{cluster.url}/ready").status_code == 200)
        assert cluster.ask(query, texts).status_code == 401
        response = cluster.ask(query, texts, headers={"Authorization": "Bearer second"})
        assert same(scores(response), ranked(query, texts))


@pytest.fixture
def free_port() -> int:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port
