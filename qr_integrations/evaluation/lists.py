"""Judged lists from files: one JSON object a line."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qr_integrations.errors import InputError
from qr_integrations.evaluation.reading import identifier, read_lines
from qr_integrations.retrieval.given import as_documents
from qr_integrations.types import Document, JudgedList

_SHAPE = (
    '{"query": "...", "documents": [{"text": "...", "title": "..."}, ...], "gold": [0]}, or with grades '
    '"relevance": {"0": 2} for "gold"'
)


def read_lists(path: str | Path) -> Iterator[JudgedList]:
    """The lists of a file, one after the other, none of them kept.

    A line is ``{"query": ..., "documents": [...], "gold": [...]}``: documents are strings or objects with ``text`` and
    perhaps ``title`` and ``id``; ``gold`` holds the places of the relevant ones, counted from 0, or is one number.
    Grades stand in ``relevance``, by places, in place of ``gold``: ``{"0": 2, "3": 1}``. ``id`` names the question;
    ``question`` is understood for ``query``. Gzip is unpacked.

    Raises:
        InputError: names file and line, and what a line must look like.
    """
    for number, line in read_lines(path, "a JSONL file of lists"):
        yield list_of_line(f"{path}, line {number}", line, number)


def list_of_line(where: str, line: str, number: int, *, judged: bool = True) -> JudgedList:
    """The list in a line that `read_lists` would read.

    Args:
        where: names file and line, for messages.
        line: without its end.
        number: of the line; the question's id where it has none.
        judged: what is relevant must stand there; else it may be left out.

    Raises:
        InputError: says where, and what a line must look like.
    """
    try:
        entry: dict[str, Any] = json.loads(line)
        query = entry.get("query", entry.get("question"))
        if not isinstance(query, str) or not query.strip():
            raise TypeError("no query")
        relevance = _relevance(entry) if judged or not {"gold", "relevance"}.isdisjoint(entry) else {}
        return JudgedList(query, _documents(entry["documents"]), relevance, id=str(entry.get("id", number)))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{where}: no list ({error}): write {_SHAPE}") from error


def _documents(given: Any) -> tuple[Document, ...]:
    if isinstance(given, list):
        given = [_with_text_id(place, document) for place, document in enumerate(given)]
    documents = tuple(replace(document, title=document.title or None) for document in as_documents(given))
    seen: set[str] = set()
    for document in documents:
        if document.id in seen:
            raise ValueError(f"two documents have the id {document.id!r}")
        if document.id is not None:
            seen.add(document.id)
    return documents


def _with_text_id(place: int, document: Any) -> Any:
    """Ids are strings; a file may hold numbers."""
    if isinstance(document, Mapping) and document.get("id") is not None:
        return {**document, "id": identifier(document, "id", f"document #{place}")}
    return document


def _relevance(entry: Mapping[str, Any]) -> dict[int, int]:
    if "relevance" not in entry:
        gold = [entry["gold"]] if isinstance(entry["gold"], int) else list(entry["gold"])
        if not all(type(place) is int for place in gold):
            raise TypeError("`gold` holds something else than numbers")
        return dict.fromkeys(gold, 1)
    if "gold" in entry:
        raise ValueError("both `gold` and `relevance`")
    grades = {int(place): grade for place, grade in entry["relevance"].items()}
    if not all(type(grade) is int for grade in grades.values()):
        raise TypeError("`relevance` holds a grade that is no whole number")
    return {place: grade for place, grade in grades.items() if grade > 0}
