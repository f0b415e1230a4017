"""Everything the model card states, measured once on questions that nothing was trained or chosen on."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from .data import TRAIN_LINES, VALID_LINES, Bm25, Passage, Pool, Question, RankList, load_nq, load_xquad
from .evaluate import (
    Heads,
    Measured,
    by_qrscore,
    document_scores,
    gain,
    list_batch,
    mean,
    pick,
    ranking_of,
    token_scores,
)
from .init import RANKED
from .teacher import Teacher
from .tokenizer import PromptPieces

Rows = dict[str, float]
SEED = 20
WORTH = 0.005
"""A head must add this much nDCG to be taken: less is noise, and a head of a later layer costs that layer's time."""


@dataclass(frozen=True)
class Setup:
    """The model with its heads, and where lists come from."""

    model: LlamaForCausalLM
    untrained: LlamaForCausalLM
    pieces: PromptPieces
    heads: Heads
    folder: Path


def hard_lists(
    pool: Pool, questions: Sequence[Question], size: int, shuffled: bool = True, stopwords: str | None = "en"
) -> list[RankList]:
    """A list of `size` for every question, shuffled from a fixed seed or in BM25's order."""
    bm25, rng = Bm25(pool.passages, stopwords), random.Random(SEED)
    return [bm25.hard_list(q, size, rng, shuffled) for q in questions]


def find_heads(model: LlamaForCausalLM, pieces: PromptPieces, folder: Path) -> tuple[Heads, Tensor, Rows]:
    """Heads by QRscore on lines 1000-1099; how many on 1100-1199: the fewest within `WORTH` of the best value."""
    nq = load_nq(folder)
    pool = Pool(nq.passages[:VALID_LINES], nq.questions[:VALID_LINES])
    detection = hard_lists(pool, nq.questions[TRAIN_LINES - 100 : TRAIN_LINES], 20)
    choice = hard_lists(pool, nq.questions[TRAIN_LINES:VALID_LINES], 20)
    qrscores = Measured(pieces, nq.passages, detection).measure(model).qrscores()
    order = by_qrscore(qrscores)
    held_out = Measured(pieces, nq.passages, choice).measure(model)
    values = {count: held_out.ndcg(order[:count]) for count in range(1, 9)}
    best = max(values.values())
    count = min(n for n, value in values.items() if value >= best - WORTH)
    return order[:count], qrscores, {f"{n} heads": v for n, v in values.items()}


def compare(measured: Measured, heads: Heads) -> Rows:
    """The same lists by chance, BM25, all heads, the detected heads, the best one alone, and by layer."""
    lists = measured.lists
    size = len(lists[0].docs)
    rows = {
        "random order": mean([1 / torch.log2(torch.tensor(r + 2.0)).item() if r < 10 else 0.0 for r in range(size)]),
        "BM25": ranking_of(lists, lambda r: r.bm25),
        "all heads": measured.ndcg(None),
        "detected heads": measured.ndcg(heads),
        "best single head": measured.ndcg(heads[:1]),
    }
    for layer in RANKED:
        inside = [h for h in heads if h[0] == layer]
        if inside:
            rows[f"detected heads of layer {layer} only"] = measured.ndcg(inside)
    return rows


def by_embedding(teacher: Teacher, passages: Sequence[Passage], lists: Sequence[RankList]) -> float:
    """nDCG@10 of MiniLM's sentence embeddings on the lists: the teacher's own figure."""
    vectors = teacher.embed([p.full for p in passages])
    asked = dict(zip([r.question for r in lists], teacher.embed([r.question for r in lists]), strict=True))
    return ranking_of(lists, lambda r: vectors[r.docs] @ asked[r.question])


def streamed(setup: Setup, pool: Pool, lists: Sequence[RankList]) -> Rows:
    """As `compare` for long lists: nothing is kept, only layers up to the last chosen head are read, and timed."""
    depth = max(layer for layer, _ in setup.heads) + 1
    gains, lengths, seconds = [], [], []
    for ranked in lists:
        batch = list_batch(setup.pieces, pool.passages, ranked)
        started = time.perf_counter()
        tokens = token_scores(setup.model, batch, depth)
        seconds.append(time.perf_counter() - started)
        lengths.append(len(batch.prefix))
        gains.append(gain(document_scores(pick(tokens, setup.heads), batch.owner), ranked.gold))
    return {
        "BM25": ranking_of(lists, lambda r: r.bm25),
        "detected heads": mean(gains),
        "lists": len(lists),
        "mean tokens": round(mean(lengths)),
        "longest": max(lengths),
        "seconds per list": mean(seconds),
    }


def first_passages(nq: Pool, count: int) -> Pool:
    """The test lines as a pool of their own: 400 passages of which none was trained on."""
    start = VALID_LINES
    passages = nq.passages[start:]
    return Pool(passages, [Question(q.text, q.gold - start) for q in nq.questions[start : start + count]])


def full_report(setup: Setup) -> dict[str, Rows]:
    """Every table of the card."""
    nq, tables = load_nq(setup.folder), {}
    questions = nq.questions[VALID_LINES:]
    shuffled = hard_lists(nq, questions, 20)
    measured = Measured(setup.pieces, nq.passages, shuffled).measure(setup.model)
    before = streamed(replace(setup, model=setup.untrained), nq, shuffled)
    tables["400 test questions, 20 documents, shuffled"] = compare(measured, setup.heads) | {
        "the same heads before training": before["detected heads"],
        "MiniLM sentence embeddings (the teacher)": by_embedding(Teacher(), nq.passages, shuffled),
    }
    tables["the same in BM25's order"] = streamed(setup, nq, hard_lists(nq, questions, 20, shuffled=False))
    shipped = Measured(setup.pieces, nq.passages, shuffled[:40]).measure(setup.model)
    tables["the first 40 of them shuffled, which ship with the package"] = compare(shipped, setup.heads)
    unseen = first_passages(nq, 150)
    tables["first 150 test questions, 20 documents, rivals from the 400 test passages only"] = streamed(
        setup, unseen, hard_lists(unseen, unseen.questions, 20)
    )
    tables["100 documents, first 40 test questions"] = streamed(setup, nq, hard_lists(nq, questions[:40], 100))
    tables["about 8,000 tokens (64 documents), next 30"] = streamed(setup, nq, hard_lists(nq, questions[40:70], 64))
    for language in ("en", "de", "zh"):
        pool = load_xquad(setup.folder, language, test=True)
        asked = pool.questions[::4]
        stopwords = "en" if language == "en" else None
        lists = hard_lists(pool, asked, 20, stopwords=stopwords)
        name = f"XQuAD {language}, every fourth question of paragraphs 160-239, 20 documents"
        tables[name] = streamed(setup, pool, lists)
    return tables
