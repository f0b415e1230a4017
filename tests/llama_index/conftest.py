"""What the tests of the LlamaIndex adapters share: four nodes, a reranker to compare with, recorders."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from io import BytesIO
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events import BaseEvent
from llama_index.core.schema import NodeRelationship, NodeWithScore, RelatedNodeInfo, TextNode
from PIL import Image

if TYPE_CHECKING:
    from qr_integrations.llama_index import QRRerank

SCORES = [0.1, None, 0.9, -3.0]


@pytest.fixture
def nodes(texts: list[str]) -> list[NodeWithScore]:
    """The texts with ids "a" to "d", metadata of which two keys are hidden, a source, and scores or none."""
    return [
        NodeWithScore(
            node=TextNode(
                id_="abcd"[i],
                text=text,
                metadata={"file_name": f"{i}.txt", "page": i, "nested": {"tags": [i, "é"]}},
                excluded_embed_metadata_keys=["page", "nested"],
                excluded_llm_metadata_keys=["file_name"],
                relationships={NodeRelationship.SOURCE: RelatedNodeInfo(node_id="book")},
            ),
            score=SCORES[i],
        )
        for i, text in enumerate(texts)
    ]


@pytest.fixture
def plain() -> Callable[[Sequence[str]], list[NodeWithScore]]:
    """Nodes that hold a text and nothing else, with their places in the list as ids."""
    return lambda texts: [NodeWithScore(node=TextNode(id_=str(i), text=text)) for i, text in enumerate(texts)]


@pytest.fixture(scope="session")
def reranker(qr_mini: Any) -> "QRRerank":
    """All nodes come back. Shared: leave it as it is."""
    from qr_integrations.llama_index import QRRerank

    return QRRerank(backend=qr_mini, top_n=None)


@pytest.fixture(scope="session")
def ranked(ranked: Callable[..., list[tuple[int, float]]]) -> Callable[..., list[Any]]:
    """The same, as ``approx`` pairs."""

    def rank(query: str, texts: Sequence[str], **options: Any) -> list[Any]:
        return [(place, pytest.approx(score, abs=1e-6)) for place, score in ranked(query, texts, **options)]

    return rank


@pytest.fixture
def places() -> Callable[..., list[tuple[int, float | None]]]:
    """Of ranked nodes, the places in the given list and the scores. Ids must differ."""

    def found(ranked: Sequence[NodeWithScore], given: Sequence[NodeWithScore]) -> list[tuple[int, float | None]]:
        known = [node.node_id for node in given]
        return [(known.index(node.node_id), node.score) for node in ranked]

    return found


class Recorder(BaseEventHandler):
    """Keeps the events of a few classes."""

    seen: list[Any]
    names: ClassVar = {"ReRankStartEvent", "ReRankEndEvent", "RetrievalStartEvent", "RetrievalEndEvent"}

    def handle(self, event: BaseEvent, **_: Any) -> None:
        if event.class_name() in self.names:
            self.seen.append(event)


@pytest.fixture
def events() -> Iterator[list[Any]]:
    """The instrumentation events of reranking and retrieval that this test made."""
    handlers = get_dispatcher().event_handlers
    recorder = Recorder(seen=[])
    handlers.append(recorder)
    yield recorder.seen
    handlers.remove(recorder)


@pytest.fixture
def heartbeat() -> Callable[[Awaitable[Any]], Any]:
    """Run something beside a clock that ticks on the event loop: result, ticks, seconds, longest pause."""

    async def beside_a_clock(work: Awaitable[Any]) -> tuple[Any, int, float, float]:
        ticks: list[float] = []

        async def tick() -> None:
            while True:
                ticks.append(time.perf_counter())
                await asyncio.sleep(0.005)

        clock = asyncio.create_task(tick())
        await asyncio.sleep(0)
        result = await work
        ticks.append(time.perf_counter())
        clock.cancel()
        pauses = [after - before for before, after in pairwise(ticks)]
        return result, len(ticks), ticks[-1] - ticks[0], max(pauses)

    return lambda work: asyncio.run(beside_a_clock(work))


@pytest.fixture(scope="session")
def picture() -> Image.Image:
    """A drawn scene."""
    from qr_integrations.evaluation.drawn_world import held_out_scene, render

    return render(held_out_scene(0))


@pytest.fixture(scope="session")
def png(picture: Image.Image) -> bytes:
    """The scene as a file."""
    file = BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def make_llm(qr_mini_vl: Any) -> Callable[..., Any]:
    """A class's LLM around the bundled model, with short answers."""

    def made(name: str = "ViCropLLM", **settings: Any) -> Any:
        from qr_integrations import llama_index

        return getattr(llama_index, name)(backend=qr_mini_vl, **{"max_new_tokens": 4, **settings})

    return made
