"""`QRRetriever(indexed=True)`: documents come and go, questions are asked together, folders hold all of it."""

import copy
import json
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_tests.integration_tests import RetrieversIntegrationTests

LAYOUTS = [{}, {"refinements": {"layout": "block"}}]


@pytest.fixture
def make(qr_mini: Any, documents: list[Document]) -> Any:
    """A retriever with an index over the four documents, or over others."""
    from qr_integrations.langchain import QRRetriever

    def made(given: list[Document] | None = None, **settings: Any) -> Any:
        chosen = documents if given is None else given
        return QRRetriever.from_documents(chosen, backend=qr_mini, indexed=True, **settings)

    return made


def found(retriever: Any, query: str, **kwargs: Any) -> list[tuple[str | None, Any]]:
    """Ids and scores."""
    hits = retriever.invoke(query, **kwargs)
    return [(hit.id, pytest.approx(hit.metadata["relevance_score"], abs=1e-5)) for hit in hits]


class TestIndexedQRRetriever(RetrieversIntegrationTests):
    @property
    def retriever_constructor(self) -> type[BaseRetriever]:
        from qr_integrations.langchain import QRRetriever

        return QRRetriever

    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        texts = ["Cats sleep.", "Dracula was written by Bram Stoker.", "A river.", "Frankenstein, by Mary Shelley."]
        return {"documents": [Document(text) for text in texts], "model": "qr-mini", "indexed": True}

    @property
    def retriever_query_example(self) -> str:
        return "who wrote dracula"


# ---- questions


@pytest.mark.parametrize("settings", [*LAYOUTS, {"normalize": "share", "score_threshold": 0.1}, {"heads": "all"}])
def test_it_finds_what_a_retriever_without_an_index_finds(
    make: Any, queries: list[str], settings: dict[str, Any]
) -> None:
    own, plain = make(**settings), make(**settings).model_copy(update={"indexed": False})
    for query in queries:
        assert found(own, query) == found(plain, query)
    assert own.invoke(queries[0])[0].metadata.keys() == plain.invoke(queries[0])[0].metadata.keys()


def test_spans_are_those_of_a_retriever_without_an_index(make: Any, queries: list[str]) -> None:
    spans = [
        [[span["text"] for span in hit.metadata["qr_spans"]] for hit in one.invoke(queries[1])]
        for one in (make(explain=True), make(explain=True).model_copy(update={"indexed": False}))
    ]
    assert spans[0] == spans[1] and spans[0][0]


async def test_questions_together_are_answered_as_one_by_one(make: Any, queries: list[str], recorder: Any) -> None:
    own = make(k=2)
    expected = [found(own, query) for query in queries]
    asked = [*queries, queries[0]]
    config = {"callbacks": [recorder]}
    for answers in (own.batch(asked, config=config), await own.abatch(asked, config=config)):
        got = [[(hit.id, hit.metadata["relevance_score"]) for hit in hits] for hits in answers]
        assert got == [*expected, expected[0]]
    assert len(recorder.runs) == 10 and {run.run_type for run in recorder.runs} == {"retriever"}
    assert [len(hits) for hits in own.batch(queries, k=1)] == [1] * 4


def test_questions_together_go_through_the_model_once(
    make: Any, queries: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qr_integrations.retrieval import DocumentIndex

    own, asked = make(), []
    rank = DocumentIndex._rank
    monkeypatch.setattr(
        DocumentIndex, "_rank", lambda self, given, *rest: asked.append(given) or rank(self, given, *rest)
    )
    own.batch(queries)
    assert asked == [queries]


def test_a_question_that_cannot_be_fails_alone(make: Any, queries: list[str]) -> None:
    own = make(k=1)
    good, empty, other = own.batch([queries[1], " ", queries[0]], return_exceptions=True)
    assert [good[0].id, other[0].id] == ["b", "a"] and "query is empty" in str(empty)
    long = own.model_copy(update={"max_context_tokens": 400})
    good, bad, other = long.batch([queries[1], "why " * 600, queries[0]], return_exceptions=True)
    assert [good[0].id, other[0].id] == ["b", "a"] and "tokens" in str(bad)


# ---- documents come and go


@pytest.mark.parametrize("settings", LAYOUTS, ids=["joint", "block"])
def test_added_and_deleted_is_as_if_made_of_what_is_left(
    make: Any, documents: list[Document], queries: list[str], settings: dict[str, Any]
) -> None:
    own = make(documents[:2], **settings)
    assert found(own, queries[1])[0][0] == "b"
    before = copy.deepcopy(documents)
    assert own.add_documents(documents[2:]) == ["c", "d"]
    assert [found(own, q) for q in queries] == [found(make(**settings), q) for q in queries]
    assert own.delete(["b"]) is True and own.delete(["b", "d"]) is False
    left = make([documents[0], documents[2]], **settings)
    assert [found(own, q) for q in queries] == [found(left, q) for q in queries]
    assert documents == before and own.documents == left.documents
    assert own.delete(["a", "c"]) and own.invoke(queries[0]) == []


@pytest.mark.parametrize("settings", LAYOUTS, ids=["joint", "block"])
def test_what_is_there_is_not_read_again(
    make: Any, documents: list[Document], capsys: pytest.CaptureFixture[str], settings: dict[str, Any]
) -> None:
    def read() -> int:
        done = re.findall(r"Reading.* (\d+)/(\d+) ", capsys.readouterr().err)
        return int(done[-1][1]) if done else 0

    own = make([Document(document.page_content * 5) for document in documents], show_progress=True, **settings)
    own.invoke("who wrote dracula")
    whole = read()
    own.invoke("what do cats do")
    assert read() == 0
    (name,) = own.add_documents([Document("One more.")])
    assert 0 < read() < whole / 5
    own.delete([name])
    own.invoke("what do cats do")
    assert read() == 0


def test_ids_are_kept_made_up_or_taken_over(make: Any, documents: list[Document]) -> None:
    own = make([])
    assert own.add_documents(documents[:1], ids=["x"]) == ["x"] and documents[0].id == "a"
    (made,) = own.add_texts(["No id."], metadatas=[{"n": 1}])
    assert made and [document.id for document in own.documents] == ["x", made]
    own.add_texts(["Another text about owls."], ids=["x"])
    assert [document.id for document in own.documents] == [made, "x"]
    assert own.invoke("what about owls", k=1)[0].page_content == "Another text about owls."


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ids": ["x"]}, "4 documents and 1 ids"),
        ({"ids": ["x", "y", "x", "z"]}, "'x' is there twice"),
    ],
    ids=str,
)
def test_ids_that_cannot_be_change_nothing(make: Any, documents: list[Document], given: Any, message: str) -> None:
    own = make()
    with pytest.raises(ValueError, match=message):
        own.add_documents(documents, **given)
    with pytest.raises(ValueError, match="pass a list"):
        own.delete("abcd")
    assert own.documents == documents


def test_a_generator_is_a_list_of_documents(make: Any, documents: list[Document]) -> None:
    own = make(documents[:2])
    assert own.add_documents(document for document in documents[1:]) == ["b", "c", "d"]
    assert own.delete(name for name in ["a", "x"]) is False
    assert [document.id for document in own.documents] == ["b", "c", "d"]


@pytest.mark.parametrize("given", [Document("One."), iter(["a text"])], ids=["a document", "texts"])
def test_what_is_no_list_of_documents_changes_nothing(make: Any, documents: list[Document], given: Any) -> None:
    own = make()
    with pytest.raises(ValueError, match="pass "):
        own.add_documents(given)
    assert own.documents == documents


def test_documents_that_do_not_fit_change_nothing(make: Any, documents: list[Document], queries: list[str]) -> None:
    from qr_integrations.errors import WindowError

    own = make(truncation="error", max_context_tokens=400)
    expected = found(own, queries[1])
    with pytest.raises(WindowError):
        own.add_texts(["word " * 2000])
    assert found(own, queries[1]) == expected and own.documents == documents


def test_a_list_changed_by_hand_and_other_settings_take_effect(make: Any, queries: list[str]) -> None:
    own = make()
    own.invoke(queries[1])
    own.documents.append(Document("Owls fly at night.", id="e"))
    assert own.invoke("what do owls do", k=1)[0].id == "e"
    own.heads = "all"
    assert found(own, queries[1]) == found(make(own.documents, heads="all"), queries[1])


async def test_async_is_the_same(make: Any, documents: list[Document]) -> None:
    own = make(documents[:1])
    assert await own.aadd_documents(documents[1:]) == ["b", "c", "d"]
    assert (await own.ainvoke("who wrote dracula", k=1))[0].id == "b"
    assert await own.adelete(["b"]) and "b" not in [hit.id for hit in await own.ainvoke("who wrote dracula")]


def test_copies_part_with_the_first_change(make: Any, queries: list[str]) -> None:
    own = make()
    own.invoke(queries[1])
    for other in (own.model_copy(), copy.deepcopy(own)):
        other.delete(["b"])
        assert "b" not in dict(found(other, queries[1])) and found(own, queries[1])[0][0] == "b"


def test_many_copies_with_settings_of_their_own_keep_what_they_read(
    make: Any, queries: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    own = make(show_progress=True)
    copies = [own.model_copy(update={"instruction": f"Find {number}."}) for number in range(6)]
    before = [found(one, queries[1]) for one in copies]
    assert "Reading" in capsys.readouterr().err
    assert [found(one, queries[1]) for one in copies] == before
    assert "Reading" not in capsys.readouterr().err


def test_sixteen_threads_while_documents_come_and_go(make: Any, documents: list[Document], queries: list[str]) -> None:
    own, owl = make(**LAYOUTS[1]), Document("Owls fly at night.", id="e")
    lists = (documents, [*documents, owl])
    expected = [[found(make(given, **LAYOUTS[1]), query, k=5) for given in lists] for query in queries]

    def change() -> None:
        for _ in range(4):
            own.add_documents([owl])
            own.delete(["e"])

    with ThreadPoolExecutor(16) as pool:
        changing = pool.submit(change)
        asked = list(range(4)) * 8
        answers = list(pool.map(lambda i: own.invoke(queries[i], k=5), asked))
        changing.result()
    for i, hits in zip(asked, answers, strict=True):
        assert [(hit.id, hit.metadata["relevance_score"]) for hit in hits] in expected[i]
    assert own.documents == documents


# ---- folders


@pytest.mark.parametrize("kv_dtype", ["auto", "float16"])
def test_a_folder_brings_everything_back(make: Any, tmp_path: Path, queries: list[str], kv_dtype: str) -> None:
    from qr_integrations.langchain import QRRetriever

    own = make(k=3, kv_dtype=kv_dtype, normalize="sigmoid", instruction="Find books.")
    own.save_local(tmp_path / "kept")
    again = QRRetriever.load_local(tmp_path / "kept")
    assert again == own.model_copy(update={"backend": None}) and not again.is_index_there
    assert [again.invoke(query) for query in queries] == [own.invoke(query) for query in queries]
    assert QRRetriever.load_local(tmp_path / "kept", k=1, explain=True).invoke(queries[1])[0].metadata["qr_spans"]


def test_a_folder_is_read_in_another_process(
    make: Any, tmp_path: Path, in_fresh_python: Any, queries: list[str]
) -> None:
    own = make(k=2)
    own.save_local(tmp_path / "kept")
    code = f"""
import json
from qr_integrations.langchain import QRRetriever
retriever = QRRetriever.load_local({str(tmp_path / "kept")!r})
retriever.show_progress = True
print(json.dumps([[hit.id, hit.page_content, hit.metadata] for hit in retriever.invoke({queries[1]!r})]))
"""
    hits = [[hit.id, hit.page_content, hit.metadata] for hit in own.invoke(queries[1])]
    again = json.loads(in_fresh_python(code))
    for one, other in zip(again, hits, strict=True):
        assert one[:2] == other[:2] and one[2]["nested"] == other[2]["nested"]
        assert one[2]["qr_score"] == pytest.approx(other[2]["qr_score"], abs=1e-6)


def test_a_folder_is_read_and_not_the_documents(
    make: Any, tmp_path: Path, queries: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    from qr_integrations.langchain import QRRetriever

    make().save_local(tmp_path)
    again = QRRetriever.load_local(tmp_path, show_progress=True)
    again.invoke(queries[1])
    assert "Reading" not in capsys.readouterr().err
    again.add_texts(["Owls fly at night."], ids=["e"])
    again.delete(["a"])
    again.save_local(tmp_path)
    assert [document.id for document in QRRetriever.load_local(tmp_path).documents] == ["b", "c", "d", "e"]
    other = QRRetriever.load_local(tmp_path, heads="all", show_progress=True)  # asked for otherwise than it was read
    capsys.readouterr()
    other.invoke(queries[1])
    assert "Reading" in capsys.readouterr().err


def test_a_model_that_another_closed_costs_no_reading_again(
    documents: list[Document], tmp_path: Path, queries: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    from qr_integrations.langchain import QRRetriever

    QRRetriever.from_documents(documents, model="qr-mini", dtype="bfloat16", indexed=True).save_local(tmp_path)
    again = QRRetriever.load_local(tmp_path, show_progress=True)
    expected = again.invoke(queries[1])
    capsys.readouterr()
    again.open().backend.close()
    assert again.invoke(queries[1]) == expected and "Reading" not in capsys.readouterr().err


def test_a_folder_is_opened_without_its_index(make: Any, tmp_path: Path, queries: list[str]) -> None:
    from qr_integrations.langchain import QRRetriever

    make(kv_dtype="int8", answers=True).save_local(tmp_path)
    plain = QRRetriever.load_local(tmp_path, indexed=False)
    assert not plain.indexed and plain.invoke(queries[1])[0].id == "b"


def test_nothing_is_loaded_before_the_first_question(tmp_path: Path, make: Any) -> None:
    from qr_integrations.errors import LoadError
    from qr_integrations.langchain import QRRetriever

    own = QRRetriever(documents=[Document("A text.")], model="no/such-model", indexed=True)
    own.add_texts(["Another."])
    assert len(own.documents) == 2 and not own.is_index_there
    with pytest.raises(LoadError, match="no/such-model"):
        own.invoke("q")
    make().save_local(tmp_path)
    assert len(QRRetriever.load_local(tmp_path, model="no/such-model").documents) == 4


def test_a_pickle_is_small_and_reads_the_folder_again(make: Any, tmp_path: Path, queries: list[str]) -> None:
    from qr_integrations.langchain import QRRetriever

    own = make()
    expected = own.invoke(queries[1])
    own.save_local(tmp_path)
    for retriever in (own, QRRetriever.load_local(tmp_path)):
        data = pickle.dumps(retriever)
        assert len(data) < 10_000 and pickle.loads(data).invoke(queries[1]) == expected


@pytest.mark.parametrize("damage", ["changed", "cut", "foreign", "newer", "gone", "index", "no json"])
def test_a_damaged_folder_is_refused(make: Any, tmp_path: Path, damage: str) -> None:
    from qr_integrations.errors import LoadError
    from qr_integrations.langchain import QRRetriever

    make().save_local(tmp_path)
    file = tmp_path / "retriever.jsonl"
    text = file.read_text()
    if damage == "index":
        next((tmp_path / "index").glob("*.safetensors")).write_bytes(b"")
    elif damage == "gone":
        file.unlink()
    else:
        other = {
            "changed": text.replace("Cats", "Dogs"),
            "cut": text[:-9],
            "foreign": '{"format": "x"}\n',
            "newer": text.replace('"version": 1', '"version": 2'),
            "no json": "a text",
        }
        file.write_text(other[damage])
    with pytest.raises(LoadError, match=r": (restore|pass|upgrade)"):
        QRRetriever.load_local(tmp_path).invoke("q")


def test_a_crash_between_the_files_costs_time_only(make: Any, tmp_path: Path, queries: list[str]) -> None:
    from qr_integrations.langchain import QRRetriever

    own = make()
    own.save_local(tmp_path)
    before = (tmp_path / "retriever.jsonl").read_bytes()
    expected = [found(own, query) for query in queries]
    own.delete(["a"])
    own.add_texts(["Owls fly at night."])
    own.save_local(tmp_path)
    (tmp_path / "retriever.jsonl").write_bytes(before)  # the index is newer
    assert [found(QRRetriever.load_local(tmp_path), query) for query in queries] == expected


def test_what_cannot_be_saved_says_so(make: Any, tmp_path: Path) -> None:
    from qr_integrations.errors import InputError

    (tmp_path / "notes.txt").write_text("mine")
    for retriever, folder, message in [
        (make(), tmp_path, "holds something else"),
        (make().model_copy(update={"indexed": False}), tmp_path / "a", "indexed=True"),
        (make([Document("x", metadata={"n": {1}})]), tmp_path / "a", "metadata or id of document #0"),
        (make().model_copy(update={"quantization": object()}), tmp_path / "a", "quantization="),
        (make(), tmp_path / "notes.txt", "pass one"),
        (make(normalize=lambda scores: scores), tmp_path / "a", "normalize is a function"),
    ]:
        with pytest.raises(InputError, match=message):
            retriever.save_local(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_folder_cannot_make_the_loader_run_code(make: Any, tmp_path: Path) -> None:
    own = make(trust_remote_code=False)
    own.save_local(tmp_path)
    head = json.loads((tmp_path / "retriever.jsonl").read_text().partition("\n")[0])
    assert not {"trust_remote_code", "model_kwargs", "device"} & head["settings"].keys()


# ---- answers


@pytest.fixture
def answering(make: Any) -> Any:
    return make(answers=True, refinements={"layout": "block"})


async def test_it_answers_from_the_best_documents(answering: Any, queries: list[str], recorder: Any) -> None:
    from qr_integrations.retrieval.answers import answer

    chain = answering.as_answerer(top_k=2, max_new_tokens=5)
    given = chain.invoke(queries[1], config={"callbacks": [recorder]})
    assert list(given) == ["input", "context", "answer"] and given["input"] == queries[1]
    assert [hit.id for hit in given["context"]] == [hit.id for hit in answering.invoke(queries[1], k=2)]
    texts = [document.page_content for document in answering.documents]
    from qr_integrations import DocumentIndex

    index = DocumentIndex.build(texts, answering.open().backend, layout="block", answers=True)
    assert given["answer"] == answer(index, queries[1], top_k=2, max_new_tokens=5).text
    assert recorder.named("QRAnswer").outputs == given
    assert await chain.ainvoke({"input": queries[1]}) == given == chain.batch([queries[1]] * 2)[1]
    answering.delete(["b"])
    assert "b" not in [hit.id for hit in chain.invoke(queries[1])["context"]]


def test_what_cannot_be_answered_says_so(make: Any, answering: Any) -> None:
    from qr_integrations.errors import InputError

    for call, message in [
        (lambda: make().as_answerer(), "answers=True"),
        (lambda: answering.as_answerer(top_k=0), "top_k is 0"),
        (lambda: answering.as_answerer().invoke(3), "no question"),
        (lambda: answering.as_answerer().invoke(" "), "query is empty"),
        (lambda: make([], answers=True).as_answerer().invoke("q"), "no documents"),
    ]:
        with pytest.raises(InputError, match=message):
            call()


def test_settings_of_an_index_without_one_are_an_error(make: Any) -> None:
    for wrong in ({"kv_dtype": "int8"}, {"answers": True}):
        with pytest.raises(ValueError, match="indexed=True"):
            make().__class__(model="qr-mini", **wrong)
    with pytest.raises(ValueError, match="kv_dtype"):
        make(kv_dtype="int4")


def test_the_search_tool_works_over_an_index(make: Any) -> None:
    from qr_integrations.langchain import create_qr_retriever_tool

    tool = create_qr_retriever_tool(make(k=1))
    message = tool.invoke({"type": "tool_call", "id": "1", "name": tool.name, "args": {"query": "who wrote dracula"}})
    assert "Bram Stoker" in message.content and message.artifact[0].id == "b"
