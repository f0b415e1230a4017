"""What is compared by `benchmarks.serving`: servers as processes, and the published procedure behind the same HTTP."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.published import Published
from benchmarks.rank_workload import Workload
from qr_integrations.backend import Backend
from qr_integrations.reranking import Relevance
from qr_integrations.retrieval import HeadSet
from qr_integrations.serving.model_queue import Job, ModelQueue
from qr_integrations.serving.run import serve
from qr_integrations.serving.settings import ServerSettings
from qr_integrations.serving.work import ChatWork, ModelCard, Ranked, RankWork, Said, State

_REPOSITORY = Path(__file__).parents[1]
_CLI = ("-c", "from qr_integrations.cli import main; raise SystemExit(main())")
_SERVE = (*_CLI, "serve", "--model", "qr-mini", "--device", "cpu", "--port", "0")
_STARTING = 120.0  # seconds


@dataclass(frozen=True, slots=True)
class System:
    """A server.

    Attributes:
        name: what it is called.
        command: its command line, for Python.
        documents: what it is asked about, see `benchmarks.serving`.
        threads: torch's, in each of its processes.
        most_clients: that it can serve in reasonable time.
    """

    name: str
    command: tuple[str, ...]
    documents: tuple[str, ...] = ("known", "new")
    threads: int = 1
    most_clients: int = 64

    @property
    def is_block(self) -> bool:
        """Whether documents do not see each other."""
        return "block" in self.command


_BLOCK, _RAY = ("--layout", "block"), ("--ray", "--replicas", "2")
SYSTEMS = (
    System("one process", _SERVE),
    System("one process, two threads", _SERVE, ("new",), threads=2),
    System("one process, block", (*_SERVE, *_BLOCK), ("popular",)),
    System("Ray, two replicas", (*_SERVE, *_RAY)),
    System("Ray, two replicas, block", (*_SERVE, *_RAY, *_BLOCK), ("popular",)),
    System("published procedure", ("-m", "benchmarks.serving_systems"), most_clients=8),
)


@dataclass(frozen=True, slots=True)
class Started:
    """A server that runs."""

    url: str
    process_id: int

    @property
    def cpu_s(self) -> float:
        """Processor seconds of its processes so far; nan where nobody tells."""
        if not Path("/proc").is_dir():
            return float("nan")
        return sum(_ticks(number) for number in _family(self.process_id)) / os.sysconf("SC_CLK_TCK")


@contextmanager
def started(system: System) -> Iterator[Started]:
    """The server, ready to be asked, until the block ends.

    Raises:
        RuntimeError: it did not start.
    """
    threads = {"OMP_NUM_THREADS": str(system.threads), "OMP_WAIT_POLICY": "PASSIVE"}
    process = subprocess.Popen(
        [sys.executable, *system.command],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, **threads},
        cwd=_REPOSITORY,
    )
    try:
        yield Started(_announced(process), process.pid)
    finally:
        process.terminate()
        process.wait(_STARTING)


def _announced(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if " at http://" in line:
            return line.partition(" at ")[2].split()[0]
    raise RuntimeError(f"{process.args!r} ended with status {process.wait()}: run it by hand to see why")


def _family(number: int) -> list[int]:
    """A process and all that it started, and so on."""
    parents = {child: parent for child, parent in _parents()}
    found = [number]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def _parents() -> Iterator[tuple[int, int]]:
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and (fields := _fields(int(folder.name))):
            yield int(folder.name), int(fields[1])


def _ticks(number: int) -> int:
    fields = _fields(number)
    return int(fields[11]) + int(fields[12]) if fields else 0


def _fields(number: int) -> list[str]:
    """Of ``/proc/NUMBER/stat``, from the state on; none if the process is gone."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


class PublishedEngine:
    """Ranks as the published code does: one request after the other, all layers, nothing kept from one to the next."""

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.backend = Backend.load(settings.model, device=settings.device)
        self.heads = HeadSet.resolve(settings.heads, self.backend)
        self.queue = ModelQueue(settings.name, size=settings.queue_size, max_batch=1)
        self._state: State = "loading"

    @property
    def state(self) -> State:
        """Whether there is work to be had."""
        return self._state

    async def models(self) -> tuple[ModelCard, ...]:
        """What is served."""
        return (ModelCard(self.settings.name, True, False, False, self.backend.max_tokens),)

    async def rank(self, work: RankWork) -> Ranked:
        """Rank documents."""
        job = Job("rank", self._rank_all, work, None, time.monotonic() + self.settings.deadline)
        self.queue.submit(job)
        ranked: Ranked = await asyncio.wrap_future(job.result)
        return ranked

    def _rank_all(self, works: Sequence[RankWork]) -> list[Ranked]:
        return [self.ranked(work) for work in works]

    def ranked(self, work: RankWork) -> Ranked:
        """One ranking."""
        scores = Published(Workload(self.backend, work.documents, self.heads, self.heads), self.heads).rank(work.query)
        whole = sum(max(0.0, score) for score in scores) or 1.0
        order = sorted(range(len(scores)), key=lambda index: -scores[index])
        found = [
            Relevance(index, max(0.0, scores[index]) / whole, scores[index], "share", rank, False)
            for rank, index in enumerate(order, start=1)
        ]
        return Ranked(tuple(found), 0)

    async def chat(self, work: ChatWork) -> Said:
        """Nothing is said here."""
        raise NotImplementedError

    def stream(self, work: ChatWork) -> AsyncIterator[str | Said]:
        """Nothing is said here."""
        raise NotImplementedError

    async def start(self) -> None:
        """Give the model the attention that keeps its query vectors."""
        first: Any = Workload(self.backend, (), self.heads, self.heads)
        Published(first, self.heads).install()
        self._state = "ready"

    async def stop(self, grace: float) -> None:
        """Finish what has begun."""
        self._state = "draining"
        await asyncio.to_thread(self.queue.stop, grace)


def main() -> None:
    """Serve the published procedure."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    settings = ServerSettings(model="qr-mini", device="cpu", port=0)
    serve(settings, engine=PublishedEngine(settings), announce=lambda url: print(f"serving at {url}", flush=True))


if __name__ == "__main__":
    main()
