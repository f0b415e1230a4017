"""Small random models to decode with, and a picture for the one that sees."""

from functools import cache
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from qr_integrations.backend import Backend

PROMPT = [1, 7, 9, 11]
IMAGE_TOKEN, PATCHES = 99, 4


def bench(name: str) -> "Backend":
    """A row of the table of architectures."""
    from tests.backend import measure

    return measure.bench(measure.named(name)).backend


@cache
def llava() -> "Backend":
    """A LLaVA of random weights, whose pictures have four tokens."""
    from transformers import AutoModelForImageTextToText, LlavaConfig

    from qr_integrations.backend import Backend
    from tests.backend import architectures, measure

    text = architectures.COMMON | dict(model_type="llama")
    eye = architectures.EYE | dict(model_type="clip_vision_model")
    torch.manual_seed(7)
    config = LlavaConfig(text_config=text, vision_config=eye, image_token_index=IMAGE_TOKEN)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            measure.spread(name, weight)
    return Backend(model, measure.tiny_tokenizer(), name="tiny LLaVA")


def seeing(seed: int = 0) -> dict[str, torch.Tensor]:
    """A prompt with a picture, as the tiny LLaVA takes it."""
    ids = torch.tensor([[1, *[IMAGE_TOKEN] * PATCHES, 7, 9, 11]])
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def generate(backend: "Backend", ids: list[list[int]] | None = None, **options: Any) -> list[list[int]]:
    """Prompt and new tokens; greedy unless told otherwise."""
    tokens = torch.tensor(ids or [PROMPT])
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
    options.setdefault("attention_mask", torch.ones_like(tokens))
    return backend.model.generate(tokens, **options).tolist()


def logits(probs: list[float]) -> torch.Tensor:
    """Of one position of one row, ``[1, 1, V]``."""
    return torch.tensor(probs).log()[None, None]
