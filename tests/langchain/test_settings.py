"""Constructing, copying, comparing, pickling and sharing the adapters; what importing them loads."""

import copy
import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from langchain_core.documents import Document


@pytest.fixture
def adapters(documents: list[Document]) -> list[Any]:
    """One of each, by the name of the model."""
    from qr_integrations.langchain import QRCrossEncoder, QRRerank, QRRetriever

    return [
        QRRerank(model="qr-mini", top_n=2),
        QRRetriever(model="qr-mini", documents=documents, k=2),
        QRCrossEncoder(model="qr-mini"),
    ]


@pytest.fixture
def own_backend(qr_mini: Any) -> Any:
    """A backend around a model that the user loaded."""
    from qr_integrations import Backend

    return Backend(qr_mini.model, qr_mini.tokenizer, name="my-own")


def best(adapter: Any, query: str, documents: list[Document]) -> Any:
    """What an adapter answers, whichever it is."""
    if hasattr(adapter, "score"):
        return adapter.score([(query, document.page_content) for document in documents])
    return adapter.invoke(query) if hasattr(adapter, "invoke") else adapter.compress_documents(documents, query)


# ---- constructing


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "qr-mini", "topn": 3}, "topn"),
        ({}, "no model: pass model='qr-mini'"),
        ({"model": "qr-mini", "null_instruction": -0.1}, "null_instruction"),
        ({"model": "qr-mini", "null_instruction": 1.1}, "null_instruction"),
        ({"model": "qr-mini", "truncation": "tail"}, "truncation"),
        ({"model": "qr-mini", "method": "bm25"}, "method"),
        ({"model": "qr-mini", "normalize": "softmax"}, "normalize"),
        ({"model": "qr-mini", "max_doc_tokens": 0}, "max_doc_tokens"),
        ({"model": "qr-mini", "batch_size": 0}, "batch_size"),
        ({"model": "qr-mini", "heads": [(1, 2, 3)]}, "heads"),
        ({"model": 3}, "model"),
    ],
    ids=str,
)
def test_a_setting_that_cannot_be_is_an_error_at_once(settings: dict[str, Any], message: str) -> None:
    from qr_integrations.langchain import QRCrossEncoder, QRRerank, QRRetriever

    for adapter in (QRRerank, QRRetriever, QRCrossEncoder):
        with pytest.raises(ValueError, match=message):
            adapter(**settings)


def test_a_model_and_the_backend_of_another_are_an_error(qr_mini: Any, own_backend: Any) -> None:
    from qr_integrations.langchain import QRRerank

    assert QRRerank(model="qr-mini", backend=qr_mini).model == "qr-mini"
    with pytest.raises(ValueError, match=r"'other' and a backend of 'qr-mini': pass one of the two"):
        QRRerank(model="other", backend=qr_mini)
    with pytest.raises(ValueError, match=r"'qr-mini' and a backend of 'my-own': pass one of the two"):
        QRRerank(model="qr-mini", backend=own_backend)


def test_a_backend_of_another_kind_or_loaded_otherwise_names_the_cure(qr_mini: Any) -> None:
    from qr_integrations.langchain import QRRerank

    with pytest.raises(ValueError, match="loaded already: leave out dtype"):
        QRRerank(backend=qr_mini, dtype="bfloat16")
    for wrong in ("qr-mini", qr_mini.model):
        with pytest.raises(ValueError, match=r"backend.*Backend\.load"):
            QRRerank(backend=wrong)


@pytest.mark.parametrize(
    ("heads", "message"),
    [([(99, 0)], r"no head \(99, 0\).*pass heads"), ("nowhere.json", r"no head set at 'nowhere.json': pass")],
)
def test_heads_that_are_not_there_are_named_on_use(texts: list[str], heads: Any, message: str) -> None:
    from qr_integrations.errors import HeadError
    from qr_integrations.langchain import QRRerank

    own = QRRerank(model="qr-mini", heads=heads)
    with pytest.raises(HeadError, match=message):
        own.rerank(texts, "q")


def test_a_model_without_known_heads_names_the_cure(own_backend: Any, texts: list[str]) -> None:
    from qr_integrations.errors import HeadError
    from qr_integrations.langchain import QRRerank

    with pytest.raises(HeadError, match=r"no heads are known for 'my-own': pass heads="):
        QRRerank(backend=own_backend).rerank(texts, "q")


def test_a_model_that_is_not_there_is_an_error_on_use_only(texts: list[str], documents: list[Document]) -> None:
    from qr_integrations.errors import LoadError
    from qr_integrations.langchain import QRCrossEncoder, QRRerank, QRRetriever

    missing = {"model": "no/such-model"}
    reranker, encoder = QRRerank(**missing), QRCrossEncoder(**missing)
    retriever = QRRetriever.from_documents(documents, **missing)
    for call in (
        lambda: reranker.rerank(texts, "q"),
        lambda: reranker.compress_documents(documents, "q"),
        lambda: retriever.invoke("q"),
        lambda: encoder.score([("q", "text")]),
    ):
        with pytest.raises(LoadError, match=r"no/such-model.*qr-mini"):
            call()


async def test_nothing_to_rank_needs_no_model(documents: list[Document]) -> None:
    from qr_integrations.langchain import QRCrossEncoder, QRRerank, QRRetriever

    missing = {"model": "no/such-model"}
    assert QRRerank(**missing).compress_documents([], "q") == [] == QRRerank(**missing).rerank([], "q")
    assert await QRRerank(**missing).acompress_documents([], "q") == []
    assert QRRerank(top_n=0, **missing).compress_documents(documents, "q") == []
    assert QRRetriever(**missing).invoke("q") == [] == QRRetriever.from_texts([], **missing).invoke("q")
    assert QRRetriever(documents=documents, k=0, **missing).invoke("q") == []
    assert QRCrossEncoder(**missing).score([]) == []


def test_a_folder_and_a_head_set_are_settings_too(qr_mini: Any, ranked: Any, texts: list[str]) -> None:
    from qr_integrations import HeadSet
    from qr_integrations.bundled import bundled_path
    from qr_integrations.langchain import QRRerank

    folder = bundled_path("qr-mini")
    heads = HeadSet.load(folder / "qr_heads.json")
    for settings in ({"model": folder}, {"heads": folder / "qr_heads.json"}, {"heads": heads}, {"heads": heads.heads}):
        adapter = QRRerank(**{"model": "qr-mini", "top_n": None, **settings})
        found = [entry["relevance_score"] for entry in adapter.rerank(texts, "who wrote dracula")]
        assert found == pytest.approx([score for _, score in ranked("who wrote dracula", texts)], abs=1e-6)
        assert adapter.open().backend is qr_mini  # the bundled model's folder is the bundled model


# ---- one set of weights


def test_all_adapters_use_the_weights_that_are_loaded(qr_mini: Any, adapters: list[Any]) -> None:
    from qr_integrations.langchain import QRRerank

    assert all(adapter.open().backend is qr_mini for adapter in [*adapters, QRRerank(backend=qr_mini)])


def test_a_model_given_by_name_is_loaded_again_after_it_was_closed(texts: list[str]) -> None:
    from qr_integrations import Backend
    from qr_integrations.langchain import QRRerank

    adapter = QRRerank(model="qr-mini", local_files_only=True)  # weights of its own: other tests go on using qr-mini
    before = adapter.rerank(texts, "who wrote dracula")
    adapter.open().backend.close()
    assert adapter.rerank(texts, "who wrote dracula") == before
    Backend.load("qr-mini", local_files_only=True).close()


# ---- copies


def test_a_deep_copy_shares_the_weights_and_answers_alike(
    qr_mini: Any, own_backend: Any, adapters: list[Any], documents: list[Document]
) -> None:
    from qr_integrations.langchain import QRRerank

    for adapter in [*adapters, QRRerank(backend=qr_mini), QRRerank(backend=own_backend, heads=[(1, 1)])]:
        expected = best(adapter, "who wrote dracula", documents)
        for other in (copy.deepcopy(adapter), copy.copy(adapter), adapter.model_copy(deep=True)):
            assert other == adapter and other is not adapter
            assert other.open().backend is adapter.open().backend
            assert best(other, "who wrote dracula", documents) == expected


def test_what_a_copy_changes_takes_effect_in_the_copy_only(qr_mini: Any, ranked: Any, texts: list[str]) -> None:
    from qr_integrations.langchain import QRRerank

    def numbers(adapter: Any) -> list[float]:
        return [entry["relevance_score"] for entry in adapter.rerank(texts, "who wrote dracula")]

    few = QRRerank(backend=qr_mini, top_n=None)
    expected = {h: [score for _, score in ranked("who wrote dracula", texts, heads=h)] for h in ("auto", "all")}
    assert numbers(few) == pytest.approx(expected["auto"], abs=1e-6)
    every = few.model_copy(update={"heads": "all"})
    for _ in range(2):
        assert numbers(every) == pytest.approx(expected["all"], abs=1e-6)
        assert numbers(few) == pytest.approx(expected["auto"], abs=1e-6)
    few.heads, few.top_n = "all", 1
    assert numbers(few) == pytest.approx(expected["all"][:1], abs=1e-6)


def test_copies_with_other_settings_may_be_used_at_once(qr_mini: Any, ranked: Any, texts: list[str]) -> None:
    from qr_integrations.langchain import QRRerank

    first = QRRerank(backend=qr_mini, top_n=None)
    choices = ["auto", "all", [(1, 1)], [(2, 0)], [(2, 1), (0, 3)]]
    copies = [first.model_copy(update={"heads": heads}) for heads in choices] * 8
    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(lambda adapter: adapter.rerank(texts, "who wrote dracula"), copies))
    for adapter, found in zip(copies, results, strict=True):
        expected = ranked("who wrote dracula", texts, heads=adapter.heads)
        assert [entry["relevance_score"] for entry in found] == pytest.approx([n for _, n in expected], abs=1e-6)


def test_equal_settings_make_equal_adapters_used_or_not(adapters: list[Any], documents: list[Document]) -> None:
    from qr_integrations.langchain import QRCrossEncoder, QRRerank, QRRetriever

    again = [
        QRRerank(model="qr-mini", top_n=2),
        QRRetriever(model="qr-mini", documents=documents, k=2),
        QRCrossEncoder(model="qr-mini"),
    ]
    assert adapters == again
    best(adapters[0], "who wrote dracula", documents)
    assert adapters == again
    assert QRRerank(model="qr-mini", top_n=2) != QRRerank(model="qr-mini", top_n=3)
    assert QRRerank(model="qr-mini", heads="all") != QRRerank(model="qr-mini")


# ---- files


def test_a_pickle_is_small_and_ranks_the_same(qr_mini: Any, adapters: list[Any], documents: list[Document]) -> None:
    from qr_integrations.langchain import QRRerank

    for adapter in [*adapters, QRRerank(backend=qr_mini, heads="all", explain=True)]:
        unused = pickle.dumps(adapter)
        expected = best(adapter, "who wrote dracula", documents)
        for data in (unused, pickle.dumps(adapter)):
            assert len(data) < 10_000
            other = pickle.loads(data)
            assert best(other, "who wrote dracula", documents) == expected and other.open().backend is qr_mini


def test_a_backend_around_your_own_model_cannot_be_pickled_and_says_so(own_backend: Any, texts: list[str]) -> None:
    from qr_integrations.errors import InputError
    from qr_integrations.langchain import QRRerank

    adapter = QRRerank(backend=own_backend, heads=[(1, 1)])
    assert adapter.rerank(texts, "who wrote dracula")[0]["index"] == 1
    with pytest.raises(InputError, match=r"'my-own'.*cannot be pickled.*Backend\.load"):
        pickle.dumps(adapter)


def test_settings_go_through_json(qr_mini: Any, texts: list[str], tmp_path: Path) -> None:
    from qr_integrations.langchain import QRRerank

    adapter = QRRerank(backend=qr_mini, heads=[(1, 1), (2, 0)], normalize="share", null_instruction=0.5, top_n=None)
    written = adapter.model_dump_json()
    assert "backend" not in json.loads(written)
    other = QRRerank.model_validate_json(written)
    assert other.open().backend is qr_mini and other.heads == adapter.heads
    assert other.rerank(texts, "who wrote dracula") == adapter.rerank(texts, "who wrote dracula")


# ---- importing


# langchain-core before 1.7 imports an empty shell of transformers with its own retriever tool, which loads no torch
BARE = "import sys; from langchain_core.tools import create_retriever_tool; bare = set(sys.modules)\n"


def test_importing_loads_no_model_library_and_no_other_framework(in_fresh_python: Any) -> None:
    heavy = ["torch", "transformers", "llama_index", "langchain", "langchain_classic", "langchain_community"]
    code = f"import qr_integrations.langchain; print(*[name for name in {heavy} if name in sys.modules.keys() - bare])"
    assert in_fresh_python(BARE + code) == ""
    assert in_fresh_python("import sys, qr_integrations.langchain; print('torch' in sys.modules)") == "False"


def test_constructing_loads_no_model_library(in_fresh_python: Any) -> None:
    code = """
from qr_integrations.langchain import *
retriever = QRRetriever.from_texts(["a text"], model="qr-mini")
create_qr_retriever_tool(retriever), create_qr_rerank_tool(model="qr-mini"), QRCrossEncoder(model="qr-mini")
print(*[name for name in ("torch", "transformers") if name in sys.modules.keys() - bare])
"""
    assert in_fresh_python(BARE + code) == ""


def test_without_langchain_the_error_names_the_cure(in_fresh_python: Any) -> None:
    code = """
import sys
from importlib.machinery import PathFinder

class WithoutLangChain(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.startswith("langchain") else super().find_spec(name, path, target)

sys.meta_path = [WithoutLangChain if finder is PathFinder else finder for finder in sys.meta_path]
try:
    import qr_integrations.langchain
except ImportError as error:
    print(type(error).__name__, error)
"""
    told = in_fresh_python(code)
    assert told.startswith("MissingExtra") and "pip install 'qr-integrations[langchain]'" in told
