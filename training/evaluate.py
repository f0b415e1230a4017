"""Scores lists exactly as the package does, finds the heads by QRscore, and measures nDCG@10 and the time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from .branches import Batch, Reader, calibrated, make_batch
from .data import Passage, RankList
from .tokenizer import NULL_QUERY, PromptPieces

Heads = Sequence[tuple[int, int]]


def list_batch(pieces: PromptPieces, passages: Sequence[Passage], ranked: RankList) -> Batch:
    """The prompt of one list: its question and the null query."""
    prefix = pieces.prefix([pieces.ids(passages[i].body) for i in ranked.docs])
    branches = [pieces.branch(ranked.question), pieces.branch(NULL_QUERY)]
    return make_batch(prefix, branches, pieces.tokenizer.pad_token_id)


@torch.no_grad()
def token_scores(model: LlamaForCausalLM, batch: Batch, layers: int | None = None) -> Tensor:
    """Calibrated attention on every prefix token: (layers, heads, P)."""
    masses = Reader(model)(batch, None, layers or model.config.num_hidden_layers)
    return calibrated(masses)[:, :, 0]


def document_scores(tokens: Tensor, owner: Tensor) -> Tensor:
    """Sums over each document's tokens, those below mean - 2 standard deviations left out: (..., P) to (..., D)."""
    parts = []
    for d in range(int(owner.max()) + 1):
        span = tokens[..., owner == d]
        floor = span.mean(-1, keepdim=True) - 2 * span.std(-1, keepdim=True)
        parts.append((span * (span > floor)).sum(-1))
    return torch.stack(parts, -1)


def pick(tokens: Tensor, heads: Heads | None) -> Tensor:
    """Token scores summed over the chosen heads, or over all of them: (layers, heads, P) to (P)."""
    if heads is None:
        return tokens.sum((0, 1))
    return torch.stack([tokens[layer, head] for layer, head in heads]).sum(0)


def gain(scores: Sequence[float] | Tensor, gold: int) -> float:
    """nDCG@10 with one relevant document; ties count against it."""
    values = torch.as_tensor(scores)
    rank = int((values >= values[gold]).sum()) - 1
    return 1 / math.log2(rank + 2) if rank < 10 else 0.0


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / max(1, len(values))


class Measured:
    """Token scores of many lists, kept so that any set of heads is measured without another forward."""

    def __init__(self, pieces: PromptPieces, passages: Sequence[Passage], lists: Sequence[RankList]) -> None:
        self.lists = lists
        self.batches = [list_batch(pieces, passages, ranked) for ranked in lists]
        self.tokens: list[Tensor] = []

    def measure(self, model: LlamaForCausalLM) -> Measured:
        """Reads every list with the model."""
        self.tokens = [token_scores(model, batch) for batch in self.batches]
        return self

    def scores(self, heads: Heads | None) -> list[Tensor]:
        """Document scores of every list."""
        return [document_scores(pick(t, heads), b.owner) for t, b in zip(self.tokens, self.batches, strict=True)]

    def ndcg(self, heads: Heads | None) -> float:
        """Mean nDCG@10 over the lists."""
        return mean([gain(s, r.gold) for s, r in zip(self.scores(heads), self.lists, strict=True)])

    def qrscores(self) -> Tensor:
        """QRscore of every head: mean calibrated attention mass on the gold document, (layers, heads)."""
        together = zip(self.tokens, self.batches, self.lists, strict=True)
        golds = [document_scores(tokens, batch.owner)[..., ranked.gold] for tokens, batch, ranked in together]
        return torch.stack(golds).mean(0)


def ranking_of(lists: Sequence[RankList], score: Callable[[RankList], Sequence[float]]) -> float:
    """Mean nDCG@10 of any other scorer over the same lists."""
    return mean([gain(score(ranked), ranked.gold) for ranked in lists])


def by_qrscore(qrscores: Tensor) -> list[tuple[int, int]]:
    """(layer, head) pairs, best first."""
    width = qrscores.shape[1]
    return [(int(i) // width, int(i) % width) for i in qrscores.flatten().argsort(descending=True)]
