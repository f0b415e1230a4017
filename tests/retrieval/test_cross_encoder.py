"""`QRCrossEncoder` against the reranker it stands in front of, and in the hands of sentence-transformers."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest
import torch

TEXTS = {
    "who wrote dracula": [
        "Cats sleep most of the day.",
        "Dracula is a novel by Bram Stoker.",
        "The Danube is a river.",
    ],
    "which river flows through vienna": ["The Danube flows through Vienna.", "Dracula is a novel by Bram Stoker."],
    "what do cats do": ["Cats sleep most of the day."],
}


@pytest.fixture(scope="module")
def reranker(qr_mini: Any) -> Any:
    from qr_integrations import QRHeadReranker

    return QRHeadReranker(qr_mini)


@pytest.fixture(scope="module")
def encoder(reranker: Any) -> Any:
    from qr_integrations import QRCrossEncoder

    return QRCrossEncoder(reranker)


def in_order(reranker: Any, query: str, texts: Sequence[str]) -> list[float]:
    """The reranker's scores in the given order."""
    return [item.score for item in sorted(reranker.rank(query, texts), key=lambda item: item.index)]


def interleaved() -> tuple[list[tuple[str, str]], list[tuple[str, int]]]:
    """Pairs of several queries, taking turns, and which text of which query each is."""
    where = [(query, place) for place in range(3) for query, texts in TEXTS.items() if place < len(texts)]
    return [(query, TEXTS[query][place]) for query, place in where], where


# ---- predict


def test_scores_of_interleaved_queries_are_those_of_each_query_alone(encoder: Any, reranker: Any) -> None:
    pairs, where = interleaved()
    expected = {query: in_order(reranker, query, texts) for query, texts in TEXTS.items()}
    scores = encoder.predict(pairs)
    assert isinstance(scores, np.ndarray) and scores.shape == (6,) and scores.dtype == np.float32
    assert scores.tolist() == pytest.approx([expected[query][place] for query, place in where], abs=1e-6)
    assert encoder.predict([list(pair) for pair in pairs]).tolist() == scores.tolist()


def test_every_query_is_ranked_once(encoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    rank = type(encoder.reranker).rank

    def counted(self: Any, query: str, *args: Any, **kwargs: Any) -> Any:
        calls.append(query)
        return rank(self, query, *args, **kwargs)

    monkeypatch.setattr(type(encoder.reranker), "rank", counted)
    encoder.predict(interleaved()[0])
    assert calls == list(TEXTS)


def test_equal_pairs_have_a_score_each(encoder: Any, reranker: Any) -> None:
    query, texts = next(iter(TEXTS.items()))
    twice = [*texts, texts[1]]
    scores = encoder.predict([(query, text) for text in twice])
    assert scores.tolist() == pytest.approx(in_order(reranker, query, twice), abs=1e-6)


@pytest.mark.parametrize("count", [0, 1, 6])
def test_what_is_returned_is_what_was_asked_for(encoder: Any, count: int) -> None:
    pairs = interleaved()[0][:count]
    array = encoder.predict(pairs)
    as_tensor = encoder.predict(pairs, convert_to_tensor=True)
    as_list = encoder.predict(pairs, convert_to_numpy=False)
    assert isinstance(array, np.ndarray) and array.shape == (count,)
    assert isinstance(as_tensor, torch.Tensor) and as_tensor.shape == (count,) and as_tensor.dtype == torch.float32
    assert isinstance(as_list, list) and all(isinstance(score, torch.Tensor) for score in as_list)
    assert array.tolist() == as_tensor.tolist() == [score.item() for score in as_list]
    assert encoder.predict(pairs, convert_to_tensor=True, convert_to_numpy=False).tolist() == array.tolist()


@pytest.mark.parametrize("pair", [("who wrote dracula", "Bram Stoker wrote it."), ["who wrote dracula", "Cats."]])
def test_a_single_pair_gives_a_single_number(encoder: Any, reranker: Any, pair: Any) -> None:
    expected = in_order(reranker, pair[0], [pair[1]])[0]
    score = encoder.predict(pair)
    assert np.ndim(score) == 0 and float(score) == pytest.approx(expected, abs=1e-6)
    as_tensor = encoder.predict(pair, convert_to_tensor=True)
    assert as_tensor.shape == () and as_tensor.item() == pytest.approx(expected, abs=1e-6)


def test_a_single_pair_as_a_tensor_without_numpy(encoder: Any) -> None:
    pair = ("who wrote dracula", "Bram Stoker wrote it.")
    score = encoder.predict(pair, convert_to_numpy=False)  # a CrossEncoder gives the first of its list
    assert isinstance(score, torch.Tensor) and score.item() == pytest.approx(float(encoder.predict(pair)))


def test_what_only_a_cross_encoder_knows_is_ignored(encoder: Any) -> None:
    pairs = interleaved()[0]
    options: dict[str, Any] = {"prompt_name": None, "prompt": None, "batch_size": 2, "apply_softmax": False}
    assert (
        encoder.predict(pairs, activation_fn=None, device=None, **options).tolist() == encoder.predict(pairs).tolist()
    )
    assert encoder.rank("who", ["a"], batch_size=2, show_progress_bar=False) == encoder.rank("who", ["a"])


def test_a_bar_over_the_queries(encoder: Any, capsys: pytest.CaptureFixture[str]) -> None:
    encoder.predict(interleaved()[0], show_progress_bar=True)
    assert "3/3" in capsys.readouterr().err
    encoder.predict(interleaved()[0], show_progress_bar=None)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("pairs", "number"),
    [
        (["who", "a", "b"], 0),
        ([("who", "a"), "ab"], 1),
        ([("who", "a"), ("who",)], 1),
        ([("who", "a"), ()], 1),
        ([("who", "a"), ("who", "b"), ("who", "b", "c")], 2),
        ([("who", None)], 0),
        ([("who", "a"), (3, "a")], 1),
        ([("who", "a"), None], 1),
        ([("who", "a"), 5], 1),
        ([("who", "a"), {"query": "who", "text": "b"}], 1),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_bad_pair_is_named_and_no_model_runs(
    encoder: Any, monkeypatch: pytest.MonkeyPatch, pairs: Any, number: int
) -> None:
    from qr_integrations.errors import InputError

    monkeypatch.setattr(type(encoder.reranker), "rank", None)
    with pytest.raises(InputError, match=rf"pair #{number} is .*: pass \(query, text\), two strings"):
        encoder.predict(pairs)


def test_an_empty_query_is_an_error_an_empty_text_is_not(encoder: Any) -> None:
    from qr_integrations.errors import InputError

    assert encoder.predict([("who", ""), ("who", "a")]).shape == (2,)
    with pytest.raises(InputError, match="query is empty"):
        encoder.predict([("who", "a"), (" ", "a")])


# ---- rank


def test_rank_has_the_rerankers_order_and_scores(encoder: Any, reranker: Any) -> None:
    for query, texts in TEXTS.items():
        expected = [{"corpus_id": item.index, "score": item.score} for item in reranker.rank(query, texts)]
        assert encoder.rank(query, texts) == expected
        assert encoder.rank(query, texts, 1) == encoder.rank(query, texts, top_k=1) == expected[:1]
        with_text = [{**line, "text": texts[line["corpus_id"]]} for line in expected]
        assert encoder.rank(query, texts, return_documents=True) == with_text
    assert encoder.rank("who", []) == []


def test_rank_takes_documents_with_titles(encoder: Any, reranker: Any) -> None:
    from qr_integrations import Document

    query, given = (
        "who wrote dracula",
        [Document("A novel by Bram Stoker.", "Dracula"), {"text": "Cats.", "title": "C"}],
    )
    lines = encoder.rank(query, given, return_documents=True)
    assert [line["corpus_id"] for line in lines] == reranker.rank(query, given).order
    assert {line["text"] for line in lines} == {"A novel by Bram Stoker.", "Cats."}


# ---- sentence-transformers


@pytest.fixture(scope="module")
def questions() -> list[Any]:
    from qr_integrations.bundled import read_sample

    return read_sample()[7:12]  # one gold passage is on rank 4 of the others' texts, one is not among the best ten


def measured(reranker: Any, query: str, texts: Sequence[str], gold: str) -> tuple[float, float, float]:
    """MAP, MRR@10 and nDCG@10 with one relevant text, by its rank."""
    rank = [texts[i] for i in reranker.rank(query, texts).order].index(gold) + 1
    return 1 / rank, 1 / rank if rank <= 10 else 0.0, 1 / math.log2(rank + 1) if rank <= 10 else 0.0


def texts_of(question: Any) -> tuple[str, list[str]]:
    """The text that answers, and the others."""
    texts = [document.text for document in question.documents]
    return texts.pop(question.gold), texts


def test_the_reranking_evaluator_measures_what_the_reranker_ranks(
    encoder: Any, reranker: Any, questions: list[Any], tmp_path: Path
) -> None:
    from sentence_transformers.cross_encoder.evaluation import CrossEncoderRerankingEvaluator

    samples, expected = [], []
    for question in questions:
        gold, others = texts_of(question)
        samples.append({"query": question.question, "positive": [gold], "negative": others})
        expected.append(measured(reranker, question.question, [gold, *others], gold))
    evaluator = CrossEncoderRerankingEvaluator(samples, name="nq")
    results = evaluator(encoder, output_path=str(tmp_path))
    found = [results[f"nq_{name}"] for name in ("map", "mrr@10", "ndcg@10")]
    assert found == pytest.approx([mean(column) for column in zip(*expected, strict=True)], abs=1e-6)
    assert 0 < found[1] < found[2] < 1 and results[evaluator.primary_metric] == found[2]
    assert list(tmp_path.glob("*.csv"))


@pytest.mark.parametrize("all_positives", [True, False])
def test_the_evaluator_compares_with_the_order_it_was_given(
    encoder: Any, reranker: Any, questions: list[Any], all_positives: bool
) -> None:
    # In BM25's order, the best 10 only: one gold passage may be missing, which counts 0 or is put back.
    from sentence_transformers.cross_encoder.evaluation import CrossEncoderRerankingEvaluator

    samples, expected, base = [], [], []
    for question in questions:
        gold, _ = texts_of(question)
        order = sorted(range(20), key=lambda i: -question.bm25[i])[:10]
        texts = [question.documents[i].text for i in order]
        samples.append({"query": question.question, "positive": [gold], "documents": texts})
        base.append(1 / (texts.index(gold) + 1) if gold in texts else 0.0)
        if all_positives:
            texts = [gold, *(text for text in texts if text != gold)]
        missing = (0.0, 0.0, 0.0)
        expected.append(measured(reranker, question.question, texts, gold) if gold in texts else missing)
    results = CrossEncoderRerankingEvaluator(samples, always_rerank_positives=all_positives)(encoder)
    found = [results[name] for name in ("map", "mrr@10", "ndcg@10")]
    assert found == pytest.approx([mean(column) for column in zip(*expected, strict=True)], abs=1e-6)
    assert results["base_mrr@10"] == pytest.approx(mean(base))


def test_the_correlation_evaluator_takes_it_too(encoder: Any) -> None:
    from sentence_transformers.cross_encoder.evaluation import CrossEncoderCorrelationEvaluator

    query = "who wrote dracula"
    pairs = [(query, text) for text in TEXTS[query]]
    results = CrossEncoderCorrelationEvaluator(pairs, scores=encoder.predict(pairs).tolist())(encoder)
    assert results["pearson"] == pytest.approx(1.0) and results["spearman"] == pytest.approx(1.0)
