"""Training lists: several questions with their gold passages and BM25 rivals, one prefix for all of them."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .branches import Batch, make_batch
from .data import Bm25, Passage, Pool, Question, inverse_frequencies, load_xquad, training_pool
from .queries import QueryMaker, Synonyms
from .teacher import Teacher
from .tokenizer import NULL_QUERY, PromptPieces

MADE_UP = 10
"""Made-up queries per passage."""
REAL_WEIGHT = 2.5
"""A question that somebody asked counts as much as this many made-up ones."""


@dataclass
class Bank:
    """What training draws from, computed once: the pool with made-up queries added, embeddings, and BM25 neighbours."""

    pool: Pool
    real: int
    passage_vectors: Tensor
    question_vectors: Tensor
    rivals: list[list[int]]
    foreign: list[Pool]


def build_bank(folder: Path, teacher: Teacher, seed: int) -> Bank:
    """Made-up queries for every passage, the teacher's embedding of everything, rivals for every question."""
    pool = training_pool(folder)
    idf = inverse_frequencies(pool.passages)
    common = [w for w, _ in sorted(idf.items(), key=lambda item: (item[1], item[0]))[:15000]]
    maker = QueryMaker(idf, Synonyms(teacher, common), seed)
    made = [Question(maker.make(p), i) for i, p in enumerate(pool.passages) for _ in range(MADE_UP)]
    everything = Pool(pool.passages, pool.questions + made)
    bm25, rivals = Bm25(pool.passages), []
    for number, question in enumerate(everything.questions):
        if number < len(pool.questions):
            found = bm25.neighbours(question.text, 60)
            rivals.append([int(i) for i in found if i != question.gold])
        elif (number - len(pool.questions)) % MADE_UP == 0:
            passage = pool.passages[question.gold]
            found = bm25.neighbours(" ".join(passage.full.split()[:40]), 40)
            rivals.append([int(i) for i in found if i != question.gold])
        else:
            rivals.append(rivals[-1])
    return Bank(
        everything,
        len(pool.questions),
        teacher.embed([p.full for p in pool.passages]).half(),
        teacher.embed([q.text for q in everything.questions]).half(),
        rivals,
        [load_xquad(folder, language, test=False) for language in ("de", "zh")],
    )


def load_bank(folder: Path, cache: Path, seed: int) -> Bank:
    """The bank from its cache (two files beside `cache`), or built and cached; some minutes the first time."""
    vectors, facts = cache.with_suffix(".safetensors"), cache.with_suffix(".json")
    if not facts.exists():  # written last
        bank = build_bank(folder, Teacher(), seed)
        save_file({"passages": bank.passage_vectors, "questions": bank.question_vectors}, vectors)
        questions = [(question.text, question.gold) for question in bank.pool.questions]
        facts.write_text(json.dumps({"questions": questions, "real": bank.real, "rivals": bank.rivals}))
    kept, known = load_file(vectors), json.loads(facts.read_text(encoding="utf-8"))
    pool = Pool(training_pool(folder).passages, [Question(text, gold) for text, gold in known["questions"]])
    foreign = [load_xquad(folder, language, test=False) for language in ("de", "zh")]
    return Bank(pool, known["real"], kept["passages"], kept["questions"], known["rivals"], foreign)


class ListMaker:
    """Draws training lists: (batch, targets), targets (questions, documents), rows sum to the question's weight."""

    def __init__(self, bank: Bank, pieces: PromptPieces, seed: int) -> None:
        self.bank = bank
        self.pieces = pieces
        self.rng = random.Random(seed)
        self.asked: dict[int, list[int]] = {}
        for number, question in enumerate(bank.pool.questions):
            self.asked.setdefault(question.gold, []).append(number)

    def _crop(self, passage: Passage) -> Passage:
        """The passage as another collection could hold it: sometimes without its title, sometimes a part of it."""
        title = "" if self.rng.random() < 0.2 else passage.title
        if self.rng.random() < 0.85:
            return Passage(title, passage.text)
        sentences = re.split(r"(?<=[.!?])\s+", passage.text)
        start = self.rng.randrange(len(sentences))
        return Passage(title, " ".join(sentences[start : start + self.rng.randint(1, 4)]))

    def _documents(self, size: int) -> tuple[list[int], list[int]]:
        """Shuffled passages and the seed questions among them; half of the lists start from real questions."""
        rng, bank = self.rng, self.bank
        real = rng.random() < 0.65
        chosen: dict[int, None] = {}
        seeds: list[int] = []
        share = rng.choice([2, 2, 3, 4, 6, 12])
        while len(chosen) < size:
            number = rng.randrange(bank.real) if real else rng.randrange(bank.real, len(bank.pool.questions))
            seeds.append(number)
            chosen[bank.pool.questions[number].gold] = None
            nearest = bank.rivals[number][: rng.choice([6, 19, 40])]
            for rival in rng.sample(nearest, min(share - 1, len(nearest))):
                chosen[rival] = None
        golds = {bank.pool.questions[s].gold for s in seeds}
        docs = list(golds)[:size] + [d for d in chosen if d not in golds][: max(0, size - len(golds))]
        rng.shuffle(docs)
        present = set(docs)
        return docs, [s for s in dict.fromkeys(seeds) if bank.pool.questions[s].gold in present]

    def draw(self, size: int, questions: int) -> tuple[Batch, Tensor]:
        """A list of `size` passages with up to `questions` questions: seeds first, then others its passages answer."""
        docs, asked = self._documents(size)
        others = [n for d in docs for n in self.rng.sample(self.asked[d], min(2, len(self.asked[d]))) if n not in asked]
        self.rng.shuffle(others)
        asked = (asked + others)[:questions]
        prefix = self.pieces.prefix([self.pieces.ids(self._crop(self.bank.pool.passages[d]).body) for d in docs])
        texts = [self.bank.pool.questions[n].text for n in asked]
        return self._batch(prefix, texts), self._targets(docs, asked)

    def _batch(self, prefix: tuple[list[int], list[int], int], texts: Sequence[str]) -> Batch:
        branches = [self.pieces.branch(t) for t in (*texts, NULL_QUERY)]
        return make_batch(prefix, branches, self.pieces.tokenizer.pad_token_id)

    def _targets(self, docs: list[int], asked: list[int]) -> Tensor:
        """The known passage mixed with the teacher's view: made-up queries often fit several passages."""
        bank = self.bank
        similar = bank.question_vectors[asked].float() @ bank.passage_vectors[docs].float().T
        targets = (similar / 0.05).softmax(-1)
        for row, number in enumerate(asked):
            weight = 0.6 if number < bank.real else 0.3
            targets[row] *= 1 - weight
            targets[row, docs.index(bank.pool.questions[number].gold)] += weight
            targets[row] *= REAL_WEIGHT if number < bank.real else 1.0
        return targets

    def draw_foreign(self, size: int, questions: int) -> tuple[Batch, Tensor]:
        """German or Chinese paragraphs with their own questions; the target is the paragraph asked about."""
        pool = self.rng.choice(self.bank.foreign)
        docs = self.rng.sample(range(len(pool.passages)), size)
        asked = [q for q in pool.questions if q.gold in docs]
        asked = self.rng.sample(asked, min(questions, len(asked)))
        prefix = self.pieces.prefix([self.pieces.ids(pool.passages[d].body) for d in docs])
        targets = torch.zeros(len(asked), size)
        for row, question in enumerate(asked):
            targets[row, docs.index(question.gold)] = 1.0
        return self._batch(prefix, [q.text for q in asked]), targets

    def text_window(self, count: int, length: int) -> Tensor:
        """(count, length) ids of running text, for the next-token loss."""
        rows = []
        for _ in range(count):
            ids = [self.pieces.tokenizer.bos_token_id]
            while len(ids) < length:
                ids += self.pieces.ids(self.rng.choice(self.bank.pool.passages).body) + self.pieces.gap
            rows.append(ids[:length])
        return torch.tensor(rows)
