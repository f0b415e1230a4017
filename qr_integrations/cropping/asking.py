"""What the model is asked while it is looked at."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from torch import Tensor

from qr_integrations.backend.picture_geometry import PictureTokens
from qr_integrations.backend.picture_reading import ReadPictures
from qr_integrations.backend.prompts import Prompt
from qr_integrations.cropping.importance import ImportanceMap
from qr_integrations.errors import InputError
from qr_integrations.types import Message

GENERIC = "Write a general description of the image."
"""The published question that asks for nothing in particular."""
SHORT_ANSWER = "Answer the question using a single word or phrase."
"""What the authors append to every question, also when they look."""


@dataclass(frozen=True, slots=True)
class Importance:
    """Maps of all pictures of a conversation, in order, and what was read of it on the way."""

    maps: tuple[ImportanceMap, ...]
    read: ReadPictures | None


def asked(messages: Sequence[Message], instruction: str = "") -> tuple[Message, ...]:
    """The conversation up to its last question, whose words come behind its pictures, as published.

    Raises:
        InputError: no pictures, or the user has not asked.
    """
    return _with_last_words(messages, None, instruction)


def asked_in_general(
    messages: Sequence[Message], question: str = GENERIC, instruction: str = ""
) -> tuple[Message, ...]:
    """The same conversation with the last question replaced by one that asks for nothing in particular."""
    return _with_last_words(messages, question, instruction)


def _with_last_words(messages: Sequence[Message], words: str | None, instruction: str) -> tuple[Message, ...]:
    places = [place for place, message in enumerate(messages) if message.role == "user"]
    if not places or not any(message.pictures for message in messages[: places[-1] + 1]):
        raise InputError("there is nothing to look at: pass a question of the user, and a picture")
    last = messages[places[-1]]
    text = " ".join(part for part in (last.text if words is None else words, instruction) if part)
    return (*messages[: places[-1]], Message.user(*last.pictures, text))


def as_maps(
    values: Sequence[Float[Tensor, "_ _ _"]], found: Sequence[PictureTokens], question: Prompt, method: str
) -> tuple[ImportanceMap, ...]:
    """The maps of a prompt's pictures, each the mean over its layers; `values` are ``[L, rows, columns]`` for each."""
    rows = zip(values, found, question.pictures, strict=True)
    return tuple(as_map(one.mean(0), where, picture.size, method) for one, where, picture in rows)


def as_map(
    values: Float[Tensor, "rows columns"], picture: PictureTokens, size: tuple[int, int], method: str
) -> ImportanceMap:
    """Numbers of a picture's cells, with the pixels they cover."""
    return ImportanceMap(values.float().cpu().numpy().astype(np.float32), picture.covers, size, method)
