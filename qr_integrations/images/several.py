"""Lists of pictures: what is one, and whose error an error is."""

import os
from typing import Any

from PIL import Image

from qr_integrations.errors import InputError
from qr_integrations.images.opening import PictureSource, open_picture
from qr_integrations.images.policy import DECODED, PicturePolicy, Readable


def check_several(sources: Any, *, once: bool = False) -> None:
    """Whether these are pictures in a list or something like it, not a single picture.

    Args:
        sources: what was passed.
        once: also what can be read once only, such as a generator, is welcome.

    Raises:
        InputError: it is one picture, or no list.
    """
    alone = isinstance(sources, str | bytes | bytearray | memoryview | os.PathLike | Image.Image | Readable)
    alone = alone or getattr(sources, "ndim", 4) < 4
    needed = ("__iter__",) if once else ("__len__", "__getitem__")
    if alone or not all(hasattr(sources, name) for name in needed):
        raise InputError(f"a {type(sources).__name__} is no list of pictures: put it into one, [picture]")


def open_numbered(source: PictureSource, number: int) -> Image.Image:
    """A picture of a list as `open_picture` opens it, by the policy for a caller's own pictures.

    Pictures that are decoded already may have any number of pixels, others the default policy's.

    Args:
        source: whatever `open_picture` opens.
        number: of the picture in its list, counted from 0.

    Raises:
        InputError: as `open_picture`, with the number.

    Example:
        >>> from qr_integrations.images import open_numbered
        >>> open_numbered(b"", 3)
        Traceback (most recent call last):
        qr_integrations.errors.InputError: picture #3: the picture is broken, or in none of the formats ...
    """
    policy = DECODED if isinstance(source, Image.Image) else PicturePolicy()
    try:
        return open_picture(source, policy=policy)
    except InputError as error:
        raise InputError(f"picture #{number}: {error}") from error
