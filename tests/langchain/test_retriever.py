"""`QRRetriever`: all documents are read, and it behaves like any other LangChain retriever."""

import asyncio
import copy
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.language_models import FakeListChatModel
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import ConfigurableField, RunnableLambda, RunnablePassthrough

KEYS = {"relevance_score", "qr_score", "qr_score_type", "qr_rank", "qr_truncated"}


@pytest.fixture
def retriever(qr_mini: Any, texts: list[str]) -> Any:
    """Over the four texts, ids "a" to "d"."""
    from qr_integrations.langchain import QRRetriever

    return QRRetriever.from_texts(texts, ids=list("abcd"), backend=qr_mini, k=4)


def ids(found: list[Document]) -> list[str | None]:
    return [document.id for document in found]


def scores(found: list[Document]) -> list[float]:
    return [document.metadata["relevance_score"] for document in found]


# ---- what is found


def test_it_is_a_retriever_with_nothing_left_to_implement() -> None:
    from qr_integrations.langchain import QRRetriever

    assert issubclass(QRRetriever, BaseRetriever) and not QRRetriever.__abstractmethods__


def test_it_ranks_as_the_core_does(retriever: Any, ranked: Any, queries: list[str], texts: list[str]) -> None:
    for number, query in enumerate(queries):
        found, expected = retriever.invoke(query), ranked(query, texts)
        assert ids(found) == ["abcd"[index] for index, _ in expected] and found[0].id == "abcd"[number]
        assert scores(found) == pytest.approx([score for _, score in expected], abs=1e-6)


def test_what_comes_back_are_copies_with_exactly_these_keys(
    qr_mini: Any, queries: list[str], documents: list[Document]
) -> None:
    from qr_integrations.langchain import QRRetriever

    before = copy.deepcopy(documents)
    own = QRRetriever.from_documents(documents, backend=qr_mini, explain=True)
    for rank, document in enumerate(own.invoke(queries[1]), start=1):
        given = documents["abcd".index(document.id or "")]
        assert document is not given and document.page_content == given.page_content
        assert set(document.metadata) == set(given.metadata) | KEYS | {"qr_spans"}
        assert {key: document.metadata[key] for key in given.metadata} == given.metadata
        assert document.metadata["qr_rank"] == rank and type(document.metadata["relevance_score"]) is float
        assert json.loads(json.dumps(document.metadata)) == document.metadata
    assert documents == before == own.documents


async def test_k_of_the_field_and_of_the_call(qr_mini: Any, queries: list[str], texts: list[str]) -> None:
    from qr_integrations.langchain import QRRetriever

    own = QRRetriever.from_texts(texts, backend=qr_mini, k=2)
    assert len(own.invoke(queries[1])) == 2
    for k, count in ((0, 0), (1, 1), (3, 3), (99, 4), (None, 2)):
        assert len(own.invoke(queries[1], k=k)) == count
        assert len(own.batch(queries[:1], k=k)[0]) == count
    assert QRRetriever.from_texts(texts, backend=qr_mini, k=0).invoke(queries[1]) == []
    for wrong in (lambda: own.invoke("q", k=-1), lambda: QRRetriever.from_texts(texts, backend=qr_mini, k=-1)):
        with pytest.raises(ValueError, match="k"):
            wrong()


async def test_k_of_the_call_in_async_calls(retriever: Any, queries: list[str]) -> None:
    for k, count in ((0, 0), (1, 1), (99, 4), (None, 4)):
        assert len(await retriever.ainvoke(queries[1], k=k)) == count
    assert [len(found) for found in await retriever.abatch(queries, k=1)] == [1] * 4
    assert [len(found) async for found in retriever.astream(queries[1], k=1)] == [1]


@pytest.mark.parametrize("query", ["", " \t"])
async def test_an_empty_query_is_a_value_error(retriever: Any, query: str) -> None:
    with pytest.raises(ValueError, match="query is empty"):
        retriever.invoke(query)
    with pytest.raises(ValueError, match="query is empty"):
        await retriever.ainvoke(query)


def test_a_threshold_may_leave_nothing(qr_mini: Any, texts: list[str]) -> None:
    from qr_integrations.langchain import QRRetriever

    assert QRRetriever.from_texts(texts, backend=qr_mini, score_threshold=5.0).invoke("hello") == []


# ---- making one


def test_from_texts_takes_metadata_and_ids(qr_mini: Any, queries: list[str], texts: list[str]) -> None:
    from qr_integrations.langchain import QRRetriever

    metadatas = [{"n": n} for n in range(4)]
    own = QRRetriever.from_texts(texts, metadatas=metadatas, ids=["w", "x", "y", "z"], backend=qr_mini, k=1)
    (found,) = own.invoke(queries[1])
    assert found.id == "x" and found.metadata["n"] == 1 and found.page_content == texts[1]
    assert metadatas == [{"n": n} for n in range(4)]
    plain = QRRetriever.from_texts(tuple(texts), backend=qr_mini)
    assert [document.id for document in plain.documents] == [None] * 4
    assert [document.metadata for document in plain.documents] == [{}] * 4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"texts": ["a", "b"], "ids": ["1"]}, "2 texts and 1 ids: pass one for each"),
        ({"texts": ["a", "b"], "ids": []}, "2 texts and 0 ids"),
        ({"texts": ["a"], "metadatas": [{}, {}]}, "1 texts and 2 metadatas: pass one for each"),
        ({"texts": "a bare string"}, "pass a list"),
        ({"texts": ["a"], "chunk_size": 0}, "chunk_size"),
        ({"texts": ["a"], "chunk_size": 4, "chunk_overlap": 4}, "chunk_overlap"),
        ({"texts": ["a"], "kk": 4}, "kk"),
    ],
    ids=str,
)
def test_texts_that_cannot_be_name_the_cure(given: dict[str, Any], message: str) -> None:
    from qr_integrations.langchain import QRRetriever

    with pytest.raises(ValueError, match=message):
        QRRetriever.from_texts(model="qr-mini", **given)


def test_pieces_know_their_place_also_in_repeated_text(qr_mini: Any, texts: list[str]) -> None:
    from qr_integrations.langchain import QRRetriever

    passage = " ".join(texts)
    long = Document(f"  {passage}\n\n{passage}\n\n{passage}", id="book", metadata={"title": "Twice told"})
    other = Document(passage, id="leaf")
    before = copy.deepcopy([long, other])
    own = QRRetriever.from_documents([long, other], chunk_size=16, chunk_overlap=4, backend=qr_mini, k=99)
    found = own.invoke("who wrote dracula")
    assert len(found) > 12 and len(set(ids(found))) == len(found) and [long, other] == before
    for piece in found:
        source = long if (piece.id or "").startswith("book") else other
        start = piece.metadata["start_index"]
        assert source.page_content[start : start + len(piece.page_content)] == piece.page_content
        assert piece.metadata.get("title") == source.metadata.get("title")
    starts = [piece.metadata["start_index"] for piece in found if (piece.id or "").startswith("book")]
    assert len(set(starts)) == len(starts) and "Dracula" in found[0].page_content
    for source in (long, other):
        places = [
            range(p.metadata["start_index"], p.metadata["start_index"] + len(p.page_content))
            for p in found
            if (p.id or "").startswith(source.id or "")
        ]
        held = set().union(*places)
        assert all(i in held for i, character in enumerate(source.page_content) if not character.isspace())


def test_pieces_of_documents_without_ids_have_none(qr_mini: Any, texts: list[str]) -> None:
    from qr_integrations.langchain import QRRetriever

    own = QRRetriever.from_texts([" ".join(texts)], chunk_size=16, backend=qr_mini)
    assert len(own.documents) > 2 and {document.id for document in own.documents} == {None}


def test_a_long_corpus_is_read_in_several_windows_and_nothing_is_lost(qr_mini: Any) -> None:
    from qr_integrations.langchain import QRRetriever

    towns = ["Vienna", "Budapest", "Lyon", "Porto", "Ghent", "Turin", "Graz", "Bergen", "Tartu", "Cork"]
    corpus = [f"Train {n} goes from {towns[n % 10]} to {towns[n // 10 % 10]} at noon." for n in range(240)]
    corpus[137] = "Dracula was written by Bram Stoker."
    names = [str(n) for n in range(240)]
    own = QRRetriever.from_texts(corpus, ids=names, backend=qr_mini, k=300, max_context_tokens=2048)
    windows: list[tuple[int, int]] = []
    ranking = own.open().rank("who wrote dracula", corpus, progress=lambda *seen: windows.append(seen))
    assert windows[-1][0] == windows[-1][1] > 2
    found = own.invoke("who wrote dracula")
    assert found[0].id == "137" and sorted(ids(found), key=str) == sorted(names)
    assert ids(found) == [str(index) for index in ranking.order]
    assert scores(found) == sorted(scores(found), reverse=True)


def test_progress_is_shown_where_there_are_several_prompts(
    qr_mini: Any, texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    from qr_integrations.langchain import QRRetriever

    QRRetriever.from_texts(texts, backend=qr_mini, show_progress=True, batch_size=2).invoke("who wrote dracula")
    assert "Ranking" in capsys.readouterr().err
    for quiet in ({"batch_size": 2}, {"show_progress": True}):
        QRRetriever.from_texts(texts, backend=qr_mini, **quiet).invoke("who wrote dracula")
        assert "Ranking" not in capsys.readouterr().err


# ---- as a Runnable


async def test_all_ways_to_call_it_agree(retriever: Any, queries: list[str]) -> None:
    expected = [retriever.invoke(query) for query in queries]
    assert [await retriever.ainvoke(query) for query in queries] == expected
    assert retriever.batch(queries) == expected == await retriever.abatch(queries)
    assert list(retriever.stream(queries[1])) == [expected[1]]
    assert [found async for found in retriever.astream(queries[1])] == [expected[1]]


def test_sixteen_at_once_equal_one_after_the_other(
    qr_mini: Any, ranked: Any, queries: list[str], texts: list[str]
) -> None:
    from qr_integrations.langchain import QRRetriever

    own = QRRetriever.from_texts(texts, backend=qr_mini)
    others = [QRRetriever.from_texts(texts[i:] + texts[:i], backend=qr_mini) for i in range(4)]
    expected = [[score for _, score in ranked(query, texts, keep_prefixes=0)] for query in queries]
    for found, numbers in zip(own.batch(queries * 4), expected * 4, strict=True):
        assert scores(found) == pytest.approx(numbers, abs=1e-6)
    jobs = [(other, query) for query in queries for other in others]
    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(lambda job: job[0].invoke(job[1]), jobs))
    for (other, query), found in zip(jobs, results, strict=True):
        rotated = [document.page_content for document in other.documents]
        wanted = ranked(query, rotated, keep_prefixes=0)
        assert [document.page_content for document in found] == [rotated[index] for index, _ in wanted]
        assert scores(found) == pytest.approx([score for _, score in wanted], abs=1e-6)


async def test_async_lets_the_event_loop_go_on(qr_mini: Any, texts: list[str], with_heartbeat: Any) -> None:
    from qr_integrations.langchain import QRRetriever

    own = QRRetriever.from_texts(texts * 20, backend=qr_mini, keep_prefixes=0)
    both = asyncio.gather(own.ainvoke("who wrote dracula"), own.ainvoke("author of frankenstein"))
    found, ticks = await with_heartbeat(both)
    assert ticks > 20 and [answer[0].page_content for answer in found] == [texts[1], texts[3]]


async def test_its_run_is_seen_with_tags_and_ends_also_when_it_fails(
    retriever: Any, queries: list[str], recorder: Any
) -> None:
    tagged = retriever.with_config(tags=["search"], metadata={"who": "me"}, run_name="books")
    found = tagged.invoke(queries[1], config={"callbacks": [recorder]})
    await tagged.ainvoke(queries[1], config={"callbacks": [recorder]})
    assert [(run.name, run.run_type, run.tags) for run in recorder.runs] == [("books", "retriever", ["search"])] * 2
    run = recorder.runs[0]
    assert run.inputs == {"query": queries[1]} and run.outputs["documents"] == found and run.end_time
    assert run.metadata["who"] == "me" and run.metadata["ls_retriever_name"] == "qr"
    recorder.runs.clear()
    with pytest.raises(ValueError, match="query is empty"):
        retriever.invoke(" ", config={"callbacks": [recorder]})
    (failed,) = recorder.runs
    assert failed.name == "QRRetriever" and "query is empty" in failed.error and failed.end_time


async def test_its_events_stream(retriever: Any, queries: list[str]) -> None:
    chain = retriever | RunnableLambda(len)
    events = [event async for event in chain.astream_events(queries[1], version="v2")]
    seen = [event for event in events if event["name"] == "QRRetriever"]
    assert [event["event"] for event in seen] == ["on_retriever_start", "on_retriever_end"]
    assert ids(seen[1]["data"]["output"])[0] == "b"


def test_retries_fallbacks_and_configurable_fields_are_those_of_any_runnable(
    qr_mini: Any, retriever: Any, queries: list[str], texts: list[str], recorder: Any
) -> None:
    from qr_integrations.errors import LoadError
    from qr_integrations.langchain import QRRetriever

    expected = retriever.invoke(queries[1])
    broken = QRRetriever.from_texts(texts, model="no/such-model")
    assert retriever.with_retry().invoke(queries[1]) == expected
    assert broken.with_fallbacks([retriever]).invoke(queries[1]) == expected
    patient = broken.with_retry(
        retry_if_exception_type=(LoadError,), stop_after_attempt=2, wait_exponential_jitter=False
    )
    with pytest.raises(LoadError):
        patient.invoke(queries[1], config={"callbacks": [recorder]})
    assert [run.run_type for run in recorder.runs] == ["chain", "retriever", "retriever"]
    flexible = retriever.configurable_fields(k=ConfigurableField(id="how_many"))
    assert flexible.invoke(queries[1]) == expected
    assert flexible.with_config(configurable={"how_many": 1}).invoke(queries[1]) == expected[:1]


async def test_it_answers_in_a_chain(retriever: Any, queries: list[str], recorder: Any) -> None:
    prompt = ChatPromptTemplate.from_template("Context: {context}\nQuestion: {question}")
    shown: list[str] = []

    def show(found: list[Document]) -> str:
        shown.append("\n".join(document.page_content for document in found[:1]))
        return shown[-1]

    model = FakeListChatModel(responses=["Bram Stoker"])
    chain = {"context": retriever | show, "question": RunnablePassthrough()} | prompt | model | StrOutputParser()
    assert chain.invoke(queries[1], config={"callbacks": [recorder]}) == "Bram Stoker"
    assert await chain.ainvoke(queries[1]) == "Bram Stoker" == "".join(chain.stream(queries[1]))
    assert chain.batch(queries[1:2]) == ["Bram Stoker"]
    assert set(shown) == {retriever.documents[1].page_content}
    run = recorder.named("QRRetriever")
    assert run.parent_run_id is not None and run.trace_id == recorder.runs[0].id
