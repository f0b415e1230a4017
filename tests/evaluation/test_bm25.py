"""BM25 against its formula, written plainly."""

import math
import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

TEXTS = [
    "The quick brown fox jumps over the lazy dog",
    "Fox, fox, FOX! A story of a fox and the hounds",
    "dogs sleep",
    "Über den Fluss: the brown river, brown water, brown banks",
]


def bm25(texts: list[str]) -> Any:
    from qr_integrations.evaluation.bm25 import Bm25

    return Bm25(texts)


def lucene(texts: list[str], query: str) -> list[float]:
    """Robertson's formula with Lucene's IDF, k1 = 1.5 and b = 0.75."""
    stop = {"the", "a", "of", "and"}

    def words(text: str) -> list[str]:
        return [word for word in re.findall(r"\w\w+", text.lower()) if word not in stop]

    split = [words(text) for text in texts]
    mean = sum(map(len, split)) / len(split)
    scores = []
    for text in split:
        score = 0.0
        for word in words(query):
            holding = sum(word in other for other in split)
            idf = math.log(1 + (len(split) - holding + 0.5) / (holding + 0.5))
            count = text.count(word)
            score += idf * count / (count + 1.5 * (1 - 0.75 + 0.75 * len(text) / mean))
        scores.append(score)
    return scores


@pytest.mark.parametrize("query", ["fox", "the brown fox", "brown brown dog", "über river of unknown words", "DOGS"])
def test_scores_follow_the_formula(query: str) -> None:
    found = bm25(TEXTS).scores(query)
    assert found == pytest.approx(lucene(TEXTS, query), rel=1e-5) and found.max() > 0


def test_more_texts_and_longer_queries() -> None:
    rng = random.Random(0)
    vocabulary = [f"word{i}" for i in range(40)]
    texts = [" ".join(rng.choices(vocabulary, k=rng.randrange(30))) for _ in range(60)]
    index = bm25(texts)
    for _ in range(20):
        query = " ".join(rng.choices(vocabulary, k=rng.randrange(1, 9)))
        assert index.scores(query) == pytest.approx(lucene(texts, query), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("query", ["", "   ", "the of and", "zeppelin", "?!", "x"])
def test_a_query_without_known_words_scores_nothing(query: str) -> None:
    index = bm25(TEXTS)
    assert index.scores(query).tolist() == [0.0] * 4
    assert index.top(query, 3) == [0, 1, 2]


@pytest.mark.parametrize("texts", [[], [""], ["", "the", "?"]])
def test_texts_without_words(texts: list[str]) -> None:
    index = bm25(texts)
    assert index.scores("fox").tolist() == [0.0] * len(texts)
    assert index.top("fox", 5) == list(range(len(texts)))


def test_empty_texts_among_others_keep_their_places() -> None:
    index = bm25(["", *TEXTS, "the"])
    assert index.scores("fox").nonzero()[0].tolist() == [1, 2]
    assert index.top("fox", 6) == [2, 1, 0, 3, 4, 5]


def test_without_spaces_a_run_of_signs_is_one_word() -> None:
    index = bm25(["多瑙河流經維也納", "多瑙河 流經 維也納", "貓睡覺"])
    assert index.scores("維也納").nonzero()[0].tolist() == [1]
    assert index.scores("貓睡覺").nonzero()[0].tolist() == [2]


def test_the_best_are_those_of_a_stable_sort() -> None:
    from qr_integrations.evaluation.bm25 import best_places

    rng = np.random.default_rng(0)
    for _ in range(200):
        size = int(rng.integers(1, 30))
        scores = rng.integers(0, 5, size).astype(np.float32)  # many ties
        k = int(rng.integers(1, 35))
        assert best_places(scores, k) == sorted(range(size), key=lambda place: (-scores[place], place))[:k]


def test_k_counts_from_one() -> None:
    from qr_integrations.errors import InputError

    with pytest.raises(InputError, match="k is 0: pass"):
        bm25(TEXTS).top("fox", 0)


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str], in_fresh_python: Callable[[str], str]) -> None:
    code = "from qr_integrations.evaluation.bm25 import Bm25; Bm25(['fox'] * 3000).top('fox', 2)"
    assert in_fresh_python(code) == ""
    bm25(TEXTS).top("fox", 2)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from qr_integrations.errors import MissingExtra

    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(MissingExtra, match=r"BM25 needs .* pip install 'qr-integrations\[eval\]'"):
        bm25(TEXTS)


def test_a_document_is_read_with_its_title() -> None:
    from qr_integrations import Document
    from qr_integrations.evaluation.bm25 import document_text

    assert document_text(Document("a novel", "Dracula")) == "Dracula a novel"
    assert document_text(Document("a novel")) == "a novel"
