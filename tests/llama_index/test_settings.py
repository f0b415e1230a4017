"""The settings of `QRRerank`: prompts, dictionaries, pickles, copies, changes, and what importing costs."""

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from llama_index.core.prompts import ChatMessage, ChatPromptTemplate, PromptTemplate, RichPromptTemplate
from llama_index.core.schema import MetadataMode

DRACULA = "who wrote dracula"
ASK = "Which of these paragraphs answers the question?\n\nQuestion: {}"


@pytest.fixture
def contents(nodes: Any) -> list[str]:
    """What is ranked of the nodes."""
    return [scored.node.get_content(MetadataMode.EMBED) for scored in nodes]


@pytest.mark.parametrize(
    "prompt",
    [
        PromptTemplate(ASK.format("{query_str}")),
        RichPromptTemplate(ASK.format("{{query_str}}")),
        RichPromptTemplate(ASK.format("{{ query_str }}")),
        PromptTemplate("Which of these {things} answers the question?\n\nQuestion: {query_str}", things="paragraphs"),
        PromptTemplate(ASK.format("{question}"), template_var_mappings={"query_str": "question"}),
    ],
    ids=["plain", "rich", "rich with spaces", "partial", "mapped"],
)
def test_the_model_reads_the_updated_prompt(nodes: Any, contents: Any, ranked: Any, places: Any, prompt: Any) -> None:
    from qr_integrations.llama_index import QRRerank

    rerank = QRRerank(model="qr-mini")
    before = places(rerank.postprocess_nodes(nodes, query_str=DRACULA), nodes)
    rerank.update_prompts({"qr_prompt": prompt})
    after = places(rerank.postprocess_nodes(nodes, query_str=DRACULA), nodes)
    assert after == ranked(DRACULA, contents, prompt=ASK.format("{query}")) and after != before
    assert rerank.get_prompts()["qr_prompt"].format(query_str="X") == ASK.format("X")


@pytest.mark.parametrize("method", ["qrhead", "icr"])
def test_the_prompt_that_is_shown_is_the_one_that_is_read(nodes: Any, method: Any) -> None:
    from qr_integrations.llama_index import QRRerank

    rerank = QRRerank(model="qr-mini", method=method)
    before = rerank.postprocess_nodes(nodes, query_str=DRACULA)
    prompts = rerank.get_prompts()
    assert set(prompts) == {"qr_prompt"} and "find information" in prompts["qr_prompt"].format(query_str=DRACULA)
    rerank.update_prompts(prompts)
    assert rerank.postprocess_nodes(nodes, query_str=DRACULA) == before


def test_a_prompt_given_at_the_start_is_shown() -> None:
    from qr_integrations.llama_index import QRRerank

    shown = QRRerank(model="qr-mini", prompt=ASK.format("{query}")).get_prompts()["qr_prompt"]
    assert shown.format(query_str="X") == ASK.format("X")


@pytest.mark.parametrize("template", ["Find it.", "", "{query_str} or {query_str}", "{query}", "{question}"])
def test_a_prompt_with_no_place_for_the_query_is_an_error_and_not_taken(template: str) -> None:
    from qr_integrations.errors import InputError
    from qr_integrations.llama_index import QRRerank

    rerank = QRRerank(model="qr-mini")
    with pytest.raises(InputError, match=r"no place for the query.*\{query_str\}"):
        rerank.update_prompts({"qr_prompt": PromptTemplate(template)})
    assert rerank.prompt is None


def test_a_chat_prompt_gives_its_words(nodes: Any) -> None:
    from qr_integrations.llama_index import QRRerank

    rerank = QRRerank(model="qr-mini")
    rerank.update_prompts({"qr_prompt": ChatPromptTemplate([ChatMessage(role="user", content="Find {query_str}")])})
    assert rerank.prompt is not None and "Find {query}" in rerank.prompt
    assert rerank.postprocess_nodes(nodes, query_str=DRACULA)


SETTINGS: dict[str, Any] = {
    "heads": [(1, 0), (2, 1)],
    "top_n": 3,
    "metadata_mode": MetadataMode.LLM,
    "normalize": "share",
    "score_threshold": -1.5,
    "explain": True,
    "max_spans": None,
    "instruction": "Find books.",
    "null_instruction": 0.5,
    "truncation": "chunk",
    "max_doc_tokens": 64,
    "max_context_tokens": 2048,
    "batch_size": 8,
    "keep_prefixes": 1,
    "keep_retrieval_score": True,
}


@pytest.mark.parametrize("settings", [{}, {"method": "icr"}, SETTINGS], ids=["defaults", "icr", "all"])
def test_a_dictionary_and_json_hold_all_settings(nodes: Any, settings: dict[str, Any]) -> None:
    from qr_integrations.llama_index import QRRerank

    rerank = QRRerank(model="qr-mini", **settings)
    expected = rerank.postprocess_nodes(nodes, query_str=DRACULA)
    as_dict = rerank.to_dict()
    assert as_dict["class_name"] == "QRRerank" and settings.items() <= as_dict.items()
    assert set(as_dict) - {"class_name"} == set(QRRerank.model_fields) - {"backend", "callback_manager"}
    for again in (QRRerank.from_dict(as_dict), QRRerank.from_json(rerank.to_json())):
        assert again.to_dict() == as_dict
        assert again.postprocess_nodes(nodes, query_str=DRACULA) == expected
    assert QRRerank.from_dict(as_dict, top_n=1).top_n == 1
    assert json.loads(rerank.to_json())["heads"] == json.loads(json.dumps(as_dict["heads"]))


def test_heads_may_be_a_list_a_set_or_a_file(
    tmp_path: Path, nodes: Any, contents: Any, ranked: Any, places: Any
) -> None:
    from qr_integrations import HeadSet
    from qr_integrations.llama_index import QRRerank

    pairs, file = [(1, 0), (2, 1)], tmp_path / "heads.json"
    HeadSet.of(pairs).save(file)
    for heads in (pairs, HeadSet.of(pairs), file, str(file), [[1, 0], [2, 1]]):
        rerank = QRRerank(model="qr-mini", heads=heads)
        again = QRRerank.from_json(rerank.to_json())
        assert again.to_dict() == rerank.to_dict()
        for adapter in (rerank, again):
            found = places(adapter.postprocess_nodes(nodes, query_str=DRACULA), nodes)
            assert found == ranked(DRACULA, contents, heads=pairs)


def test_a_backend_is_written_as_the_name_of_its_model(qr_mini: Any, nodes: Any) -> None:
    from qr_integrations.llama_index import QRRerank

    rerank = QRRerank(backend=qr_mini)
    assert rerank.to_dict() == QRRerank(model="qr-mini").to_dict() and rerank.model == "qr-mini"
    again = QRRerank.from_dict(rerank.to_dict())
    assert again.open().backend is qr_mini
    assert QRRerank(model="qr-mini", backend=qr_mini).backend is qr_mini


@pytest.mark.parametrize("typo", [{"topn": 3}, {"models": "qr-mini"}, {"device_maps": None}])
def test_an_unknown_name_is_an_error(typo: dict[str, Any]) -> None:
    from qr_integrations.llama_index import QRRerank

    with pytest.raises(ValueError, match=next(iter(typo))):
        QRRerank(**{"model": "qr-mini", **typo})
    with pytest.raises(ValueError, match=next(iter(typo))):
        QRRerank.from_dict({**QRRerank(model="qr-mini").to_dict(), **typo})


@pytest.mark.parametrize(
    "wrong",
    [
        {"method": "bm25"},
        {"truncation": "tail"},
        {"max_doc_tokens": 0},
        {"batch_size": 0},
        {"null_instruction": 2.0},
        {"keep_prefixes": -1},
        {"metadata_mode": "some"},
        {"heads": [(1, 2, 3)]},
        {"prompt": "Find it."},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_wrong_value_is_an_error_at_once(wrong: dict[str, Any]) -> None:
    from qr_integrations.llama_index import QRRerank

    with pytest.raises(ValueError, match=next(iter(wrong))):
        QRRerank(model="qr-mini", **wrong)


def test_neither_model_nor_backend_names_the_cure() -> None:
    from qr_integrations.llama_index import QRRerank, QRRetriever

    for make in (QRRerank, lambda: QRRetriever([]), lambda: QRRetriever.from_text("Some text.")):
        with pytest.raises(ValueError, match=r"pass model='qr-mini'.*or backend=Backend\.load"):
            make()


@pytest.mark.parametrize("other", [{"model": "another/model"}, {"dtype": "bfloat16"}, {"device": "cuda:7"}], ids=str)
def test_a_backend_and_something_else_to_load_are_an_error(qr_mini: Any, other: dict[str, Any]) -> None:
    from qr_integrations.llama_index import QRRerank

    with pytest.raises(ValueError, match=next(iter(other))):
        QRRerank(backend=qr_mini, **other)


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("given", ["model", "backend"])
def test_a_pickle_is_small_and_ranks_the_same(qr_mini: Any, nodes: Any, given: str, used: bool) -> None:
    from qr_integrations.llama_index import QRRerank

    rerank = QRRerank(**{given: qr_mini if given == "backend" else "qr-mini"}, **SETTINGS)
    expected = QRRerank(model="qr-mini", **SETTINGS).postprocess_nodes(nodes, query_str=DRACULA)
    if used:
        rerank.postprocess_nodes(nodes, query_str=DRACULA)
    data = pickle.dumps(rerank)
    assert len(data) < 10_000
    again = pickle.loads(data)
    assert again.to_dict() == rerank.to_dict() and again.backend is None
    assert again.postprocess_nodes(nodes, query_str=DRACULA) == expected


def test_a_pickle_loads_no_model_until_it_ranks(qr_mini: Any, in_fresh_python: Callable[[str], str]) -> None:
    from qr_integrations.llama_index import QRRerank

    data = pickle.dumps(QRRerank(backend=qr_mini, top_n=2))
    code = f"import pickle, sys; rerank = pickle.loads({data!r}); print(rerank.top_n, 'torch' in sys.modules)"
    assert in_fresh_python(code) == "2 False"


def test_a_pickle_keeps_a_function_that_can_be_found_again() -> None:
    from qr_integrations.llama_index import QRRerank

    assert pickle.loads(pickle.dumps(QRRerank(model="qr-mini", normalize=sorted))).normalize is sorted


def test_a_pickle_does_not_lose_a_function_silently() -> None:
    from qr_integrations.llama_index import QRRerank

    rerank = QRRerank(model="qr-mini", normalize=lambda scores: scores)
    with pytest.raises(Exception, match=r"normalize|lambda"):  # other scores would come out of the copy
        pickle.dumps(rerank)


def test_a_model_object_of_the_user_cannot_be_pickled_and_says_so(qr_mini: Any, nodes: Any) -> None:
    from qr_integrations.backend import Backend
    from qr_integrations.errors import InputError
    from qr_integrations.llama_index import QRRerank

    mine = Backend(qr_mini.model, qr_mini.tokenizer, name="mine")
    rerank = QRRerank(backend=mine, heads=[(1, 0)])
    assert len(rerank.postprocess_nodes(nodes, query_str=DRACULA)) == 4 and rerank.model == "mine"
    with pytest.raises(InputError, match=r"'mine' stands around a model object.*Backend\.load"):
        pickle.dumps(rerank)
    assert copy.deepcopy(rerank).open().backend is mine


@pytest.mark.parametrize("given", ["model", "backend"])
def test_a_deep_copy_shares_the_weights(qr_mini: Any, nodes: Any, given: str) -> None:
    from qr_integrations.llama_index import QRRerank

    rerank = QRRerank(**{given: qr_mini if given == "backend" else "qr-mini"})
    expected = rerank.postprocess_nodes(nodes, query_str=DRACULA)
    for twin in (copy.deepcopy(rerank), copy.copy(rerank), rerank.model_copy(), rerank.model_copy(deep=True)):
        assert twin is not rerank and twin.open().backend is qr_mini
        assert twin.postprocess_nodes(nodes, query_str=DRACULA) == expected
        twin.top_n = 1
        assert rerank.top_n == 5


def test_a_changed_copy_leaves_the_other_as_it_was(nodes: Any, contents: Any, ranked: Any, places: Any) -> None:
    from qr_integrations.llama_index import QRRerank

    one = QRRerank(model="qr-mini")
    other = one.model_copy(update={"heads": "all"})
    for _ in range(2):
        assert places(one.postprocess_nodes(nodes, query_str=DRACULA), nodes) == ranked(DRACULA, contents)
        expected = ranked(DRACULA, contents, heads="all")
        assert places(other.postprocess_nodes(nodes, query_str=DRACULA), nodes) == expected


@pytest.mark.parametrize(
    "change",
    [
        {"heads": "all"},
        {"heads": [(1, 0)]},
        {"prompt": ASK.format("{query}")},
        {"instruction": "Find books.", "null_instruction": 1.0},
        {"calibrated": False},
        {"max_doc_tokens": 10},
        {"batch_size": 2},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_change_after_use_takes_effect(
    qr_mini: Any, nodes: Any, contents: Any, ranked: Any, places: Any, change: dict[str, Any]
) -> None:
    from qr_integrations.llama_index import QRRerank

    for rerank in (QRRerank(model="qr-mini"), QRRerank(backend=qr_mini)):
        before = places(rerank.postprocess_nodes(nodes, query_str=DRACULA), nodes)
        for name, value in change.items():
            setattr(rerank, name, value)
        after = places(rerank.postprocess_nodes(nodes, query_str=DRACULA), nodes)
        assert after == ranked(DRACULA, contents, **change) and after != before


def test_a_change_is_checked_and_written_like_a_first_value() -> None:
    from qr_integrations import HeadSet
    from qr_integrations.llama_index import QRRerank

    rerank = QRRerank(model="qr-mini")
    rerank.heads, rerank.metadata_mode = HeadSet.of([(1, 0)]), "none"
    assert rerank.to_dict() == QRRerank(model="qr-mini", heads=[(1, 0)], metadata_mode=MetadataMode.NONE).to_dict()
    for name, wrong in (("top_n", -1), ("max_spans", 0), ("truncation", "tail"), ("top_k", 3)):
        with pytest.raises(ValueError, match=name):
            setattr(rerank, name, wrong)


def test_icr_is_the_other_method(qr_mini: Any, nodes: Any, contents: Any, places: Any) -> None:
    from qr_integrations import ICRReranker
    from qr_integrations.llama_index import QRRerank

    rerank = QRRerank(model="qr-mini", method="icr")
    expected = [(item.index, pytest.approx(item.score)) for item in ICRReranker(qr_mini).rank(DRACULA, contents)]
    assert places(rerank.postprocess_nodes(nodes, query_str=DRACULA), nodes) == expected


@pytest.mark.parametrize("given", ["model", "backend"])
def test_another_model_after_use_takes_effect(qr_mini: Any, nodes: Any, given: str) -> None:
    from qr_integrations.errors import LoadError
    from qr_integrations.llama_index import QRRerank

    rerank = QRRerank(**{given: qr_mini if given == "backend" else "qr-mini"})
    rerank.postprocess_nodes(nodes, query_str=DRACULA)
    with pytest.raises((LoadError, ValueError), match="nowhere"):
        rerank.model = "/nowhere/at/all"
        rerank.postprocess_nodes(nodes, query_str=DRACULA)


def test_importing_it_loads_no_model_library_and_not_the_other_framework(in_fresh_python: Callable[[str], str]) -> None:
    heavy = ["torch", "transformers", "langchain_core"]
    code = f"import sys, qr_integrations.llama_index; print(*[m for m in {heavy} if m in sys.modules])"
    assert in_fresh_python(code) == ""


@pytest.mark.parametrize(
    "hide",
    [
        "sys.modules['llama_index'] = None",
        "sys.modules['llama_index.core'] = None",
        "sys.path[:] = [p for p in sys.path if 'site-packages' not in p]",
    ],
)
def test_without_llama_index_the_error_names_the_cure(in_fresh_python: Callable[[str], str], hide: str) -> None:
    code = f"import sys\n{hide}\ntry:\n import qr_integrations.llama_index\nexcept ImportError as error:\n print(error)"
    assert "pip install 'qr-integrations[llama-index]'" in in_fresh_python(code)
