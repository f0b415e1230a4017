"""`QRRerank` at work: events of both kinds, event loops, threads, one set of weights."""

import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload, LlamaDebugHandler
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.span_handlers import SimpleSpanHandler
from llama_index.core.schema import ImageNode, MetadataMode, NodeWithScore, QueryBundle

DRACULA = "who wrote dracula"
PICTURE = NodeWithScore(node=ImageNode(image_path="cover.png"))


@pytest.fixture
def debug() -> LlamaDebugHandler:
    return LlamaDebugHandler(print_trace_on_end=False)


def test_callbacks_tell_of_the_reranking(nodes: Any, debug: LlamaDebugHandler) -> None:
    from qr_integrations.llama_index import QRRerank

    rerank = QRRerank(model="qr-mini", top_n=2, callback_manager=CallbackManager([debug]))
    found = rerank.postprocess_nodes(nodes, query_str=DRACULA)
    [(start, end)] = debug.get_event_pairs(CBEventType.RERANKING)
    assert start.payload == {
        EventPayload.NODES: nodes,
        EventPayload.MODEL_NAME: "qr-mini",
        EventPayload.QUERY_STR: DRACULA,
        EventPayload.TOP_K: 2,
    }
    assert end.payload == {EventPayload.NODES: found}


@pytest.mark.parametrize(("top_n", "announced"), [(None, 4), (2, 2), (99, 99)])
def test_events_tell_of_the_reranking(
    qr_mini: Any, nodes: Any, events: list[Any], top_n: int | None, announced: int
) -> None:
    from qr_integrations.llama_index import QRRerank

    found = QRRerank(backend=qr_mini, top_n=top_n).postprocess_nodes(nodes, query_str=DRACULA)
    start, end = events
    assert (start.class_name(), end.class_name()) == ("ReRankStartEvent", "ReRankEndEvent")
    assert (start.query, start.nodes, start.model_name) == (QueryBundle(DRACULA), nodes, "qr-mini")
    assert start.top_n == announced and end.nodes == found


@pytest.mark.parametrize(
    ("settings", "picture", "message"),
    [
        ({"model": "qr-mini"}, True, "image without text"),
        ({"model": "qr-mini", "truncation": "error", "max_context_tokens": 16}, False, "the prompt needs"),
        ({"model": "qr-mini", "heads": [(99, 0)]}, False, "has no head"),
        ({"model": "/nowhere/at/all"}, False, "no model folder"),
        ({"model": "qr-mini", "normalize": lambda scores: None}, False, "normalize returned None"),
    ],
    ids=["image", "window", "heads", "model", "normalize"],
)
def test_what_was_announced_ends_also_when_it_fails(
    nodes: Any, debug: LlamaDebugHandler, events: list[Any], settings: Any, picture: bool, message: str
) -> None:
    from qr_integrations.errors import QRError
    from qr_integrations.llama_index import QRRerank

    rerank = QRRerank(**settings, callback_manager=CallbackManager([debug]))
    with pytest.raises(QRError, match=message):
        rerank.postprocess_nodes([*nodes, PICTURE] if picture else nodes, query_str=DRACULA)
    assert [event.class_name() for event in events] == ["ReRankStartEvent", "ReRankEndEvent"]
    assert events[1].nodes == []
    [(_, end)] = debug.get_event_pairs(CBEventType.RERANKING)
    assert isinstance(end.payload[EventPayload.EXCEPTION], QRError)


def test_nothing_is_announced_where_nothing_is_ranked(nodes: Any, debug: LlamaDebugHandler, events: list[Any]) -> None:
    from qr_integrations.llama_index import QRRerank

    rerank = QRRerank(model="qr-mini", callback_manager=CallbackManager([debug]))
    rerank.postprocess_nodes([], query_str=DRACULA)
    with pytest.raises(ValueError, match="Missing query bundle"):
        rerank.postprocess_nodes(nodes)
    assert events == [] and debug.get_events(CBEventType.RERANKING) == []


def test_the_work_is_a_span_of_the_trace(reranker: Any, nodes: Any) -> None:
    handlers = get_dispatcher().span_handlers
    spans = SimpleSpanHandler()
    handlers.append(spans)
    try:
        reranker.postprocess_nodes(nodes, query_str=DRACULA)
    finally:
        handlers.remove(spans)
    assert [span.id_.split("-")[0] for span in spans.completed_spans] == ["QRRerank._postprocess_nodes"]


async def test_async_is_the_same(reranker: Any, nodes: Any, events: list[Any]) -> None:
    expected = reranker.postprocess_nodes(nodes, query_str=DRACULA)
    assert await reranker.apostprocess_nodes(nodes, query_str=DRACULA) == expected
    assert await reranker.apostprocess_nodes(nodes, query_bundle=QueryBundle(DRACULA)) == expected
    assert [event.class_name() for event in events] == ["ReRankStartEvent", "ReRankEndEvent"] * 3
    assert await reranker.apostprocess_nodes([], query_str=DRACULA) == []
    with pytest.raises(ValueError, match="Missing query bundle"):
        await reranker.apostprocess_nodes(nodes)


def test_the_event_loop_goes_on_meanwhile(plain: Any, texts: Any, heartbeat: Any) -> None:
    from qr_integrations.llama_index import QRRerank

    given = plain([" ".join(texts * 6)] * 20)
    rerank = QRRerank(model="qr-mini", keep_prefixes=0)
    expected = rerank.postprocess_nodes(given, query_str=DRACULA)
    found, ticks, seconds, longest = heartbeat(rerank.apostprocess_nodes(given, query_str=DRACULA))
    assert found == expected
    assert ticks > 10 and longest < seconds / 2, (ticks, seconds, longest)


def test_many_at_once_on_one_loop_are_not_mixed_up(reranker: Any, nodes: Any, queries: Any) -> None:
    import asyncio

    async def at_once() -> Any:
        return await asyncio.gather(*(reranker.apostprocess_nodes(nodes, query_str=query) for query in queries * 4))

    expected = [reranker.postprocess_nodes(nodes, query_str=query) for query in queries]
    assert_same(asyncio.run(at_once()), expected * 4)


def test_sixteen_threads_get_what_one_gets(qr_mini: Any, nodes: Any, queries: Any, debug: LlamaDebugHandler) -> None:
    from qr_integrations.llama_index import QRRerank

    jobs = [(nodes[shift:] + nodes[:shift], query) for query in queries for shift in range(4)] * 2
    serial = QRRerank(backend=qr_mini, keep_prefixes=0, explain=True)
    expected = [serial.postprocess_nodes(given, query_str=query) for given, query in jobs]
    shared = QRRerank(model="qr-mini", explain=True, callback_manager=CallbackManager([debug]))  # opened by all at once
    with ThreadPoolExecutor(16) as pool:
        assert_same(list(pool.map(lambda job: shared.postprocess_nodes(job[0], query_str=job[1]), jobs)), expected)
    counts = Counter(event.id_ for event in debug.get_events(CBEventType.RERANKING))
    assert len(counts) == len(jobs) and set(counts.values()) == {2}


def assert_same(lists: list[Any], expected: list[Any]) -> None:
    """The same nodes, the same spans, scores to a millionth."""
    for found, wanted in zip(lists, expected, strict=True):
        assert [scored.node_id for scored in found] == [scored.node_id for scored in wanted]
        assert [scored.score for scored in found] == pytest.approx([scored.score for scored in wanted], abs=1e-6)
        for one, other in zip(found, wanted, strict=True):
            spans = [[span["text"] for span in scored.metadata.get("qr_spans", [])] for scored in (one, other)]
            assert spans[0] == spans[1]


def test_all_adapters_share_one_set_of_weights(qr_mini: Any, nodes: Any) -> None:
    from qr_integrations.backend import Backend
    from qr_integrations.llama_index import QRRerank, QRRetriever, QRToolSpec

    one, other = QRRerank(model="qr-mini"), QRRerank(model="qr-mini", heads="all", explain=True)
    retriever = QRRetriever([scored.node for scored in nodes], model="qr-mini")
    tools = QRToolSpec(model="qr-mini")
    opened = [
        one.open(),
        other.open(),
        retriever.settings.open(),
        tools._ranker.open(),
        QRRerank(backend=qr_mini).open(),
    ]
    assert {id(reranker.backend) for reranker in opened} == {id(qr_mini)} == {id(Backend.load("qr-mini"))}


def test_an_adapter_opens_its_model_once(nodes: Any) -> None:
    from qr_integrations.llama_index import QRRerank

    rerank = QRRerank(model="qr-mini")
    rerank.postprocess_nodes(nodes, query_str=DRACULA)
    assert rerank.open() is rerank.open()


def test_nothing_is_loaded_before_the_first_ranking() -> None:
    from qr_integrations.llama_index import QRRerank, QRRetriever, QRToolSpec

    nowhere: dict[str, Any] = {"model": "/nowhere/at/all"}
    assert QRRerank(**nowhere).get_prompts() and QRRerank(**nowhere).to_json()
    assert QRRetriever.from_text("Some text.", **nowhere).nodes and QRToolSpec(**nowhere).to_tool_list()


def test_a_model_that_was_closed_is_opened_again(tmp_path: Path, nodes: Any, reranker: Any) -> None:
    from qr_integrations.bundled import bundled_path
    from qr_integrations.llama_index import QRRerank

    folder = shutil.copytree(bundled_path("qr-mini"), tmp_path / "mine")
    rerank = QRRerank(model=folder, top_n=None)
    expected = reranker.postprocess_nodes(nodes, query_str=DRACULA)
    for _ in range(2):
        assert rerank.postprocess_nodes(nodes, query_str=DRACULA) == expected
        rerank.open().backend.close()


@pytest.mark.parametrize("mode", ["none", "embed"])
def test_the_mode_of_the_metadata_may_be_given_as_a_word(nodes: Any, mode: str) -> None:
    from qr_integrations.llama_index import QRRerank

    by_word, by_name = QRRerank(model="qr-mini", metadata_mode=mode), QRRerank(model="qr-mini")
    by_name.metadata_mode = MetadataMode(mode)
    expected = by_name.postprocess_nodes(nodes, query_str=DRACULA)
    assert by_word.postprocess_nodes(nodes, query_str=DRACULA) == expected


def test_a_bar_shows_the_prompts(plain: Any, texts: Any, capfd: pytest.CaptureFixture[str]) -> None:
    from qr_integrations.llama_index import QRRerank

    settings: dict[str, Any] = {"model": "qr-mini", "max_context_tokens": 300}
    quiet = QRRerank(**settings).postprocess_nodes(plain(texts * 6), query_str=DRACULA)
    assert "Ranking" not in capfd.readouterr().err
    shown = QRRerank(**settings, show_progress=True).postprocess_nodes(plain(texts * 6), query_str=DRACULA)
    assert shown == quiet and "Ranking: 100%" in capfd.readouterr().err
