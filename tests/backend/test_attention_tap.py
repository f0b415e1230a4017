"""What a tap refuses, how much memory it takes, and gradients through it."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from qr_integrations.backend import AttentionTap, Backend
from qr_integrations.errors import HeadError, InputError
from qr_integrations.types import Span
from tests.backend.measure import bench, difference, named, random_ids, random_model, reference, tiny_tokenizer

LLAMA = named("Llama")


def test_heads_that_do_not_exist_are_named() -> None:
    backend = bench(LLAMA).backend
    tap = AttentionTap(((0, 0), (9, 0), (1, 4), (0, -1)), Span(0, 2))
    with pytest.raises(HeadError, match=r"no head \(9, 0\), \(1, 4\), \(0, -1\): it has attention layers 0..2 with 4"):
        backend.forward(random_ids(), tap=tap)
    with pytest.raises(HeadError, match="attention layers 1, 3"):
        bench(named("Bamba")).backend.forward(random_ids(), tap=AttentionTap(((0, 0),), Span(0, 2)))


def test_a_tap_asks_for_something() -> None:
    with pytest.raises(HeadError, match="at least one head"):
        AttentionTap((), Span(0, 1))
    with pytest.raises(HeadError, match="at least one row"):
        AttentionTap(((0, 0),), Span(3, 3))


def test_rows_lie_within_the_pass() -> None:
    backend = bench(LLAMA).backend
    with pytest.raises(InputError, match="tokens 0 to 24"):
        backend.forward(random_ids(), tap=AttentionTap(((0, 0),), Span(20, 25)))
    prefix = backend.prefill(random_ids()[:10], top_layer=0)
    with pytest.raises(InputError, match="tokens 10 to 24"):
        backend.forward(random_ids()[10:], tap=AttentionTap(((0, 0),), Span(9, 12)), prefix=prefix)
    with pytest.raises(InputError, match="prefill with top_layer"):
        backend.forward(random_ids()[10:], tap=AttentionTap(((1, 0),), Span(12, 13)), prefix=prefix)


def test_mean_is_the_mean_of_the_rows() -> None:
    backend, heads = bench(LLAMA).backend, ((2, 3), (0, 1), (2, 0))
    rows = backend.forward(random_ids(), tap=AttentionTap(heads, Span(7, 12), "none"))
    mean = backend.forward(random_ids(), tap=AttentionTap(heads, Span(7, 12)))
    assert rows.shape == (1, 3, 5, 24)
    assert difference(mean, rows.mean(2)) < 1e-6


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_half_precision_is_read_in_full(kernel: str) -> None:
    model = random_model(LLAMA, kernel).bfloat16()
    tap = AttentionTap(((1, 2),), Span(0, 24), "none")
    rows = Backend(model, tiny_tokenizer()).forward(random_ids(), tap=tap)
    assert rows.dtype == torch.float32
    assert difference(rows.sum(-1), torch.ones(1, 1, 24)) < 1e-5
    model.set_attn_implementation("eager")
    assert (rows[:, 0] - reference(model, random_ids())[:, 6]).abs().mean() < 1e-2


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_gradients_through_the_rows_are_those_of_eager_attention(kernel: str) -> None:
    on, heads = bench(LLAMA, kernel), ((0, 1), (2, 3))
    weights = torch.randn(1, 2, 24, generator=torch.Generator().manual_seed(0))

    def gradient(model: Any, rows: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad((rows * weights).sum(), model.get_input_embeddings().weight)[0]

    tap = AttentionTap(heads, Span(18, 24), differentiable=True)
    found = gradient(on.backend.model, on.backend.forward(random_ids(), tap=tap))
    attentions = on.eager(input_ids=torch.tensor([random_ids()]), output_attentions=True).attentions
    expected = gradient(on.eager, torch.stack([attentions[la][:, h, 18:].mean(1) for la, h in heads], dim=1))
    assert expected.abs().max() > 1e-2
    assert difference(found, expected) < 1e-4 * expected.abs().max()


def test_no_graph_unless_asked_for() -> None:
    backend = bench(LLAMA).backend
    assert not backend.forward(random_ids(), tap=AttentionTap(((0, 0),), Span(0, 3))).requires_grad
    with torch.no_grad():
        tap = AttentionTap(((0, 0),), Span(0, 3), differentiable=True)
        assert not backend.forward(random_ids(), tap=tap).requires_grad


def test_checkpointing_left_on_after_training_does_no_harm() -> None:
    on = bench(LLAMA)
    model = random_model(LLAMA)
    model.gradient_checkpointing_enable()
    rows = Backend(model, tiny_tokenizer()).forward(random_ids(), tap=AttentionTap(on.heads, Span(0, 24), "none"))
    assert difference(rows, reference(on.eager, random_ids())) < 1e-5


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation made, in elements; expanded views count what they store."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return made


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("kept", [0, 2000])
def test_no_full_attention_matrix_is_ever_made(kernel: str, kept: int) -> None:
    num_heads, num_tokens = 8, 2048
    config = LlamaConfig(
        vocab_size=101, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=num_heads
    )
    model = LlamaForCausalLM._from_config(config, attn_implementation=kernel).eval()
    backend, ids = Backend(model, tiny_tokenizer()), random_ids(num_tokens)
    tap = AttentionTap(tuple((1, head) for head in range(num_heads)), Span(num_tokens - 16, num_tokens))
    with Largest() as largest:
        prefix = backend.prefill(ids[:kept], top_layer=1) if kept else None
        backend.forward(ids[kept:], tap=tap, prefix=prefix)
    assert largest.elements < num_heads * num_tokens**2 / 4
    with Largest() as largest:
        model.set_attn_implementation("eager")
        model(input_ids=torch.tensor([ids]))
    assert largest.elements >= num_heads * num_tokens**2, "the measure sees a full matrix"
