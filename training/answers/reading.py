"""One pass over packed lessons: logits of the answers, and where the heads that copy look."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from .prompts import Packed

POINTING = (3, (2, 3))
"""Layer and heads that training makes look at the token to copy."""


def read_answers(model: LlamaForCausalLM, packed: Packed) -> tuple[Tensor, Tensor]:
    """Logits ``[R, V]`` of the rows that predict answers, and attention ``[2, R, T]`` of the pointing heads there.

    No other logits are computed.
    """
    layer = model.model.layers[POINTING[0]]
    kept: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda module, given: kept.append(given[0]))
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(
            input_ids=packed.ids[None],
            attention_mask=packed.mask[None, None],
            position_ids=packed.positions[None],
            use_cache=False,
        ).last_hidden_state[0, packed.rows]
        hook.remove()
        logits = hidden @ model.model.embed_tokens.weight.T
        return logits, _pointing(model, kept[0], packed)


def _pointing(model: LlamaForCausalLM, states: Tensor, packed: Packed) -> Tensor:
    number, heads = POINTING
    layer, size = model.model.layers[number], model.config.head_dim
    normed = layer.input_layernorm(states)
    projections = (layer.self_attn.q_proj, layer.self_attn.k_proj)
    q, k = (projection(normed).view(*states.shape[:2], -1, size).transpose(1, 2) for projection in projections)
    q, k = apply_rotary_pos_emb(q, k, *model.model.rotary_emb(q, packed.positions[None]))
    q, k = q[0, list(heads)][:, packed.rows], k[0, list(heads)]
    logits = (q @ k.transpose(-1, -2)).float() * size**-0.5
    return logits.masked_fill(~packed.mask[packed.rows], float("-inf")).softmax(-1)
