"""Clients of a server in a process of their own, so that what they cost is not the server's.

``python -m benchmarks.serving_clients`` reads a job a line, as JSON, from standard input, and answers with a line each.
Every client has one connection, asks, reads the answer, and asks again.
"""

import asyncio
import json
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import httpx

_PATIENCE = 300.0  # seconds


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of a server.

    Attributes:
        url: with the path.
        bodies: a file with the JSON of a request in each line, asked from the first on, and again from the first.
        clients: that ask at the same time.
        seconds: after which nobody asks any more; answers that are not there yet are waited for.
        most: requests in all; None: as many as there is time for.
    """

    url: str
    bodies: str
    clients: int
    seconds: float
    most: int | None = None


@dataclass(frozen=True, slots=True)
class Heard:
    """What came back: answers, answers per second, seconds that one took, processor seconds of the clients."""

    requests: int
    rate: float
    mean_s: float
    p50_s: float
    p95_s: float
    p99_s: float
    slowest_s: float
    wall_s: float
    clients_cpu_s: float
    statuses: dict[str, int]


async def ask(load: Load) -> Heard:
    """Let the clients ask."""
    bodies = islice(cycle(Path(load.bodies).read_bytes().splitlines()), load.most)
    seconds: list[float] = []
    statuses: Counter[str] = Counter()
    begun, cpu = time.perf_counter(), time.process_time()
    async with asyncio.TaskGroup() as group:
        for _ in range(load.clients):
            group.create_task(_one(load.url, bodies, begun + load.seconds, seconds, statuses))
    wall = time.perf_counter() - begun
    return Heard(
        requests=len(seconds),
        rate=len(seconds) / wall,
        mean_s=statistics.fmean(seconds),
        p50_s=share_below(seconds, 0.5),
        p95_s=share_below(seconds, 0.95),
        p99_s=share_below(seconds, 0.99),
        slowest_s=max(seconds),
        wall_s=wall,
        clients_cpu_s=time.process_time() - cpu,
        statuses=dict(statuses),
    )


async def _one(url: str, bodies: Iterator[bytes], until: float, seconds: list[float], statuses: Counter[str]) -> None:
    headers = {"Content-Type": "application/json"}
    async with httpx.AsyncClient(timeout=_PATIENCE, verify=False, trust_env=False, headers=headers) as client:
        while (started := time.perf_counter()) < until and (body := next(bodies, None)) is not None:
            answer = await client.post(url, content=body)
            seconds.append(time.perf_counter() - started)
            statuses[str(answer.status_code)] += 1


def share_below(values: Sequence[float], share: float) -> float:
    """The smallest value that is not below `share` of all; of fewer than 100, the 99th percentile is the largest."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def main() -> None:
    """A job a line."""
    for line in sys.stdin:
        given: dict[str, Any] = json.loads(line)
        print(json.dumps(asdict(asyncio.run(ask(Load(**given))))), flush=True)


if __name__ == "__main__":
    main()
