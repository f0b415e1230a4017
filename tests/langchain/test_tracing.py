"""Runs that a tracer sees: ``QRRerank`` under whatever called it, begun and ended, also when it fails."""

from typing import Any

import pytest
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_classic.retrievers.document_compressors import DocumentCompressorPipeline
from langchain_core.callbacks import AsyncCallbackHandler
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.runnables import RunnableLambda
from langchain_core.vectorstores import InMemoryVectorStore


@pytest.fixture
def compression(reranker: Any, documents: list[Document]) -> ContextualCompressionRetriever:
    store = InMemoryVectorStore.from_documents(documents, DeterministicFakeEmbedding(size=8))
    base = store.as_retriever(search_kwargs={"k": 4})
    return ContextualCompressionRetriever(base_compressor=reranker, base_retriever=base)


async def test_it_reranks_what_a_retriever_found(
    compression: ContextualCompressionRetriever, queries: list[str]
) -> None:
    for query, best in zip(queries, "abcd", strict=True):
        found = compression.invoke(query)
        assert found[0].id == best and len(found) == 4 and found == await compression.ainvoke(query)
    assert [found[0].id for found in compression.batch(queries)] == ["a", "b", "c", "d"]


async def test_its_run_stands_under_the_run_of_the_retriever(
    compression: ContextualCompressionRetriever, queries: list[str], recorder: Any
) -> None:
    for call in ("invoke", "ainvoke"):
        recorder.runs.clear()
        if call == "invoke":
            found = compression.invoke(queries[1], config={"callbacks": [recorder]})
        else:
            found = await compression.ainvoke(queries[1], config={"callbacks": [recorder]})
        outer, inner, own = recorder.runs
        assert own is recorder.named("QRRerank") and outer is recorder.named("ContextualCompressionRetriever")
        assert outer.parent_run_id is None and inner.parent_run_id == own.parent_run_id == outer.id
        assert own.trace_id == outer.id and own in outer.child_runs
        assert all(run.end_time and run.error is None for run in recorder.runs)
        assert own.inputs["query"] == queries[1] and len(own.inputs["documents"]) == 4
        assert own.outputs["output"] == found


async def test_a_run_that_fails_ends_with_the_error(
    compression: ContextualCompressionRetriever, reranker: Any, documents: list[Document], recorder: Any
) -> None:
    with pytest.raises(ValueError, match="query is empty"):
        reranker.compress_documents(documents, " ", callbacks=[recorder])
    with pytest.raises(ValueError, match="query is empty"):
        await reranker.acompress_documents(documents, " ", callbacks=[recorder])
    assert [run.name for run in recorder.runs] == ["QRRerank"] * 2
    with pytest.raises(ValueError, match="query is empty"):
        compression.invoke(" ", config={"callbacks": [recorder]})
    failed = [run for run in recorder.runs if run.name in ("QRRerank", "ContextualCompressionRetriever")]
    assert len(failed) == 4 and all("query is empty" in run.error and run.end_time for run in failed)


def test_no_documents_make_no_run(reranker: Any, recorder: Any) -> None:
    assert reranker.compress_documents([], "q", callbacks=[recorder]) == [] and recorder.runs == []


async def test_handlers_that_are_async_are_told_too(
    compression: ContextualCompressionRetriever, queries: list[str]
) -> None:
    told: list[Any] = []

    class Handler(AsyncCallbackHandler):
        async def on_chain_start(self, serialized: Any, inputs: Any, **kwargs: Any) -> None:
            told.append(("start", kwargs["name"], kwargs["run_id"]))

        async def on_chain_end(self, outputs: Any, **kwargs: Any) -> None:
            told.append(("end", outputs[0].id, kwargs["run_id"]))

    await compression.ainvoke(queries[1], config={"callbacks": [Handler()]})
    assert [entry[:2] for entry in told] == [("start", "QRRerank"), ("end", "b")] and told[0][2] == told[1][2]


async def test_inside_a_chain_it_finds_its_parent_by_itself(
    reranker: Any, queries: list[str], documents: list[Document], recorder: Any
) -> None:
    async def later(query: str) -> Any:
        return await reranker.acompress_documents(documents, query)

    chain = RunnableLambda(lambda query: reranker.compress_documents(documents, query), afunc=later, name="outer")
    config: Any = {"callbacks": [recorder], "tags": ["mine"]}
    chain.invoke(queries[1], config=config)
    await chain.ainvoke(queries[1], config=config)
    names = [(run.name, run.parent_run_id) for run in recorder.runs]
    first, second = recorder.runs[0].id, recorder.runs[2].id
    assert names == [("outer", None), ("QRRerank", first), ("outer", None), ("QRRerank", second)]
    assert recorder.runs[1].tags == recorder.runs[3].tags == ["mine"]


def test_a_pipeline_of_compressors_hands_its_callbacks_on(
    reranker: Any, queries: list[str], documents: list[Document], recorder: Any
) -> None:
    pipeline = DocumentCompressorPipeline(transformers=[reranker])
    assert pipeline.compress_documents(documents, queries[1], callbacks=[recorder])[0].id == "b"
    assert recorder.named("QRRerank").outputs["output"][0].id == "b"


def test_as_runnable_is_one_run_of_the_same_name(
    reranker: Any, queries: list[str], documents: list[Document], recorder: Any
) -> None:
    given = {"query": queries[1], "documents": documents}
    reranker.as_runnable().invoke(given, config={"callbacks": [recorder]})
    assert [run.name for run in recorder.runs] == ["QRRerank"]
