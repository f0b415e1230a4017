"""What a `DocumentCache` saves where the same passages come back in other combinations, as in a RAG application.

``python -m benchmarks.rag_cache`` ranks a stream of requests over the passages of `benchmarks/nq`: each a question and
20 passages, drawn by a Zipf law and in any order. "steady" is a cache that has seen requests before, "found" one that
holds every passage of the stream, in memory or in a folder. Times are per request; processor time of all threads, and
wall time. "off" is the largest difference to the scores of the same layout without a cache, over its largest score.
"""

import argparse
import gzip
import json
import random
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from qr_integrations import QRHeadReranker
from qr_integrations.backend import Backend
from qr_integrations.retrieval.store import DocumentCache
from qr_integrations.types import Document

_NQ = Path(__file__).parent / "nq"


@dataclass(frozen=True, slots=True)
class Request:
    """A question and what was retrieved for it."""

    query: str
    documents: tuple[Document, ...]


@dataclass(frozen=True, slots=True)
class System:
    """How a stream is ranked. `state` is of the cache: ``"none"``, ``"steady"``, ``"found"`` or ``"disk"``."""

    name: str
    layout: str
    state: str = "none"
    kv_dtype: str = "auto"


SYSTEMS = (
    System("joint", "joint"),
    System("joint, steady cache", "joint", "steady"),
    System("block", "block"),
    System("block, steady cache", "block", "steady"),
    System("block, found in memory", "block", "found"),
    System("block, found in memory, int8", "block", "found", "int8"),
    System("block, found on disk", "block", "disk"),
    System("block, found on disk, int8", "block", "disk", "int8"),
)


@dataclass(frozen=True, slots=True)
class Measured:
    """One system: seconds per request, the share of passages that were found, and what the cache holds."""

    name: str
    cpu_s: float
    wall_s: float
    hits: float
    memory_bytes: int
    disk_bytes: int
    off: float


def requests(count: int, passages: int, exponent: float, seed: int) -> list[Request]:
    """The same on every machine: the corpus in a shuffled order, the k-th passage with weight ``k ** -exponent``."""
    corpus = [Document(entry["text"], entry["title"]) for entry in _lines("corpus")]
    questions = [entry["text"] for entry in _lines("queries")]
    rng = random.Random(0)
    rng.shuffle(corpus)
    weights = [rank**-exponent for rank in range(1, len(corpus) + 1)]
    rng = random.Random(seed)
    return [Request(rng.choice(questions), _drawn(rng, corpus, weights, passages)) for _ in range(count)]


def _lines(name: str) -> list[dict[str, Any]]:
    with gzip.open(_NQ / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _drawn(
    rng: random.Random, corpus: Sequence[Document], weights: Sequence[float], count: int
) -> tuple[Document, ...]:
    places: dict[int, None] = {}
    while len(places) < count:
        places[rng.choices(range(len(corpus)), weights)[0]] = None
    return tuple(corpus[place] for place in places)


@contextmanager
def cache_of(system: System) -> Iterator[DocumentCache | None]:
    """An empty one; None for systems without."""
    if system.state == "none":
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        on_disk = {"max_bytes": 0, "folder": folder} if system.state == "disk" else {}
        yield DocumentCache(**on_disk, kv_dtype=system.kv_dtype)


def run(
    system: System, backend: Backend, stream: Sequence[Request], before: Sequence[Request]
) -> tuple[Measured, list[list[float]]]:
    """Rank the stream, each request once; and the scores, in the order of the documents."""
    with cache_of(system) as cache:
        reranker = QRHeadReranker(backend, refinements={"layout": system.layout}, keep_prefixes=0, cache=cache)
        for request in () if cache is None else before if system.state == "steady" else stream:
            reranker.rank(request.query, request.documents)
        seen = None if cache is None else cache.stats()
        scores: list[list[float]] = [[] for _ in stream]

        def rank(number: int) -> None:
            items = sorted(reranker.rank(stream[number].query, stream[number].documents), key=lambda item: item.index)
            scores[number] = [item.score for item in items]

        job = measure.Job(system.name, rank)
        wall, cpu = zip(*(measure.seconds_of(job, number) for number in range(len(stream))), strict=True)
        now = None if cache is None else cache.stats()
        hits = 0.0
        if seen is not None and now is not None:
            hits = (now.hits - seen.hits) / (now.hits - seen.hits + now.misses - seen.misses)
        held = (0, 0) if now is None else (now.num_bytes, now.disk_bytes)
    return Measured(system.name, statistics.median(cpu), statistics.median(wall), hits, *held, 0.0), scores


def difference(scores: Sequence[Sequence[float]], plain: Sequence[Sequence[float]]) -> float:
    """The largest of all requests, over the largest score."""
    pairs = [pair for some, others in zip(scores, plain, strict=True) for pair in zip(some, others, strict=True)]
    return max(abs(mine - its) for mine, its in pairs) / max(abs(its) for _, its in pairs)


def table(found: Sequence[Measured]) -> str:
    """A line for each system."""
    lines = ["| system | processor ms | wall ms | found | in memory | on disk | off |", "|---|---|---|---|---|---|---|"]
    for one in found:
        sizes = " | ".join(f"{size / 2**20:.1f} MiB" if size else "" for size in (one.memory_bytes, one.disk_bytes))
        lines.append(
            f"| {one.name} | {1000 * one.cpu_s:.0f} | {1000 * one.wall_s:.0f} | {one.hits:.0%} | {sizes} | "
            f"{one.off:.1e} |"
        )
    return "\n".join(lines)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.rag_cache", description=__doc__)
    parser.add_argument("--model", default="qr-mini")
    parser.add_argument("--requests", type=int, default=20)
    parser.add_argument("--before", type=int, default=50, help="requests that a steady cache has seen")
    parser.add_argument("--passages", type=int, default=20, help="of a request")
    parser.add_argument("--exponent", type=float, default=1.0, help="of the Zipf law")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    args = _arguments(argv)
    torch.set_num_threads(args.threads)
    backend = Backend.load(args.model)
    stream = requests(args.requests, args.passages, args.exponent, seed=1)
    before = requests(args.before, args.passages, args.exponent, seed=2)
    found: list[Measured] = []
    plain: dict[str, list[list[float]]] = {}
    for system in SYSTEMS:
        measured, scores = run(system, backend, stream, before)
        off = difference(scores, plain.setdefault(system.layout, scores))
        found.append(Measured(**{**asdict(measured), "off": off}))
        print(table(found[-1:]).splitlines()[-1], flush=True)
    print("", table(found), sep="\n")
    if args.json:
        settings = {key: value for key, value in vars(args).items() if key != "json"}
        result = {"machine": measure.machine(), "settings": settings, "systems": [asdict(one) for one in found]}
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
