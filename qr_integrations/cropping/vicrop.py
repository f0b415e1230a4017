"""ViCrop: look, cut out what matters, look again (arXiv 2502.17422)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

from qr_integrations.backend import Backend
from qr_integrations.backend.answering import Cropped
from qr_integrations.backend.picture_families import picture_family
from qr_integrations.backend.prompts import as_messages
from qr_integrations.cropping.asking import GENERIC, Importance, asked
from qr_integrations.cropping.boxes import FoundBox, Geometry, find_box
from qr_integrations.cropping.gradient_attention import GradientAttention
from qr_integrations.cropping.importance import ImportanceMap
from qr_integrations.cropping.input_gradient import InputGradient
from qr_integrations.cropping.layers import Layers, stated
from qr_integrations.cropping.relative_attention import RelativeAttention
from qr_integrations.cropping.tiling import merge_maps, tile_picture
from qr_integrations.errors import InputError
from qr_integrations.types import Box, Message

Method = Literal["relative", "gradient", "input_gradient"]
_METHODS = ("relative", "gradient", "input_gradient")


@dataclass(frozen=True, slots=True)
class Look:
    """What one look at a picture found.

    Attributes:
        box: what was cut out, in the picture's pixels; None if no crop was worth it.
        importance: the map that it was found on.
        sharpness: how much more importance the window holds than its neighbours, per cell; no unit.
        lift: the mean of the map within the box over its mean in the picture; 1 where nothing stands out.
        reason: why there is no box; empty if there is one.
    """

    box: Box | None
    importance: ImportanceMap
    sharpness: float
    lift: float
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        """``{"box", "sharpness", "lift", "reason"}``, as it stands in JSON and in the adapters' metadata."""
        box = None if self.box is None else list(self.box.as_tuple())
        return {"box": box, "sharpness": float(self.sharpness), "lift": float(self.lift), "reason": self.reason}


@dataclass(frozen=True, slots=True)
class ViCrop:
    """How to look again; pass it as ``Backend.answer(..., crop=ViCrop())``, or call `look`.

    Args:
        method: ``"relative"`` (rel-att), ``"gradient"`` (grad-att) or ``"input_gradient"`` (pure-grad).
        layers: whose attention says where to look, see `choose_layers`. Not for ``"input_gradient"``.
        base: side of the smallest crop: in pixels as published, or below 1 as a share of the picture's longer side.
            None is what the checkpoint's config states (`stated`), the published side, or that of what the model sees.
        high_resolution: look at tiles of at most 1,024 pixels one by one; each costs a look of its own.
        geometry: ``"true"`` knows which pixels the model sees; ``"published"`` takes them to be the whole picture.
        instruction: appended to the question while looking, such as `SHORT_ANSWER`, which the authors append.
        generic: what the question is compared with; repeat there what all of your questions end with.
        min_lift: below this lift a crop is not worth it; 0 crops always, as published.

    The answer reads each picture of the last message that has any, and behind them their crops, as published. There is
    no crop where it would hold all that the model sees of a picture, nor where the map is the same everywhere; the
    authors' code shows the whole picture twice, or its top left corner.

    Raises:
        InputError: an unknown method, or a setting out of range.
    """

    method: Method = "relative"
    layers: Layers = None
    base: int | float | None = None
    high_resolution: bool = False
    geometry: Geometry = "true"
    instruction: str = ""
    generic: str = GENERIC
    min_lift: float = 0.0

    def __post_init__(self) -> None:
        if self.method not in _METHODS:
            raise InputError(f"unknown method {self.method!r}: pass {', '.join(map(repr, _METHODS))}")
        if self.geometry not in ("true", "published"):
            raise InputError(f"unknown geometry {self.geometry!r}: pass 'true' or 'published'")
        if not self.min_lift >= 0 or (self.base is not None and not _is_side(self.base)):
            raise InputError(
                f"min_lift={self.min_lift}, base={self.base} cannot be: pass at least 0, and at least 2 pixels or a "
                "share between 0 and 1"
            )
        if not (self.layers is None or self.layers == "all" or _are_layers(self.layers)):
            raise InputError(f"layers={self.layers!r} are no layers: pass None, 'all', a number or a tuple of numbers")
        if isinstance(self.layers, tuple | list) and len(set(self.layers)) < len(self.layers):
            raise InputError("a layer stands in `layers` more than once: pass distinct numbers")
        if isinstance(self.layers, list):
            object.__setattr__(self, "layers", tuple(self.layers))

    def look(self, backend: Backend, image: Image.Image, question: str) -> Look:
        """Where in a picture the answer to a question is to be found.

        Raises:
            InputError: a broken picture, or a model that reads text only.
            UnsupportedModelError: where pictures stand in this family's prompts is not known.
        """
        messages = as_messages((Message.user(image, question),))
        return self._judged(backend, self._importance(backend, messages).maps[0])

    def crop(self, backend: Backend, messages: tuple[Message, ...]) -> Cropped:
        """The conversation with crops behind the pictures of its last message with any; `record` holds the looks.

        What stands behind the last question is not looked at.

        Raises:
            InputError: no question of the user, or no picture up to there.
        """
        looked_at = messages[: len(asked(messages))]
        place = max(number for number, message in enumerate(looked_at) if message.pictures)
        found = self._importance(backend, looked_at)
        count = len(messages[place].pictures)
        looks = tuple(self._judged(backend, one) for one in found.maps[-count:])
        pictures = zip(messages[place].pictures, looks, strict=True)
        crops = [picture.crop(one.box.as_tuple()) for picture, one in pictures if one.box is not None]
        changed = (*messages[:place], _with_crops(messages[place], crops), *messages[place + 1 :])
        return Cropped(changed, looks, found.read)

    def _importance(self, backend: Backend, messages: Sequence[Message]) -> Importance:
        if not self.high_resolution:
            return self._of_conversation(backend, messages)
        # a tile takes its picture's place, one at a time
        pictures = [picture for message in messages for picture in message.pictures]
        maps = tuple(self._tiled(backend, messages, number) for number in range(len(pictures)))
        return Importance(maps, None)

    def _of_conversation(self, backend: Backend, messages: Sequence[Message]) -> Importance:
        said, compared = {"instruction": self.instruction}, {"generic": self.generic}
        if self.method == "input_gradient":
            return InputGradient(backend, geometry=self.geometry, **said, **compared).of_conversation(messages)
        if self.method == "gradient":
            return GradientAttention(backend, layers=self.layers, **said).of_conversation(messages)
        return RelativeAttention(backend, layers=self.layers, **said, **compared).of_conversation(messages)

    def _tiled(self, backend: Backend, messages: Sequence[Message], number: int) -> ImportanceMap:
        picture = [picture for message in messages for picture in message.pictures][number]
        tiling = tile_picture(picture.size, published=self.geometry == "published")
        maps = []
        for box in tiling.boxes:
            shown = _replaced(messages, number, picture.crop(box.as_tuple()))
            maps.append(self._of_conversation(backend, shown).maps[number])
        return merge_maps(tiling, maps, geometry=self.geometry)

    def _judged(self, backend: Backend, importance: ImportanceMap) -> Look:
        side = crop_side(backend, importance.image_size, self.base)
        found = find_box(importance, side, geometry=self.geometry)
        lift = _lift(importance, found)
        reason = ""
        if found.whole:
            of_all = max(importance.image_size) <= side
            seen = "the picture" if of_all else "what the model sees of the picture"
            reason = f"{seen} is no larger than its crop"
        elif not importance.is_informative:
            reason = "the map is the same everywhere"
        elif lift < self.min_lift:
            reason = f"the crop stands out {lift:.2f} times only"
        return Look(None if reason else found.box, importance, found.sharpness, lift, reason)


def _is_side(base: int | float) -> bool:
    return math.isfinite(base) and (0 < base < 1 or base >= 2)


def _are_layers(layers: object) -> bool:
    several = layers if isinstance(layers, tuple | list) else (layers,)
    return all(isinstance(layer, int) and not isinstance(layer, bool) for layer in several)


def crop_side(backend: Backend, image_size: tuple[int, int], base: int | float | None = None) -> int:
    """The side of the smallest crop in pixels; `base` as in `ViCrop`.

    As a share, it is all of a picture that is no larger than what the model sees: nothing was lost there.
    """
    config, longer = backend.model.config, max(image_size)
    seen = picture_family(config).side(config)
    base = base or stated(backend).get("base") or seen
    if base >= 1:
        return round(base)
    return longer if longer <= seen else max(2, round(base * longer))


def _lift(importance: ImportanceMap, found: FoundBox) -> float:
    """How much the map within the box exceeds its mean, as seen on 256 x 256 points of the picture."""
    width, height = importance.image_size
    shown = importance.on_picture((256, 256))
    left, top, right, bottom = found.box.as_tuple()
    rows = slice(top * 256 // height, max(-(-bottom * 256 // height), top * 256 // height + 1))
    columns = slice(left * 256 // width, max(-(-right * 256 // width), left * 256 // width + 1))
    inside = shown[rows, columns]
    if np.isnan(inside).all() or not (mean := float(np.nanmean(shown))):
        return 0.0
    return float(np.nanmean(inside)) / mean


def _with_crops(message: Message, crops: Sequence[Image.Image]) -> Message:
    """The crops stand behind the last picture, so that all before them is read as it was."""
    last = max(place for place, part in enumerate(message.content) if not isinstance(part, str))
    return Message(message.role, (*message.content[: last + 1], *crops, *message.content[last + 1 :]))


def _replaced(messages: Sequence[Message], number: int, picture: Image.Image) -> tuple[Message, ...]:
    """The conversation with another picture in the place of one, counted through all messages."""
    changed, count = [], 0
    for message in messages:
        content: list[str | Image.Image] = []
        for part in message.content:
            if not isinstance(part, str):
                part, count = (picture if count == number else part), count + 1
            content.append(part)
        changed.append(Message(message.role, tuple(content)))
    return tuple(changed)
