"""What the tests of the LangChain adapters share: four documents, a reranker to compare with, recorders."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import pytest
from langchain_core.documents import Document
from langchain_core.tracers.base import BaseTracer
from langchain_core.tracers.schemas import Run

if TYPE_CHECKING:
    from qr_integrations.langchain import QRRerank


@pytest.fixture
def documents(texts: list[str]) -> list[Document]:
    """With ids "a" to "d" and metadata that is nested and holds what JSON can hold."""
    return [
        Document(text, id="abcd"[i], metadata={"source": f"{i}.txt", "page": i, "nested": {"tags": [i, "é"]}})
        for i, text in enumerate(texts)
    ]


@pytest.fixture(scope="session")
def reranker(qr_mini: Any) -> "QRRerank":
    """All documents come back. Shared: leave it as it is."""
    from qr_integrations.langchain import QRRerank

    return QRRerank(backend=qr_mini, top_n=None)


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
