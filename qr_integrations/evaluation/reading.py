"""Text files, plain or packed with gzip, and the fields of their JSON objects. What is wrong is named by its line."""

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from qr_integrations.errors import InputError

_GZIP = b"\x1f\x8b"  # the first two bytes tell, whatever the file is called


def read_lines(path: str | Path, what: str) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers from 1, without their ends; one at a time.

    Args:
        path: UTF-8 text, plain or packed with gzip.
        what: such a file holds, for messages: "pass {what}".

    Raises:
        InputError: the file is not there, is damaged, or is not UTF-8.
    """
    with _opened(path, what) as handle:
        for number, line in enumerate(handle, start=1):
            text = _decoded(path, number, line).rstrip("\r\n")
            if text.strip():
                yield number, text


def read_text(path: str | Path, what: str) -> str:
    """The whole file; arguments and errors are those of `read_lines`."""
    with _opened(path, what) as handle:
        return "".join(_decoded(path, number, line) for number, line in enumerate(handle, start=1))


def json_object(where: str, line: str, shape: str) -> dict[str, Any]:
    """The JSON object that a line holds.

    Raises:
        InputError: it holds none; says `where`, and the `shape` that a line must have.
    """
    try:
        entry: Any = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: not JSON ({error}): write {shape}") from error
    if not isinstance(entry, dict):
        raise InputError(f"{where}: no JSON object: write {shape}")
    return entry


def identifier(entry: Mapping[str, Any], key: str, where: str) -> str:
    """The id under `key`, as a string: numbers count as they are written.

    Raises:
        InputError: there is none, or it is no string and no number.
    """
    value = entry.get(key)
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value == "":
        found = f"`{key}` is {value!r}" if key in entry else f"no `{key}`"
        raise InputError(f"{where}: {found}: write a string or a number as `{key}`")
    return _encodable(str(value), key, where)


def text_field(entry: Mapping[str, Any], key: str, where: str) -> str:
    """The text under `key`; it may be empty.

    Raises:
        InputError: there is none, or it is no text.
    """
    value = entry.get(key)
    if not isinstance(value, str):
        found = f"`{key}` is {value!r:.40}" if key in entry else f"no `{key}`"
        raise InputError(f"{where}: {found}: write a string as `{key}`")
    return _encodable(value, key, where)


def _encodable(text: str, key: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: `{key}` holds half a character ({text[error.start]!r} at {error.start}): write it whole"
        ) from error
    return text


@contextmanager
def _opened(path: str | Path, what: str) -> Iterator[BufferedIOBase]:
    try:
        with Path(path).open("rb") as handle:
            packed = handle.peek(len(_GZIP))[: len(_GZIP)] == _GZIP
            yield gzip.GzipFile(fileobj=handle) if packed else handle
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{str(path)!r} is damaged ({error}): pack it again with gzip") from error
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be read ({error.strerror}): pass {what}") from error


def _decoded(path: str | Path, number: int, line: bytes) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        encoding = "UTF-16" if number == 1 and line[:2] in (b"\xff\xfe", b"\xfe\xff") else "LATIN1"
        raise InputError(
            f"{path}, line {number}: not UTF-8 (byte {error.start + 1} of the line is 0x{line[error.start]:02x}): "
            f"convert the file, for instance with iconv -f {encoding} -t UTF-8"
        ) from error
