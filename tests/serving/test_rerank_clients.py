"""Clients of Cohere, Jina and TEI as they are published, given this server's address."""

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

NO_RETRIES: Any = {"max_retries": 0}


@pytest.fixture(scope="module")
def url(serving: Any, qr_mini: Any) -> Iterator[str]:
    from qr_integrations.serving import ServerSettings

    with serving(ServerSettings(model="qr-mini", device="cpu", max_documents=50)) as url:
        yield url


@pytest.fixture(scope="module")
def question() -> Any:
    from qr_integrations.bundled import read_sample

    return read_sample()[3]


@pytest.fixture(scope="module")
def texts(question: Any) -> list[str]:
    return [document.text for document in question.documents]


@pytest.fixture(scope="module")
def expected(qr_mini: Any, question: Any, texts: list[str]) -> list[tuple[int, float]]:
    """Index and share of the positive attention, by `QRHeadReranker`, best first."""
    from qr_integrations import QRHeadReranker

    ranking = QRHeadReranker(qr_mini).rank(question.question, texts)
    whole = sum(max(0.0, item.score) for item in ranking)
    return [(item.index, max(0.0, item.score) / whole) for item in ranking]


def same(found: Sequence[tuple[int, float]], expected: Sequence[tuple[int, float]]) -> bool:
    return [index for index, _ in found] == [index for index, _ in expected] and [
        score for _, score in found
    ] == pytest.approx([score for _, score in expected], abs=1e-4)


# ---- Cohere's own


def test_cohere_v1(url: str, question: Any, texts: list[str], expected: list[tuple[int, float]]) -> None:
    import cohere

    with cohere.Client("any key", base_url=url) as client:
        told = client.rerank(query=question.question, documents=texts, model="rerank-v3.5", top_n=4)
        bare = client.rerank(
            query=question.question, documents=[{"text": text} for text in texts], return_documents=False
        )

    assert same([(line.index, line.relevance_score) for line in told.results], expected[:4])
    assert [line.document.text for line in told.results if line.document] == [texts[index] for index, _ in expected[:4]]
    assert told.meta is not None and told.meta.billed_units is not None and told.meta.api_version is not None
    assert told.meta.billed_units.search_units == 1 and told.meta.api_version.version == "1"
    assert same([(line.index, line.relevance_score) for line in bare.results], expected)
    assert not any(line.document for line in bare.results)


def test_cohere_v2(url: str, question: Any, texts: list[str], expected: list[tuple[int, float]]) -> None:
    import cohere

    with cohere.ClientV2("any key", base_url=url) as client:
        told = client.rerank(model="rerank-v3.5", query=question.question, documents=texts, priority=0)
        short = client.rerank(model="rerank-v3.5", query=question.question, documents=texts, max_tokens_per_doc=10)

    assert same([(line.index, line.relevance_score) for line in told.results], expected)
    assert told.meta is not None and told.meta.api_version is not None and told.meta.api_version.version == "2"
    fields: list[Any] = [line.model_extra for line in short.results]
    assert all(line["qr_truncated"] for line in fields) and [line["qr_rank"] for line in fields][:2] == [1, 2]


def test_cohere_takes_this_packages_fields_along(url: str) -> None:
    import cohere

    documents = ["Cats sleep most of the day.", "Dracula is a novel by Bram Stoker."]
    more: Any = {"additional_body_parameters": {"explain": True, "max_spans": 1}}
    with cohere.ClientV2("any key", base_url=url) as client:
        told = client.rerank(model="m", query="who wrote dracula", documents=documents, request_options=more)

    best: Any = told.results[0]
    (span,) = best.qr_spans
    assert documents[best.index][span["start"] : span["end"]] == span["text"]


def test_cohere_asynchronously(url: str, question: Any, texts: list[str], expected: list[tuple[int, float]]) -> None:
    import cohere

    async def ask() -> list[Any]:
        async with (
            cohere.AsyncClient("any key", base_url=url) as first,
            cohere.AsyncClientV2("any key", base_url=url) as second,
        ):
            return await asyncio.gather(
                *(client.rerank(model="m", query=question.question, documents=texts) for client in (first, second))
            )

    for told in asyncio.run(ask()):
        assert same([(line.index, line.relevance_score) for line in told.results], expected)


def test_cohere_raises_its_own_errors(url: str) -> None:
    import cohere
    from cohere.core.api_error import ApiError

    with cohere.ClientV2("any key", base_url=url) as client:
        for wrong in ({"query": ""}, {"documents": []}, {"top_n": 0}):
            with pytest.raises(cohere.errors.BadRequestError) as caught:
                client.rerank(**{"model": "m", "query": "who", "documents": ["a"], **wrong})
            assert next(iter(wrong)).rstrip("s") in caught.value.body["message"]
        with pytest.raises(ApiError, match="send them in several requests") as too_many:
            client.rerank(model="m", query="who", documents=["a"] * 51)
    assert too_many.value.status_code == 413


def test_cohere_raises_its_own_errors_when_there_is_no_work_to_be_had(serving: Any) -> None:
    import cohere

    from qr_integrations.serving import ServerSettings
    from qr_integrations.serving.refusals import NotReady, OutOfTime, Overloaded, WorkerLost

    errors = cohere.errors
    refusals = [
        (Overloaded("the queue is full: ask again", retry_after=2.5), errors.TooManyRequestsError),
        (NotReady("the models are being loaded: ask again"), errors.ServiceUnavailableError),
        (WorkerLost("the worker is gone: ask again"), errors.ServiceUnavailableError),
        (OutOfTime("it took too long: ask for less"), errors.GatewayTimeoutError),
    ]
    engine = Refusing()
    with (
        serving(ServerSettings(model="qr-mini"), engine) as url,
        cohere.Client("any key", base_url=url) as first,
        cohere.ClientV2("any key", base_url=url) as second,
    ):
        for refusal, kind in refusals:
            engine.refusal = refusal
            for client in (first, second):
                with pytest.raises(kind) as caught:
                    client.rerank(model="m", query="who", documents=["a"], request_options=NO_RETRIES)
                assert caught.value.body["message"] == str(refusal)
                assert refusal is not refusals[0][0] or caught.value.headers["retry-after"] == "3"


class Refusing:
    """An engine that is ready and refuses everything."""

    state = "ready"
    refusal: Exception = RuntimeError()

    async def start(self) -> None: ...

    async def stop(self, grace: float) -> None: ...

    async def models(self) -> tuple[Any, ...]:
        return ()

    async def rank(self, work: Any) -> Any:
        raise self.refusal

    async def chat(self, work: Any) -> Any:
        raise self.refusal

    def stream(self, work: Any) -> Any:
        raise self.refusal


# ---- LangChain and LlamaIndex


def test_langchains_cohere_rerank(url: str, question: Any, texts: list[str], expected: list[tuple[int, float]]) -> None:
    from langchain_cohere import CohereRerank
    from langchain_core.documents import Document

    compressor = CohereRerank(base_url=url, cohere_api_key="any key", model="rerank-v3.5", top_n=3)
    given = [Document(text, metadata={"place": place}) for place, text in enumerate(texts)]

    with compressor.client:
        kept = compressor.compress_documents(given, question.question)
        whole = compressor.rerank(given, question.question, top_n=None, max_tokens_per_doc=4000)

    assert same([(one.metadata["place"], one.metadata["relevance_score"]) for one in kept], expected[:3])
    assert same([(line["index"], line["relevance_score"]) for line in whole], expected)


def nodes_of(texts: list[str]) -> list[Any]:
    from llama_index.core.schema import NodeWithScore, TextNode

    return [NodeWithScore(node=TextNode(text=text, id_=str(place)), score=0.5) for place, text in enumerate(texts)]


def found(nodes: list[Any]) -> list[tuple[int, float]]:
    return [(int(node.node.node_id), float(node.score)) for node in nodes]


def test_llama_indexs_cohere_rerank(
    url: str, question: Any, texts: list[str], expected: list[tuple[int, float]]
) -> None:
    from llama_index.postprocessor.cohere_rerank import CohereRerank

    rerank = CohereRerank(base_url=url, api_key="any key", top_n=3)

    with rerank._client:
        assert same(found(rerank.postprocess_nodes(nodes_of(texts), query_str=question.question)), expected[:3])


def test_llama_indexs_jina_rerank(url: str, question: Any, texts: list[str], expected: list[tuple[int, float]]) -> None:
    from llama_index.postprocessor.jinaai_rerank import JinaRerank

    rerank = JinaRerank(base_url=f"{url}/v1", api_key="any key", top_n=3)

    with rerank._session:
        assert same(found(rerank.postprocess_nodes(nodes_of(texts), query_str=question.question)), expected[:3])
        with pytest.raises(RuntimeError, match="the query is empty: pass what is asked"):
            rerank.postprocess_nodes(nodes_of(texts), query_str=" ")


def test_llama_indexs_text_embedding_inference(
    url: str, question: Any, texts: list[str], expected: list[tuple[int, float]]
) -> None:
    from llama_index.postprocessor.tei_rerank import TextEmbeddingInference

    rerank = TextEmbeddingInference(base_url=url, auth_token="Bearer any key", top_n=3)

    assert same(found(rerank.postprocess_nodes(nodes_of(texts), query_str=question.question)), expected[:3])
