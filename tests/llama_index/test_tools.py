"""`QRToolSpec`: what an agent sees, and what reaches the model."""

import asyncio
import re
from typing import Any

import pytest
from llama_index.core import MockEmbedding, VectorStoreIndex
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from llama_index.core.tools import FunctionTool
from llama_index.core.tools.tool_spec.base import BaseToolSpec

DRACULA = "who wrote dracula"
LINE = re.compile(r"(\d+)\. \[(.+?)(?:, score (-?\d+\.\d{3}))?\] (.*)", re.DOTALL)


class Found(BaseRetriever):
    """Finds the same nodes for every question, and notes the questions."""

    def __init__(self, nodes: list[NodeWithScore]) -> None:
        super().__init__()
        self.nodes, self.questions = nodes, list[str]()

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        self.questions.append(query_bundle.query_str)
        return self.nodes


@pytest.fixture
def found(nodes: Any) -> Found:
    return Found(nodes)


@pytest.fixture
def ours(nodes: Any) -> Any:
    from qr_integrations.llama_index import QRRetriever

    return QRRetriever([scored.node for scored in nodes], similarity_top_k=2, model="qr-mini")


def read(answer: str) -> list[tuple[str, float, str]]:
    """Place, score and text of every entry; the numbers in front must count from one."""
    entries = []
    for number, entry in enumerate(re.split(r"\n\n(?=\d+\. \[)", answer), start=1):
        match = LINE.fullmatch(entry)
        assert match and int(match[1]) == number, entry
        entries.append((match[2], float(match[3] or "nan"), match[4]))
    return entries


def tools_of(spec: Any) -> dict[str, FunctionTool]:
    return {tool.metadata.get_name(): tool for tool in spec.to_tool_list()}


def test_it_is_a_tool_spec() -> None:
    from qr_integrations.llama_index import QRToolSpec

    assert issubclass(QRToolSpec, BaseToolSpec)


def test_the_tools_are_those_it_can_serve(found: Found, ours: Any, qr_mini: Any) -> None:
    from qr_integrations.llama_index import QRToolSpec

    search, rank = ["search_documents"], ["rerank_passages", "find_in_text"]
    assert list(tools_of(QRToolSpec(model="qr-mini"))) == list(tools_of(QRToolSpec(backend=qr_mini))) == rank
    assert list(tools_of(QRToolSpec(found))) == search
    assert list(tools_of(QRToolSpec(found, model="qr-mini"))) == search + rank
    assert list(tools_of(QRToolSpec(ours))) == search + rank


def test_neither_a_retriever_nor_a_model_is_an_error_that_names_the_cure(found: Found) -> None:
    from qr_integrations.errors import InputError
    from qr_integrations.llama_index import QRToolSpec

    with pytest.raises(InputError, match=r"pass retriever=\.\.\., model=\.\.\. or backend="):
        QRToolSpec()
    with pytest.raises(ValueError, match="modell"):
        QRToolSpec(modell="qr-mini")
    with pytest.raises(InputError, match="retriever="):
        QRToolSpec(model="qr-mini").search_documents(DRACULA)
    for call in (QRToolSpec(found).rerank_passages, QRToolSpec(found).find_in_text):
        with pytest.raises(InputError, match="model="):
            call(DRACULA, ["a passage"] if call.__name__ == "rerank_passages" else "a text")


def test_every_tool_fits_the_form_of_the_providers(ours: Any) -> None:
    from qr_integrations.llama_index import QRToolSpec

    required = {
        "search_documents": (["query"], {"query", "top_k"}),
        "rerank_passages": (["query", "passages"], {"query", "passages", "top_n"}),
        "find_in_text": (["query", "text"], {"query", "text", "top_k"}),
    }
    for name, tool in tools_of(QRToolSpec(ours)).items():
        assert isinstance(tool, FunctionTool) and 20 < len(tool.metadata.description) <= 1024
        function = tool.metadata.to_openai_tool()["function"]
        parameters = function["parameters"]
        assert function["name"] == name and re.fullmatch(r"[a-zA-Z0-9_-]+", name)
        assert (parameters["required"], set(parameters["properties"])) == required[name]


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("search_documents", {"query": DRACULA, "top_k": 2}),
        ("rerank_passages", {"query": DRACULA, "passages": ["Cats sleep.", "Bram Stoker wrote Dracula."]}),
        ("find_in_text", {"query": DRACULA, "text": "Cats sleep.\n\nBram Stoker wrote Dracula."}),
    ],
)
def test_called_by_an_agent_in_either_way_it_answers_the_same(ours: Any, name: str, given: dict[str, Any]) -> None:
    from qr_integrations.llama_index import QRToolSpec

    spec = QRToolSpec(ours)
    tool = tools_of(spec)[name]
    output = tool.call(**given)
    assert output.content == getattr(spec, name)(**given) and "Stoker" in output.content
    assert not output.is_error and output.tool_name == name
    assert asyncio.run(tool.acall(**given)).content == output.content


def test_the_question_reaches_the_retriever_as_it_was_asked(found: Found, ours: Any) -> None:
    from qr_integrations.llama_index import QRToolSpec

    for spec in (QRToolSpec(found), QRToolSpec(found, model="qr-mini")):
        tools_of(spec)["search_documents"].call(query="who is X?")
        asyncio.run(tools_of(spec)["search_documents"].acall(query="who is X?"))
    assert found.questions == ["who is X?"] * 4
    seen = read(QRToolSpec(ours).search_documents(DRACULA, top_k=4))
    ours.similarity_top_k = 4
    expected = ours.retrieve(DRACULA)
    assert [(text, score) for _, score, text in seen] == [(n.text, pytest.approx(n.score, abs=6e-4)) for n in expected]


def test_what_another_retriever_finds_is_ranked_again_if_a_model_is_given(
    found: Found, nodes: Any, reranker: Any
) -> None:
    from qr_integrations.llama_index import QRToolSpec

    expected = [scored.text for scored in reranker.postprocess_nodes(nodes, query_str=DRACULA)]
    vectors = VectorStoreIndex([n.node for n in nodes], embed_model=MockEmbedding(embed_dim=4))
    for retriever in (found, vectors.as_retriever(similarity_top_k=4)):
        spec = QRToolSpec(retriever, model="qr-mini")
        assert [text for _, _, text in read(spec.search_documents(DRACULA))] == expected
        assert [text for _, _, text in read(spec.search_documents(DRACULA, top_k=1))] == expected[:1]
    assert [text for _, _, text in read(QRToolSpec(found).search_documents(DRACULA, top_k=3))] == [
        scored.text for scored in nodes[:3]
    ]
    assert QRToolSpec(Found([]), model="/nowhere/at/all").search_documents(DRACULA) == "Nothing found."


def test_more_than_the_retriever_usually_returns_may_be_asked_for(ours: Any) -> None:
    from qr_integrations.llama_index import QRToolSpec

    spec = QRToolSpec(ours)
    assert [len(read(spec.search_documents(DRACULA, top_k=k))) for k in (1, 3, 4, 99)] == [1, 3, 4, 4]
    assert len(read(spec.search_documents(DRACULA))) == 4
    assert spec.search_documents(DRACULA, top_k=0) == "Nothing found."
    assert ours.similarity_top_k == 2 and len(ours.retrieve(DRACULA)) == 2


@pytest.mark.parametrize("name", ["search_documents", "rerank_passages", "find_in_text"])
def test_a_negative_number_is_an_error_and_drops_nothing_silently(ours: Any, texts: Any, name: str) -> None:
    from qr_integrations.llama_index import QRToolSpec

    spec = QRToolSpec(ours, chunk_size=16)
    given = {"search_documents": [], "rerank_passages": [texts], "find_in_text": ["\n\n".join(texts)]}[name]
    with pytest.raises(ValueError, match="-1"):
        getattr(spec, name)(DRACULA, *given, -1)


def test_a_place_is_named_by_title_file_or_id(found: Found) -> None:
    from qr_integrations.llama_index import QRToolSpec

    found.nodes = [
        NodeWithScore(node=TextNode(id_=f"id{i}", text="one", metadata=metadata), score=0.5)
        for i, metadata in enumerate([{"title": "Title", "file_name": "f.txt"}, {"file_name": "f.txt"}, {}])
    ]
    assert read(QRToolSpec(found).search_documents(DRACULA)) == [(n, 0.5, "one") for n in ("Title", "f.txt", "id2")]


def test_passages_are_numbered_as_they_were_given(texts: Any, ranked: Any) -> None:
    from qr_integrations.llama_index import QRToolSpec

    passages = [*texts, f"  {texts[1]} \n"]
    spec = QRToolSpec(model="qr-mini")
    entries = read(spec.rerank_passages(DRACULA, passages))
    expected = ranked(DRACULA, passages)
    assert [place for place, _, _ in entries] == [f"passage {i + 1}" for i, _ in expected]
    assert [text for _, _, text in entries] == [passages[i].strip() for i, _ in expected]
    assert [score for _, score, _ in entries] == [pytest.approx(score.expected, abs=6e-4) for _, score in expected]
    assert read(spec.rerank_passages(DRACULA, passages, top_n=2)) == entries[:2]


def test_no_passages_and_no_text_find_nothing_and_load_no_model() -> None:
    from qr_integrations.llama_index import QRToolSpec

    spec = QRToolSpec(model="/nowhere/at/all")
    assert spec.rerank_passages(DRACULA, []) == spec.find_in_text(DRACULA, " \n") == "Nothing found."
    assert tools_of(spec)["rerank_passages"].call(query=DRACULA, passages=[]).content == "Nothing found."


@pytest.mark.usefixtures("unchecked")
def test_one_passage_instead_of_a_list_is_an_error_and_no_list_of_letters() -> None:
    from qr_integrations.llama_index import QRToolSpec

    with pytest.raises(ValueError, match="list"):
        QRToolSpec(model="qr-mini").rerank_passages(DRACULA, "one passage")  # type: ignore[arg-type]


def test_an_empty_question_is_an_error(ours: Any) -> None:
    from qr_integrations.llama_index import QRToolSpec

    spec = QRToolSpec(ours)
    for call in (
        lambda: spec.search_documents(" "),
        lambda: spec.rerank_passages("", ["a"]),
        lambda: spec.find_in_text("", "a"),
    ):
        with pytest.raises(ValueError, match="query is empty"):
            call()


def test_find_in_text_names_the_right_characters(texts: Any) -> None:
    from qr_integrations.llama_index import QRToolSpec

    needle = "It was Bram Stoker who wrote Dracula."
    text = "\n\n".join([*texts[:1] * 5, "🦇 東京 Cafe\u0301.", *texts[2:] * 4, needle, *texts[:1] * 5])
    entries = read(QRToolSpec(model="qr-mini", chunk_size=16).find_in_text(DRACULA, text, top_k=99))
    assert needle in entries[0][2] and len(entries) > 10
    seen = set()
    for place, _, shown in entries:
        begin, end = map(int, re.fullmatch(r"characters (\d+)-(\d+)", place).groups())  # type: ignore[union-attr]
        assert " ".join(text[begin:end].split()) == shown
        seen.add((begin, end))
    assert len(seen) == len(entries)


def test_the_event_loop_goes_on_while_a_tool_works(texts: Any, heartbeat: Any) -> None:
    from qr_integrations.llama_index import QRToolSpec

    spec = QRToolSpec(model="qr-mini", keep_prefixes=0)
    given = {"query": DRACULA, "text": "\n\n".join(texts * 60)}
    expected = spec.find_in_text(**given)
    output, ticks, seconds, longest = heartbeat(tools_of(spec)["find_in_text"].acall(**given))
    assert output.content == expected
    assert ticks > 10 and longest < seconds / 2, (ticks, seconds, longest)


def test_a_model_may_be_left_to_the_retriever_and_the_rest_set(ours: Any) -> None:
    from qr_integrations.llama_index import QRToolSpec

    spec = QRToolSpec(ours)
    assert spec._ranker is ours.settings
    with pytest.raises(ValueError, match="no model"):
        QRToolSpec(Found([]), normalize="share")
