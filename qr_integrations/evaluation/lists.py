"""Judged lists from files: one JSON object a line."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from qr_integrations.errors import InputError
from qr_integrations.retrieval.reranker import as_documents
from qr_integrations.types import JudgedList

_SHAPE = '{"query": "...", "documents": [{"text": "...", "title": "..."}, ...], "gold": [0]}'


def read_lists(path: str | Path) -> Iterator[JudgedList]:
    """The lists of a file, one after the other, none of them kept.

    A line is ``{"query": ..., "documents": [...], "gold": [...]}``: documents are strings or objects with ``text`` and
    perhaps ``title`` and ``id``; ``gold`` holds the places of the relevant ones, counted from 0, or is one number.
    ``id`` names the question; ``question`` is understood for ``query``.

    Raises:
        InputError: names file and line, and what a line must look like.
    """
    try:
        with Path(path).open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _list(f"{path}, line {number}", line, number)
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be read ({error.strerror}): pass a JSONL file of lists") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{str(path)!r} is not UTF-8 (byte {error.start}): convert it with iconv") from error


def _list(where: str, line: str, number: int) -> JudgedList:
    try:
        entry: dict[str, Any] = json.loads(line)
        query = entry.get("query", entry.get("question"))
        documents = tuple(replace(given, title=given.title or None) for given in as_documents(entry["documents"]))
        gold = [entry["gold"]] if isinstance(entry["gold"], int) else list(entry["gold"])
        if not isinstance(query, str) or not query.strip() or not all(type(place) is int for place in gold):
            raise TypeError("no query, or `gold` holds something else than numbers")
        return JudgedList(query, documents, dict.fromkeys(gold, 1), id=str(entry.get("id", number)))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{where}: no list ({error}): write {_SHAPE}") from error
