"""From a request of OpenAI's clients to work for an engine: what is asked for is checked, pictures are opened."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import cache, partial
from typing import Any, TypeVar, get_type_hints

from PIL import Image
from pydantic import ConfigDict, TypeAdapter, ValidationError

from qr_integrations.chat_steps import CHAT_STEPS, as_step
from qr_integrations.errors import InputError, WindowError
from qr_integrations.images import PictureFetcher, PicturePolicy, identify_picture, open_picture
from qr_integrations.images.policy import SCHEME, shown
from qr_integrations.serving.openai_shapes import ChatRequest, PicturePart, TextPart, Turn
from qr_integrations.serving.refusals import TooLarge
from qr_integrations.serving.room import Room, Share
from qr_integrations.serving.settings import ServerSettings
from qr_integrations.serving.work import ChatWork, ModelCard
from qr_integrations.types import Message

T = TypeVar("T")
_REQUESTS_AT_ONCE = 4  # with the most pixels; with fewer there may be more
_OF_PICTURES = ("crop", "num_visual_tokens", "prune")
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")  # OpenAI's: fewer decoders for strangers' bytes
_MOST_CHARACTERS, _MOST_VALUES = 4_000, 256  # in all steps together
_LOADS_MODELS = "text_encoder"  # a step's setting that names a folder or hub id
_SAME_NAMES = ("temperature", "top_p", "top_k", "repetition_penalty", "stop", "seed")
_LONGEST_TOKEN = 200  # characters; spaces in a row make the longest, of about 128
_EMBED = "send the picture itself, as data:image/png;base64,..."


class ChatReader:
    """Reads the requests of one server. Two pictures are decoded at once, and four fetched, whoever sent them.

    Args:
        settings: what is let in.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.policy = PicturePolicy(
            allow_local_files=False,
            allow_urls=settings.allow_urls,
            max_bytes=settings.max_picture_bytes,
            max_pixels=settings.max_picture_pixels,
            timeout=settings.picture_timeout,
            formats=_FORMATS,
        )
        self.room = Room(_REQUESTS_AT_ONCE * settings.max_picture_pixels, "pixels of pictures")
        self._decoding = ThreadPoolExecutor(2, thread_name_prefix="decoding")
        self._fetching = ThreadPoolExecutor(4, thread_name_prefix="fetching")

    @asynccontextmanager
    async def reading(self, sent: ChatRequest, card: ModelCard) -> AsyncIterator[ChatWork]:
        """What is to be done for a request, by the model of this card; within the block its pictures take `room`.

        Raises:
            TooLarge: too many pictures.
            Overloaded: other requests' pictures take too much of the room.
            WindowError: a text that is too long in any case.
            InputError: a setting, a step or a picture that cannot be used.
        """
        settings = self._settings(sent)
        given = {name: getattr(sent, name) for name in CHAT_STEPS}
        steps = {name: value for name, value in given.items() if value is not None and value is not False}
        _check_reads_pictures(card, steps)
        self._check_pictures(sent, card)
        _check_length(sent, card)
        if steps:
            await asyncio.to_thread(check_steps, steps)  # loads torch on first use
        with self.room.shared() as share:
            messages = await self._messages(sent, share)
            yield ChatWork(card.id, messages, {**settings, **steps}, bool(sent.heat_map))

    def _settings(self, sent: ChatRequest) -> dict[str, Any]:
        if complaint := sent.not_done():
            raise InputError(complaint)
        limit = self.settings.max_new_tokens
        for name in ("max_completion_tokens", "max_tokens"):
            if (getattr(sent, name) or 0) > limit:
                raise InputError(f"{name}={getattr(sent, name)} is more than this server gives: pass {limit} or less")
        given = {name: value for name in _SAME_NAMES if (value := getattr(sent, name)) is not None}
        return given if sent.longest is None else {**given, "max_new_tokens": sent.longest}

    def _check_pictures(self, sent: ChatRequest, card: ModelCard) -> None:
        places = [
            _place(number, part_number)
            for number, turn in enumerate(sent.messages)
            for part_number, part in enumerate(_parts(turn))
            if isinstance(part, PicturePart)
        ]
        if places and not card.sees_pictures:
            raise InputError(f"{places[0]}: {card.id!r} reads text only: choose a model that sees pictures")
        if len(places) > (most := self.settings.max_pictures):
            raise TooLarge(f"{len(places)} pictures are more than this server takes: send {most} or fewer")

    async def _messages(self, sent: ChatRequest, share: Share) -> tuple[Message, ...]:
        """All pictures together may have as many pixels as one alone."""
        messages, left = [], self.settings.max_picture_pixels
        for number, turn in enumerate(sent.messages):
            content: list[str | Image.Image] = []
            for part_number, part in enumerate(_parts(turn)):
                if isinstance(part, PicturePart):
                    picture = await self._opened(part.image_url.url, _place(number, part_number), left, share)
                    left -= picture.width * picture.height
                    content.append(picture)
                else:
                    content.append(part)
            messages.append(Message("system" if turn.role == "developer" else turn.role, tuple(content)))
        return tuple(messages)

    async def _opened(self, url: str, place: str, left: int, share: Share) -> Image.Image:
        """A picture of at most `left` pixels, which are taken before they are decoded."""
        used_up = left < self.policy.max_pixels
        try:
            if left < 1:
                raise InputError("there are pixels enough in the pictures before it: send fewer or smaller ones")
            policy, source = replace(self.policy, max_pixels=left), await self._source(url)
            picture = await _in(self._decoding, partial(identify_picture, source, policy=policy))
            share.take(picture.width * picture.height)
            return await _in(self._decoding, partial(open_picture, picture, policy=policy))
        except InputError as error:
            together = f" (all pictures together may have {self.policy.max_pixels:,} pixels)" if used_up else ""
            raise InputError(f"{place}: {error}{together}") from error

    async def _source(self, url: str) -> str | bytes:
        """A ``data:`` URI as it is, or what an address leads to; no paths."""
        found, name = SCHEME.match(url[:100]), shown(url[:1000])
        scheme = found[1].lower() if found else ""
        if scheme == "data":
            return url
        if scheme not in ("http", "https"):
            raise InputError(f"{name} is no address of a picture: {_EMBED}")
        if not self.policy.allow_urls:
            raise InputError(f"{name} is not fetched, this server fetches no pictures: {_EMBED}")
        return await _in(self._fetching, partial(PictureFetcher(self.policy).fetch, url.strip()))


async def _in(pool: ThreadPoolExecutor, work: Callable[[], T]) -> T:
    """Who stops waiting does not let another thread in while this one runs, as semaphores would."""
    return await asyncio.get_running_loop().run_in_executor(pool, work)


def _parts(turn: Turn) -> list[str | PicturePart]:
    content = turn.content or ""
    if isinstance(content, str):
        return [content]
    return [part.text if isinstance(part, TextPart) else part for part in content]


def _check_length(sent: ChatRequest, card: ModelCard) -> None:
    """Texts that cannot fit need not be cut into tokens, which may take longer than a request has."""
    count = sum(len(part) for turn in sent.messages for part in _parts(turn) if isinstance(part, str))
    if card.max_tokens is not None and count > card.max_tokens * _LONGEST_TOKEN:
        raise WindowError(f"{count:,} characters, {card.id!r} holds {card.max_tokens:,} tokens: pass shorter messages")


def _place(number: int, part_number: int) -> str:
    return f"messages[{number}].content[{part_number}]"


# ---- steps


def _check_reads_pictures(card: ModelCard, steps: Mapping[str, Any]) -> None:
    lost = [name for name in _OF_PICTURES if name in steps]
    if lost and not card.sees_pictures:
        raise InputError(f"{lost[0]!r} is about pictures, and {card.id!r} reads text only: leave it out")


def check_steps(steps: Mapping[str, Any]) -> None:
    """Whether `as_step` reads what was sent for each step, and its settings have the types that they are declared with.

    Raises:
        InputError: it does not, it is too much, or a setting names a model to be loaded.
    """
    _check_amount(steps)
    for name, given in steps.items():
        try:
            step = as_step(name, given)
        except InputError as error:
            raise InputError(str(error) if str(error).startswith(name) else f"{name}: {error}") from error
        except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise InputError(f"{name} has a setting that cannot be ({error}): correct it") from error
        if getattr(step, _LOADS_MODELS, None) is not None:
            raise InputError(f"{name}: no model is loaded for a request: leave out {_LOADS_MODELS!r}")
        for setting, adapter in [] if isinstance(step, bool | int) else _adapters(step.__class__).items():
            try:
                adapter.validate_python(getattr(step, setting))
            except ValidationError as error:
                raise InputError(f"{name}.{setting}: {error.errors()[0]['msg']}: correct it") from error


def _check_amount(steps: Mapping[str, Any]) -> None:
    """Texts of steps are read by the model too, and lists are worked through."""
    values, count, length = list(steps.items()), 0, 0
    while values:
        name, value = values.pop()
        if isinstance(value, str):
            length += len(value)
            if length > _MOST_CHARACTERS:
                raise InputError(f"{name}: more than {_MOST_CHARACTERS:,} characters in all steps: shorten the texts")
            if any("\ud800" <= character <= "\udfff" for character in value):
                raise InputError(f"{name}: a text holds half a character: send both halves, or none")
        elif isinstance(value, Mapping | list):
            count += len(value)
            if count > _MOST_VALUES:
                raise InputError(f"{name}: more than {_MOST_VALUES} values in all steps: shorten the lists")
            inner = [*value, *value.values()] if isinstance(value, Mapping) else value
            values += [(name, one) for one in inner]


@cache
def _adapters(kind: type) -> dict[str, Any]:
    config = ConfigDict(strict=True)
    return {name: TypeAdapter(hint, config=config) for name, hint in get_type_hints(kind).items()}
