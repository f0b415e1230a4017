"""Messages with pictures, read by the tiny vision-language models: what the tests of the families share."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from qr_integrations.backend.picture_families import PictureFamily, picture_family
from qr_integrations.backend.picture_geometry import PictureTokens
from tests.backend.tiny_vlms import prompt, tiny

WIDE, TALL = (300, 100), (100, 150)

tiny_once = cache(tiny)


def noise(size: tuple[int, int], seed: int) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def features(model: Any, chosen: Mapping[str, Tensor]) -> Tensor:
    """What stands at the placeholders of some pictures, one row each."""
    found = model.get_image_features(**chosen, return_dict=True).pooler_output
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in found])


def find(name: str, *content: Any, **how: Any) -> tuple[Any, PictureFamily, dict[str, Tensor], list[PictureTokens]]:
    """The model, its row, the inputs of a message, and its pictures."""
    model, processor = tiny_once(name)
    inputs = prompt(processor, *content, **how)
    family = picture_family(model.config)
    sizes = [part.size for part in content if not isinstance(part, str)]
    return model, family, inputs, family.locate(model.config, processor, inputs, sizes)


def two(name: str, **how: Any) -> tuple[Any, PictureFamily, dict[str, Tensor], list[PictureTokens]]:
    return find(name, noise(WIDE, 0), noise(TALL, 1), "what is in the picture ?", **how)


def image_token(name: str) -> int:
    return int(tiny_once(name)[0].config.image_token_id)
