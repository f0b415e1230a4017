"""Queries over the same documents go through the model together, and nobody can tell."""

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from qr_integrations.backend import Backend

QUERIES = ["who wrote dracula", "what do cats do all day", "where does the danube end", "who wrote dracula"]
DOCUMENTS = [
    "Cats sleep most of the day and hunt at night.",
    "Dracula was written by Bram Stoker in 1897.",
    "The Danube ends in the Black Sea.",
    "A recipe for bread: flour, water, salt.",
]


def make(backend: "Backend", **options: Any) -> Any:
    from qr_integrations import QRHeadReranker

    return QRHeadReranker(backend, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"refinements": {"layout": "block"}},
        {"refinements": {"orders": 2}},
        {"calibrated": False},
        {"max_context_tokens": 120, "truncation": "chunk"},
        {"max_context_tokens": 140, "truncation": "head"},
    ],
    ids=str,
)
def test_together_as_one_by_one(qr_mini: "Backend", options: dict[str, Any]) -> None:
    alone = [make(qr_mini, **options).rank(query, DOCUMENTS, explain=True) for query in QUERIES]
    together = make(qr_mini, **options).rank_batch(QUERIES, [DOCUMENTS] * 4, explain=True)
    for one, other in zip(alone, together, strict=True):
        assert one.order == other.order and one.query == other.query
        assert [item.score for item in one] == pytest.approx([item.score for item in other], abs=1e-6)
        assert [[span.span for span in item.spans] for item in one] == [[s.span for s in item.spans] for item in other]


def test_equal_documents_are_read_by_one_pass(qr_mini: "Backend", monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    original = type(qr_mini).forward_branches
    monkeypatch.setattr(
        type(qr_mini), "forward_branches", lambda self, *a, **k: passes.append(len(a[0])) or original(self, *a, **k)
    )
    make(qr_mini).rank_batch(QUERIES, [DOCUMENTS] * 4)
    assert max(passes) == 4 and len(passes) == 2  # the null query, and all others


def test_each_gets_its_own_documents_back(qr_mini: "Backend") -> None:
    from qr_integrations.types import Document

    mine = [Document(text, id=f"a{i}") for i, text in enumerate(DOCUMENTS)]
    other = [Document(text, id=f"b{i}") for i, text in enumerate(DOCUMENTS)]
    rankings = make(qr_mini).rank_batch(QUERIES[:2], [mine, other], top_k=1)
    assert [ranking[0].document.id for ranking in rankings] == ["a1", "b0"]


@pytest.mark.usefixtures("unchecked")
def test_options_of_a_call(qr_mini: "Backend") -> None:
    from qr_integrations.errors import InputError

    long = [text + " And so on and on." * 50 for text in DOCUMENTS]
    ranking = make(qr_mini).rank(QUERIES[0], long, max_doc_tokens=20, truncation="head")
    assert all(item.num_tokens == 20 and item.num_tokens_cut > 100 for item in ranking)
    batch = make(qr_mini).rank_batch(QUERIES[:2], [long, long], max_doc_tokens=20, truncation="head")
    assert batch[0].order == ranking.order and all(item.num_tokens == 20 for item in batch[1])
    with pytest.raises(InputError, match="unknown truncation"):
        make(qr_mini).rank(QUERIES[0], long, truncation="middle")


@pytest.mark.usefixtures("unchecked")
def test_one_bad_query_is_named(qr_mini: "Backend") -> None:
    from qr_integrations.errors import InputError

    with pytest.raises(InputError, match="query is empty"):
        make(qr_mini).rank_batch(["who?", " "], [DOCUMENTS] * 2)
    assert [len(one) for one in make(qr_mini).rank_batch(["a", "b"], [[], []])] == [0, 0]


def test_progress_and_wrong_numbers_of_spans(qr_mini: "Backend") -> None:
    from qr_integrations.errors import InputError

    told: list[tuple[int, int]] = []
    make(qr_mini).rank_batch(QUERIES[:2], [DOCUMENTS] * 2, progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 1)]
    with pytest.raises(InputError, match="max_spans must be at least 1"):
        make(qr_mini).rank_batch(QUERIES[:2], [DOCUMENTS] * 2, max_spans=0)
