"""What may come in, and how much of it."""

import re
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from qr_integrations.errors import InputError

SCHEME = re.compile(r"\s*([a-z][a-z0-9+.-]+):", re.IGNORECASE)  # one letter is a Windows drive
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
"""All that are ever tried. Pillow knows more, and hands some of them to other programs."""
_CHUNK = 1 << 16  # bytes


@runtime_checkable
class Readable(Protocol):
    """An open binary file, an upload, a response: whatever gives its bytes piece by piece."""

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes, none at the end."""


@dataclass(frozen=True, slots=True)
class PicturePolicy:
    """What may be opened. Limits are inclusive.

    Attributes:
        allow_local_files: open paths. True suits a caller's own paths; pass False for paths out of other people's
            messages.
        allow_urls: fetch http and https addresses, from public hosts only.
        max_bytes: of the encoded picture, wherever it comes from.
        max_pixels: width times height, checked before anything is decoded. Pillow's own limit holds besides.
        max_side: the longer side in pixels.
        max_ratio: the longer side over the shorter one: models scale or pad a narrow picture to a huge one.
        timeout: seconds for fetching one picture, redirects included; looking up a host's name is left to the system.
        formats: of encoded pictures, some of `FORMATS`, which is the default.

    Raises:
        InputError: a limit that is not above 0, or a format that is not known.
    """

    allow_local_files: bool = True
    allow_urls: bool = False
    max_bytes: int = 20 * 2**20
    max_pixels: int = 64_000_000
    max_side: int = 12_000
    max_ratio: float = 200.0
    timeout: float = 10.0
    formats: tuple[str, ...] = FORMATS

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_pixels", "max_side", "max_ratio", "timeout"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name}={getattr(self, name)} lets nothing in: pass a number above 0")
        if not self.formats or (unknown := [name for name in self.formats if name not in FORMATS]):
            raise InputError(f"formats={unknown if self.formats else ()} are none: pass some of {', '.join(FORMATS)}")

    def check_length(self, length: int, name: str) -> None:
        """Raises `InputError` for more than `max_bytes` bytes."""
        if length > self.max_bytes:
            raise InputError(f"{name} has more than {self.max_bytes} bytes: make it smaller or raise max_bytes")

    def read(self, stream: Readable, name: str) -> bytes:
        """All that is left in a stream.

        Raises:
            InputError: as soon as it is more than `max_bytes`, or text.
        """
        data = bytearray()
        while part := stream.read(_CHUNK):
            if not isinstance(part, bytes):
                raise InputError(f"{name} is read as text: open its file in binary mode")
            data += part
            self.check_length(len(data), name)
        return bytes(data)


DECODED = PicturePolicy(max_pixels=2**62)
"""For pictures that are decoded: who has done that has judged how many pixels are too many."""


def shown(source: str) -> str:
    """A source as an error names it, short and without secrets: a URL's query may hold keys."""
    longest = 200
    if SCHEME.match(source):
        source, longest = re.sub(r"//[^/@]*@", "//", source[:1000].partition("?")[0]), 40
    return repr(source if len(source) <= longest else source[:longest] + "...")
