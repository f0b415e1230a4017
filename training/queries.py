"""Made-up queries: words and sentences of a passage, bent into what people type."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .data import Passage, words
from .teacher import Teacher

STARTS = [
    "who",
    "who is",
    "who was",
    "who wrote",
    "who plays",
    "what",
    "what is",
    "what is the",
    "what was the",
    "what are the",
    "when",
    "when did",
    "when was",
    "where",
    "where is",
    "where did",
    "where does",
    "which",
    "how",
    "how many",
    "how did",
    "why",
    "why did",
    "name of",
    "the",
    "in which",
    "what year",
    "is",
    "was",
    "does",
]
ENDINGS = ("", "", "", " ?", "?", " mean", " located", " from", " in", " called")


class Synonyms:
    """Nearest whole words by MiniLM's word embeddings, for soft matching."""

    def __init__(self, teacher: Teacher, vocabulary: Sequence[str], keep: int = 4) -> None:
        ids = teacher.tokenizer.get_vocab()
        known = [w for w in vocabulary if w in ids and w.isalpha() and len(w) > 2]
        table = F.normalize(teacher.words[[ids[w] for w in known]], dim=1)
        self.near: dict[str, list[str]] = {}
        for part in torch.arange(len(known)).split(1000):
            values, columns = (table[part] @ table.T).topk(keep + 1)
            for row, score, column in zip(part.tolist(), values.tolist(), columns.tolist(), strict=True):
                self.near[known[row]] = [known[c] for s, c in zip(score, column, strict=True) if c != row and s > 0.45]

    def replace(self, word: str, rng: random.Random) -> str:
        """One neighbour of the word, or the word where it has none."""
        return rng.choice(self.near.get(word) or [word])


class QueryMaker:
    """Draws made-up queries; `idf` says which words a person would keep."""

    def __init__(self, idf: dict[str, float], synonyms: Synonyms, seed: int) -> None:
        self.idf = idf
        self.synonyms = synonyms
        self.rng = random.Random(seed)

    def _weight(self, word: str) -> float:
        return min(self.idf.get(word, 8.0), 7.0) ** 1.5 + 0.5

    def _sample(self, source: Sequence[str], count: int) -> list[str]:
        """`count` words of the source in their order, rare ones more often."""
        keyed = sorted(range(len(source)), key=lambda i: -(self.rng.random() ** (1 / self._weight(source[i]))))
        return [source[i] for i in sorted(keyed[:count])]

    def make(self, passage: Passage) -> str:
        """One query for the passage."""
        rng = self.rng
        sentences = [s for s in map(words, re.split(r"(?<=[.!?])\s+", passage.text)) if len(s) > 3]
        if not sentences:
            return passage.full.lower()[:80]
        sentence, title, kind = rng.choice(sentences), words(passage.title), rng.random()
        if kind < 0.45:
            chosen = self._sample(sentence, rng.randint(2, 8))
        elif kind < 0.65:
            chosen = self._sample([w for s in sentences for w in s], rng.randint(2, 6))
        elif kind < 0.85 and title:
            chosen = self._sample(title, rng.randint(1, 4)) + self._sample(sentence, rng.randint(1, 5))
        else:
            start = rng.randrange(max(1, len(sentence) - 7))
            chosen = sentence[start : start + rng.randint(4, 12)]
        if rng.random() < 0.25:
            rng.shuffle(chosen)
        swap = 0.2 if rng.random() < 0.5 else 0.0
        chosen = [self.synonyms.replace(w, rng) if rng.random() < swap else w for w in chosen]
        opening = rng.choice(STARTS) + " " if rng.random() < 0.6 else ""
        return opening + " ".join(chosen) + (rng.choice(ENDINGS) if rng.random() < 0.4 else "")
