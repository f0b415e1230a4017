"""Backends around the tiny vision-language models, and what the tests of reading and answering ask them."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from qr_integrations.backend import Backend
from qr_integrations.types import Message
from tests.backend.found_pictures import TALL, WIDE, noise
from tests.backend.tiny_vlms import tiny

QUESTION, OTHER = "what is in the picture ?", "which colour has the small circle ?"


def fresh(family: str) -> Backend:
    """A model of one's own, to be changed."""
    model, processor = tiny(family)
    return Backend(model, processor.tokenizer, processor=processor, name=f"tiny {family}")


backend = cache(fresh)


def pictures(count: int) -> list[Image.Image]:
    """Of different shapes."""
    return [noise(size, seed) for seed, size in enumerate([WIDE, TALL, (200, 200)][:count])]


def seen(count: int = 2, question: str = QUESTION) -> tuple[Message, ...]:
    """Pictures first, then the question."""
    return (Message.user(*pictures(count), question),)


@cache
def eager(family: str) -> Any:
    """A copy of the same model that returns its attention."""
    model = copy.deepcopy(backend(family).model)
    model.set_attn_implementation("eager")
    return model.requires_grad_(True)


def layers(opened: Backend) -> nn.ModuleList:
    found = opened.decoder.layers
    assert isinstance(found, nn.ModuleList)
    return found


@contextmanager
def breaking(module: nn.Module) -> Iterator[None]:
    """A model that fails in the middle of a pass."""

    def fail(*_: object) -> None:
        raise ZeroDivisionError("the hardware is on fire")

    hook = module.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def counted(module: nn.Module) -> Iterator[list[int]]:
    """How many tokens each call of a layer reads, from here on."""
    calls: list[int] = []
    hook = module.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args[0] if args else kwargs["hidden_states"]).shape[1]), with_kwargs=True
    )
    try:
        yield calls
    finally:
        hook.remove()


def generated(opened: Backend, messages: Any, **options: Any) -> Tensor:
    """What `generate` itself makes of a conversation: the new tokens."""
    prompt = opened.lay_out(messages)
    options = {"max_new_tokens": 8, "do_sample": False, **options}
    model: Any = opened.model
    if hasattr(model.base_model, "rope_deltas"):
        model.base_model.rope_deltas = None
    new: Tensor = model.generate(**prompt.inputs, **options)[0, len(prompt) :]
    return new


def text(opened: Backend, token_ids: Tensor) -> str:
    decoded: str = opened.tokenizer.decode(token_ids, skip_special_tokens=True)
    return decoded


def equal(found: Any, expected: Any, limit: float = 1e-5) -> None:
    """Maps agree to `limit` of their largest value."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert float((torch.as_tensor(one) - torch.as_tensor(other)).abs().max()) <= limit * float(other.abs().max())
