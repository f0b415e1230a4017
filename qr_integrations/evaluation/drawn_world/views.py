"""What a model sees of a scene: the whole picture or a part, padded to a square and scaled to its resolution."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from qr_integrations.evaluation.drawn_world.render import mark_box, render
from qr_integrations.evaluation.drawn_world.world import Corners, Scene, Thing

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation of CLIP's input."""
PADDING = (int(MEAN[0] * 255), int(MEAN[1] * 255), int(MEAN[2] * 255))


@dataclass(frozen=True)
class View:
    """A scene, or a part of it, as the model sees it: padded to a square and scaled to `resolution` pixels."""

    scene: Scene
    region: Corners
    resolution: int

    @property
    def scale(self) -> float:
        """Pixels of the model's input per source pixel."""
        return self.resolution / max(self.region[2] - self.region[0], self.region[3] - self.region[1])

    def place(self, box: Corners) -> tuple[float, float, float, float]:
        """A box in source pixels, in pixels of the model's input."""
        width, height = self.region[2] - self.region[0], self.region[3] - self.region[1]
        pad = (max(width, height) - width) // 2, (max(width, height) - height) // 2
        x, y = self.region[0] - pad[0], self.region[1] - pad[1]
        return tuple((v - o) * self.scale for v, o in zip(box, (x, y, x, y), strict=True))  # type: ignore[return-value]

    def shows(self, thing: Thing) -> float:
        """The share of a thing's box that is inside the view."""
        region, box = self.region, thing.box
        width = max(0, min(box[2], region[2]) - max(box[0], region[0]))
        height = max(0, min(box[3], region[3]) - max(box[1], region[1]))
        return width * height / ((box[2] - box[0]) * (box[3] - box[1]))

    def size(self, thing: Thing) -> float:
        """Longest side of a thing in pixels of the model's input."""
        return thing.size * self.scale

    def mark_size(self, thing: Thing) -> float:
        """Height of a thing's mark in pixels of the model's input."""
        box = mark_box(thing)
        return (box[3] - box[1]) * self.scale

    def pixels(self) -> UInt8[np.ndarray, "R R 3"]:
        """(resolution, resolution, 3) bytes, drawn at about twice the resolution: what the processor makes, faster."""
        image = pad_to_square(render(self.scene, self.region, min(1.0, 2 * self.scale)))
        return np.asarray(image.resize((self.resolution, self.resolution), Image.Resampling.BICUBIC))


def pad_to_square(image: Image.Image) -> Image.Image:
    """The picture in the middle of a square of the mean colour."""
    side = max(image.size)
    if image.width == image.height:
        return image
    square = Image.new("RGB", (side, side), PADDING)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def whole(scene: Scene, resolution: int) -> View:
    """The view of the whole picture."""
    return View(scene, scene.frame, resolution)
