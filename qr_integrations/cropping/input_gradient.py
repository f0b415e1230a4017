"""pure-grad: pixels that matter for the answer (arXiv 2502.17422, section 4.3)."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from qr_integrations.backend import Backend
from qr_integrations.backend.picture_geometry import PictureTokens
from qr_integrations.backend.picture_reading import find_pictures, map_grid, pixel_gradients
from qr_integrations.cropping.asking import GENERIC, Importance, as_map, asked, asked_in_general
from qr_integrations.cropping.boxes import Geometry
from qr_integrations.cropping.high_pass import high_pass_mask
from qr_integrations.cropping.importance import ImportanceMap
from qr_integrations.types import Grid, Message

_SMALLEST = 1e-20  # of a gradient


class InputGradient:
    """The gradient of the answer at each pixel, divided by that of a generic answer, at edges only, per cell.

    Needs no attention, but a pass back through all of the model for each of two questions, and gives the least of the
    three methods.

    Args:
        backend: a vision-language model that reads a picture as one square of pixels (LLaVA-1.5, InstructBLIP,
            PaliGemma, Gemma 3).
        instruction: appended to the question while looking, such as `SHORT_ANSWER`.
        generic: what the question is compared with.
        geometry: ``"true"`` looks for edges in the part of the picture that the model sees; ``"published"`` in all of
            it, squashed into that square, as the authors do.
    """

    method = "input_gradient"

    def __init__(
        self, backend: Backend, *, instruction: str = "", generic: str = GENERIC, geometry: Geometry = "true"
    ) -> None:
        self._backend, self._instruction, self._generic, self._geometry = backend, instruction, generic, geometry

    def importance(self, image: Image.Image, question: str) -> ImportanceMap:
        """Where to look for the answer. Errors are those of `RelativeAttention.importance`.

        Raises:
            InputError: besides, the family shows a picture as tiles or patches.
        """
        return self.of_conversation((Message.user(image, question),)).maps[0]

    def of_conversation(self, messages: Sequence[Message]) -> Importance:
        """Maps of all its pictures, for the last question."""
        question = self._backend.lay_out(asked(messages, self._instruction))
        generic = self._backend.lay_out(asked_in_general(messages, self._generic, self._instruction))
        found = find_pictures(self._backend, question)
        both = zip(pixel_gradients(self._backend, question), pixel_gradients(self._backend, generic), strict=True)
        maps = []
        for (mine, its), picture, where in zip(both, question.pictures, found, strict=True):
            quotient = mine / its.clamp(min=_SMALLEST)
            edges = self._edges(picture, where, quotient)
            cells = in_cells(quotient * edges, map_grid(self._backend, question, where))
            maps.append(as_map(cells, where, picture.size, self.method))
        return Importance(tuple(maps), None)

    def _edges(self, picture: Image.Image, where: PictureTokens, pixels: Tensor) -> Tensor:
        seen = picture
        if self._geometry == "true":
            left, top, right, bottom = where.covers
            seen = picture.crop((round(left), round(top), round(right), round(bottom)))
        height, width = pixels.shape
        return torch.from_numpy(high_pass_mask(seen, (width, height))).to(pixels)


def in_cells(pixels: Float[Tensor, "height width"], grid: Grid) -> Float[Tensor, "rows columns"]:
    """The mean of the pixels of each cell."""
    return torch.nn.functional.adaptive_avg_pool2d(pixels[None], (grid.rows, grid.columns))[0]
