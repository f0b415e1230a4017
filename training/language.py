"""The second phase: next-token prediction by the parts no ranking head reads, so that the logits mean something."""

from __future__ import annotations

import time

import torch
from torch import nn
from transformers import LlamaForCausalLM

from .init import RANKED
from .lists import ListMaker


def free_parts(model: LlamaForCausalLM) -> list[nn.Parameter]:
    """What comes behind the last ranking layer's attention weights; training it changes no score."""
    layers, last = model.model.layers, max(RANKED)
    parts = [model.model.norm.weight, *layers[last].mlp.parameters(), layers[last].post_attention_layernorm.weight]
    parts += [layers[last].self_attn.o_proj.weight]
    for layer in layers[last + 1 :]:
        parts += list(layer.parameters())
    return parts


def train_language(model: LlamaForCausalLM, lists: ListMaker, steps: int, seconds: float, rate: float = 2e-3) -> float:
    """Trains the free parts on running text until `steps` or `seconds` are over; returns the last mean loss."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    parts = free_parts(model)
    for parameter in parts:
        parameter.requires_grad_(True)
    optimiser = torch.optim.AdamW(parts, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    started = time.time()
    recent: list[float] = []
    for step in range(steps):
        done = max(step / steps, (time.time() - started) / seconds)
        if done >= 1:
            break
        optimiser.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 50) * max(0.03, 1 - done)
        ids = lists.text_window(6, 192)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, labels=ids).loss.float()
        loss.backward()
        nn.utils.clip_grad_norm_(parts, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        recent = [*recent[-99:], float(loss.detach())]
    return sum(recent) / max(1, len(recent))
