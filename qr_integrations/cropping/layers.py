"""Which layer's attention says where to look: published, asked for, or found without labels."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from PIL import Image

from qr_integrations.backend import Backend
from qr_integrations.backend.picture_families import picture_family
from qr_integrations.backend.picture_reading import attention_to_pictures, read_pictures
from qr_integrations.errors import HeadError, InputError
from qr_integrations.types import Message

_SMALLEST = 1e-30  # of attention; a layer with a sliding window may see nothing of a picture
Layers = int | tuple[int, ...] | Literal["all"] | None
"""One layer, some, all of them, or None for the published one."""

QUESTIONS = (
    "What is at the top left of the image?",
    "What is written in the image?",
    "Is there a person in the image?",
    "What color is the object on the right?",
)
"""Asked by `locate_layer`; what they ask for need not be there, they only have to ask for different things."""


def choose_layers(backend: Backend, layers: Layers) -> tuple[int, ...]:
    """The layers to read, counted from 0.

    None takes the ``layers`` that the checkpoint's config states (`stated`), else the layer published for the family at
    its depth (arXiv 2502.17422: 14 of 32 in LLaVA-1.5, 15 of 32 in InstructBLIP, 22 of 36 in Qwen2.5-VL), else the one
    in the middle, for which nothing is published: `locate_layer` finds a better one.

    Raises:
        HeadError: a layer without attention that can be read, or none at all.
        InputError: the model reads text only.
        UnsupportedModelError: None, for a family that is not known.
    """
    if not backend.sees_pictures:
        raise InputError(f"{backend.name!r} reads text only: load a vision-language model for pictures")
    there = list(backend.attention_layers)
    layers = stated(backend).get("layers") if layers is None else layers
    if layers == "all":
        return tuple(there)
    if layers is None:
        depth = backend.config.num_hidden_layers
        wanted = picture_family(backend.model.config).layers.get(depth, depth // 2)
        return (min(there, key=lambda layer: abs(layer - wanted)),)
    chosen = (layers,) if isinstance(layers, int) else tuple(layers)
    if not chosen or (wrong := [layer for layer in chosen if layer not in there]):
        raise HeadError(
            f"{backend.name!r} has no attention to read in layers {list(wrong) if chosen else []}: pass layers among "
            f"{there}, 'all' or None"
        )
    return chosen


def stated(backend: Backend) -> Mapping[str, Any]:
    """What a checkpoint's config says about looking at its pictures: ``{"vicrop": {"layers": ..., "base": ...}}``."""
    given: Mapping[str, Any] = getattr(backend.model.config, "vicrop", None) or {}
    return given


def layer_divergences(backend: Backend, image: Image.Image, questions: Sequence[str] = QUESTIONS) -> dict[int, float]:
    """How far apart the maps of different questions about one picture lie, layer by layer.

    The mean Jensen-Shannon divergence, in nats, of pairs of maps, each normalised to a sum of 1. Near 0 where a layer
    looks at the same places whatever is asked, and 0 where it sees nothing of the picture. No labels are needed.

    Args:
        backend: a vision-language model.
        image: any picture with several things in it.
        questions: two or more, about different things.

    Raises:
        InputError: fewer than two questions.
    """
    if len(set(questions)) < 2:
        raise InputError("one question cannot be told from another: pass at least two different questions")
    layers = tuple(backend.attention_layers)
    flat, read = [], None
    for question in questions:
        prompt = backend.lay_out([Message.user(image, question)])
        read = read or read_pictures(backend, prompt)
        (one,) = attention_to_pictures(backend, prompt, layers, read=read)
        flat.append(one.flatten(1).double())
    sums = torch.stack([one.sum(-1) for one in flat])
    maps = [one / total.clamp(min=_SMALLEST)[:, None] for one, total in zip(flat, sums, strict=True)]
    pairs = [(a, b) for i, a in enumerate(maps) for b in maps[:i]]
    means = torch.stack([_divergence(a, b) for a, b in pairs]).mean(0).masked_fill(sums.amin(0) < _SMALLEST, 0.0)
    return dict(zip(layers, means.tolist(), strict=True))


def _divergence(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    middle = (a + b) / 2
    return (torch.special.entr(middle) - (torch.special.entr(a) + torch.special.entr(b)) / 2).sum(-1)


def locate_layer(backend: Backend, image: Image.Image, questions: Sequence[str] = QUESTIONS) -> int:
    """The first layer whose maps follow the question: where `layer_divergences` passes half of its largest value.

    Up to about half of the depth the maps of vision-language models are the same whatever is asked, and then they jump.
    A choice without labels, and only as good as that; with labels, compare layers by accuracy.
    """
    divergences = layer_divergences(backend, image, questions)
    half = max(divergences.values()) / 2
    return next(layer for layer, value in divergences.items() if value >= half)
