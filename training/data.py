"""Passages, questions, candidate lists: what is trained on, what is kept apart, and BM25 for hard negatives."""

from __future__ import annotations

import gzip
import json
import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bm25s
import numpy as np

TRAIN_LINES = 1100
"""NQ lines trained on; those up to 1,200 choose the checkpoint and the number of heads, the rest is the test."""
VALID_LINES = 1200
XQUAD_TRAIN_PARAGRAPHS = 160


@dataclass(frozen=True)
class Passage:
    """One document as the prompt prints it: an optional title, a newline, the text."""

    title: str
    text: str

    @property
    def full(self) -> str:
        """Title and text in one string: what BM25 indexes."""
        return f"{self.title} {self.text}" if self.title else self.text

    @property
    def body(self) -> str:
        """Title, newline, text: what stands after "[i] " in the prompt."""
        return f"{self.title}\n{self.text}" if self.title else self.text


@dataclass(frozen=True)
class Question:
    """A question and the index of the passage that answers it in the pool it belongs to."""

    text: str
    gold: int


@dataclass(frozen=True)
class Pool:
    """Passages, and questions whose `gold` points into them."""

    passages: list[Passage]
    questions: list[Question]


@dataclass(frozen=True)
class RankList:
    """A question and its candidates: indices into a pool, the gold one's position, BM25 scores in that order."""

    question: str
    docs: list[int]
    gold: int
    bm25: list[float]


def read_json(path: Path) -> Any:
    """Reads one gzipped JSON file."""
    with gzip.open(path, "rt", encoding="utf-8") as handle:
        return json.load(handle)


def load_nq(folder: Path) -> Pool:
    """The 1,600 NQ lines in file order: line i asks for passage i."""
    with gzip.open(folder / "nq_passages.jsonl.gz", "rt", encoding="utf-8") as handle:
        rows = [json.loads(line) for line in handle]
    passages = [Passage(row["title"], row["text"]) for row in rows]
    return Pool(passages, [Question(row["question"], i) for i, row in enumerate(rows)])


def load_wiki(folder: Path) -> list[Passage]:
    """The Wikipedia introductions: passages without questions."""
    return [Passage(row["title"], row["text"]) for row in read_json(folder / "wiki_passages.json.gz")]


def load_xquad(folder: Path, language: str, test: bool) -> Pool:
    """One language of XQuAD; the first 160 paragraphs are for training, the others for the report."""
    data = read_json(folder / f"xquad.{language}.json.gz")["data"]
    paragraphs = [p for article in data for p in article["paragraphs"]]
    chosen = paragraphs[XQUAD_TRAIN_PARAGRAPHS:] if test else paragraphs[:XQUAD_TRAIN_PARAGRAPHS]
    questions = [Question(qa["question"], i) for i, p in enumerate(chosen) for qa in p["qas"]]
    return Pool([Passage("", p["context"]) for p in chosen], questions)


def training_pool(folder: Path) -> Pool:
    """NQ lines before `TRAIN_LINES`, Wikipedia introductions, English XQuAD; no passage a later NQ line asks for.

    Two NQ lines can share a passage; comparing texts keeps the test passages out even then.
    """
    nq = load_nq(folder)
    held_out = {p.text for p in nq.passages[TRAIN_LINES:]}
    passages: list[Passage] = []
    questions: list[Question] = []
    seen: dict[str, int] = {}
    for question in nq.questions[:TRAIN_LINES]:
        passage = nq.passages[question.gold]
        if passage.text in held_out:
            continue
        if passage.text not in seen:
            seen[passage.text] = len(passages)
            passages.append(passage)
        questions.append(Question(question.text, seen[passage.text]))
    for passage in load_wiki(folder):
        if passage.text not in held_out and passage.text not in seen:
            seen[passage.text] = len(passages)
            passages.append(passage)
    xquad, start = load_xquad(folder, "en", test=False), len(passages)
    questions += [Question(q.text, start + q.gold) for q in xquad.questions]
    return Pool(passages + xquad.passages, questions)


def words(text: str) -> list[str]:
    """Lower-case words and numbers; single Chinese characters count as words."""
    return re.findall(r"[\u4e00-\u9fff]|[^\W_\u4e00-\u9fff]+", text.lower())


def inverse_frequencies(passages: Sequence[Passage]) -> dict[str, float]:
    """IDF of every word of the passages."""
    counts = Counter(word for p in passages for word in set(words(p.full)))
    return {word: math.log(len(passages) / n) for word, n in counts.items()}


class Bm25:
    """BM25 over passages; English stop words are dropped where `stopwords` asks for it."""

    def __init__(self, passages: Sequence[Passage], stopwords: str | None = "en") -> None:
        self.texts = [p.text for p in passages]
        self.stopwords = stopwords
        self.index = bm25s.BM25()
        self.index.index(self._tokens([p.full for p in passages]), show_progress=False)

    def _tokens(self, texts: Sequence[str]) -> list[list[str]]:
        joined = [" ".join(words(text)) for text in texts]
        return bm25s.tokenize(
            joined, stopwords=self.stopwords or [], token_pattern=r"(?u)\S+", return_ids=False, show_progress=False
        )

    def scores(self, query: str) -> np.ndarray:
        """BM25 score of every passage for the query."""
        return self.index.get_scores(self._tokens([query])[0])

    def neighbours(self, query: str, count: int) -> np.ndarray:
        """Indices of the `count` best passages for the query, best first."""
        scores = self.scores(query)
        top = np.argpartition(-scores, min(count, len(scores) - 1))[:count]
        return top[np.argsort(-scores[top], kind="stable")]

    def hard_list(self, question: Question, size: int, rng: random.Random, shuffled: bool = True) -> RankList:
        """The gold passage and its `size - 1` best BM25 rivals (no text equal to gold), shuffled or best first."""
        scores = self.scores(question.text)
        order = [int(i) for i in np.argsort(-scores, kind="stable")]
        gold_text = self.texts[question.gold]
        rivals = [i for i in order if i != question.gold and self.texts[i] != gold_text][: size - 1]
        docs = [question.gold, *rivals]
        rng.shuffle(docs)
        if not shuffled:
            docs.sort(key=lambda i: -scores[i])
        return RankList(question.text, docs, docs.index(question.gold), [float(scores[i]) for i in docs])
