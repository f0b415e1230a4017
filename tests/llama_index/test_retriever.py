"""`QRRetriever`: all nodes are read, none has an embedding."""

import copy
import pickle
import random
import time
from typing import Any

import pytest
from llama_index.core import MockEmbedding, StorageContext, SummaryIndex, VectorStoreIndex
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload, LlamaDebugHandler
from llama_index.core.llms import MockLLM
from llama_index.core.prompts import PromptTemplate
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import Document, MetadataMode, NodeRelationship, QueryBundle, TextNode
from llama_index.core.storage.docstore import SimpleDocumentStore

DRACULA = "who wrote dracula"


@pytest.fixture
def inner(nodes: Any) -> list[TextNode]:
    """The four nodes without scores."""
    return [scored.node for scored in nodes]


@pytest.fixture
def contents(inner: Any) -> list[str]:
    return [node.get_content(MetadataMode.EMBED) for node in inner]


def test_it_is_a_retriever_with_nothing_left_abstract() -> None:
    from qr_integrations.llama_index import QRRetriever

    assert issubclass(QRRetriever, BaseRetriever)
    assert not getattr(QRRetriever, "__abstractmethods__", None)


def test_order_and_scores_are_those_of_the_reranker(
    inner: Any, contents: Any, queries: Any, ranked: Any, places: Any
) -> None:
    from qr_integrations.llama_index import QRRetriever

    retriever = QRRetriever(inner, model="qr-mini")
    for query in queries:
        assert places(retriever.retrieve(query), inner) == ranked(query, contents)
        assert retriever.retrieve(QueryBundle(query)) == retriever.retrieve(query)
    by_text = QRRetriever(inner, model="qr-mini", metadata_mode=MetadataMode.NONE, heads="all")
    texts = [node.text for node in inner]
    assert places(by_text.retrieve(DRACULA), inner) == ranked(DRACULA, texts, heads="all")


def test_it_finds_what_the_postprocessor_finds(inner: Any, plain: Any, reranker: Any) -> None:
    from qr_integrations.llama_index import QRRetriever

    found = QRRetriever(inner, model="qr-mini", explain=True).retrieve(DRACULA)
    again = reranker.postprocess_nodes(found, query_str=DRACULA)
    assert [scored.node_id for scored in again] == [scored.node_id for scored in found]
    keys = {"qr_score", "qr_score_type", "qr_rank", "qr_truncated", "qr_spans"}
    assert all(set(scored.metadata) - {"file_name", "page", "nested"} == keys for scored in found)


def test_the_nodes_stay_as_they_were(inner: Any) -> None:
    from qr_integrations.llama_index import QRRetriever

    before = [node.model_copy(deep=True) for node in inner]
    given = list(inner)
    retriever = QRRetriever(given, model="qr-mini", explain=True)
    for scored in retriever.retrieve(DRACULA):
        scored.node.metadata["file_name"] = "changed"
        scored.node.text = "changed"
    given.clear()
    assert inner == before == retriever.nodes and len(retriever.retrieve(DRACULA)) == 4


def sources(inner: list[TextNode]) -> dict[str, Any]:
    docstore = SimpleDocumentStore()
    docstore.add_documents(inner)
    vectors = VectorStoreIndex(inner, embed_model=MockEmbedding(embed_dim=4))
    return {"nodes": inner, "docstore": docstore, "index": SummaryIndex(inner), "vectors": vectors}


@pytest.mark.parametrize("source", ["nodes", "docstore", "index", "vectors"])
def test_nodes_come_from_a_list_a_store_or_an_index(inner: Any, contents: Any, ranked: Any, source: str) -> None:
    from qr_integrations.llama_index import QRRetriever

    given = {source.replace("vectors", "index"): sources(inner)[source]}
    found = QRRetriever.from_defaults(**given, model="qr-mini", similarity_top_k=2).retrieve(DRACULA)
    expected = ranked(DRACULA, contents)[:2]
    assert [(scored.node_id, scored.score) for scored in found] == [(inner[i].node_id, s) for i, s in expected]


@pytest.mark.parametrize("names", [[], ["nodes", "index"], ["index", "docstore"], ["nodes", "index", "docstore"]])
def test_exactly_one_source_is_given(inner: Any, names: list[str]) -> None:
    from qr_integrations.errors import InputError
    from qr_integrations.llama_index import QRRetriever

    known = sources(inner)
    with pytest.raises(InputError, match="pass one of nodes"):
        QRRetriever.from_defaults(**{name: known[name] for name in names}, model="qr-mini")


def test_a_store_without_nodes_is_an_error_that_names_the_cure() -> None:
    from qr_integrations.errors import InputError
    from qr_integrations.llama_index import QRRetriever

    for given in ({"docstore": SimpleDocumentStore()}, {"index": SummaryIndex([])}):
        with pytest.raises(InputError, match=r"holds no nodes .* pass nodes=\.\.\., or build the index with"):
            QRRetriever.from_defaults(**given, model="qr-mini")


def test_an_index_brings_its_own_nodes_only(inner: Any) -> None:
    from qr_integrations.llama_index import QRRetriever

    shared = StorageContext.from_defaults()
    one = SummaryIndex(inner[:2], storage_context=shared)
    other = VectorStoreIndex(inner[2:], storage_context=shared, embed_model=MockEmbedding(embed_dim=4))
    for index, expected in ((one, ["a", "b"]), (other, ["c", "d"])):
        retriever = QRRetriever.from_defaults(index=index, model="qr-mini")
        assert sorted(node.node_id for node in retriever.nodes) == expected


@pytest.mark.parametrize(("top_k", "expected"), [(None, 4), (0, 0), (1, 1), (4, 4), (99, 4)])
def test_similarity_top_k_is_how_many_come_back(inner: Any, top_k: int | None, expected: int) -> None:
    from qr_integrations.llama_index import QRRetriever

    everything = QRRetriever(inner, model="qr-mini", similarity_top_k=None).retrieve(DRACULA)
    retriever = QRRetriever(inner, model="qr-mini", similarity_top_k=top_k)
    assert retriever.retrieve(DRACULA) == everything[:expected]
    retriever.similarity_top_k = 2
    assert retriever.retrieve(DRACULA) == everything[:2]


def test_nothing_to_find_loads_no_model(inner: Any) -> None:
    from qr_integrations.llama_index import QRRetriever

    assert QRRetriever([], model="/nowhere/at/all").retrieve(DRACULA) == []
    assert QRRetriever.from_text(" \n ", model="/nowhere/at/all").retrieve(DRACULA) == []
    assert QRRetriever(inner, model="/nowhere/at/all", similarity_top_k=0).retrieve(DRACULA) == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"similarity_top_k": -1}, "similarity_top_k"),
        ({"top_n": 3}, "top_n"),
        ({"chunk": 3}, "chunk"),
        ({"batch_size": 0}, "batch_size"),
    ],
    ids=str,
)
def test_wrong_arguments_are_errors_at_once(inner: Any, wrong: dict[str, Any], message: str) -> None:
    from qr_integrations.llama_index import QRRetriever

    for make in (QRRetriever, lambda nodes, **given: QRRetriever.from_defaults(nodes=nodes, **given)):
        with pytest.raises(ValueError, match=message):
            make(inner, model="qr-mini", **wrong)
    with pytest.raises(ValueError, match=message):
        QRRetriever.from_text("Some text.", model="qr-mini", **wrong)


@pytest.mark.parametrize("query", ["", "  "])
def test_an_empty_query_is_an_error(inner: Any, query: str) -> None:
    from qr_integrations.llama_index import QRRetriever

    with pytest.raises(ValueError, match="query is empty"):
        QRRetriever(inner, model="qr-mini").retrieve(query)


LONG = [
    "The same sentence stands here twice. The same sentence stands here twice. " * 40,
    "A paragraph.\n\nA paragraph.\n\n\n  A paragraph.\r\n\r\n\tA line\nA line\n" * 20,
    "  \n leading and trailing white space \n ",
    "Cafe\u0301 nai\u0308ve 👩‍👩‍👧 🦇 東京都は日本の首都。東京都は日本の首都。 كتب برام " * 30,
    "x" * 5000,
    "word",
]


@pytest.mark.parametrize("overlap", [0, 5])
@pytest.mark.parametrize("text", LONG, ids=range(len(LONG)))
def test_every_piece_knows_its_characters(text: str, overlap: int) -> None:
    from qr_integrations.llama_index import QRRetriever

    nodes = QRRetriever.from_text(text, chunk_size=16, chunk_overlap=overlap, model="qr-mini").nodes
    covered = [False] * len(text)
    last = 0
    for node in nodes:
        assert isinstance(node, TextNode) and node.start_char_idx is not None and node.end_char_idx is not None
        assert node.text == text[node.start_char_idx : node.end_char_idx] == node.text.strip() != ""
        assert node.end_char_idx > last and (overlap or node.start_char_idx >= last)
        last = node.end_char_idx
        covered[node.start_char_idx : node.end_char_idx] = [True] * len(node.text)
    assert all(covered[i] or text[i].isspace() for i in range(len(text)))
    assert len({node.node_id for node in nodes}) == len(nodes)


def test_smaller_pieces_are_more(texts: Any) -> None:
    from qr_integrations.llama_index import QRRetriever

    text = " ".join(texts * 20)
    numbers = [len(QRRetriever.from_text(text, chunk_size=size, model="qr-mini").nodes) for size in (16, 64, 256)]
    assert numbers[0] > numbers[1] > numbers[2] > 1


@pytest.mark.parametrize(("size", "overlap"), [(0, 0), (-1, 0), (8, 8), (8, -1)])
def test_sizes_that_cannot_be_are_errors(size: int, overlap: int) -> None:
    from qr_integrations.llama_index import QRRetriever

    with pytest.raises(ValueError, match="chunk_size"):
        QRRetriever.from_text("Some text.", chunk_size=size, chunk_overlap=overlap, model="qr-mini")


def test_pieces_of_several_documents_know_their_source(texts: Any) -> None:
    from qr_integrations.llama_index import QRRetriever

    vampires = Document(
        id_="vampires",
        text="\n\n".join([texts[1]] * 3),
        metadata={"title": "On vampires", "page": 7},
        excluded_embed_metadata_keys=["page"],
        excluded_llm_metadata_keys=["title"],
    )
    given = [vampires, Document(id_="cats", text="\n\n".join([texts[0]] * 3)), texts[2]]
    retriever = QRRetriever.from_text(given, chunk_size=16, similarity_top_k=3, model="qr-mini")
    for scored in retriever.retrieve(DRACULA):
        node, source = scored.node, scored.node.source_node
        assert source is not None and node.ref_doc_id == source.node_id == "vampires"
        assert source == vampires.as_related_node_info()
        assert node.metadata.items() >= vampires.metadata.items()
        assert node.get_content(MetadataMode.EMBED) == f"title: On vampires\n\n{node.text}"
        assert node.get_content(MetadataMode.LLM) == f"page: 7\n\n{node.text}"
        assert vampires.text[node.start_char_idx : node.end_char_idx] == node.text == texts[1]
    assert NodeRelationship.SOURCE in retriever.nodes[-1].relationships and retriever.nodes[-1].text == texts[2]
    assert vampires.metadata == {"title": "On vampires", "page": 7}


def test_pieces_are_written_in_the_templates_of_their_document(texts: Any) -> None:
    from qr_integrations.llama_index import QRRetriever

    document = Document(
        text=texts[1],
        metadata={"title": "On vampires", "page": 7},
        text_template="{metadata_str} | {content}",
        metadata_template="{value}",
        metadata_separator=";",
    )
    [node] = QRRetriever.from_text(document, model="qr-mini").nodes
    assert node.get_content(MetadataMode.EMBED) == document.get_content(MetadataMode.EMBED)


def test_spans_and_pieces_together_point_into_the_text(texts: Any) -> None:
    from qr_integrations.llama_index import QRRetriever

    text = "\n\n".join([*texts * 3, "It was Bram Stoker who wrote Dracula.", *texts[:1] * 9])
    retriever = QRRetriever.from_text(text, chunk_size=24, model="qr-mini", explain=True)
    found = retriever.retrieve(DRACULA)
    assert found[0].metadata["qr_spans"]
    for scored in found:
        for span in scored.metadata["qr_spans"]:
            begin = scored.node.start_char_idx
            assert text[begin + span["start"] : begin + span["end"]] == span["text"]


def test_retrieval_and_its_end_are_announced(inner: Any, events: list[Any]) -> None:
    from qr_integrations.llama_index import QRRetriever

    debug = LlamaDebugHandler(print_trace_on_end=False)
    retriever = QRRetriever(inner, model="qr-mini", callback_manager=CallbackManager([debug]))
    found = retriever.retrieve(DRACULA)
    [(start, end)] = debug.get_event_pairs(CBEventType.RETRIEVE)
    assert start.payload == {EventPayload.QUERY_STR: DRACULA} and end.payload == {EventPayload.NODES: found}
    assert [event.class_name() for event in events] == ["RetrievalStartEvent", "RetrievalEndEvent"]
    assert events[1].nodes == found


async def test_async_is_the_same(inner: Any) -> None:
    from qr_integrations.llama_index import QRRetriever

    retriever = QRRetriever(inner, model="qr-mini")
    assert await retriever.aretrieve(DRACULA) == retriever.retrieve(DRACULA)


def test_the_event_loop_goes_on_meanwhile(texts: Any, heartbeat: Any) -> None:
    from qr_integrations.llama_index import QRRetriever

    text = "\n\n".join(texts * 60)
    retriever = QRRetriever.from_text(text, chunk_size=128, model="qr-mini", keep_prefixes=0)
    expected = retriever.retrieve(DRACULA)
    found, ticks, seconds, longest = heartbeat(retriever.aretrieve(DRACULA))
    assert found == expected
    assert ticks > 10 and longest < seconds / 2, (ticks, seconds, longest)


@pytest.mark.parametrize("mode", ["sync", "async"])
async def test_it_serves_a_query_engine_with_a_reranker(inner: Any, events: list[Any], mode: str) -> None:
    from qr_integrations.llama_index import QRRerank, QRRetriever

    retriever = QRRetriever.from_defaults(index=SummaryIndex(inner), similarity_top_k=3, model="qr-mini")
    rerank = QRRerank(model="qr-mini", top_n=1, keep_retrieval_score=True)
    engine = RetrieverQueryEngine.from_args(retriever, llm=MockLLM(), node_postprocessors=[rerank])
    response = engine.query(DRACULA) if mode == "sync" else await engine.aquery(DRACULA)
    [source] = response.source_nodes
    assert source.node_id == "b" and "Bram Stoker" in str(response) and "qr_score" not in str(response)
    assert source.metadata["retrieval_score"] == pytest.approx(retriever.retrieve(DRACULA)[0].score, abs=1e-6)
    names = ["RetrievalStartEvent", "RetrievalEndEvent", "ReRankStartEvent", "ReRankEndEvent"]
    assert [event.class_name() for event in events][:4] == names


def test_a_hundred_thousand_words_are_searched_in_several_prompts() -> None:
    from qr_integrations.llama_index import QRRetriever

    words = ["the", "old", "cat", "sat", "on", "a", "red", "mat", "and", "went", "to", "sleep", "by", "the", "river"]
    draw = random.Random(0)
    filler = " ".join(f"{' '.join(draw.choices(words, k=12))}." for _ in range(100_000 // 12))
    needle = "The password of the lighthouse is marigold."
    place = filler.index(". ", len(filler) * 2 // 3) + 2
    text = filler[:place] + needle + " " + filler[place:]
    retriever = QRRetriever.from_text(text, model="qr-mini", max_context_tokens=2048, explain=True)
    began = time.perf_counter()
    found = retriever.retrieve("what is the password of the lighthouse")
    assert len(text.split()) > 99_000 and len(retriever.nodes) > 300
    assert time.perf_counter() - began < 120  # it takes seconds
    assert needle in found[0].text and not any(needle in scored.text for scored in found[1:])
    assert text[found[0].node.start_char_idx : found[0].node.end_char_idx] == found[0].text
    assert any("password" in span["text"] for span in found[0].metadata["qr_spans"])


def test_a_pickle_is_small_and_retrieves_the_same(qr_mini: Any, inner: Any) -> None:
    from qr_integrations.llama_index import QRRetriever

    for given in ({"model": "qr-mini"}, {"backend": qr_mini}):
        retriever = QRRetriever(inner, similarity_top_k=3, metadata_mode=MetadataMode.NONE, heads="all", **given)
        expected = retriever.retrieve(DRACULA)
        data = pickle.dumps(retriever)
        assert len(data) < 10_000
        again = pickle.loads(data)
        assert again.retrieve(DRACULA) == expected and again.settings.open().backend is qr_mini


def test_a_model_object_of_the_user_cannot_be_pickled_and_says_so(qr_mini: Any, inner: Any) -> None:
    from qr_integrations.backend import Backend
    from qr_integrations.errors import InputError
    from qr_integrations.llama_index import QRRetriever

    mine = Backend(qr_mini.model, qr_mini.tokenizer, name="mine")
    retriever = QRRetriever(inner, backend=mine, heads=[(1, 0)])
    with pytest.raises(InputError, match="'mine' stands around a model object"):
        pickle.dumps(retriever)
    assert copy.deepcopy(retriever).settings.open().backend is mine


def test_a_deep_copy_shares_the_weights_and_not_the_nodes(qr_mini: Any, inner: Any) -> None:
    from qr_integrations.llama_index import QRRetriever

    retriever = QRRetriever(inner, model="qr-mini")
    twin = copy.deepcopy(retriever)
    assert twin.retrieve(DRACULA) == retriever.retrieve(DRACULA)
    assert twin.settings.open().backend is qr_mini and twin.nodes[0] is not retriever.nodes[0]


def test_the_prompt_can_be_read_and_changed(inner: Any, contents: Any, ranked: Any, places: Any) -> None:
    from qr_integrations.errors import InputError
    from qr_integrations.llama_index import QRRetriever

    retriever = QRRetriever(inner, model="qr-mini")
    assert set(retriever.get_prompts()) == {"qr_prompt"}
    retriever.update_prompts({"qr_prompt": PromptTemplate("Which one answers this?\n\n{query_str}")})
    expected = ranked(DRACULA, contents, prompt="Which one answers this?\n\n{query}")
    assert places(retriever.retrieve(DRACULA), inner) == expected
    with pytest.raises(InputError, match="no place for the query"):
        retriever.update_prompts({"qr_prompt": PromptTemplate("Which one?")})
    assert places(retriever.retrieve(DRACULA), inner) == expected
