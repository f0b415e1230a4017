"""`QRRerank` as a node postprocessor, on the bundled model: what comes back, and what stays as it was."""

import json
import math
from collections.abc import Callable
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.prompts.mixin import PromptMixin
from llama_index.core.schema import (
    Document,
    ImageDocument,
    ImageNode,
    IndexNode,
    MediaResource,
    MetadataMode,
    Node,
    NodeRelationship,
    NodeWithScore,
    QueryBundle,
    RelatedNodeInfo,
    TextNode,
)

DRACULA = "who wrote dracula"
ALWAYS = {"qr_score", "qr_score_type", "qr_rank", "qr_truncated"}


def test_it_is_a_node_postprocessor_with_nothing_left_abstract() -> None:
    from qr_integrations.llama_index import QRRerank

    assert {BaseNodePostprocessor, PromptMixin} <= set(QRRerank.__mro__)
    assert not QRRerank.__abstractmethods__ and QRRerank.class_name() == "QRRerank"


@pytest.mark.parametrize("mode", MetadataMode)
def test_order_and_scores_are_those_of_the_reranker(
    nodes: Any, queries: Any, ranked: Any, places: Any, mode: MetadataMode
) -> None:
    from qr_integrations.llama_index import QRRerank

    rerank = QRRerank(model="qr-mini", metadata_mode=mode, top_n=None)
    contents = [scored.node.get_content(mode) for scored in nodes]
    for query in queries:
        assert places(rerank.postprocess_nodes(nodes, query_str=query), nodes) == ranked(query, contents)


def test_without_metadata_the_text_alone_is_ranked(reranker: Any, plain: Any, texts: Any, queries: Any) -> None:
    for number, query in enumerate(queries):
        assert reranker.postprocess_nodes(plain(texts), query_str=query)[0].node_id == str(number)


def test_metadata_is_ranked_as_embeddings_would_see_it(reranker: Any, nodes: Any, ranked: Any, places: Any) -> None:
    contents = [scored.node.get_content(MetadataMode.EMBED) for scored in nodes]
    assert contents[1].startswith("file_name: 1.txt\n\nDracula")
    assert places(reranker.postprocess_nodes(nodes, query_str=DRACULA), nodes) == ranked(DRACULA, contents)


def test_a_query_bundle_is_the_same_as_its_string(reranker: Any, nodes: Any) -> None:
    by_bundle = reranker.postprocess_nodes(nodes, query_bundle=QueryBundle(DRACULA))
    assert by_bundle == reranker.postprocess_nodes(nodes, query_str=DRACULA)
    with pytest.raises(ValueError, match="Cannot specify both"):
        reranker.postprocess_nodes(nodes, query_bundle=QueryBundle(DRACULA), query_str=DRACULA)


def test_in_every_order_of_the_input_each_node_carries_its_own_score(
    reranker: Any, nodes: Any, ranked: Any, places: Any
) -> None:
    text_of = {scored.node_id: scored.text for scored in nodes}
    for given in permutations(nodes):
        given = list(given)
        found = reranker.postprocess_nodes(given, query_str=DRACULA)
        assert places(found, given) == ranked(DRACULA, [n.node.get_content(MetadataMode.EMBED) for n in given])
        assert {scored.node_id: scored.text for scored in found} == text_of
        assert found[0].node_id == "b"


@pytest.mark.parametrize("query", [DRACULA, "author of frankenstein"])
def test_ties_keep_the_order_of_the_input(nodes: Any, query: str) -> None:
    from qr_integrations.llama_index import QRRerank

    rerank = QRRerank(model="qr-mini", top_n=None, normalize=lambda scores: [0.5] * len(scores))
    for given in (nodes, nodes[::-1]):
        found = rerank.postprocess_nodes(given, query_str=query)
        assert [scored.node_id for scored in found] == [scored.node_id for scored in given]
        assert [scored.metadata["qr_rank"] for scored in found] == [1, 2, 3, 4]


def test_one_node_is_ranked_like_any_list(reranker: Any, nodes: Any, ranked: Any, places: Any) -> None:
    content = nodes[1].node.get_content(MetadataMode.EMBED)
    assert places(reranker.postprocess_nodes(nodes[1:2], query_str=DRACULA), nodes[1:2]) == ranked(DRACULA, [content])


def test_equal_texts_stay_apart(reranker: Any, plain: Any, texts: Any, ranked: Any, places: Any) -> None:
    given = plain([texts[1], texts[0], texts[1]])
    found = reranker.postprocess_nodes(given, query_str=DRACULA)
    assert places(found, given) == ranked(DRACULA, [texts[1], texts[0], texts[1]])
    assert sorted(scored.node_id for scored in found) == ["0", "1", "2"]


def test_equal_ids_and_the_same_node_twice_stay_apart(reranker: Any, texts: Any, ranked: Any) -> None:
    given = [NodeWithScore(node=TextNode(id_="same", text=text)) for text in texts]
    given += given[1:2]
    found = reranker.postprocess_nodes(given, query_str=DRACULA)
    expected = ranked(DRACULA, [*texts, texts[1]])
    assert [(scored.text, scored.score) for scored in found] == [(given[i].text, score) for i, score in expected]


def test_empty_and_odd_texts_are_ranked_not_lost(reranker: Any, plain: Any, ranked: Any, places: Any) -> None:
    odd = ["", " \n", "🙂", "東京都は日本の首都", "\x00", "{query_str}", "Dracula is by Bram Stoker."]
    given = plain(odd)
    found = reranker.postprocess_nodes(given, query_str=DRACULA)
    assert places(found, given) == ranked(DRACULA, odd) and found[0].node_id == "6"


def test_every_kind_of_node_with_text_is_ranked_and_keeps_its_kind(
    reranker: Any, texts: Any, ranked: Any, places: Any
) -> None:
    kinds = [
        IndexNode(text=texts[0], index_id="i"),
        Node(text_resource=MediaResource(text=texts[1])),
        Document(text=texts[2]),
        ImageNode(text=texts[3], image_path="cover.png"),
    ]
    given = [NodeWithScore(node=node) for node in kinds]
    found = reranker.postprocess_nodes(given, query_str=DRACULA)
    assert places(found, given) == ranked(DRACULA, texts)
    assert {type(scored.node) for scored in found} == {type(node) for node in kinds}


@pytest.mark.parametrize(
    "node",
    [
        ImageNode(id_="picture", image_path="cover.png", metadata={"title": "Dracula"}),
        ImageDocument(id_="picture", image=b"pixels"),
        Node(id_="picture", image_resource=MediaResource(path="cover.png")),
    ],
    ids=lambda node: type(node).__name__,
)
def test_an_image_without_text_is_an_error_and_no_empty_document(reranker: Any, nodes: Any, node: Any) -> None:
    with pytest.raises(ValueError, match=r"node #1 \(picture\) is an image without text.*caption"):
        reranker.postprocess_nodes([nodes[0], NodeWithScore(node=node)], query_str=DRACULA)


@pytest.mark.parametrize("top_n", [None, 0, 1, 5])
def test_no_nodes_are_an_empty_list_and_load_no_model(top_n: int | None) -> None:
    from qr_integrations.llama_index import QRRerank

    rerank = QRRerank(model="/nowhere/at/all", top_n=top_n)
    assert rerank.postprocess_nodes([], query_str=DRACULA) == []


def test_a_missing_query_is_an_error(reranker: Any, nodes: Any) -> None:
    with pytest.raises(ValueError, match="Missing query bundle"):
        reranker.postprocess_nodes(nodes)


@pytest.mark.parametrize("query", ["", "  \n"])
def test_an_empty_query_is_an_error(reranker: Any, nodes: Any, query: str) -> None:
    with pytest.raises(ValueError, match="query is empty"):
        reranker.postprocess_nodes(nodes, query_str=query)


@pytest.mark.parametrize(("top_n", "expected"), [(None, 4), (0, 0), (1, 1), (3, 3), (4, 4), (99, 4)])
def test_top_n_is_how_many_come_back(reranker: Any, nodes: Any, top_n: int | None, expected: int) -> None:
    from qr_integrations.llama_index import QRRerank

    found = QRRerank(model="qr-mini", top_n=top_n).postprocess_nodes(nodes, query_str=DRACULA)
    assert found == reranker.postprocess_nodes(nodes, query_str=DRACULA)[:expected] and len(found) == expected


def test_five_come_back_unless_told_otherwise(plain: Any, texts: Any) -> None:
    from qr_integrations.llama_index import QRRerank

    assert len(QRRerank(model="qr-mini").postprocess_nodes(plain(texts * 2), query_str=DRACULA)) == 5


@pytest.mark.parametrize("top_n", [-1, -5, "many"])
def test_a_wrong_top_n_is_an_error_at_once(top_n: Any) -> None:
    from qr_integrations.llama_index import QRRerank

    with pytest.raises(ValueError, match="top_n"):
        QRRerank(model="qr-mini", top_n=top_n)


def test_a_wrong_top_n_set_later_is_an_error_too(nodes: Any) -> None:
    from qr_integrations.llama_index import QRRerank

    rerank = QRRerank(model="qr-mini")
    with pytest.raises(ValueError, match="top_n"):
        rerank.top_n = -1
        rerank.postprocess_nodes(nodes, query_str=DRACULA)


def test_negative_scores_and_nodes_without_a_score_are_not_dropped(reranker: Any, nodes: Any) -> None:
    assert {scored.score for scored in nodes} >= {None, -3.0}
    found = reranker.postprocess_nodes(nodes, query_str=DRACULA)
    scores = [scored.score for scored in found]
    assert len(scores) == 4 and scores[-1] < 0 < scores[0] and scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("normalize", [None, "share", "sigmoid"])
def test_the_threshold_is_on_the_scale_of_the_scores(nodes: Any, normalize: Any) -> None:
    from qr_integrations.llama_index import QRRerank

    settings: dict[str, Any] = {"model": "qr-mini", "top_n": None, "normalize": normalize}
    everything = QRRerank(**settings).postprocess_nodes(nodes, query_str=DRACULA)
    for threshold in (everything[0].score, everything[1].score):
        found = QRRerank(**settings, score_threshold=threshold).postprocess_nodes(nodes, query_str=DRACULA)
        assert found == [scored for scored in everything if scored.score >= threshold]
    assert QRRerank(**settings, score_threshold=2.0).postprocess_nodes(nodes, query_str=DRACULA) == []
    one = QRRerank(**{**settings, "top_n": 1}, score_threshold=-2.0).postprocess_nodes(nodes, query_str=DRACULA)
    assert one == everything[:1]


@pytest.mark.parametrize(
    ("normalize", "name", "of"),
    [
        (None, "raw", lambda raw: raw),
        ("share", "share", lambda raw: [max(0.0, s) / sum(max(0.0, s) for s in raw) for s in raw]),
        ("sigmoid", "sigmoid", lambda raw: [1 / (1 + math.exp(-s)) for s in raw]),
        (lambda scores: [10 * s for s in scores], "custom", lambda raw: [10 * s for s in raw]),
        (lambda scores: np.array(scores, dtype=np.float32), "custom", lambda raw: raw),
    ],
)
def test_normalize_changes_the_score_and_keeps_the_attention(
    reranker: Any, nodes: Any, normalize: Any, name: str, of: Callable[[list[float]], list[float]]
) -> None:
    from qr_integrations.llama_index import QRRerank

    raw = [scored.score for scored in reranker.postprocess_nodes(nodes, query_str=DRACULA)]
    found = QRRerank(model="qr-mini", top_n=None, normalize=normalize).postprocess_nodes(nodes, query_str=DRACULA)
    assert [scored.score for scored in found] == pytest.approx(of(raw), abs=1e-6)
    assert [scored.metadata["qr_score"] for scored in found] == pytest.approx(raw, abs=1e-6)
    assert {scored.metadata["qr_score_type"] for scored in found} == {name}
    assert {type(scored.score) for scored in found} == {float}


@pytest.mark.parametrize(
    "returned",
    [None, 1.0, [], [1.0], [1.0] * 5, [float("nan")] * 4, [float("inf")] * 4, ["high"] * 4, [[1.0]] * 4, "abcd"],
    ids=repr,
)
def test_a_normalize_that_returns_no_list_of_numbers_is_a_clear_error(nodes: Any, returned: Any) -> None:
    from qr_integrations.errors import InputError
    from qr_integrations.llama_index import QRRerank

    rerank = QRRerank(model="qr-mini", normalize=lambda scores: returned)
    with pytest.raises(InputError, match="normalize"):
        rerank.postprocess_nodes(nodes, query_str=DRACULA)


@pytest.mark.parametrize("normalize", ["softmax", 3, ["share"]])
def test_an_unknown_normalize_is_an_error_at_once(normalize: Any) -> None:
    from qr_integrations.llama_index import QRRerank

    with pytest.raises(ValueError, match="normalize"):
        QRRerank(model="qr-mini", normalize=normalize)


def test_the_nodes_given_stay_as_they_were(nodes: Any) -> None:
    from qr_integrations.llama_index import QRRerank

    given, before = list(nodes), [scored.model_copy(deep=True) for scored in nodes]
    inner = [id(scored.node) for scored in nodes]
    rerank = QRRerank(model="qr-mini", explain=True, keep_retrieval_score=True, normalize="share")
    found = rerank.postprocess_nodes(nodes, query_str=DRACULA)
    assert all(a is b for a, b in zip(nodes, given, strict=True)) and [id(s.node) for s in nodes] == inner
    assert [scored.model_dump() for scored in nodes] == [scored.model_dump() for scored in before]
    assert not {id(scored) for scored in found} & {id(scored) for scored in nodes}
    assert not {id(scored.node) for scored in found} & set(inner)


@pytest.mark.parametrize(
    "change",
    [
        lambda node: node.metadata.update(page="new"),
        lambda node: node.excluded_embed_metadata_keys.append("new"),
        lambda node: node.excluded_llm_metadata_keys.append("new"),
        lambda node: node.relationships.update({NodeRelationship.NEXT: RelatedNodeInfo(node_id="new")}),
    ],
    ids=["metadata", "embed keys", "llm keys", "relationships"],
)
def test_what_is_done_to_a_returned_node_does_not_reach_the_given_one(
    reranker: Any, nodes: Any, change: Callable[[Any], None]
) -> None:
    before = [scored.model_copy(deep=True) for scored in nodes]
    for scored in reranker.postprocess_nodes(nodes, query_str=DRACULA):
        change(scored.node)
    assert [scored.model_dump() for scored in nodes] == [scored.model_dump() for scored in before]


def test_ids_relationships_and_metadata_are_kept(reranker: Any, nodes: Any) -> None:
    given = {scored.node_id: scored.node for scored in nodes}
    for scored in reranker.postprocess_nodes(nodes, query_str=DRACULA):
        node = given[scored.node_id]
        assert scored.text == node.text and scored.node.relationships == node.relationships
        assert {key: value for key, value in scored.metadata.items() if key not in ALWAYS} == node.metadata


@pytest.mark.parametrize("explain", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_the_metadata_keys_are_exactly_these(nodes: Any, explain: bool, keep: bool) -> None:
    from qr_integrations.llama_index import QRRerank

    rerank = QRRerank(model="qr-mini", explain=explain, keep_retrieval_score=keep)
    for rank, scored in enumerate(rerank.postprocess_nodes(nodes, query_str=DRACULA), start=1):
        given = next(node for node in nodes if node.node_id == scored.node_id)
        kept = {"retrieval_score"} if keep and given.score is not None else set()
        assert set(scored.metadata) - set(given.metadata) == ALWAYS | ({"qr_spans"} if explain else set()) | kept
        types = [type(scored.metadata[key]) for key in ("qr_score", "qr_score_type", "qr_rank", "qr_truncated")]
        assert types == [float, str, int, bool] and scored.metadata["qr_rank"] == rank
        assert scored.metadata.get("retrieval_score") == (given.score if keep else None)
        assert type(scored.score) is float
        assert json.loads(scored.to_json())["score"] == scored.score
        assert json.loads(json.dumps(scored.metadata)) == scored.metadata


def test_numbers_of_numpy_do_not_come_back(reranker: Any, nodes: Any) -> None:
    from qr_integrations.llama_index import QRRerank

    nodes[0].score = np.float32(0.25)  # not validated by LlamaIndex
    found = QRRerank(model="qr-mini", keep_retrieval_score=True).postprocess_nodes(nodes, query_str="what do cats do")
    assert type(found[0].metadata["retrieval_score"]) is float and json.loads(found[0].to_json())


def test_our_keys_are_hidden_from_embeddings_and_language_models(nodes: Any) -> None:
    from qr_integrations.llama_index import QRRerank

    rerank = QRRerank(model="qr-mini", explain=True, keep_retrieval_score=True)
    given = {scored.node_id: scored.node for scored in nodes}
    once = rerank.postprocess_nodes(nodes, query_str=DRACULA)
    for scored in [*once, *rerank.postprocess_nodes(once, query_str=DRACULA)]:
        for mode in (MetadataMode.EMBED, MetadataMode.LLM, MetadataMode.NONE):
            assert scored.node.get_content(mode) == given[scored.node_id].get_content(mode)
        for keys in (scored.node.excluded_embed_metadata_keys, scored.node.excluded_llm_metadata_keys):
            assert len(keys) == len(set(keys)) and keys[0] in ("page", "file_name")


@pytest.mark.parametrize("key", ["relevance_score", "retrieval_score"])
def test_metadata_of_the_user_that_we_do_not_write_stays_visible(reranker: Any, key: str) -> None:
    given = NodeWithScore(node=TextNode(text="Dracula is by Bram Stoker.", metadata={key: "high"}))
    found = reranker.postprocess_nodes([given], query_str=DRACULA)[0]
    assert found.node.get_content(MetadataMode.LLM) == given.node.get_content(MetadataMode.LLM)


def test_a_node_that_is_cut_says_so(plain: Any, texts: Any, ranked: Any, places: Any) -> None:
    from qr_integrations.llama_index import QRRerank

    given = plain([texts[0], texts[1] * 20])
    found = QRRerank(model="qr-mini", max_doc_tokens=40).postprocess_nodes(given, query_str=DRACULA)
    assert places(found, given) == ranked(DRACULA, [scored.text for scored in given], max_doc_tokens=40)
    assert {scored.node_id: scored.metadata["qr_truncated"] for scored in found} == {"0": False, "1": True}
    assert found[0].text == texts[1] * 20
