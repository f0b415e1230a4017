"""Documents that do not fit: nothing is lost, everything is reported."""

import itertools
import random
from typing import Any

import pytest


def texts(lengths: list[int]) -> list[str]:
    return [f"Document {i} speaks. " + "the river and the mountain " * n for i, n in enumerate(lengths)]


@pytest.mark.parametrize("seed", range(20))
def test_fair_cap_is_the_largest_that_fits(seed: int) -> None:
    from qr_integrations.retrieval.windows import fair_cap

    draw = random.Random(seed)
    lengths = [draw.randint(1, 300) for _ in range(draw.randint(1, 40))]
    budget = draw.randint(1, 3000)
    cap = fair_cap(lengths, budget)

    def total(c: int) -> int:
        return sum(min(n, c) for n in lengths)

    assert total(cap) <= budget
    assert total(cap + 1) > budget or cap >= max(lengths)


@pytest.mark.parametrize("seed", range(20))
def test_pack_keeps_order_and_budget_with_as_few_windows_as_possible(seed: int) -> None:
    from qr_integrations.retrieval.windows import pack

    draw = random.Random(seed)
    lengths = [draw.randint(1, 90) for _ in range(draw.randint(1, 60))]
    windows = pack(lengths, 100)
    assert list(itertools.chain(*windows)) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in window) <= 100 for window in windows)
    greedy, used = 1, 0
    for n in lengths:
        greedy, used = (greedy, used + n) if used + n <= 100 else (greedy + 1, n)
    assert len(windows) == greedy


def test_error_does_the_arithmetic(qr_mini: Any) -> None:
    from qr_integrations import QRHeadReranker
    from qr_integrations.errors import WindowError

    reranker = QRHeadReranker(qr_mini, max_context_tokens=300)
    with pytest.raises(WindowError, match=r"needs [\d,]+ tokens \(3 documents, longest #1 .*holds 300.*pass"):
        reranker.rank("what does the document say", texts([10, 90, 20]))


def test_head_cuts_the_longest_and_says_so(qr_mini: Any) -> None:
    from qr_integrations import QRHeadReranker

    given = texts([1, 90, 20, 200])
    ranking = QRHeadReranker(qr_mini, max_context_tokens=300, truncation="head").rank(
        "what does the document say", given
    )
    cut = {item.index: item.num_tokens_cut for item in ranking}
    assert sorted(cut) == [0, 1, 2, 3] and cut[0] == 0 and cut[3] > cut[1] > 0
    assert {item.window for item in ranking} == {0} and all(item.document.text == given[item.index] for item in ranking)


def test_queries_of_similar_length_share_the_prefix_of_cut_documents(qr_mini: Any) -> None:
    from qr_integrations import QRHeadReranker

    reranker = QRHeadReranker(qr_mini, max_context_tokens=300, truncation="head")
    given = texts([90, 90, 20, 200])
    first, second = (reranker.rank(q, given) for q in ("what does it say", "which of these documents is about rivers"))
    assert {i.index: i.num_tokens for i in first} == {i.index: i.num_tokens for i in second}


def test_windows_rank_everything_and_the_winners_meet(qr_mini: Any) -> None:
    from qr_integrations import QRHeadReranker

    given = [*texts([20] * 11), "Bram Stoker wrote Dracula, a novel about a vampire. " + "the mountain " * 40]
    given.insert(3, given.pop())
    reranker = QRHeadReranker(qr_mini, max_context_tokens=700, truncation="head", merge="final")
    ranking = reranker.rank("who wrote dracula", given)
    assert sorted(ranking.order) == list(range(12)) and ranking.order[0] == 3
    numbers = [item.window for item in ranking]
    final = max(numbers)
    met = numbers.count(final)
    assert final >= 2 and met >= 2 and numbers[:met] == [final] * met  # the final's documents come first


def test_max_doc_tokens_cuts_every_document(qr_mini: Any) -> None:
    from qr_integrations import QRHeadReranker

    ranking = QRHeadReranker(qr_mini, max_doc_tokens=30, truncation="head").rank("what does it say", texts([1, 50, 80]))
    assert all(item.num_tokens <= 30 for item in ranking)
    assert {item.index for item in ranking if item.num_tokens_cut} == {1, 2}


@pytest.mark.parametrize("truncation", ["head", "chunk", "error"])
def test_a_query_longer_than_the_window(qr_mini: Any, truncation: Any) -> None:
    from qr_integrations import QRHeadReranker
    from qr_integrations.errors import WindowError

    reranker = QRHeadReranker(qr_mini, max_context_tokens=300, truncation=truncation)
    with pytest.raises(WindowError, match=r"shorter query|pass truncation"):
        reranker.rank("why " * 400, texts([3, 3]))


@pytest.mark.parametrize("truncation", ["head", "chunk"])
def test_a_document_of_100_000_words(qr_mini: Any, truncation: Any) -> None:
    from qr_integrations import QRHeadReranker

    given = ["the king of the mountain " * 20_000, "Bram Stoker wrote Dracula.", "Cats sleep."]
    ranking = QRHeadReranker(qr_mini, truncation=truncation, max_context_tokens=2048).rank("who wrote dracula", given)
    assert sorted(ranking.order) == [0, 1, 2] and ranking.order[0] == 1
    longest = next(item for item in ranking if item.index == 0)
    if truncation == "head":
        assert longest.num_tokens_cut > 90_000
    else:  # read whole, in pieces
        assert longest.num_tokens_cut == 0 and longest.num_tokens > 90_000


@pytest.mark.parametrize("value", [0, 512.5])
def test_limits_are_whole_numbers(value: Any, unchecked: None) -> None:
    from qr_integrations.errors import InputError
    from qr_integrations.retrieval.windows import Limits

    with pytest.raises(InputError, match="max_doc_tokens"):
        Limits(max_doc_tokens=value)
