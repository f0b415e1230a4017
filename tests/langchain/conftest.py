"""What the tests of the LangChain adapters share: four documents, a reranker to compare with, recorders."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from langchain_core.documents import Document
from langchain_core.tracers.base import BaseTracer
from langchain_core.tracers.schemas import Run

if TYPE_CHECKING:
    from qr_integrations.langchain import QRRerank

TEXTS = [
    "Cats sleep most of the day.",
    "Dracula is an 1897 Gothic novel by the Irish author Bram Stoker.",
    "The Danube flows through Vienna and Budapest.",
    "Frankenstein was written by Mary Shelley.",
]
QUERIES = ["what do cats do", "who wrote dracula", "which river flows through vienna", "author of frankenstein"]


@pytest.fixture
def texts() -> list[str]:
    """Text number i answers query number i."""
    return list(TEXTS)


@pytest.fixture
def queries() -> list[str]:
    return list(QUERIES)


@pytest.fixture
def documents() -> list[Document]:
    """With ids "a" to "d" and metadata that is nested and holds what JSON can hold."""
    return [
        Document(text, id="abcd"[i], metadata={"source": f"{i}.txt", "page": i, "nested": {"tags": [i, "é"]}})
        for i, text in enumerate(TEXTS)
    ]


@pytest.fixture(scope="session")
def reranker(qr_mini: Any) -> "QRRerank":
    """All documents come back. Shared: leave it as it is."""
    from qr_integrations.langchain import QRRerank

    return QRRerank(backend=qr_mini, top_n=None)


@pytest.fixture(scope="session")
def ranked(qr_mini: Any) -> Callable[..., list[tuple[int, float]]]:
    """The numbers to compare with: index and score by `QRHeadReranker`, best first."""
    from qr_integrations import QRHeadReranker

    made: dict[str, Any] = {}

    def rank(query: str, texts: Sequence[str], **options: Any) -> list[tuple[int, float]]:
        options = {"truncation": "head", **options}
        key = repr(options)
        if key not in made:
            made[key] = QRHeadReranker(qr_mini, **options)
        return [(item.index, item.score) for item in made[key].rank(query, list(texts))]

    return rank


class Recorder(BaseTracer):
    """A tracer that keeps every run, in the order they began."""

    def __init__(self) -> None:
        super().__init__(_schema_format="original+chat")
        self.runs: list[Run] = []

    def _on_run_create(self, run: Run) -> None:
        self.runs.append(run)

    def _persist_run(self, run: Run) -> None:
        pass

    def named(self, name: str) -> Run:
        """The only run of that name."""
        (run,) = [run for run in self.runs if run.name == name]
        return run


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def with_heartbeat() -> Callable[[Awaitable[Any]], Awaitable[tuple[Any, int]]]:
    """Await something and count how often the event loop came by meanwhile, every two milliseconds if it can."""

    async def measured(work: Awaitable[Any]) -> tuple[Any, int]:
        ticks = 0

        async def beat() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.002)
                ticks += 1

        heart = asyncio.create_task(beat())
        try:
            result = await work
        finally:
            heart.cancel()
        return result, ticks

    return measured


@pytest.fixture
def in_fresh_python() -> Callable[[str], str]:
    """Run code in a new interpreter that sees the same package as this one; returns what it printed."""

    def run(code: str) -> str:
        import qr_integrations

        package = Path(qr_integrations.__file__).parent
        path = os.pathsep.join([str(package.parent), os.environ.get("PYTHONPATH", "")])
        command, environment = [sys.executable, "-P", "-c", code], {**os.environ, "PYTHONPATH": path}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run
