"""Weights before training: token embeddings from MiniLM, heads that already attend to the same word anywhere."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .data import Passage
from .teacher import Teacher
from .tokenizer import SPECIAL

CONSTANT, SINK, CONTENT = 0, 1, 2
"""Hidden dimensions: one equal for all tokens, one for the first token only, the rest for meaning."""
SCALE = 1.0
RANKED = {1: 2, 2: 3}
"""Heads (the first n of a layer) that carry the ranking loss. The rest are free to build context."""


def configure(
    tokenizer: PreTrainedTokenizerFast, heads: int = 4, head_dim: int = 64, theta: float = 1e12
) -> LlamaConfig:
    """A Llama of 4 layers; the large RoPE base leaves most of a head's dimensions unturned at 32,768 tokens."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=head_dim,
        max_position_embeddings=32768,
        rope_theta=theta,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attention_dropout=0.0,
    )


def token_meanings(tokenizer: PreTrainedTokenizerFast, teacher: Teacher, width: int) -> Tensor:
    """(vocabulary, width): mean of each token's word pieces, centred, largest common direction removed, PCA."""
    texts = [tokenizer.decode([i]).strip() for i in range(len(tokenizer))]
    pieces = teacher.tokenizer(texts, add_special_tokens=False)["input_ids"]
    table = teacher.words
    rows = torch.stack([table[p].mean(0) if p else torch.zeros(table.shape[1]) for p in pieces])
    rows = rows - rows.mean(0)
    _, _, directions = torch.linalg.svd(rows, full_matrices=False)
    rows = rows @ directions[1 : width + 1].T
    rows = rows / rows.std(0).clamp_min(1e-6).sqrt()
    noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1))
    rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-6) + 0.15 * noise / math.sqrt(width)
    return rows / rows.norm(dim=1, keepdim=True) * math.sqrt(width)


def importance(tokenizer: PreTrainedTokenizerFast, passages: Sequence[Passage]) -> Tensor:
    """0.3 for tokens in every passage up to 1 for rare ones: how far a meaning stands out of the constant part."""
    seen = torch.zeros(len(tokenizer))
    for p in passages:
        seen[list(set(tokenizer.encode(p.body)))] += 1
    rarity = torch.log(len(passages) / (seen + 1)) / math.log(200)
    weight = 0.3 + 0.7 * rarity.clamp(0, 1)
    weight[: len(SPECIAL)] = 0.3
    return weight


def embeddings(tokenizer: PreTrainedTokenizerFast, teacher: Teacher, passages: Sequence[Passage]) -> Tensor:
    """The embedding table, (vocabulary, 256)."""
    meaning = token_meanings(tokenizer, teacher, 256 - CONTENT)
    table = torch.zeros(len(tokenizer), 256)
    table[:, CONSTANT] = 16.0
    table[:, CONTENT:] = meaning * importance(tokenizer, passages).unsqueeze(1)
    table[tokenizer.bos_token_id, SINK] = 24.0
    return table * SCALE


def _stable(config: LlamaConfig) -> list[int]:
    half = config.head_dim // 2
    theta = config.rope_parameters["rope_theta"]
    pairs = [i for i in range(half) if theta ** (-i / half) < 4e-5]
    return pairs + [i + half for i in pairs]


def matching_head(config: LlamaConfig, basis: Tensor, strength: float, sink: float) -> tuple[Tensor, Tensor]:
    """Query and key rows, (head_dim, hidden): equal tokens reach logit `strength`, the first token `sink`."""
    rows = _stable(config)
    key = torch.zeros(config.head_dim, config.hidden_size)
    free = [r for r in rows if r != rows[-1]]
    key[free, CONTENT:] = basis[: len(free)]
    factor = strength * math.sqrt(config.head_dim) / (0.5 * len(free))
    query = key * math.sqrt(factor)
    key = key * math.sqrt(factor)
    query[rows[-1], CONSTANT] = math.sqrt(sink * math.sqrt(config.head_dim) / (11 * 13))
    key[rows[-1], SINK] = query[rows[-1], CONSTANT]
    return query, key


def previous_head(config: LlamaConfig, offset: int, strength: float) -> tuple[Tensor, Tensor]:
    """Query and key rows of a head that looks `offset` tokens back: constant input, turned by RoPE."""
    half = config.head_dim // 2
    theta = config.rope_parameters["rope_theta"]
    turning = [i for i in range(half) if theta ** (-i / half) > 2e-3]
    query, key = torch.zeros(config.head_dim, config.hidden_size), torch.zeros(config.head_dim, config.hidden_size)
    size = math.sqrt(strength * math.sqrt(config.head_dim) / len(turning)) / 11
    for i in turning:
        angle = offset * theta ** (-i / half)
        key[i, CONSTANT] = size
        query[i, CONSTANT], query[i + half, CONSTANT] = size * math.cos(angle), -size * math.sin(angle)
    return query, key


def initialise(
    config: LlamaConfig, table: Tensor, strength: float = 14.0, sink: float = 9.0, seed: int = 0
) -> LlamaForCausalLM:
    """A model that ranks by shared words before any step of training."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).float()
    model.model.embed_tokens.weight.data.copy_(table)
    size = config.head_dim
    for number, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        for name, std in (("q_proj", 0.06), ("k_proj", 0.06), ("v_proj", 0.06), ("o_proj", 0.01 * SCALE)):
            getattr(attention, name).weight.data.normal_(0, std)
        for name, std in (("gate_proj", 0.06), ("up_proj", 0.06), ("down_proj", 0.01 * SCALE)):
            getattr(layer.mlp, name).weight.data.normal_(0, std)
        basis = torch.linalg.qr(torch.randn(config.hidden_size - CONTENT, config.hidden_size - CONTENT))[0]
        heads = [previous_head(config, n + 1, 40.0) for n in range(2)] if number in (0, 3) else []
        for h in range(RANKED.get(number, 0)):
            part = basis[(torch.arange(size) + h * size) % len(basis)]
            heads.append(matching_head(config, part, strength, sink))
        for h, (query, key) in enumerate(heads):
            attention.q_proj.weight.data[h * size : (h + 1) * size] = query
            attention.k_proj.weight.data[h * size : (h + 1) * size] = key
    model.model.norm.weight.data.fill_(0.05)
    return model
