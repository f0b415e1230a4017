"""What is ranked and by which model: random weights in real shapes, synthetic documents, the same on every machine.

Random weights cost what trained ones cost. The documents are words drawn with a seed: nothing is downloaded.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from qr_integrations.backend import Backend
from qr_integrations.bundled import bundled_path
from qr_integrations.retrieval import HeadSet, PromptLayout
from qr_integrations.types import Document

NUM_HEADS = 16  # as many as the published sets hold
_PASSAGE_WORDS = 120  # about 150 tokens
_SPREAD = 4.0  # random queries are scaled by this: rows of attention as uneven as a trained model's, not flat
_TEXT = """
the of and to in a is that for it was on as with by he at from his be were are which this an had not have one
but also they been their has its who first two new more other when there can time these after only some year
world city river war school state house station music season team film game south north early later system
company party family history national known called used made part number several between under during against
through century population government university language island church member service building series record
"""
_WORDS = _TEXT.split()


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama-like decoder; `vocab` None takes the tokenizer's."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int | None = None


SHAPES = {
    "random-cpu": Shape(layers=16, hidden=1024, heads=16, kv_heads=4, head_dim=64, mlp=2816),
    "random-llama-8b": Shape(layers=32, hidden=4096, heads=32, kv_heads=8, head_dim=128, mlp=14336, vocab=128256),
}
GPU_ONLY = ("random-llama-8b",)


def load(name: str, dtype: torch.dtype, device: str) -> Backend:
    """A random model of `SHAPES`, a bundled one, or a folder."""
    if name not in SHAPES:
        return Backend.load(name, device=device, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(bundled_path("qr-mini"))
    config = _config(SHAPES[name], len(tokenizer))
    with seeded_in(dtype, device):
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= _SPREAD
    return Backend(model.eval(), tokenizer, name=name)


@contextmanager
def seeded_in(dtype: torch.dtype, device: str) -> Iterator[None]:
    """Weights made within the block are the same on every machine, and nowhere else than where they belong."""
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(default)


def _config(shape: Shape, vocab: int) -> LlamaConfig:
    return LlamaConfig(
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.mlp,
        vocab_size=shape.vocab or vocab,
        max_position_embeddings=2**18,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=shape.vocab is None,
        attn_implementation="sdpa",
    )


def spread_heads(backend: Backend, top_layer: int) -> HeadSet:
    """`NUM_HEADS` heads over the upper half of layers 0..top_layer, the deepest included, as published sets lie."""
    layers = [layer for layer in backend.attention_layers if top_layer // 2 <= layer <= top_layer]
    per_layer = backend.attention_layers[top_layer].num_heads
    rounds = random.Random(top_layer).sample(range(per_layer), per_layer)
    pairs = [(layer, head) for head in rounds for layer in reversed(layers)]
    return HeadSet.of(pairs[:NUM_HEADS])


def query_at(backend: Backend, number: int) -> str:
    """A question of twelve words; all numbers give equally many tokens."""
    wanted, rng = None, random.Random(17)
    while True:
        text = " ".join(rng.choices(_WORDS, k=12)) + "?"
        length = len(backend.tokenizer(text, add_special_tokens=False)["input_ids"])
        wanted = wanted or length
        if length == wanted:
            if number == 0:
                return text
            number -= 1


def documents_for(backend: Backend, num_tokens: int, seed: int = 0) -> list[Document]:
    """As many passages of about 150 tokens as a prompt of `num_tokens` holds."""
    rng = random.Random(seed)
    count = 2 + num_tokens // _PASSAGE_WORDS
    documents = [_passage(rng, number) for number in range(count)]
    layout = PromptLayout.build(backend, query_at(backend, 0), documents)
    room = num_tokens - len(layout.query) - 4
    return [document for document, span in zip(documents, layout.documents, strict=True) if span.stop <= room]


def _passage(rng: random.Random, number: int) -> Document:
    sentences: list[str] = []
    left = _PASSAGE_WORDS
    while left > 0:
        words = rng.choices(_WORDS, k=min(left, rng.randint(8, 20)))
        sentences.append(" ".join([words[0].capitalize(), *words[1:]]) + ".")
        left -= len(words)
    return Document(" ".join(sentences), title=f"{rng.choice(_WORDS).capitalize()} {number}")


@dataclass(frozen=True, slots=True)
class Workload:
    """One model, one list of documents, and the two head sets: top head at half depth, and in the last layer."""

    backend: Backend
    documents: Sequence[Document]
    half: HeadSet
    last: HeadSet

    @classmethod
    def make(cls, backend: Backend, num_tokens: int) -> "Workload":
        """About `num_tokens` tokens of documents for `backend`."""
        layers = list(backend.attention_layers)
        half, last = layers[max(0, len(layers) // 2 - 1)], layers[-1]
        documents = documents_for(backend, num_tokens)
        return cls(backend, documents, spread_heads(backend, half), spread_heads(backend, last))

    def query(self, number: int) -> str:
        """The question of this number."""
        return query_at(self.backend, number)

    def layout(self, number: int = 0) -> PromptLayout:
        """The prompt of the question of this number."""
        return PromptLayout.build(self.backend, self.query(number), self.documents)

    def describe(self) -> dict[str, Any]:
        """Sizes, for the report."""
        layout, model = self.layout(), self.backend.model
        return {
            "tokens": len(layout),
            "query_tokens": len(layout.query),
            "documents": len(self.documents),
            "parameters": sum(p.numel() for p in model.parameters()),
            "model_bytes": sum(t.nbytes for t in [*model.parameters(), *model.buffers()]),
            "dtype": str(model.dtype).removeprefix("torch."),
            "layers": len(self.backend.attention_layers),
            "heads": next(iter(self.backend.attention_layers.values())).num_heads,
            "top_layer_half": self.half.top_layer,
            "top_layer_last": self.last.top_layer,
            "heads_read": len(self.half),
        }
