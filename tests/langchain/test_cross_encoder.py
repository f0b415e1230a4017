"""`QRCrossEncoder`: for components of LangChain that score pairs."""

from typing import Any

import pytest
from langchain_classic.retrievers.document_compressors import CrossEncoderReranker
from langchain_core.cross_encoders import BaseCrossEncoder
from langchain_core.documents import Document


@pytest.fixture(scope="module")
def encoder(qr_mini: Any) -> Any:
    from qr_integrations.langchain import QRCrossEncoder

    return QRCrossEncoder(backend=qr_mini)


def in_input_order(ranking: list[tuple[int, float]]) -> list[float]:
    return [score for _, score in sorted(ranking)]


def test_it_is_a_cross_encoder_with_nothing_left_to_implement() -> None:
    from qr_integrations.langchain import QRCrossEncoder

    assert issubclass(QRCrossEncoder, BaseCrossEncoder) and not QRCrossEncoder.__abstractmethods__


def test_pairs_of_several_queries_come_back_in_their_order(
    encoder: Any, ranked: Any, queries: list[str], texts: list[str]
) -> None:
    pairs = [(queries[(i + j) % 4], texts[i]) for j in range(4) for i in range(4)]  # no two neighbours share a query
    found = encoder.score(pairs)
    assert [type(score) for score in found] == [float] * 16
    for query in queries:
        own = [number for number, pair in enumerate(pairs) if pair[0] == query]
        expected = in_input_order(ranked(query, [pairs[number][1] for number in own]))
        assert [found[number] for number in own] == pytest.approx(expected, abs=1e-6)


def test_equal_pairs_and_single_pairs_have_scores_of_their_own(
    encoder: Any, ranked: Any, queries: list[str], texts: list[str]
) -> None:
    twice = [(queries[1], texts[1]), (queries[1], texts[0]), (queries[1], texts[1])]
    assert encoder.score(twice) == pytest.approx(in_input_order(ranked(queries[1], [text for _, text in twice])))
    assert encoder.score(twice[:1]) == pytest.approx(in_input_order(ranked(queries[1], texts[1:2])))
    assert encoder.score([]) == []


def test_it_works_inside_langchains_reranker(
    encoder: Any, ranked: Any, queries: list[str], documents: list[Document]
) -> None:
    reranker = CrossEncoderReranker(model=encoder, top_n=2)
    found = reranker.compress_documents(documents, queries[1])
    expected = ranked(queries[1], [document.page_content for document in documents])
    assert [document.id for document in found] == ["abcd"[index] for index, _ in expected[:2]]
    assert reranker.compress_documents([], queries[1]) == []


def test_a_threshold_and_explain_have_no_effect(
    qr_mini: Any, encoder: Any, queries: list[str], texts: list[str]
) -> None:
    from qr_integrations.langchain import QRCrossEncoder

    pairs = [(queries[1], text) for text in texts]
    assert QRCrossEncoder(backend=qr_mini, score_threshold=9.0, explain=True).score(pairs) == encoder.score(pairs)


def test_normalize_is_applied_per_query(qr_mini: Any, queries: list[str], texts: list[str]) -> None:
    from qr_integrations.langchain import QRCrossEncoder

    own = QRCrossEncoder(backend=qr_mini, normalize="share")
    found = own.score([(query, text) for text in texts for query in queries[:2]])
    assert sum(found[0::2]) == pytest.approx(1) == sum(found[1::2]) and min(found) >= 0


@pytest.mark.parametrize(
    "wrong", [None, 3, "ab", ("q",), ("q", "t", "x"), ("q", None), (b"q", "t"), [], {"q": 1, "t": 2}]
)
@pytest.mark.usefixtures("unchecked")
def test_a_bad_pair_is_named(encoder: Any, wrong: Any) -> None:
    from qr_integrations.errors import InputError

    with pytest.raises(InputError, match=r"pair #1 is .*: pass \(query, text\)"):
        encoder.score([("q", "fine"), wrong])


def test_an_empty_query_is_a_value_error(encoder: Any) -> None:
    with pytest.raises(ValueError, match="query is empty"):
        encoder.score([("", "text")])
