"""`QRRetriever(indexed=True)` and `QRQueryEngine`: nodes come and go, a folder holds all of it, the model answers."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload, LlamaDebugHandler
from llama_index.core.schema import Document, ImageNode, MetadataMode, NodeRelationship, TextNode

DRACULA = "who wrote dracula"


@pytest.fixture
def inner(nodes: Any) -> list[TextNode]:
    """The four nodes without scores."""
    return [scored.node for scored in nodes]


@pytest.fixture
def make(qr_mini: Any, inner: Any) -> Any:
    """A retriever with an index over the four nodes, or over others."""
    from qr_integrations.llama_index import QRRetriever

    def made(given: Any = None, **settings: Any) -> Any:
        return QRRetriever(inner if given is None else given, backend=qr_mini, indexed=True, **settings)

    return made


def found(retriever: Any, query: str = DRACULA) -> list[tuple[str, Any]]:
    return [(scored.node_id, pytest.approx(scored.score, abs=1e-5)) for scored in retriever.retrieve(query)]


@pytest.mark.parametrize("settings", [{}, {"metadata_mode": MetadataMode.ALL, "refinements": {"layout": "block"}}])
def test_it_finds_what_a_retriever_without_an_index_finds(make: Any, inner: Any, settings: Any, queries: Any) -> None:
    from qr_integrations.llama_index import QRRetriever

    own, plain = make(explain=True, **settings), QRRetriever(inner, model="qr-mini", explain=True, **settings)
    for query in queries:
        assert found(own, query) == found(plain, query)
    spans = [[[p["text"] for p in s.metadata["qr_spans"]] for s in one.retrieve(DRACULA)] for one in (own, plain)]
    assert spans[0] == spans[1] and spans[0][0]


@pytest.mark.parametrize("settings", [{}, {"refinements": {"layout": "block"}}], ids=["joint", "block"])
def test_nodes_come_and_go(make: Any, inner: Any, settings: Any) -> None:
    own = make(inner[:2], **settings)
    assert found(own)[0][0] == "b"
    own.insert_nodes(inner[2:])
    assert found(own) == found(make(**settings))
    assert own.delete_nodes(["b"]) is True and own.delete_nodes(["b", "c"]) is False
    assert found(own) == found(make([inner[0], inner[3]], **settings))
    own.insert_nodes([TextNode(id_="a", text="Dracula is a novel about a vampire.")])
    assert [node.node_id for node in own.nodes] == ["d", "a"] and "vampire" in own.retrieve("vampire novel")[0].text


def test_what_cannot_be_inserted_changes_nothing(make: Any, inner: Any) -> None:
    own = make()
    expected = found(own)
    for wrong, message in [([inner[0], inner[0]], "'a' is there twice"), ([ImageNode(image_path="x.png")], "image")]:
        with pytest.raises(ValueError, match=message):
            own.insert_nodes(wrong)
    with pytest.raises(ValueError, match="pass a list"):
        own.delete_nodes("abc")
    assert own.nodes == inner and found(own) == expected


def test_a_generator_is_a_list_of_nodes(make: Any, inner: Any) -> None:
    own = make(inner[:2])
    own.insert_nodes(node for node in inner[1:])
    assert [node.node_id for node in own.nodes] == ["a", "b", "c", "d"]
    assert own.delete_nodes(name for name in ["a", "x"]) is False
    assert [node.node_id for node in own.nodes] == ["b", "c", "d"]


@pytest.mark.parametrize("is_read", [True, False], ids=["read", "not read yet"])
def test_what_is_no_list_of_nodes_with_text_changes_nothing(make: Any, inner: Any, nodes: Any, is_read: bool) -> None:
    own = make()
    if is_read:
        own.retrieve(DRACULA)
    for wrong in (inner[0], iter(["a text"]), iter(nodes), [ImageNode(image_path="x.png")]):
        with pytest.raises(ValueError, match=r"pass |caption"):
            own.insert_nodes(wrong)
    assert own.nodes == inner and own.retrieve(DRACULA)[0].node_id == "b"


def test_nodes_come_back_as_they_were(make: Any, inner: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from qr_integrations.llama_index import QRRetriever

    book = Document(id_="book", text="Frankenstein was written by Mary Shelley. " * 3, metadata={"title": "Monsters"})
    pieces = QRRetriever.from_text(book, chunk_size=12, model="qr-mini").nodes
    given = [*inner, *pieces, book]
    before = copy.deepcopy(given)
    own = make(given, similarity_top_k=2, metadata_mode=MetadataMode.LLM, title_key="title")
    own.persist(tmp_path / "kept")
    again = QRRetriever.from_persist_dir(tmp_path / "kept")
    assert again.nodes == before == given and [type(node) for node in again.nodes] == [type(node) for node in given]
    assert again.nodes[0].relationships[NodeRelationship.SOURCE].node_id == "book"
    assert (again.similarity_top_k, again.metadata_mode) == (2, MetadataMode.LLM)
    again.settings.show_progress = True
    assert again.retrieve(DRACULA) == own.retrieve(DRACULA) and "Reading" not in capfd.readouterr().err
    data = pickle.dumps(again)
    assert len(data) < 15_000 and pickle.loads(data).retrieve(DRACULA) == own.retrieve(DRACULA)


def test_a_folder_of_one_framework_serves_the_other(
    make: Any, qr_mini: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    langchain = pytest.importorskip("qr_integrations.langchain")
    from qr_integrations.llama_index import QRRetriever

    own = make(similarity_top_k=3)
    own.persist(tmp_path / "nodes")
    there = langchain.QRRetriever.load_local(tmp_path / "nodes", show_progress=True)
    hits = there.invoke(DRACULA)
    assert [(hit.id, hit.metadata["relevance_score"]) for hit in hits] == found(own)
    assert hits[0].metadata["file_name"] == "1.txt" and "_node" not in hits[0].metadata
    there.save_local(tmp_path / "documents")
    back = QRRetriever.from_persist_dir(tmp_path / "documents", show_progress=True)
    assert found(back) == found(own) and back.retrieve(DRACULA)[0].metadata["file_name"] == "1.txt"
    assert "Reading" not in capfd.readouterr().err


def test_a_damaged_folder_is_refused(make: Any, tmp_path: Path) -> None:
    from qr_integrations.errors import LoadError
    from qr_integrations.llama_index import QRRetriever

    make().persist(tmp_path)
    file = tmp_path / "retriever.jsonl"
    file.write_text(file.read_text().replace("Stoker", "Shaker"))
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(LoadError):
            QRRetriever.from_persist_dir(folder)


def test_other_passages_leave_the_index_alone(make: Any, capfd: pytest.CaptureFixture[str]) -> None:
    from qr_integrations.llama_index import QRToolSpec

    own = make(kv_dtype="float32", show_progress=True)
    spec = QRToolSpec(own)
    assert "Bram Stoker" in spec.search_documents(DRACULA, top_k=1)
    capfd.readouterr()
    assert "passage 2" in spec.rerank_passages(DRACULA, ["Cats sleep.", "Dracula was written by Bram Stoker."], top_n=1)
    assert "Bram Stoker" in spec.search_documents(DRACULA, top_k=1) and "Reading" not in capfd.readouterr().err


# ---- answers


@pytest.fixture
def answering(make: Any) -> Any:
    return make(answers=True)


async def test_the_engine_answers_from_the_best_nodes(answering: Any) -> None:
    from qr_integrations import DocumentIndex
    from qr_integrations.llama_index import QRQueryEngine
    from qr_integrations.retrieval.answers import answer

    debug = LlamaDebugHandler(print_trace_on_end=False)
    engine = QRQueryEngine(answering, top_k=2, max_new_tokens=4, callback_manager=CallbackManager([debug]))
    response = engine.query(DRACULA)
    assert [source.node_id for source in response.source_nodes] == [s.node_id for s in answering.retrieve(DRACULA)[:2]]
    assert response.source_nodes[0].score == pytest.approx(answering.retrieve(DRACULA)[0].score, abs=1e-5)
    texts = [node.get_content(MetadataMode.EMBED) for node in answering.nodes]
    index = DocumentIndex.build(texts, answering.settings.open().backend, answers=True)
    expected = answer(index, DRACULA, top_k=2, max_new_tokens=4).answer
    assert response.response == expected.text and response.metadata["usage"]["completion_tokens"] == 4
    assert response.metadata["steps"] == dict(expected.steps) and response.metadata["finish_reason"] == "length"
    again = await engine.aquery(DRACULA)
    assert again.response == response.response and again.source_nodes == response.source_nodes
    [(start, end), _] = debug.get_event_pairs(CBEventType.QUERY)
    assert start.payload[EventPayload.QUERY_STR] == DRACULA and end.payload[EventPayload.RESPONSE] == response
    assert "retriever:qr_prompt" in engine.get_prompts()


def test_what_cannot_be_answered_says_so(make: Any, answering: Any) -> None:
    from qr_integrations.errors import InputError
    from qr_integrations.llama_index import QRQueryEngine

    for call, message in [
        (lambda: QRQueryEngine(make()), "answers=True"),
        (lambda: QRQueryEngine(answering, top_k=0), "top_k is 0"),
        (lambda: QRQueryEngine(answering).query(" "), "query is empty"),
        (lambda: QRQueryEngine(make([], answers=True)).query("q"), "no documents"),
    ]:
        with pytest.raises(InputError, match=message):
            call()
