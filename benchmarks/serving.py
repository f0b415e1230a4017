"""How many rankings a server gives per second, and how long one takes: ``python -m benchmarks.serving``.

Questions of the package's sample with 20 passages each (about 2,500 tokens of `qr-mini`), asked over HTTP by 1, 8 and
64 clients at a time, each of which asks again as soon as it is answered. Beside the servers stand the same rankings by
direct calls of the library in one loop, which no server of one thread can beat unless requests share work, and the
published procedure behind the same HTTP: one query at a time, all layers, nothing kept from one request to the next.

"known": all ask about the same 20 passages. "new": nobody has asked about any of the passages before. "popular":
passages drawn by a Zipf law from 1,577, in any order, as in `rag_cache`; the caches have seen other requests before.

The clients are a process of their own, but on the same machine: they take processor time from the servers.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from benchmarks.rag_cache import Request
from benchmarks.rag_cache import requests as popular_requests
from benchmarks.serving_clients import Load, share_below
from benchmarks.serving_systems import SYSTEMS, Started, System, started
from qr_integrations import QRHeadReranker
from qr_integrations.backend import Backend
from qr_integrations.bundled import read_sample
from qr_integrations.retrieval.store import DocumentCache
from qr_integrations.types import Document

_RESULTS = Path(__file__).parent / "results"
_PATH = "/v2/rerank"
_TOGETHER = 16  # as many as a server lets through the model together
_ENOUGH = 600  # requests; who asks more begins again
_PATIENCE = 300.0  # seconds
_BEFORE = 50  # requests that a cache has seen before "popular" ones are measured
_COLUMNS = (
    *("documents", "system", "clients", "requests/s", "/ library", "p50 ms", "p95", "p99"),
    *("processor ms", "found", "requests"),
)
_CLOSE = 1e-3  # of the largest score: as far as the published procedure may be off
_number = count()


def requests_of(documents: str, number: int) -> list[Request]:
    """Requests; in every call other ones, but for the known."""
    sample = read_sample()
    if documents == "popular":
        return popular_requests(number, 20, 1.0, seed=100 + next(_number))
    if documents == "known":
        return [Request(sample[i % len(sample)].question, sample[0].documents) for i in range(number)]
    return [
        Request(one.question, tuple(Document(d.text, f"{d.title} {next(_number)}") for d in one.documents))
        for one in (sample[i % len(sample)] for i in range(number))
    ]


def body(request: Request) -> dict[str, Any]:
    """As a client sends it."""
    documents = [{"title": document.title, "text": document.text} for document in request.documents]
    return {"model": "qr-mini", "query": request.query, "documents": documents, "rank_fields": ["title", "text"]}


# ---- the library


def library(documents: str, backend: Backend, seconds: float, together: int = 1) -> dict[str, Any]:
    """Direct calls in one loop, of `rank` or, for several queries at a time, of `rank_batch`."""
    layout = {"layout": "block" if documents == "popular" else "joint"}
    cache = DocumentCache()
    reranker = QRHeadReranker(backend, refinements=layout, cache=cache)
    for request in popular_requests(_BEFORE, 20, 1.0, seed=2) if documents == "popular" else ():
        reranker.rank(request.query, request.documents)
    asked = requests_of(documents, _ENOUGH)
    reranker.rank(asked[-1].query, asked[-1].documents)
    taken: list[float] = []
    seen = cache.stats()
    begun, cpu = time.perf_counter(), time.process_time()
    while (started_at := time.perf_counter()) < begun + seconds:
        some = [asked[(len(taken) + i) % len(asked)] for i in range(together)]
        reranker.rank_batch([one.query for one in some], [one.documents for one in some])
        taken += [time.perf_counter() - started_at] * together
    wall, cpu = time.perf_counter() - begun, time.process_time() - cpu
    now = cache.stats()
    return {
        "requests": len(taken),
        "rate": len(taken) / wall,
        "hits": _share(now.hits - seen.hits, now.misses - seen.misses),
        **{f"p{share}_s": share_below(taken, share / 100) for share in (50, 95, 99)},
        "cpu_s": cpu / len(taken),
    }


def _share(hits: float, misses: float) -> float | None:
    """Of the documents that the store was asked for; None if it was asked for none."""
    return hits / (hits + misses) if hits + misses else None


# ---- servers


class Clients:
    """A process of clients that does one load after the other."""

    def __init__(self, process: "subprocess.Popen[str]", folder: Path) -> None:
        self._process, self._folder = process, folder

    def ask(
        self, server: Started, asked: Sequence[Request], clients: int, seconds: float, most: int | None = None
    ) -> dict[str, Any]:
        """What they heard, and what it cost the server for each request."""
        bodies = self._folder / "bodies.jsonl"
        bodies.write_text("".join(json.dumps(body(request)) + "\n" for request in asked), encoding="utf-8")
        load, cpu = Load(server.url + _PATH, str(bodies), clients, seconds, most), server.cpu_s
        hits, misses = counted(server, "qr_cache_hits_total"), counted(server, "qr_cache_misses_total")
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(asdict(load)) + "\n")
        self._process.stdin.flush()
        heard: dict[str, Any] = json.loads(self._process.stdout.readline())
        cpu = (server.cpu_s - cpu) / heard["requests"]
        hits, misses = counted(server, "qr_cache_hits_total") - hits, counted(server, "qr_cache_misses_total") - misses
        return heard | {"cpu_s": cpu, "hits": _share(hits, misses)}


def counted(server: Started, name: str) -> float:
    """A number of the server's ``/metrics``."""
    with urllib.request.urlopen(f"{server.url}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


@contextmanager
def clients_process() -> Iterator[Clients]:
    """The clients, until the block ends."""
    command = [sys.executable, "-m", "benchmarks.serving_clients"]
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
        )
        try:
            yield Clients(process, Path(folder))
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait()


def check(server: Started, backend: Backend, documents: str, is_block: bool) -> float:
    """How far the server's scores are from the library's, as a share of the largest.

    Raises:
        AssertionError: too far: it does something else, and its times mean nothing.
    """
    request = requests_of(documents, 1)[0]
    sent = urllib.request.Request(
        server.url + _PATH, json.dumps(body(request)).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(sent) as answer:
        theirs = {result["index"]: result["qr_score"] for result in json.load(answer)["results"]}
    reranker = QRHeadReranker(backend, refinements={"layout": "block" if is_block else "joint"})
    ours = {item.index: item.score for item in reranker.rank(request.query, request.documents)}
    off = max(abs(theirs[index] - score) for index, score in ours.items()) / max(map(abs, ours.values()))
    assert off <= _CLOSE, f"the server gives other scores: {off:.1e} of the largest, {_CLOSE:.0e} allowed"
    return off


def served(system: System, backend: Backend, clients: Clients, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A server with all its documents and numbers of clients."""
    with started(system) as server:
        for documents in system.documents:
            off = check(server, backend, documents, system.is_block)
            if documents == "popular":
                clients.ask(server, popular_requests(_BEFORE, 20, 1.0, seed=2), 8, _PATIENCE, _BEFORE)
            for number in (number for number in args.clients if number <= system.most_clients):
                asked = requests_of(documents, _ENOUGH)
                heard = clients.ask(server, asked, number, args.seconds)
                yield {"documents": documents, "system": system.name, "clients": number, "off": off, **heard}


# ---- the report


def row(found: dict[str, Any], floor: float) -> str:
    """A line of the table; `floor` is the library's rate for the same documents."""
    times = (f"{1000 * found[f'p{share}_s']:.0f}" for share in (50, 95, 99))
    cells = [found["documents"], found["system"], str(found["clients"] or ""), f"{found['rate']:.1f}"]
    hits = "" if found["hits"] is None else f"{found['hits']:.0%}"
    cells += [f"{found['rate'] / floor:.2f}", *times, f"{1000 * found['cpu_s']:.0f}", hits, str(found["requests"])]
    return "| " + " | ".join(cells) + " |"


def measured(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Everything, one after the other."""
    backend = Backend.load("qr-mini", device="cpu")
    for documents in ("known", "new", "popular"):
        found = library(documents, backend, args.seconds)
        yield {"documents": documents, "system": "library, one by one", "clients": None, **found}
    together = library("known", backend, args.seconds, _TOGETHER)
    yield {"documents": "known", "system": f"library, {_TOGETHER} together", "clients": None, **together}
    with clients_process() as clients:
        for system in SYSTEMS:
            if args.systems is None or system.name in args.systems:
                yield from served(system, backend, clients, args)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--systems", nargs="+", choices=[system.name for system in SYSTEMS], help="default: all")
    parser.add_argument("--out", type=Path, default=_RESULTS / "serving.json")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    args = _arguments(argv)
    torch.set_num_threads(1)
    machine = measure.machine()
    print(f"{machine['processor']}, {machine['cores']} cores, one thread for each model unless it says otherwise\n")
    print(f"| {' | '.join(_COLUMNS)} |\n{'|---' * len(_COLUMNS)}|")
    rows: list[dict[str, Any]] = []
    for found in measured(args):
        rows.append(found)
        print(row(found, next(one["rate"] for one in rows if one["documents"] == found["documents"])), flush=True)
    settings = {key: value for key, value in vars(args).items() if key != "out"}
    result = {"machine": machine, "settings": settings, "rows": rows}
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
