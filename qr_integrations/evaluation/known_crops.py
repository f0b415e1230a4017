"""Second looks to compare with: at a place that is known beforehand, and at one that means nothing."""

from dataclasses import dataclass
from random import Random
from typing import Any

from PIL import Image

from qr_integrations.backend.answering import Cropped
from qr_integrations.cropping import ViCrop
from qr_integrations.cropping.boxes import RATIOS
from qr_integrations.types import Box, Message


@dataclass(frozen=True, slots=True)
class KnownBox:
    """A second look at a place that is known beforehand; None: no second look. Passed as ``crop=``."""

    box: Box | None

    def crop(self, backend: Any, messages: tuple[Message, ...]) -> Cropped:
        """Every picture is followed by its part in the box."""
        if self.box is None:
            return Cropped(messages, (self,))
        return Cropped(tuple(Message(one.role, self._looked_at_again(one)) for one in messages), (self,))

    def _looked_at_again(self, message: Message) -> tuple[str | Image.Image, ...]:
        parts: list[str | Image.Image] = []
        for part in message.content:
            parts.append(part)
            if self.box is not None and not isinstance(part, str):
                parts.append(part.crop(self.box.as_tuple()))
        return tuple(parts)


def crop_sides(base: int) -> tuple[int, ...]:
    """The sides in pixels that ViCrop's crops can have, smallest first.

    Example:
        >>> crop_sides(336)
        (336, 402, 470, 536, 604, 672)
    """
    return tuple(2 * int(base * ratio // 2) for ratio in RATIOS)


def oracle_box(size: tuple[int, int], box: Box | None, base: int) -> Box | None:
    """The smallest of ViCrop's crops that holds a box, around its centre.

    None where no second look helps: nothing to look at, a picture that ViCrop would not crop either, or a box that none
    of the sizes holds.
    """
    if box is None or max(size) <= base:
        return None
    fitting = [side for side in crop_sides(base) if side >= max(box.width, box.height)]
    if not fitting:
        return None
    return _square(size, fitting[0], (box.left + box.right) // 2, (box.top + box.bottom) // 2)


def random_box(size: tuple[int, int], box: Box, draw: Random) -> Box:
    """A box as large as another one, anywhere in the picture."""
    left, top = draw.randint(0, size[0] - box.width), draw.randint(0, size[1] - box.height)
    return Box(left, top, left + box.width, top + box.height)


@dataclass(frozen=True, slots=True)
class RandomPlace:
    """A second look at a place that means nothing, as large as what ViCrop would look at. Passed as ``crop=``."""

    seed: str

    def crop(self, backend: Any, messages: tuple[Message, ...]) -> Cropped:
        """The conversation with a crop of its one picture; none where ViCrop would not crop."""
        (look,) = ViCrop().crop(backend, messages).record
        draw = Random(self.seed)
        return KnownBox(look.box and random_box(look.importance.image_size, look.box, draw)).crop(backend, messages)


def _square(size: tuple[int, int], side: int, x: int, y: int) -> Box:
    """Around (x, y), moved into the picture and cut where that is smaller."""
    width, height = min(side, size[0]), min(side, size[1])
    left = min(max(0, x - width // 2), size[0] - width)
    top = min(max(0, y - height // 2), size[1] - height)
    return Box(left, top, left + width, top + height)
