"""The door through which pictures come in: whatever holds one becomes an upright RGB picture, or an `InputError`.

Nothing global is changed and nothing is kept: any number of threads may open pictures.
"""

import binascii
import os
from base64 import b64decode
from contextlib import closing, suppress
from io import BytesIO
from urllib.parse import unquote_to_bytes

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from qr_integrations.errors import InputError
from qr_integrations.images.fetching import PictureFetcher
from qr_integrations.images.policy import SCHEME, PicturePolicy, Readable, shown

_MOST_ESCAPES = 1_000_000  # in a data: URI; these take 0.4 seconds
_ORIENTATION = 0x0112  # the EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

EncodedPicture = bytes | bytearray | Readable | os.PathLike | str
PictureSource = Image.Image | UInt8[np.ndarray, "*shape"] | EncodedPicture
_DEFAULT = PicturePolicy()


def open_picture(source: PictureSource, *, policy: PicturePolicy = _DEFAULT) -> Image.Image:
    """A new picture in RGB, turned upright as its EXIF data say; `source` stays as it is.

    Transparent pixels are laid on white. Of an animation the first frame counts, of an open Pillow picture its current
    one. 16 bits a channel become the upper 8. Colour profiles are not applied, metadata are dropped.

    Args:
        source: a Pillow picture; a uint8 array ``[height, width]`` or ``[height, width, 1, 3 or 4]``; the bytes of a
            file (PNG, JPEG, WebP, GIF, BMP, TIFF, PPM, AVIF) or an open binary file, which is read from its start;
            a path; or a text: a ``data:`` URI, an http(s) URL, else a path. Bare base64 goes through `decode_base64`.
        policy: what may be opened.

    Raises:
        InputError: not allowed by the policy, not found, not a picture, broken, too large, or too narrow.

    Example:
        >>> from PIL import Image
        >>> from qr_integrations.images import open_picture
        >>> open_picture(Image.new("RGBA", (3, 2))).getpixel((0, 0))
        (255, 255, 255)
    """
    if isinstance(source, Image.Image):
        return _upright_rgb(source, policy, "the picture")
    if isinstance(source, np.ndarray):
        return _upright_rgb(_from_array(source), policy, "the picture")
    with closing(identify_picture(source, policy=policy)) as picture:
        return _upright_rgb(picture, policy, _name(source))


def identify_picture(source: EncodedPicture, *, policy: PicturePolicy = _DEFAULT) -> Image.Image:
    """A picture whose header has been read, and no pixel: for its size, and for `open_picture` to decode it.

    Args:
        source: what `open_picture` opens, if it is encoded.
        policy: what may be opened.

    Raises:
        InputError: as `open_picture`, as far as the header tells.

    Example:
        >>> from qr_integrations.images import identify_picture
        >>> gif = "data:image/gif;base64,R0lGODlhAwACAIAAAAAAAP///ywAAAAAAwACAAACAoRRADs="
        >>> identify_picture(gif).size
        (3, 2)
    """
    name = _name(source)
    picture = _identified(_read(source, policy, name), policy, name)
    _check_size(picture, policy, name)
    return picture


def decode_base64(text: str | bytes, *, policy: PicturePolicy = _DEFAULT) -> bytes:
    """The bytes behind base64 text; the URL-safe alphabet, white space and missing padding are understood.

    Raises:
        InputError: not base64, or more than the policy's `max_bytes`.
    """
    given = text.encode("utf-8", "replace") if isinstance(text, str) else text
    joined = given.translate(bytes.maketrans(b"-_", b"+/"), b" \t\r\n").rstrip(b"=")
    policy.check_length(len(joined) * 3 // 4, "the picture")
    try:
        return b64decode(joined + b"=" * (-len(joined) % 4), validate=True)
    except binascii.Error as error:
        raise InputError(
            f"{shown(given[:40].decode('ascii', 'replace'))} is no base64 ({error}): encode it anew"
        ) from error


# ---- from bytes to a picture


def _name(source: EncodedPicture) -> str:
    return shown(os.fspath(source)) if isinstance(source, str | os.PathLike) else "the picture"


def _identified(data: bytes, policy: PicturePolicy, name: str) -> Image.Image:
    Image.init()  # makes all formats known
    try:
        return Image.open(BytesIO(data), formats=[known for known in policy.formats if known in Image.OPEN])
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{name} has more pixels than Pillow opens: make it smaller") from error
    except Exception as error:  # what a format raises over broken data is not documented
        raise InputError(
            f"{name} is broken, or in none of the formats {', '.join(policy.formats)}: convert it to PNG or JPEG"
        ) from error


def _from_array(pixels: np.ndarray) -> Image.Image:
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or channels not in (1, 3, 4) or not pixels.size:
        raise InputError(
            f"an array {list(pixels.shape)} of {pixels.dtype} is no picture: pass uint8 [height, width] or [height, "
            "width, channels] with 1, 3 or 4 channels; multiply values from 0 to 1 by 255, move channels to the end"
        )
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.ndim == 3 and channels == 1 else pixels))


def _check_size(picture: Image.Image, policy: PicturePolicy, name: str) -> None:
    width, height = picture.size
    if not 0 < width * height <= policy.max_pixels:
        raise InputError(
            f"{name} has {width} x {height} pixels, 1 to {policy.max_pixels} are allowed: resize it or raise max_pixels"
        )
    if max(width, height) > min(policy.max_side, policy.max_ratio * min(width, height)):
        raise InputError(
            f"{name} has {width} x {height} pixels, too long or too narrow: cut it, or raise max_side or max_ratio"
        )


def _upright_rgb(picture: Image.Image, policy: PicturePolicy, name: str) -> Image.Image:
    _check_size(picture, policy, name)
    try:
        picture.load()
        rgb = _rgb(picture, name)
    except InputError:
        raise
    except Exception as error:  # what a format raises over broken data is not documented
        raise InputError(f"{name} is cut short or broken ({error}): get it again, or save it anew as PNG") from error
    turn = _UPRIGHT.get(_orientation(picture))
    rgb = rgb if turn is None else rgb.transpose(turn)
    rgb.info = {}  # an orientation left there would turn the picture a second time
    return rgb


def _orientation(picture: Image.Image) -> int:
    """1, as it stands, where the EXIF data cannot be read: the pixels can."""
    try:
        return int(picture.getexif().get(_ORIENTATION, 1))
    except Exception:
        return 1


def _rgb(picture: Image.Image, name: str) -> Image.Image:
    if picture.mode == "F":
        raise InputError(
            f"{name} holds floating-point values, whose range is not known: convert it to 8 bits a channel"
        )
    if picture.mode.startswith("I"):
        picture = _upper_bits(picture, name)
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    layer = picture.convert("LA" if picture.mode == "La" else "RGBA").convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def _upper_bits(picture: Image.Image, name: str) -> Image.Image:
    """Mode I holds 16 bits as well: Pillow reads 16-bit grey into it."""
    values = np.asarray(picture)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise InputError(f"{name} has values outside 16 bits: convert it to 8 bits a channel")
    return Image.fromarray((values >> 8).astype(np.uint8))


# ---- from a source to bytes


def _read(source: EncodedPicture, policy: PicturePolicy, name: str) -> bytes:
    if isinstance(source, bytes | bytearray):
        policy.check_length(len(source), name)
        return bytes(source)
    if isinstance(source, str) and (scheme := SCHEME.match(source)):
        return _read_address(scheme[1].lower(), source.strip(), policy, name)
    if isinstance(source, str | os.PathLike):
        return _read_file(source, policy, name)
    if not hasattr(source, "read"):
        raise InputError(
            f"a {type(source).__name__} is no picture: pass a Pillow picture, an array, bytes, a file or a path"
        )
    try:
        if hasattr(source, "seek"):
            with suppress(OSError):  # a pipe
                source.seek(0)
        return policy.read(source, name)
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"the picture's file cannot be read ({error}): open it in binary mode") from error


def _read_address(scheme: str, address: str, policy: PicturePolicy, name: str) -> bytes:
    if scheme == "data":
        head, comma, body = address.partition(",")
        if not comma:
            raise InputError(f"{name} has no data: write data:image/png;base64,...")
        is_base64 = head.lower().endswith(";base64")
        # a byte takes at most 4 characters of base64: 4/3, each written as an escape of 3
        policy.check_length(len(body) // 4 if is_base64 else len(body), name)
        if body.count("%") > _MOST_ESCAPES:
            raise InputError(f"{name} has more than {_MOST_ESCAPES:,} escapes: write data:image/png;base64,...")
        if not is_base64:
            return unquote_to_bytes(body)
        return decode_base64(unquote_to_bytes(body) if "%" in body else body, policy=policy)
    if scheme not in ("http", "https"):
        raise InputError(f"{name} is not read: only data:, http: and https: are; pass a file as pathlib.Path")
    if not policy.allow_urls:
        raise InputError(f"{name} is not fetched, as allow_urls is off: pass the picture itself, or switch it on")
    return PictureFetcher(policy).fetch(address)


def _read_file(path: str | os.PathLike, policy: PicturePolicy, name: str) -> bytes:
    if not policy.allow_local_files:
        raise InputError(f"{name} is not opened, as allow_local_files is off: pass the picture itself, or switch it on")
    if not os.path.isfile(path):  # devices and pipes have no end
        raise InputError(f"there is no file {name}: check the path; bare base64 goes through decode_base64")
    try:
        with open(path, "rb") as file:
            return policy.read(file, name)
    except OSError as error:
        raise InputError(f"{name} cannot be read ({error.strerror}): check the file's rights") from error
