"""A `DocumentCache` in the adapters of both frameworks: shared by copies, written as its arguments."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

BLOCK: dict[str, Any] = {"refinements": {"layout": "block"}, "keep_prefixes": 0}


def ranks(adapter: Any, texts: list[str]) -> list[Any]:
    """Positions and scores, best first, of either framework's reranker."""
    if hasattr(adapter, "rerank"):
        return [(f["index"], pytest.approx(f["relevance_score"], abs=1e-5)) for f in adapter.rerank(texts, "who wrote")]
    from llama_index.core.schema import NodeWithScore, TextNode

    nodes = [NodeWithScore(node=TextNode(id_=str(i), text=text)) for i, text in enumerate(texts)]
    scored = adapter.postprocess_nodes(nodes, query_str="who wrote")
    return [(int(s.node_id), pytest.approx(s.score, abs=1e-5)) for s in scored]


@pytest.fixture(params=["langchain", "llama_index"])
def adapter_class(request: pytest.FixtureRequest) -> Any:
    return pytest.importorskip(f"qr_integrations.{request.param}").QRRerank


def test_documents_that_come_back_are_not_read_again(adapter_class: Any, texts: list[str]) -> None:
    from qr_integrations.retrieval.store import DocumentCache

    cache = DocumentCache()
    own = adapter_class(model="qr-mini", top_n=None, cache=cache, **BLOCK)
    plain = adapter_class(model="qr-mini", top_n=None, **BLOCK)
    for given in (texts, texts[::-1], texts[1:3]):
        assert ranks(own, given) == ranks(plain, given)
    assert (cache.stats().hits, cache.stats().misses) == (6, 4)
    joint = adapter_class(model="qr-mini", top_n=None, cache=cache, keep_prefixes=0)
    for given in (texts[:3], texts):
        assert ranks(joint, given) == ranks(adapter_class(model="qr-mini", top_n=None), given)
    assert (cache.stats().hits, cache.stats().misses) == (10, 7)  # the first one sees nothing before it either way


def test_copies_share_one_cache(adapter_class: Any, texts: list[str]) -> None:
    own = adapter_class(model="qr-mini", top_n=None, cache={"max_bytes": 2**24}, **BLOCK)
    made = own.open().scorer.cache
    for other in (copy.deepcopy(own), own.model_copy(update={"heads": "all"}), copy.copy(own)):
        assert other.open().scorer.cache is made
    given = adapter_class(model="qr-mini", cache=made)
    assert copy.deepcopy(given).cache is made and given.open().scorer.cache is made


def test_a_pickle_and_a_dictionary_hold_its_arguments(adapter_class: Any, texts: list[str], tmp_path: Path) -> None:
    from qr_integrations.retrieval.store import DocumentCache

    arguments = {"max_bytes": 2**24, "folder": str(tmp_path), "max_disk_bytes": None, "kv_dtype": "float16"}
    cache = DocumentCache(2**24, folder=tmp_path, kv_dtype="float16")
    for given in (cache, arguments):
        own = adapter_class(model="qr-mini", top_n=None, cache=given, **BLOCK)
        expected = ranks(own, texts)
        assert own.model_dump()["cache"] == arguments
        written = json.loads(own.model_dump_json(exclude={"callback_manager"}))
        written.pop("class_name", None)
        again = adapter_class(**written)
        assert again.cache == arguments and ranks(again, texts) == expected
        data = pickle.dumps(own)
        assert len(data) < 10_000 and ranks(pickle.loads(data), texts) == expected


def test_a_folder_holds_what_was_read_once_the_adapter_is_closed(
    adapter_class: Any, texts: list[str], tmp_path: Path
) -> None:
    arguments = {"folder": str(tmp_path)}
    own = adapter_class(model="qr-mini", dtype="bfloat16", top_n=None, cache=arguments, **BLOCK)
    expected = ranks(own, texts)
    own.close()
    again = adapter_class(model="qr-mini", dtype="bfloat16", top_n=None, cache=arguments, **BLOCK)
    assert ranks(again, texts[::-1]) == [(3 - place, score) for place, score in expected]
    assert (again.open().scorer.cache.stats().hits, again.open().scorer.cache.stats().misses) == (4, 0)


@pytest.mark.parametrize("wrong", [{"bytes": 3}, 3, "a folder"], ids=str)
def test_what_is_no_cache_is_an_error_at_once(adapter_class: Any, wrong: Any) -> None:
    with pytest.raises(ValueError, match="cache"):
        adapter_class(model="qr-mini", cache=wrong)
