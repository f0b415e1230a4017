"""`QRRerank`: what comes back, in which order, with which numbers, and that nothing else is touched."""

import copy
import inspect
import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations
from operator import itemgetter
from typing import Any

import numpy as np
import pytest
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.runnables import RunnableLambda, RunnableParallel

KEYS = {"relevance_score", "qr_score", "qr_score_type", "qr_rank", "qr_truncated"}


def scores(found: Sequence[Document]) -> list[float]:
    return [document.metadata["relevance_score"] for document in found]


def ids(found: Sequence[Document]) -> list[str | None]:
    return [document.id for document in found]


def assert_are(found: Sequence[dict[str, Any]], expected: Sequence[tuple[int, float]]) -> None:
    assert [entry["index"] for entry in found] == [index for index, _ in expected]
    assert [entry["relevance_score"] for entry in found] == pytest.approx([score for _, score in expected], abs=1e-6)


# ---- the ranking


def test_it_is_a_document_compressor_with_nothing_left_to_implement() -> None:
    from qr_integrations.langchain import QRRerank

    assert issubclass(QRRerank, BaseDocumentCompressor) and not QRRerank.__abstractmethods__
    for name in ("compress_documents", "acompress_documents"):
        parameters = inspect.signature(getattr(QRRerank, name)).parameters
        assert list(parameters)[1:] == ["documents", "query", "callbacks"]  # pipelines look for the last one by name


def test_it_ranks_as_the_core_does(reranker: Any, ranked: Any, queries: list[str], documents: list[Document]) -> None:
    for number, query in enumerate(queries):
        found = reranker.compress_documents(documents, query)
        expected = ranked(query, [document.page_content for document in documents])
        assert ids(found) == ["abcd"[index] for index, _ in expected] and found[0].id == "abcd"[number]
        assert scores(found) == pytest.approx([score for _, score in expected], abs=1e-6)
        assert_are(reranker.rerank(documents, query), expected)


def test_icr_ranks_as_the_core_does(qr_mini: Any, queries: list[str], texts: list[str]) -> None:
    from qr_integrations import ICRReranker
    from qr_integrations.langchain import QRRerank

    expected = [(item.index, item.score) for item in ICRReranker(qr_mini).rank(queries[1], texts)]
    found = QRRerank(backend=qr_mini, method="icr", top_n=None).rerank(texts, queries[1])
    assert_are(found, expected)


@pytest.mark.parametrize(
    "setting",
    [
        {"heads": [(1, 1), (2, 0)]},
        {"heads": "all"},
        {"instruction": "Find the river."},
        {"null_instruction": 1.0},
        {"calibrated": False},
        {"max_doc_tokens": 8},
        {"max_doc_tokens": 8, "truncation": "chunk"},
        {"batch_size": 2},
        {"keep_prefixes": 0},
    ],
    ids=str,
)
def test_every_setting_reaches_the_core(
    qr_mini: Any, ranked: Any, queries: list[str], texts: list[str], setting: dict[str, Any]
) -> None:
    from qr_integrations.langchain import QRRerank

    found = QRRerank(backend=qr_mini, top_n=None, **setting).rerank(texts, queries[1])
    assert_are(found, ranked(queries[1], texts, **setting))


def test_whatever_the_order_of_the_input_scores_stay_with_their_documents(
    reranker: Any, ranked: Any, queries: list[str], documents: list[Document]
) -> None:
    for order in list(permutations(range(4)))[::5]:
        given = [documents[i] for i in order]
        expected = ranked(queries[2], [document.page_content for document in given])
        found = reranker.compress_documents(given, queries[2])
        assert ids(found) == [given[index].id for index, _ in expected] and found[0].id == "c"
        assert scores(found) == pytest.approx([score for _, score in expected], abs=1e-6)
        assert [document.metadata["source"][0] for document in found] == [str(order[index]) for index, _ in expected]


def test_ties_keep_the_given_order(qr_mini: Any, queries: list[str], documents: list[Document]) -> None:
    from qr_integrations.langchain import QRRerank

    tied = QRRerank(backend=qr_mini, top_n=None, normalize=lambda raw: [0.5] * len(raw))
    assert ids(tied.compress_documents(documents, queries[1])) == ["a", "b", "c", "d"]
    assert ids(tied.compress_documents(documents[::-1], queries[1])) == ["d", "c", "b", "a"]


def test_equal_texts_and_equal_ids_stay_apart(reranker: Any, ranked: Any, queries: list[str], texts: list[str]) -> None:
    given = [Document(texts[i], id="same", metadata={"n": n}) for n, i in enumerate([1, 0, 1])]
    found = reranker.compress_documents(given, queries[1])
    expected = ranked(queries[1], [document.page_content for document in given])
    assert [document.metadata["n"] for document in found] == [index for index, _ in expected]
    assert found[2].metadata["n"] == 1 and ids(found) == ["same"] * 3


def test_one_document_and_odd_documents_are_ranked_not_lost(
    reranker: Any, queries: list[str], texts: list[str]
) -> None:
    (only,) = reranker.compress_documents([Document(texts[1])], queries[1])
    assert only.metadata["qr_rank"] == 1 and only.metadata["relevance_score"] > 0
    odd = [Document(text) for text in ["", " \n", "🙂", "\x00", "a" * 500, texts[1]]]
    found = reranker.compress_documents(odd, queries[1])
    assert sorted(d.page_content for d in found) == sorted(d.page_content for d in odd)
    assert found[0].page_content == texts[1]


# ---- what stands in the documents


def test_the_metadata_keys_are_these_and_no_others(
    reranker: Any, queries: list[str], documents: list[Document]
) -> None:
    for rank, document in enumerate(reranker.compress_documents(documents, queries[1]), start=1):
        said = document.metadata
        assert set(said) == {"source", "page", "nested"} | KEYS
        assert said["relevance_score"] == said["qr_score"] and said["qr_score_type"] == "raw"
        assert said["qr_rank"] == rank and said["qr_truncated"] is False


def test_a_cut_document_says_so(qr_mini: Any, queries: list[str], texts: list[str]) -> None:
    from qr_integrations.langchain import QRRerank

    given = [Document(texts[1] + " and so on" * 40), Document("Short.")]
    found = QRRerank(backend=qr_mini, max_doc_tokens=30).compress_documents(given, queries[1])
    assert {document.page_content[0]: document.metadata["qr_truncated"] for document in found} == {
        "D": True,
        "S": False,
    }


def test_numbers_are_python_floats_and_all_of_it_goes_into_json(
    qr_mini: Any, queries: list[str], documents: list[Document]
) -> None:
    from qr_integrations.langchain import QRRerank

    for normalize in (None, "share", "sigmoid", lambda raw: np.array(raw, dtype=np.float32)):
        own = QRRerank(backend=qr_mini, explain=True, normalize=normalize)
        for document in own.compress_documents(documents, queries[1]):
            assert type(document.metadata["relevance_score"]) is type(document.metadata["qr_score"]) is float
            assert type(document.metadata["qr_rank"]) is int
            assert json.loads(json.dumps(document.metadata)) == document.metadata
        for entry in own.rerank(documents, queries[1]):
            assert type(entry["index"]) is int and type(entry["relevance_score"]) is float


def test_the_score_of_the_retriever_is_kept(reranker: Any, queries: list[str], texts: list[str]) -> None:
    given = [Document(text, metadata={"relevance_score": 0.1 * i}) for i, text in enumerate(texts)]
    for document in reranker.compress_documents(given, queries[1]):
        assert set(document.metadata) == KEYS | {"retrieval_score"}
        assert document.metadata["retrieval_score"] == 0.1 * texts.index(document.page_content)
        assert document.metadata["relevance_score"] == document.metadata["qr_score"]


def test_the_kept_score_is_a_python_float_too(reranker: Any, queries: list[str], texts: list[str]) -> None:
    # vector stores hand out numpy's numbers, which JSON cannot hold
    given = [Document(text, metadata={"relevance_score": np.float32(0.5)}) for text in texts]
    for document in reranker.compress_documents(given, queries[1]):
        assert type(document.metadata["retrieval_score"]) is float
        json.dumps(document.metadata)


def test_a_score_that_is_no_number_is_kept_as_it_is(reranker: Any) -> None:
    (document,) = reranker.compress_documents([Document("A text.", metadata={"relevance_score": "high"})], "q")
    assert document.metadata["retrieval_score"] == "high" and type(document.metadata["relevance_score"]) is float


def test_a_second_ranking_replaces_what_the_first_one_said(
    qr_mini: Any, reranker: Any, queries: list[str], documents: list[Document]
) -> None:
    from qr_integrations.langchain import QRRerank

    first = QRRerank(backend=qr_mini, top_n=None, explain=True).compress_documents(documents, queries[1])
    second = reranker.compress_documents(first, queries[2])
    was = {document.id: document.metadata["relevance_score"] for document in first}
    assert [document.metadata["retrieval_score"] for document in second] == [was[document.id] for document in second]
    assert [document.metadata["qr_rank"] for document in second] == [1, 2, 3, 4] and second[0].id == "c"
    assert all("qr_spans" not in document.metadata for document in second)  # they are those of the other question


def test_ids_text_and_other_metadata_are_kept_and_what_was_given_is_untouched(
    reranker: Any, queries: list[str], documents: list[Document]
) -> None:
    before = copy.deepcopy(documents)
    found = reranker.compress_documents(documents, queries[1])
    assert documents == before and [d.metadata for d in documents] == [d.metadata for d in before]
    by_id = {document.id: document for document in documents}
    for document in found:
        given = by_id[document.id]
        assert document is not given and document.metadata is not given.metadata
        assert document.page_content == given.page_content and document.type == "Document"
        assert {key: document.metadata[key] for key in given.metadata} == given.metadata


def test_a_class_of_your_own_comes_back_as_it_is(reranker: Any, queries: list[str], texts: list[str]) -> None:
    class Page(Document):
        number: int = 0

    found = reranker.compress_documents([Page(text, number=i) for i, text in enumerate(texts)], queries[1])
    assert [type(page) for page in found] == [Page] * 4 and found[0].number == 1


# ---- how many, and on which scale


def test_top_n_returns_the_best_so_many(qr_mini: Any, queries: list[str], documents: list[Document]) -> None:
    from qr_integrations.langchain import QRRerank

    everything = ids(QRRerank(backend=qr_mini, top_n=None).compress_documents(documents, queries[1]))
    assert len(everything) == 4
    for top_n in (0, 1, 3, 99):
        assert (
            ids(QRRerank(backend=qr_mini, top_n=top_n).compress_documents(documents, queries[1])) == everything[:top_n]
        )
    assert len(QRRerank(backend=qr_mini).compress_documents(documents, queries[1])) == 3
    with pytest.raises(ValueError, match="top_n"):
        QRRerank(backend=qr_mini, top_n=-1)


def test_negative_scores_come_back_unless_a_threshold_says_otherwise(
    qr_mini: Any, reranker: Any, queries: list[str], documents: list[Document]
) -> None:
    from qr_integrations.langchain import QRRerank

    numbers = scores(reranker.compress_documents(documents, queries[1]))
    assert numbers == sorted(numbers, reverse=True) and numbers[0] > 0 > numbers[-1]
    for threshold, count in ((0.0, sum(n >= 0 for n in numbers)), (numbers[1], 2), (-1.0, 4), (9.0, 0)):
        strict = QRRerank(backend=qr_mini, top_n=None, score_threshold=threshold)
        assert scores(strict.compress_documents(documents, queries[1])) == pytest.approx(numbers[:count])
        assert len(strict.rerank(documents, queries[1])) == count


def test_normalize_changes_the_score_and_says_so(
    qr_mini: Any, ranked: Any, queries: list[str], documents: list[Document]
) -> None:
    from qr_integrations.langchain import QRRerank

    raw = [score for _, score in ranked(queries[1], [document.page_content for document in documents])]
    whole = sum(score for score in raw if score > 0)
    expected = {
        "share": [max(0.0, score) / whole for score in raw],
        "sigmoid": [1 / (1 + math.exp(-score)) for score in raw],
        "custom": [score * 2 - 1 for score in raw],
    }
    for name, numbers in expected.items():
        normalize: Any = (lambda raw: [score * 2 - 1 for score in raw]) if name == "custom" else name
        found = QRRerank(backend=qr_mini, top_n=None, normalize=normalize).compress_documents(documents, queries[1])
        assert scores(found) == pytest.approx(numbers, abs=1e-6)
        assert {document.metadata["qr_score_type"] for document in found} == {name}
        assert sorted((d.metadata["qr_score"] for d in found), reverse=True) == pytest.approx(raw, abs=1e-6)
    assert sum(expected["share"]) == pytest.approx(1)


def test_the_threshold_and_the_order_go_by_the_normalized_score(
    qr_mini: Any, reranker: Any, queries: list[str], documents: list[Document]
) -> None:
    from qr_integrations.langchain import QRRerank

    half = QRRerank(backend=qr_mini, top_n=None, normalize="sigmoid", score_threshold=0.5)
    raw = reranker.compress_documents(documents, queries[1])
    assert ids(half.compress_documents(documents, queries[1])) == [d.id for d in raw if d.metadata["qr_score"] >= 0]
    upside_down = QRRerank(backend=qr_mini, top_n=2, normalize=lambda raw: [-score for score in raw])
    found = upside_down.compress_documents(documents, queries[1])
    assert ids(found) == ids(raw)[:1:-1] and [d.metadata["qr_rank"] for d in found] == [1, 2]


@pytest.mark.parametrize(
    "normalize",
    [
        lambda raw: raw[1:],
        lambda raw: [math.nan] * len(raw),
        lambda raw: None,
        lambda raw: 1.0,
        lambda raw: ["high"] * len(raw),
        lambda raw: [None] * len(raw),
    ],
    ids=["too few", "nan", "nothing", "one number", "words", "nones"],
)
def test_a_function_that_does_not_normalize_is_named(
    reranker: Any, queries: list[str], texts: list[str], normalize: Callable[[list[float]], Any]
) -> None:
    from qr_integrations.errors import InputError

    with pytest.raises(InputError, match="normalize"):
        reranker.model_copy(update={"normalize": normalize}).rerank(texts, queries[1])


# ---- the other doors


def test_rerank_takes_strings_documents_and_mappings(
    reranker: Any, ranked: Any, queries: list[str], texts: list[str], documents: list[Document]
) -> None:
    expected = ranked(queries[1], texts)
    mixed = [texts[0], documents[1], {"text": texts[2]}, {"page_content": texts[3]}]
    for given in (texts, documents, [{"text": text, "id": 3} for text in texts], mixed, tuple(texts)):
        found = reranker.rerank(given, queries[1])
        assert [set(entry) for entry in found] == [{"index", "relevance_score"}] * 4
        assert_are(found, expected)


def test_rerank_returns_its_own_number_all_or_so_many(qr_mini: Any, queries: list[str], texts: list[str]) -> None:
    from qr_integrations.errors import InputError
    from qr_integrations.langchain import QRRerank

    own = QRRerank(backend=qr_mini)
    for top_n, count in ((-1, 3), (None, 4), (2, 2), (0, 0), (99, 4)):
        assert len(own.rerank(texts, queries[1], top_n=top_n)) == count
    assert len(own.rerank(texts, queries[1])) == 3
    with pytest.raises(InputError, match="top_n is -2"):
        own.rerank(texts, queries[1], top_n=-2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["fine", None], "document #1 has no text"),
        (["fine", b"bytes"], "document #1 has no text"),
        ([{"title": "no text"}], "document #0 has no text"),
        ([{"text": 3}], "document #0 has no text"),
        ("a single text", "pass a list"),
        ({"text": "a single mapping"}, "pass a list"),
        (Document("a single document"), "pass a list"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_rerank_names_what_is_no_document(reranker: Any, given: Any, message: str) -> None:
    from qr_integrations.errors import InputError

    with pytest.raises(InputError, match=message):
        reranker.rerank(given, "who wrote dracula")


@pytest.mark.parametrize("query", ["", "  \n"])
async def test_an_empty_query_is_a_value_error(reranker: Any, documents: list[Document], query: str) -> None:
    with pytest.raises(ValueError, match="query is empty"):
        reranker.compress_documents(documents, query)
    with pytest.raises(ValueError, match="query is empty"):
        await reranker.acompress_documents(documents, query)
    with pytest.raises(ValueError, match="query is empty"):
        reranker.rerank(documents, query)


async def test_as_runnable_goes_into_a_chain(reranker: Any, queries: list[str], documents: list[Document]) -> None:
    look_up = RunnableParallel(query=itemgetter("question"), documents=lambda _: documents)
    chain = look_up | reranker.as_runnable() | RunnableLambda(lambda found: found[0].id)
    asked = [{"question": query} for query in queries]
    assert chain.invoke(asked[1]) == await chain.ainvoke(asked[1]) == "b"
    assert chain.batch(asked) == await chain.abatch(asked) == ["a", "b", "c", "d"]
    alone = reranker.as_runnable().invoke({"query": queries[1], "documents": documents})
    assert alone == reranker.compress_documents(documents, queries[1])
    assert reranker.as_runnable().invoke({"query": queries[1], "documents": []}) == []


async def test_async_gives_the_same_and_lets_the_event_loop_go_on(
    qr_mini: Any, queries: list[str], documents: list[Document], with_heartbeat: Any
) -> None:
    from qr_integrations.langchain import QRRerank

    own, many = QRRerank(backend=qr_mini, keep_prefixes=0), documents * 30
    found, ticks = await with_heartbeat(own.acompress_documents(many, queries[1]))
    assert ticks > 20
    assert found == own.compress_documents(many, queries[1]) and found[0].id == "b"


def test_sixteen_threads_get_the_numbers_of_one(
    qr_mini: Any, ranked: Any, queries: list[str], documents: list[Document]
) -> None:
    from qr_integrations.langchain import QRRerank

    shared = QRRerank(backend=qr_mini, top_n=None)
    jobs = [(documents[shift:] + documents[:shift], query) for query in queries for shift in range(4)] * 2
    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(lambda job: shared.compress_documents(*job), jobs))
    for (given, query), found in zip(jobs, results, strict=True):
        expected = ranked(query, [document.page_content for document in given], keep_prefixes=0)
        assert ids(found) == [given[index].id for index, _ in expected]
        assert scores(found) == pytest.approx([score for _, score in expected], abs=1e-6)
