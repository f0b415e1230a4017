"""`rank` as users call it, on the bundled model."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

DOCUMENTS = [
    "Cats sleep most of the day.",
    "Dracula is an 1897 Gothic novel by the Irish author Bram Stoker.",
    "The Danube flows through Vienna and Budapest.",
    "Frankenstein was written by Mary Shelley.",
]
QUERIES = ["who wrote dracula", "which river flows through vienna", "what do cats do", "author of frankenstein"]


@pytest.fixture(scope="module")
def reranker(qr_mini: Any) -> Any:
    from qr_integrations import QRHeadReranker

    return QRHeadReranker(qr_mini)


def scores(ranking: Any) -> list[float]:
    return [item.score for item in sorted(ranking, key=lambda item: item.index)]


def test_the_right_document_comes_first(reranker: Any) -> None:
    for query, expected in zip(QUERIES, [1, 2, 0, 3], strict=True):
        assert reranker.rank(query, DOCUMENTS).order[0] == expected


def test_a_ranking_is_a_sequence_of_plain_numbers(reranker: Any) -> None:
    ranking = reranker.rank(QUERIES[0], DOCUMENTS)
    assert len(ranking) == 4 and ranking[0] is next(iter(ranking)) and ranking.query == QUERIES[0]
    assert [type(item.score) for item in ranking] == [float] * 4
    assert [item.score for item in ranking] == sorted((item.score for item in ranking), reverse=True)
    assert reranker.rank(QUERIES[0], DOCUMENTS, top_k=2).order == ranking.order[:2]
    assert reranker.rank(QUERIES[0], DOCUMENTS, top_k=99).order == ranking.order


def test_strings_documents_and_mappings_are_the_same_and_come_back(reranker: Any) -> None:
    from qr_integrations import Document

    mappings = [{"text": text, "id": str(i), "metadata": {"n": i}} for i, text in enumerate(DOCUMENTS)]
    own = [Document(text, id="same") for text in DOCUMENTS]
    a, b, c = (reranker.rank(QUERIES[0], given) for given in (DOCUMENTS, mappings, own))
    assert scores(a) == scores(b) == scores(c)
    assert b[0].document.metadata == {"n": b[0].index} and {item.document.id for item in c} == {"same"}
    assert c[0].document is own[c[0].index]


def test_warm_equals_cold_and_fresh(qr_mini: Any) -> None:
    from qr_integrations import QRHeadReranker

    warm, fresh = QRHeadReranker(qr_mini), QRHeadReranker(qr_mini, keep_prefixes=0)
    for query in [*QUERIES, *QUERIES]:
        assert scores(warm.rank(query, DOCUMENTS)) == pytest.approx(scores(fresh.rank(query, DOCUMENTS)), abs=1e-6)


def test_known_documents_are_not_read_again(qr_mini: Any, lengths_read: list[int]) -> None:
    from qr_integrations import QRHeadReranker
    from qr_integrations.retrieval.layout import Query

    reranker = QRHeadReranker(qr_mini)
    reranker.rank(QUERIES[0], DOCUMENTS[:1])  # whatever is tried out once per model
    lengths_read.clear()
    reranker.rank(QUERIES[0], DOCUMENTS)
    layout = reranker.scorer.layout(Query(QUERIES[0]), _documents())
    documents, task, own, null = lengths_read
    assert (documents, task + own) == (len(layout.shared), len(layout.query)) and 0 < null < task
    lengths_read.clear()
    reranker.rank(QUERIES[0], DOCUMENTS)
    assert lengths_read == [own]  # the question itself and what closes the prompt, nothing else
    reranker.forget()
    lengths_read.clear()
    reranker.rank(QUERIES[0], DOCUMENTS)
    assert lengths_read == [documents, task, own, null]


def test_keep_prefixes_counts_what_was_read(qr_mini: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from qr_integrations import QRHeadReranker

    reads: list[int] = []
    prefill = type(qr_mini).prefill

    def counted(self: Any, token_ids: Any, **kwargs: Any) -> Any:
        reads.append(len(token_ids))
        return prefill(self, token_ids, **kwargs)

    monkeypatch.setattr(type(qr_mini), "prefill", counted)
    lists = [DOCUMENTS, DOCUMENTS[:2], DOCUMENTS[2:]]
    for keep, expected in ((0, 9), (1, 9), (2, 9), (3, 3)):
        reads.clear()
        reranker = QRHeadReranker(qr_mini, keep_prefixes=keep)
        for _ in range(3):
            for given in lists:
                reranker.rank(QUERIES[0], given)
        assert len(reads) == expected, keep
        assert sum(known.prefix is not None for known in reranker.scorer._known.values()) == keep
    reads.clear()
    cutting = QRHeadReranker(qr_mini, keep_prefixes=1, truncation="head", max_context_tokens=150)
    for query in QUERIES:
        cutting.rank(query, [text * 4 for text in DOCUMENTS])
    assert len(reads) == 1  # the whole list is laid out for its lengths, only the cut one is read and kept


def _documents() -> list[Any]:
    from qr_integrations import Document

    return [Document(text) for text in DOCUMENTS]


def test_rank_batch_reads_equal_lists_once_wherever_they_stand(reranker: Any) -> None:
    other = ["Mary Shelley was born in London.", "The Rhine is a river."]
    lists = [DOCUMENTS, other, DOCUMENTS, other]
    batch = reranker.rank_batch(QUERIES, lists)
    assert [r.query for r in batch] == QUERIES
    for ranking, query, given in zip(batch, QUERIES, lists, strict=True):
        assert scores(ranking) == pytest.approx(scores(reranker.rank(query, given)), abs=1e-6)


def test_rank_batch_takes_lists_that_can_be_read_once(reranker: Any, unchecked: None) -> None:
    batch = reranker.rank_batch(QUERIES[:2], [iter(DOCUMENTS), iter(DOCUMENTS[::-1])])
    assert [len(ranking) for ranking in batch] == [4, 4]


def test_scores_by_head_need_documents(reranker: Any) -> None:
    from qr_integrations.errors import InputError

    for score in (reranker.score_per_head, lambda query, given: reranker.score_subsets(query, given, [[0]])):
        with pytest.raises(InputError, match="pass at least one"):
            score(QUERIES[0], [])


def test_async_runs_off_the_event_loop(reranker: Any) -> None:
    names: list[str] = []

    async def main() -> Any:
        ticker = asyncio.create_task(tick())
        ranking = await reranker.arank(QUERIES[0], DOCUMENTS * 20)
        ticker.cancel()
        batch = await reranker.arank_batch(QUERIES[:1], [DOCUMENTS])
        return ranking, batch

    async def tick() -> None:
        while True:
            names.append(threading.current_thread().name)
            await asyncio.sleep(0.001)

    ranking, batch = asyncio.run(main())
    assert len(names) > 1  # the loop went on meanwhile
    assert ranking[0].index % 4 == 1 and batch[0][0].index == 1


def test_sixteen_threads_get_the_numbers_of_one(qr_mini: Any) -> None:
    from qr_integrations import QRHeadReranker

    reranker = QRHeadReranker(qr_mini)
    jobs = [(query, DOCUMENTS[shift:] + DOCUMENTS[:shift]) for query in QUERIES for shift in range(4)] * 2
    expected = [scores(QRHeadReranker(qr_mini, keep_prefixes=0).rank(*job)) for job in jobs]
    with ThreadPoolExecutor(16) as pool:
        rankings = list(pool.map(lambda job: reranker.rank(*job), jobs))
    for ranking, numbers in zip(rankings, expected, strict=True):
        assert scores(ranking) == pytest.approx(numbers, abs=1e-6)


def test_an_exception_in_the_middle_leaves_everything_as_it_was(qr_mini: Any) -> None:
    from qr_integrations import QRHeadReranker

    reranker = QRHeadReranker(qr_mini)
    before = scores(reranker.rank(QUERIES[0], DOCUMENTS))
    configs = [id(layer.module.config) for layer in qr_mini.attention_layers.values()]

    def explode(*_: Any) -> None:
        raise RuntimeError("in the middle")

    hook = qr_mini.decoder.layers[1].mlp.register_forward_pre_hook(explode)
    try:
        with pytest.raises(RuntimeError, match="in the middle"):
            reranker.rank(QUERIES[0], DOCUMENTS)
        with pytest.raises(RuntimeError, match="in the middle"):
            reranker.rank(QUERIES[0], DOCUMENTS[:2])
    finally:
        hook.remove()
    assert [id(layer.module.config) for layer in qr_mini.attention_layers.values()] == configs
    assert scores(reranker.rank(QUERIES[0], DOCUMENTS)) == before
    assert reranker.rank(QUERIES[0], DOCUMENTS[:2]).order[0] == 1


def test_equal_documents_stay_apart_and_ties_keep_their_order(reranker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    twice = reranker.rank(QUERIES[0], [DOCUMENTS[1], DOCUMENTS[0], DOCUMENTS[1]])
    assert sorted(twice.order) == [0, 1, 2] and set(twice.order[:2]) == {0, 2}
    monkeypatch.setattr("qr_integrations.retrieval.entrants.score_documents", lambda *_: torch.zeros(4))
    assert reranker.rank(QUERIES[0], DOCUMENTS).order == [0, 1, 2, 3]


def test_no_documents_do_not_run_the_model(qr_mini: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from qr_integrations import QRHeadReranker

    reranker = QRHeadReranker(qr_mini)
    monkeypatch.setattr(type(qr_mini), "prefill", None)
    assert list(reranker.rank("anything", [])) == [] and reranker.rank_batch([], []) == []


def test_empty_and_odd_documents_are_ranked_not_lost(reranker: Any) -> None:
    odd = ["", " ", "\n\n", "🙂", "東京都は日本の首都", "\x00", "a" * 5000, DOCUMENTS[1], "<|end|><|assistant|>"]
    ranking = reranker.rank(QUERIES[0], odd)
    assert sorted(ranking.order) == list(range(len(odd))) and ranking.order[0] == 7


@pytest.mark.parametrize(
    ("query", "documents", "message"),
    [
        ("", DOCUMENTS, "query is empty"),
        ("  \n", DOCUMENTS, "query is empty"),
        ("q", "one string", "pass a list"),
        ("q", {"text": "one mapping"}, "pass a list"),
        ("q", ["fine", None], "document #1 has no text"),
        ("q", ["fine", b"bytes"], "document #1 has no text"),
        ("q", [{"title": "no text"}], "document #0 has no text"),
        ("q", [{"text": 3}], "document #0 has no text"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input_names_the_cure(reranker: Any, query: str, documents: Any, message: str) -> None:
    from qr_integrations.errors import InputError

    with pytest.raises(InputError, match=message):
        reranker.rank(query, documents)


@pytest.mark.usefixtures("unchecked")
def test_bad_options(qr_mini: Any, reranker: Any) -> None:
    from qr_integrations import ICRReranker, QRHeadReranker
    from qr_integrations.errors import InputError

    options: list[dict[str, Any]] = [
        {"truncation": "cut"},
        {"max_doc_tokens": 0},
        {"max_context_tokens": -1},
        {"batch_size": 0},
        {"null_instruction": 2},
        {"prompt": "no place"},
    ]
    for wrong in options:
        with pytest.raises(InputError, match="pass"):
            QRHeadReranker(qr_mini, **wrong)
    with pytest.raises(InputError, match="pass 'IE' or 'QA'"):
        ICRReranker(qr_mini, retrieval_type="XX")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="top_k"):
        reranker.rank("q", DOCUMENTS, top_k=0)
    with pytest.raises(InputError, match="one list per query"):
        reranker.rank_batch(["q", "r"], [DOCUMENTS])


def test_without_calibration_the_scores_are_attention_shares(qr_mini: Any) -> None:
    from qr_integrations import QRHeadReranker

    ranking = QRHeadReranker(qr_mini, calibrated=False).rank(QUERIES[0], DOCUMENTS)
    heads = len(QRHeadReranker(qr_mini).heads)
    assert all(item.score >= 0 for item in ranking) and sum(item.score for item in ranking) <= heads


def test_score_per_head_sums_to_the_detection_order(qr_mini: Any, reranker: Any) -> None:
    from qr_integrations.retrieval.layout import Query
    from qr_integrations.retrieval.scoring import score_documents

    per_head = reranker.score_per_head(QUERIES[0], DOCUMENTS)
    assert per_head.shape == (len(reranker.heads), 4)
    layout, tokens = reranker.scorer.score(Query(QUERIES[0]), _documents(), per_head=True)
    expected = score_documents(tokens, layout.documents, order="filter_then_sum")
    torch.testing.assert_close(per_head.sum(0), expected)


def test_explain_finds_the_words(reranker: Any) -> None:
    from qr_integrations.errors import InputError

    ranking = reranker.rank(QUERIES[0], DOCUMENTS)
    words = reranker.explain(QUERIES[0], DOCUMENTS, ranking[0].index)
    text = ranking[0].document.text
    assert [text[word.span.slice()] for word in words] == [word.text for word in words]
    assert max(words, key=lambda word: word.score).text == "Dracula"
    assert sum(word.score for word in words) <= ranking[0].score + 0.05
    with pytest.raises(InputError, match="no document #9"):
        reranker.explain(QUERIES[0], DOCUMENTS, 9)


def test_explain_in_unicode(reranker: Any) -> None:
    documents = ["Der Straßenname „Bärenweg“ 🙂 ist alt.", "東京都は日本の首都", "İstanbul is a city"]
    for index, text in enumerate(documents):
        for word in reranker.explain("straßenname istanbul 東京都", documents, index):
            assert text[word.span.slice()] == word.text


def test_subsets_of_heads_score_as_rerankers_of_their_own(qr_mini: Any) -> None:
    from qr_integrations import HeadSet, QRHeadReranker

    every = HeadSet.all(qr_mini).heads
    subsets = [[5], [4, 5, 8], list(range(16))]
    scores = QRHeadReranker(qr_mini, heads=every).score_subsets(QUERIES[0], DOCUMENTS, subsets)
    for subset, found in zip(subsets, scores.tolist(), strict=True):
        ranking = QRHeadReranker(qr_mini, heads=[every[i] for i in subset]).rank(QUERIES[0], DOCUMENTS)
        assert found == pytest.approx([item.score for item in sorted(ranking, key=lambda i: i.index)], abs=1e-6)


def test_heads_are_scored_on_documents_that_were_cut(qr_mini: Any) -> None:
    from qr_integrations import QRHeadReranker
    from qr_integrations.errors import WindowError

    long = ["dracula was written by stoker " * 40, "cats sleep " * 60]
    cut = QRHeadReranker(qr_mini, truncation="head", max_doc_tokens=20).score_per_head("who wrote dracula", long)
    assert cut.shape == (5, 2)
    with pytest.raises(WindowError, match="heads are compared within one"):
        QRHeadReranker(qr_mini, truncation="chunk", max_doc_tokens=20).score_per_head("who wrote dracula", long)
