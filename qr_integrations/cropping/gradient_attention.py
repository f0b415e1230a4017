"""grad-att: attention that matters for the answer (arXiv 2502.17422, section 4.2)."""

from collections.abc import Sequence

from PIL import Image

from qr_integrations.backend import Backend
from qr_integrations.backend.picture_reading import attention_to_pictures, find_pictures, read_pictures
from qr_integrations.cropping.asking import Importance, as_maps, asked
from qr_integrations.cropping.importance import ImportanceMap
from qr_integrations.cropping.layers import Layers, choose_layers
from qr_integrations.types import Message


class GradientAttention:
    """Each weight of attention times the part above 0 of its gradient, the mean over heads.

    The gradient is that of the log probability of the most probable first answer token. It is had in one pass over the
    question's tokens, behind the kept pictures, with respect to what the heads bring home at the last token: equal to
    the authors' gradient through full attention matrices, without them. Parameters get no gradients.

    Args:
        backend: a vision-language model.
        layers: see `choose_layers`; of several, the mean of their maps.
        instruction: appended to the question while looking, such as `SHORT_ANSWER`.
    """

    method = "gradient"

    def __init__(self, backend: Backend, *, layers: Layers = None, instruction: str = "") -> None:
        self._backend, self._layers, self._instruction = backend, choose_layers(backend, layers), instruction

    def importance(self, image: Image.Image, question: str) -> ImportanceMap:
        """Where to look for the answer. Errors are those of `RelativeAttention.importance`."""
        return self.of_conversation((Message.user(image, question),)).maps[0]

    def of_conversation(self, messages: Sequence[Message]) -> Importance:
        """Maps of all its pictures, for the last question."""
        question = self._backend.lay_out(asked(messages, self._instruction))
        read = read_pictures(self._backend, question)
        maps = attention_to_pictures(self._backend, question, self._layers, weighed=True, read=read)
        return Importance(as_maps(maps, find_pictures(self._backend, question), question, self.method), read)
