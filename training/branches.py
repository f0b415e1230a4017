"""Many queries over one list: the documents are read once, every query continues from there as it would alone.

A causal model gives the documents the same keys whatever question follows. So one prefix of documents serves a list's
whole set of questions: each branch sees the prefix and itself, its positions start where the prefix ends. This is the
layout of inference, checked against the plain model's attention in `check_branches`, and it makes a step with 24
questions about as dear as a step with one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM


@dataclass
class Batch:
    """One list and its questions.

    `prefix` (P) token ids up to "Query:", `owner` (P) document of each token or -1, `start` first instruction row,
    `branches` (B, L) padded ids behind "Query:", `lengths` (B) their true lengths; the last branch is the null query.
    """

    prefix: Tensor
    owner: Tensor
    start: int
    branches: Tensor
    lengths: Tensor


def make_batch(prefix: tuple[list[int], list[int], int], branches: Sequence[Sequence[int]], pad: int) -> Batch:
    """Tensors from lists of ids; the last branch must be the null query."""
    tokens, owner, start = prefix
    width = max(len(b) for b in branches)
    padded = torch.full((len(branches), width), pad)
    for row, ids in zip(padded, branches, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    lengths = torch.tensor([len(b) for b in branches])
    return Batch(torch.tensor(tokens), torch.tensor(owner), start, padded, lengths)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin


def _norm(module: Any, x: Tensor) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon) * module.weight


def _mlp(layer: Any, x: Tensor) -> Tensor:
    h, mlp = _norm(layer.post_attention_layernorm, x), layer.mlp
    return x + F.linear(
        F.silu(F.linear(h, mlp.gate_proj.weight)) * F.linear(h, mlp.up_proj.weight), mlp.down_proj.weight
    )


class Reader:
    """The plain Llama computation over a prefix and its branches; returns each row's attention instead of logits."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.model = model
        self.heads = model.config.num_attention_heads
        self.size = model.config.head_dim

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.model.model.rotary_emb(torch.zeros(1, dtype=torch.float32), positions[None])
        return cos[0], sin[0]

    def _project(self, layer: Any, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        h, attention = _norm(layer.input_layernorm, x), layer.self_attn
        shape = (*h.shape[:-1], self.heads, self.size)
        weights = (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)
        q, k, v = (F.linear(h, weight).view(shape).transpose(-2, -3) for weight in weights)
        return _rotate(q.float(), *angles).to(v.dtype), _rotate(k.float(), *angles).to(v.dtype), v

    def __call__(self, batch: Batch, owners: Tensor | None, layers: int) -> Tensor:
        """Mean attention of the query rows, (layers, heads, B, P), or summed by `owners` (P, D) to (..., D)."""
        count, width = batch.branches.shape
        length = len(batch.prefix)
        near = self._angles(torch.arange(length))
        far = self._angles(length + torch.arange(width))
        table = self.model.model.embed_tokens.weight
        x, y = F.embedding(batch.prefix, table), F.embedding(batch.branches, table)
        real = torch.arange(width)[None] < batch.lengths[:, None]
        rows = (length - batch.start + batch.lengths).float()
        result = []
        for number in range(layers):
            layer, last = self.model.model.layers[number], number == layers - 1
            q, k, v = self._project(layer, x, near)
            own, out = self._branch_rows(self._project(layer, y, far), k, v, last)
            early = self._instruction_rows(q[:, batch.start :], k, batch.start)
            if owners is not None:
                own, early = own @ owners.to(own.dtype), early @ owners.to(early.dtype)
            masses = (own.float().view(self.heads, count, width, -1) * real[None, :, :, None]).sum(2)
            result.append((masses + early.float().sum(1)[:, None]) / rows[None, :, None])
            if out is not None:
                mixed = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
                x = self._finish(layer, x, mixed)
                y = self._finish(layer, y, out)
        return torch.stack(result)

    def _finish(self, layer: Any, x: Tensor, mixed: Tensor) -> Tensor:
        joined = mixed.transpose(-2, -3).reshape(*x.shape[:-1], -1)
        return _mlp(layer, x + F.linear(joined, layer.self_attn.o_proj.weight))

    def _branch_rows(
        self, projected: tuple[Tensor, ...], k: Tensor, v: Tensor, last: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of the branch rows to the prefix, (heads, B * L, P), and their output, (B, heads, L, size)."""
        q, own_k, own_v = projected
        count, heads, width, size = q.shape
        q = q * size**-0.5
        seen = q.transpose(0, 1).reshape(heads, count * width, size) @ k.transpose(-1, -2)
        inner = q @ own_k.transpose(-1, -2)
        inner = inner.masked_fill(torch.ones(width, width, dtype=torch.bool).triu(1), float("-inf"))
        inner = inner.transpose(0, 1).reshape(heads, count * width, width)
        shares = torch.cat([seen, inner], dim=-1).softmax(-1, dtype=torch.float32).to(v.dtype)
        to_prefix, to_self = shares.split([k.shape[1], width], dim=-1)
        if last:
            return to_prefix, None
        out = (to_prefix @ v).view(heads, count, width, size).transpose(0, 1)
        return to_prefix, out + to_self.reshape(heads, count, width, width).transpose(0, 1) @ own_v

    def _instruction_rows(self, q: Tensor, k: Tensor, start: int) -> Tensor:
        """Attention of the instruction's rows, which no branch changes: (heads, rows, P)."""
        logits = (q @ k.transpose(-1, -2)).float() * self.size**-0.5
        later = torch.arange(k.shape[1])[None] > start + torch.arange(q.shape[1])[:, None]
        return logits.masked_fill(later, float("-inf")).softmax(-1).to(k.dtype)


def one_hot_owners(batch: Batch) -> Tensor:
    """(P, D): which document each prefix token belongs to."""
    return F.one_hot(batch.owner + 1, int(batch.owner.max()) + 2)[:, 1:].float()


def calibrated(masses: Tensor) -> Tensor:
    """Masses of the queries minus those of the null query (the last branch): (layers, heads, B - 1, D)."""
    return masses[:, :, :-1] - masses[:, :, -1:]


@torch.no_grad()
def check_branches(model: LlamaForCausalLM, batches: Sequence[Batch]) -> float:
    """Largest difference between the branch computation and plain eager attention; asserts it below 1e-4."""
    plain = LlamaForCausalLM(model.config)
    plain.load_state_dict(model.state_dict())
    plain.set_attn_implementation("eager")
    worst = 0.0
    for batch in batches:
        masses = Reader(model)(batch, None, model.config.num_hidden_layers)
        for b in range(len(batch.branches)):
            ids = torch.cat([batch.prefix, batch.branches[b, : batch.lengths[b]]])
            attention = plain(ids[None], output_attentions=True).attentions
            expected = torch.stack([a[0, :, batch.start :, : len(batch.prefix)].mean(1) for a in attention])
            worst = max(worst, float((expected - masses[:, :, b]).abs().max()))
    assert worst < 1e-4, worst
    return worst
