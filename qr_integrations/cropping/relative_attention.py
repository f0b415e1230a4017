"""rel-att: where a question looks more than a question about nothing in particular (arXiv 2502.17422, section 4.1)."""

from collections.abc import Sequence

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from qr_integrations.backend import Backend
from qr_integrations.backend.picture_reading import (
    ReadPictures,
    attention_to_pictures,
    find_pictures,
    read_pictures,
)
from qr_integrations.backend.prompts import Prompt
from qr_integrations.cropping.asking import GENERIC, Importance, as_maps, asked, asked_in_general
from qr_integrations.cropping.importance import ImportanceMap
from qr_integrations.cropping.layers import Layers, choose_layers
from qr_integrations.types import Message

_SMALLEST = 1e-8  # of attention; the authors divide by what is there, and one cell of 0 would decide the box


class RelativeAttention:
    """The attention of the last token before the answer, divided by that of the same token after a generic question.

    The quotient cancels what attracts attention whatever is asked. Only one row of each layer is computed, nothing
    above the deepest layer runs, and both questions share the pictures' keys and values where the family permits.

    Args:
        backend: a vision-language model.
        layers: see `choose_layers`; of several, the mean of their maps.
        instruction: appended to both questions while looking, such as `SHORT_ANSWER`, which the authors append.
        generic: what the question is compared with.

    Where we differ from the authors' code: heads are averaged in fp32, attention below 1e-8 counts as that, and a map
    knows which pixels it covers (theirs takes a centre square for the whole picture).
    """

    method = "relative"

    def __init__(
        self, backend: Backend, *, layers: Layers = None, instruction: str = "", generic: str = GENERIC
    ) -> None:
        self._backend, self._layers = backend, choose_layers(backend, layers)
        self._instruction, self._generic = instruction, generic

    def importance(self, image: Image.Image, question: str) -> ImportanceMap:
        """Where to look for the answer.

        Raises:
            InputError: a broken picture, or a model that reads text only.
            UnsupportedModelError: where pictures stand in this family's prompts is not known.
        """
        return self.of_conversation((Message.user(image, question),)).maps[0]

    def of_conversation(self, messages: Sequence[Message]) -> Importance:
        """Maps of all its pictures, for the last question."""
        question = self._backend.lay_out(asked(messages, self._instruction))
        generic = self._backend.lay_out(asked_in_general(messages, self._generic, self._instruction))
        read = read_pictures(self._backend, question)
        maps = relative_attention(self._backend, question, generic, self._layers, read)
        return Importance(as_maps(maps, find_pictures(self._backend, question), question, self.method), read)


def relative_attention(
    backend: Backend, question: Prompt, generic: Prompt, layers: Sequence[int], read: ReadPictures | None = None
) -> tuple[Float[Tensor, "L rows columns"], ...]:
    """The quotients themselves, for each picture: equation 2 of the paper, without its normalisation."""
    asked_maps = attention_to_pictures(backend, question, layers, read=read)
    generic_maps = attention_to_pictures(backend, generic, layers, read=read)
    return tuple(a / b.clamp(min=_SMALLEST) for a, b in zip(asked_maps, generic_maps, strict=True))
