"""What the published method does not do: each option against the plain computation, and against its own promise."""

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from qr_integrations.backend import Backend
    from qr_integrations.types import Document, Ranking

QUERY = "who wrote dracula"
TEXTS = [
    ("Cats", "Cats sleep most of the day, and wrote nothing."),
    ("Dracula", "Dracula is an 1897 Gothic novel by the Irish author Bram Stoker."),
    (None, "The Danube flows through Vienna and Budapest. " * 6),
    ("Frankenstein", "Frankenstein was written by Mary Shelley; Dracula was not."),
    ("Rivers", "Rivers flow."),
]


@pytest.fixture
def documents() -> "list[Document]":
    from qr_integrations.types import Document

    return [Document(text, title) for title, text in TEXTS]


def ranked(backend: "Backend", documents: "Sequence[Document]", query: str = QUERY, **refinements: Any) -> "Ranking":
    from qr_integrations import QRHeadReranker

    return QRHeadReranker(backend, refinements=refinements).rank(query, documents)


def by_text(ranking: "Ranking") -> dict[str, float]:
    return {item.document.text: item.score for item in ranking}


ORDER_FREE = [{"layout": "block"}, {"orders": 2}, {"orders": 3}]


@pytest.mark.parametrize("refinements", ORDER_FREE, ids=str)
def test_the_order_of_the_documents_makes_no_difference(
    qr_mini: "Backend", documents: "list[Document]", refinements: dict[str, Any]
) -> None:
    expected = by_text(ranked(qr_mini, documents, **refinements))
    for order in ([4, 3, 2, 1, 0], [2, 0, 4, 1, 3]):
        found = by_text(ranked(qr_mini, [documents[i] for i in order], **refinements))
        assert found == pytest.approx(expected, abs=1e-6)
    published = by_text(ranked(qr_mini, documents)), by_text(ranked(qr_mini, documents[::-1]))
    assert published[0] != pytest.approx(published[1], abs=1e-4)  # without them it does


def test_several_orders_are_the_mean_of_the_orders(qr_mini: "Backend", documents: "list[Document]") -> None:
    """Of the token scores: the documents' scores are their sums, but for outliers, which single orders drop."""
    from qr_integrations.retrieval.refinements import orders_of

    orders = orders_of(documents, 2)
    singly = [by_text(ranked(qr_mini, [documents[i] for i in order])) for order in orders]
    together = by_text(ranked(qr_mini, documents, orders=2))
    means = {text: (singly[0][text] + singly[1][text]) / 2 for text in together}
    assert together == pytest.approx(means, abs=0.01)
    assert together != pytest.approx(singly[0], abs=1e-5)


def test_orders_are_permutations_that_differ(documents: "list[Document]") -> None:
    from qr_integrations.retrieval.refinements import orders_of

    orders = orders_of(documents, 4)
    assert all(sorted(order) == list(range(5)) for order in orders) and len({tuple(order) for order in orders}) == 4
    read = [[documents[i].text for i in order] for order in orders]
    turned = documents[::-1]
    assert [[turned[i].text for i in order] for order in orders_of(turned, 4)] == read


def test_the_mean_length_is_divided_by(qr_mini: "Backend", documents: "list[Document]") -> None:
    lengths = {item.document.text: item.num_tokens for item in ranked(qr_mini, documents)}
    mean = sum(lengths.values()) / len(lengths)
    plain, divided = by_text(ranked(qr_mini, documents)), by_text(ranked(qr_mini, documents, length_power=0.5))
    assert divided == pytest.approx({t: s * math.sqrt(mean / lengths[t]) for t, s in plain.items()}, abs=1e-6)


def test_words_of_the_query_count_less_the_more_documents_hold_them(qr_mini: "Backend") -> None:
    """Token by token: 'dracula' stands in two of five documents, 'wrote' in one, the others are not asked for."""
    from qr_integrations.retrieval.layout import PromptLayout
    from qr_integrations.retrieval.refinements import Refinements, token_weights
    from qr_integrations.types import Document

    layout = PromptLayout.build(qr_mini, QUERY, [Document(text, title) for title, text in TEXTS])
    weights = token_weights(layout, QUERY, Refinements(rare_words=0.5))
    assert weights is not None and layout.offsets is not None
    expected = {"dracula": 1 - 0.5 * (1 - math.log(5 / 2) / math.log(5)), "wrote": 1.0}
    told: dict[str, set[float]] = {}
    for word in re.finditer(r"\w+", layout.text[: layout.tail]):
        for token, (start, stop) in enumerate(layout.offsets[layout.shared.slice()].tolist()):
            if word.start() <= start and stop <= word.end() and start < stop:
                told.setdefault(word.group().lower(), set()).add(round(float(weights[token]), 6))
    assert told["dracula"] == {round(expected["dracula"], 6)}
    assert told["wrote"] == {1.0} and told["cats"] == {1.0} and told["flow"] == {1.0}


def test_a_word_of_all_documents_counts_nothing(qr_mini: "Backend") -> None:
    from qr_integrations.types import Document

    texts = [Document(f"Dracula {word}.") for word in ("sleeps", "flies", "bites")]
    with_it = by_text(ranked(qr_mini, texts, query="dracula"))
    without = by_text(ranked(qr_mini, texts, query="dracula", rare_words=1.0))
    assert sum(without.values()) < 0.5 * sum(with_it.values())


def test_spans_and_scores_stay_together(qr_mini: "Backend", documents: "list[Document]") -> None:
    from qr_integrations import QRHeadReranker

    for refinements in ({"layout": "block"}, {"orders": 2}, {"length_power": 1.0}, {"rare_words": 1.0}):
        reranker = QRHeadReranker(qr_mini, refinements=refinements)
        for item in reranker.rank(QUERY, documents, explain=True, max_spans=None):
            assert all(span.text == item.document.text[span.span.slice()] for span in item.spans)
            words = reranker.explain(QUERY, documents, item.index)
            for span in item.spans:
                within = [w.score for w in words if span.span.start <= w.span.start and w.span.stop <= span.span.stop]
                assert span.score == pytest.approx(sum(within), abs=1e-6)


def test_a_second_query_reads_no_document_again(
    qr_mini: "Backend", documents: "list[Document]", lengths_read: list[int]
) -> None:
    from qr_integrations import QRHeadReranker

    for refinements in ({"layout": "block"}, {"orders": 3}):
        reranker = QRHeadReranker(qr_mini, refinements=refinements)
        reranker.rank(QUERY, documents)
        whole = sum(lengths_read)
        lengths_read.clear()
        reranker.rank("which river flows through vienna", documents)
        assert 0 < sum(lengths_read) < whole / 3
        lengths_read.clear()


def test_a_document_alone_is_the_same_in_both_layouts(qr_mini: "Backend", documents: "list[Document]") -> None:
    joint, block = (by_text(ranked(qr_mini, documents[1:2], layout=layout)) for layout in ("joint", "block"))
    assert joint == pytest.approx(block, abs=1e-5)


def test_blocks_work_in_several_prompts_and_pieces(qr_mini: "Backend", documents: "list[Document]") -> None:
    from qr_integrations import QRHeadReranker

    for truncation in ("head", "chunk"):
        reranker = QRHeadReranker(
            qr_mini, refinements={"layout": "block"}, truncation=truncation, max_context_tokens=130
        )
        ranking = reranker.rank(QUERY, documents)
        assert sorted(ranking.order) == [0, 1, 2, 3, 4] and ranking[0].document.title == "Dracula"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layout": "blocks"}, "pass 'joint' or 'block'"),
        ({"orders": 0}, "pass 1 or more"),
        ({"orders": 2, "layout": "block"}, "which has no order"),
        ({"rare_words": 1.5}, "from 0 to 1"),
        ({"length_power": math.nan}, "pass 0 for the sum"),
        ({"lenght_power": 1.0}, "known are layout, positions, orders, length_power, rare_words"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_is_no_refinement_is_said(qr_mini: "Backend", given: dict[str, Any], message: str) -> None:
    from qr_integrations import QRHeadReranker
    from qr_integrations.errors import InputError

    with pytest.raises(InputError, match=message):
        QRHeadReranker(qr_mini, refinements=given)


def test_the_default_is_the_published_method(qr_mini: "Backend", documents: "list[Document]") -> None:
    from qr_integrations import QRHeadReranker, Refinements

    plain = QRHeadReranker(qr_mini).rank(QUERY, documents)
    assert by_text(ranked(qr_mini, documents, **{})) == by_text(plain)
    assert Refinements() == Refinements.of({})
