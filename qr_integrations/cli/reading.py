"""Files as documents: text, Markdown, JSON lines, standard input. Nothing in a file is lost."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from qr_integrations.errors import InputError
from qr_integrations.types import Document

_JSON_LINES = {".jsonl", ".ndjson"}
_MARKDOWN = {".md", ".markdown"}
_HEADING = re.compile(r" {0,3}(#{1,6})[ \t]+(.*?)[ \t]*#*[ \t]*$")
_FENCE = re.compile(r" {0,3}(```+|~~~+)")


def read_documents(files: list[str], *, paragraphs: bool = False) -> list[Document]:
    """The documents of all files in order; `metadata` tells file and, for JSON lines, line.

    Raises:
        InputError: names file, line or byte, and the cure.
    """
    documents = [document for file in files for document in _documents_of(file, paragraphs)]
    if not documents:
        raise InputError(f"no documents in {', '.join(files)}: pass files with text in them")
    return documents


def _documents_of(file: str, paragraphs: bool) -> Iterator[Document]:
    name, text = ("standard input", _decode(file, _stdin())) if file == "-" else (file, _decode(file, _bytes_of(file)))
    suffix = Path(file).suffix.lower()
    if suffix in _JSON_LINES or (file == "-" and text.lstrip().startswith("{")):
        yield from _json_lines(name, text)
    elif paragraphs:
        pieces = _markdown_paragraphs(text) if suffix in _MARKDOWN else [(None, p) for p in _paragraphs(text)]
        for number, (title, piece) in enumerate(pieces, start=1):
            yield Document(piece, title, f"{file}#{number}", {"file": file})
    else:
        yield Document(text, _title(file, text), file, {"file": file})


def _stdin() -> bytes:
    buffer = getattr(sys.stdin, "buffer", None)
    return sys.stdin.read().encode() if buffer is None else buffer.read()


def _bytes_of(file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"no file {file!r}: check its name, or pass - for standard input") from error
    except IsADirectoryError as error:
        raise InputError(f"{file!r} is a folder: pass its files, for instance {file.rstrip('/')}/*.txt") from error
    except OSError as error:
        raise InputError(f"{file!r} cannot be read ({error.strerror}): check who may read it") from error


def _decode(file: str, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        encoding = "UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "LATIN1"
        raise InputError(
            f"{file!r} is not UTF-8 (byte {error.start} is 0x{data[error.start]:02x}): convert it, for instance with "
            f"iconv -f {encoding} -t UTF-8 {file} > utf8.txt"
        ) from error


def _title(file: str, text: str) -> str | None:
    """The first top heading of Markdown, else the file's name."""
    if Path(file).suffix.lower() in _MARKDOWN:
        for line in _markdown_lines(text):
            if line.level == 1:
                return line.heading
    return None if file == "-" else Path(file).name


def _paragraphs(text: str) -> list[str]:
    return [piece.strip("\n") for piece in re.split(r"\r?\n(?:[ \t]*\r?\n)+", text) if piece.strip()]


class _Line(NamedTuple):
    """A line of Markdown; `level` 0 is no heading."""

    text: str
    level: int = 0
    heading: str = ""
    in_code: bool = False


def _markdown_lines(text: str) -> Iterator[_Line]:
    """A `#` or an empty line within a fenced code block is code."""
    fence = ""
    for line in text.split("\n"):
        line = line.rstrip("\r")
        mark, heading = _FENCE.match(line), _HEADING.match(line)
        if fence:
            closes = mark is not None and mark[1].startswith(fence) and set(line.strip()) == {fence[0]}
            yield _Line(line, in_code=True)
            fence = "" if closes else fence
        elif mark:
            fence = mark[1]
            yield _Line(line, in_code=True)
        else:
            yield _Line(line, len(heading[1]), heading[2]) if heading else _Line(line)


def _markdown_paragraphs(text: str) -> Iterator[tuple[str | None, str]]:
    """Paragraphs with the headings they stand under, e.g. ``("Guide > Setup", "...")``; code blocks stay whole.

    A heading with nothing under it is a paragraph without text, so that it can be found.
    """
    path: dict[int, str] = {}
    paragraph: list[str] = []
    bare = False  # the last heading has nothing under it yet
    for line in [*_markdown_lines(text), _Line("", 1)]:  # a last heading ends the last paragraph
        if (line.text.strip() and not line.level) or (line.in_code and paragraph):
            paragraph.append(line.text)
            continue
        if paragraph or (bare and 0 < line.level <= max(path)):
            yield " > ".join(path[level] for level in sorted(path)) or None, "\n".join(paragraph)
            paragraph, bare = [], False
        if line.level:
            path = {level: name for level, name in path.items() if level < line.level} | {line.level: line.heading}
            bare = True


def _json_lines(name: str, text: str) -> Iterator[Document]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _json_document(name, number, line)


def _json_document(name: str, number: int, line: str) -> Document:
    try:
        entry: Any = json.loads(line)
    except ValueError as error:
        raise InputError(f"{name}, line {number}: not JSON ({error}): write one JSON object per line") from error
    if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
        raise InputError(f'{name}, line {number}: no text: write {{"text": "...", "title": "...", "id": "..."}}')
    title, given = entry.get("title"), entry.get("id")
    if not isinstance(title, str | None):
        raise InputError(f"{name}, line {number}: the title is {title!r}: write a string, or leave it out")
    identity = f"{name}#{number}" if given is None else str(given)
    return Document(entry["text"], title, identity, {"file": name, "line": number})
