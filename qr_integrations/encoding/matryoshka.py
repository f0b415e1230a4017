"""Pictures in as many tokens as one likes (MQT, arXiv 2405.19315): for search, and how many a conversation needs.

Models: of type ``mqt_llava``, such as the bundled ``qr-mini-vl-mqt``. Their first m tokens of a picture are the same
however many are made, so that everything here computes a picture once.

Legend: B pictures, M the most tokens of a picture, m tokens asked for, D the language model's width, V the tower's.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from qr_integrations.backend import Backend
from qr_integrations.backend.prompts import check_num_visual_tokens
from qr_integrations.errors import InputError
from qr_integrations.images import PictureSource, check_several, open_numbered
from qr_integrations.types import Message

_BATCH = 16
_LENGTHS = (16, 64, 256, 1024, 4096)
"""Prompts that are timed, in tokens."""
_RUNS = 2
_LONG = 2.0
"""Seconds after which no longer prompt is timed."""


class MQTEncoder:
    """A matryoshka model's eyes alone.

    Args:
        backend: with a model of type ``mqt_llava``.

    Raises:
        InputError: another model.

    Example:
        >>> from PIL import Image
        >>> from qr_integrations import Backend
        >>> from qr_integrations.encoding import MQTEncoder
        >>> encoder = MQTEncoder(Backend.load("qr-mini-vl-mqt"))
        >>> encoder.encode([Image.new("RGB", (300, 200), "navy")], 4).shape
        torch.Size([1, 4, 192])
    """

    def __init__(self, backend: Backend) -> None:
        check_num_visual_tokens(backend, 1)
        self.backend = backend

    @property
    def num_queries(self) -> int:
        """M."""
        return _most_tokens(self.backend)

    def encode(self, images: Sequence[PictureSource], num_tokens: int | None = None) -> Float[Tensor, "B m D"]:
        """The tokens that the language model reads of each picture, in the model's dtype on its device.

        Args:
            images: whatever `open_picture` opens.
            num_tokens: m; None makes all M.

        Raises:
            InputError: no list, a number that the model does not make, or a picture that cannot be opened, with its
                number.
        """
        inner = self._inner
        return self._of_each(images, lambda patches: inner.multi_modal_projector(patches, num_tokens), num_tokens)

    def embed(self, images: Sequence[PictureSource], num_tokens: int | None = None) -> Float[np.ndarray, "B V"]:
        """A vector of length 1 for each picture, fp32: the mean of what m queries take from it.

        It stays in the tower's space, before anything is multiplied for the language model, where pictures alike are
        found better: with 16 tokens of the bundled model, crops of 0.6 of a drawn scene's sides found their scene among
        80 at 75 % (62 % in the language model's space, 75 % by the mean of all patches, 86 % by `embed_tokens` and the
        sum of each token's best match).

        Arguments and errors are those of `encode`.
        """
        inner = self._inner
        taken = self._of_each(
            images, lambda patches: inner.multi_modal_projector.pooled(patches, num_tokens), num_tokens
        )
        return _as_array(taken.float().mean(1))

    def embed_tokens(
        self, images: Sequence[PictureSource], num_tokens: int | None = None
    ) -> Float[np.ndarray, "B m V"]:
        """m vectors of length 1 for each picture, fp32, for search that compares token with token.

        Arguments and errors are those of `encode`.
        """
        inner = self._inner
        taken = self._of_each(
            images, lambda patches: inner.multi_modal_projector.pooled(patches, num_tokens), num_tokens
        )
        return _as_array(taken.float())

    @property
    def _inner(self) -> Any:
        return self.backend.model.base_model

    @torch.no_grad()
    def _of_each(
        self, images: Sequence[PictureSource], read: Callable[[Tensor], Tensor], num_tokens: int | None
    ) -> Tensor:
        """What is read of the patches, batch by batch; no pictures give a result of the same shape."""
        check_several(images)
        if num_tokens is not None:
            check_num_visual_tokens(self.backend, num_tokens)
        processor: Any = self.backend.processor
        with self.backend.locked():
            weight = self._inner.multi_modal_projector.proj
            made = [read(weight.new_zeros(0, self._inner.multi_modal_projector.num_patches, len(weight)))]
            for start in range(0, len(images), _BATCH):
                some = enumerate(images[start : start + _BATCH], start)
                opened = [open_numbered(image, number) for number, image in some]
                pixels = processor.image_processor(images=opened, return_tensors="pt")["pixel_values"]
                made.append(read(self._inner.patches_of(pixels.to(weight.device, weight.dtype))))
        return torch.cat(made)


def _as_array(vectors: Tensor) -> Any:
    return normalize(vectors, dim=-1).cpu().numpy()


# ---- how many tokens


@dataclass(frozen=True, slots=True)
class TokenBudget:
    """As many tokens as fit for all pictures of a conversation together, the same number for each.

    Args:
        total: tokens of all pictures.

    Raises:
        InputError: less than 1.
    """

    total: int

    def __post_init__(self) -> None:
        _check_whole("total", self.total)

    def choose(self, backend: Backend, messages: Sequence[Message]) -> int:
        """Tokens of each picture.

        Raises:
            InputError: more pictures than tokens, or no matryoshka model.
        """
        pictures, most = _num_pictures(messages), _most_tokens(backend)
        if pictures > self.total:
            raise InputError(
                f"{pictures} pictures need at least one token each, total={self.total} is less: pass total={pictures} "
                "or more, or fewer pictures"
            )
        return min(most, self.total // pictures) if pictures else most


@dataclass(frozen=True, slots=True)
class TimeBudget:
    """As many tokens as the model reads in time, by what this machine was measured to need.

    The first use with a model measures it, see `measure_prefill`. Each picture gets one token at least, in time or not.

    Args:
        seconds: until the prompt has been read and the first token of the answer is known.

    Raises:
        InputError: not a number above 0.
    """

    seconds: float

    def __post_init__(self) -> None:
        if isinstance(self.seconds, bool) or not 0 < self.seconds < math.inf:
            raise InputError(f"seconds={self.seconds!r} is no time: pass a number above 0")

    def choose(self, backend: Backend, messages: Sequence[Message]) -> int:
        """Tokens of each picture.

        Raises:
            InputError: no matryoshka model.
        """
        pictures = _num_pictures(messages)
        if not pictures:
            return _most_tokens(backend)
        times = measure_prefill(backend)
        text, most = _room(backend, messages)
        return next((m for m in range(most, 1, -1) if times.of(text + m * pictures, pictures) <= self.seconds), 1)


@dataclass(frozen=True, slots=True)
class Confidence:
    """Few tokens first, and twice as many until the model is sure how its answer begins.

    An idea of ours, not the paper's. The pictures go through the tower once, the prompt through the language model once
    for each number of tokens that is tried. A first word that says nothing ("The") makes a model sure of nothing: it
    suits questions for short answers.

    Args:
        least: probability of the most probable first token at which the model counts as sure.
        start: tokens of each picture that are tried first.

    Raises:
        InputError: a probability outside of 0 to 1, or a start below 1.
    """

    least: float = 0.9
    start: int = 4

    def __post_init__(self) -> None:
        _check_whole("start", self.start)
        if isinstance(self.least, bool) or not 0 <= self.least <= 1:
            raise InputError(f"least={self.least!r} is no probability: pass 0 to 1")

    def choose(self, backend: Backend, messages: Sequence[Message]) -> int:
        """Tokens of each picture.

        Raises:
            InputError: no matryoshka model.
        """
        if not _num_pictures(messages):
            return _most_tokens(backend)
        _, most = _room(backend, messages)
        with backend.locked(), torch.no_grad():
            prompt = backend.lay_out(messages, num_visual_tokens=1)
            tokens = backend.model.base_model.tokens_of(prompt.inputs["pixel_values"].to(backend.model.dtype), most)
            count = min(self.start, most)
            while count < most and _sureness(backend, prompt.inputs["input_ids"], tokens[:, :count]) < self.least:
                count = min(2 * count, most)
        return count


def _sureness(backend: Backend, ids: Tensor, tokens: Tensor) -> float:
    """The probability of the most probable next token, each placeholder of `ids` being a picture's m tokens."""
    visual = ids[0] == backend.model.config.image_token_id
    ids = ids.repeat_interleave(torch.where(visual, tokens.shape[1], 1), dim=1)
    places = (ids == backend.model.config.image_token_id)[..., None]
    states = backend.model.get_input_embeddings()(ids)
    states = states.masked_scatter(places, tokens.flatten(0, 1).to(states.dtype))
    logits = backend.model(inputs_embeds=states, attention_mask=torch.ones_like(ids), logits_to_keep=1).logits
    return float(logits[0, -1].float().softmax(-1).max())


# ---- what takes how long


@dataclass(frozen=True, slots=True)
class PrefillTimes:
    """What a model needs on this machine until it has read a prompt.

    Attributes:
        picture: seconds for one picture, up to its tokens.
        lengths: of prompts that were timed, in tokens, ascending.
        seconds: for each of them.
    """

    picture: float
    lengths: tuple[int, ...]
    seconds: tuple[float, ...]

    def of(self, tokens: int, pictures: int = 0) -> float:
        """Seconds for a prompt of so many tokens: between two timed lengths in proportion, beyond them as between the
        last two."""
        if tokens > self.lengths[-1]:
            slope = np.diff(self.seconds[-2:]).sum() / max(1, np.diff(self.lengths[-2:]).sum())
            beyond = float(self.seconds[-1] + slope * (tokens - self.lengths[-1]))
        else:
            beyond = float(np.interp(tokens, self.lengths, self.seconds))
        return beyond + self.picture * pictures


_measured: WeakKeyDictionary[Any, PrefillTimes] = WeakKeyDictionary()


def measure_prefill(backend: Backend, *, again: bool = False) -> PrefillTimes:
    """Time one picture, and prompts of a few lengths up to the model's window; measured once and kept with the model.

    Longer prompts than one that took 2 seconds are not timed.

    Args:
        backend: of a matryoshka model.
        again: measure anew, as on a machine that was busy.

    Raises:
        InputError: no matryoshka model.
    """
    _most_tokens(backend)
    with backend.locked(), torch.no_grad():
        if again or backend.model not in _measured:
            _measured[backend.model] = _measure(backend)
        return _measured[backend.model]


def _measure(backend: Backend) -> PrefillTimes:
    model: Any = backend.model
    side = model.config.vision_config.image_size
    pixels = torch.zeros(1, 3, side, side, device=backend.device, dtype=model.dtype)
    longest = min(_LENGTHS[-1], (backend.max_tokens or _LENGTHS[-1]) - 1)
    lengths = (*(length for length in _LENGTHS if length < longest), longest)

    def read(length: int) -> float:
        ids = torch.zeros(1, length, dtype=torch.long, device=backend.device)
        return _seconds_of(lambda: model(input_ids=ids, logits_to_keep=1, use_cache=True).logits)

    timed: dict[int, float] = {}
    for length in lengths:
        timed[length] = max([read(length), *timed.values()])
        if len(timed) > 1 and timed[length] > _LONG:
            break
    picture = _seconds_of(lambda: model.base_model.tokens_of(pixels))
    return PrefillTimes(picture, tuple(timed), tuple(timed.values()))


def _seconds_of(run: Callable[[], Tensor]) -> float:
    """The least of some runs after one that does not count; reading a number waits for the device."""
    taken = []
    for _ in range(1 + _RUNS):
        started = time.perf_counter()
        run().flatten()[0].item()
        taken.append(time.perf_counter() - started)
    return min(taken[1:])


def _most_tokens(backend: Backend) -> int:
    check_num_visual_tokens(backend, 1)
    return int(backend.model.config.num_queries)


def _num_pictures(messages: Sequence[Message]) -> int:
    return sum(len(message.pictures) for message in messages)


def _room(backend: Backend, messages: Sequence[Message]) -> tuple[int, int]:
    """Tokens of the text, and the most tokens of each picture that the model's window holds beside them."""
    pictures, most = _num_pictures(messages), _most_tokens(backend)
    text = len(backend.lay_out(messages, num_visual_tokens=1)) - pictures
    if backend.max_tokens is not None:
        most = min(most, (backend.max_tokens - 1 - text) // pictures)
    return text, most


def _check_whole(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{name}={value!r} is no number of tokens: pass a whole number from 1 on")
