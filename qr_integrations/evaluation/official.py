"""The files that the authors' scripts read (princeton-pli/QRHead): LongMemEval, CLIPPER, and their lists of BEIR."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qr_integrations.errors import InputError
from qr_integrations.evaluation.reading import identifier, read_text, text_field
from qr_integrations.types import Document, JudgedList

_SHAPE = (
    '[{"idx": "...", "question": "...", "paragraphs": [{"idx": "...", "title": "...", "paragraph_text": "..."}, ...], '
    '"gt_docs": ["..."]}, ...]'
)


def read_official(path: str | Path, *, keep_unanswerable: bool = False) -> list[JudgedList]:
    """The questions of a file, in its order, their paragraphs in its order too.

    The file is one JSON array of ``{"idx", "question", "paragraphs", "gt_docs"}``; a paragraph is ``{"idx",
    "paragraph_text"}``, perhaps with ``title``. As in the authors' scripts, ids count as strings, texts are stripped,
    and an empty title is a line of its own. Unlike there, nothing is cut to a number of words, and their lists of
    BEIR are not turned around. Gzip is unpacked.

    Questions without any gold paragraph (`gt_docs` is empty: LongMemEval asks what cannot be answered) cannot be
    ranked well or badly. They are left out. The authors' evaluation counts them, with recall 0 and "recall-all" 1 at
    every rank; for its averages take `keep_unanswerable`.

    Args:
        path: the file.
        keep_unanswerable: give those questions too, as lists in which nothing is relevant.

    Raises:
        InputError: names the file and the entry, counted from 1; the line where it is no JSON.
    """
    try:
        entries: Any = json.loads(read_text(path, f"a JSON file of {_SHAPE}"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: not JSON ({error.msg}): write {_SHAPE}") from error
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{str(path)!r} holds no array of questions: write {_SHAPE}")
    lists = [_list(f"{path}, entry {number}", entry) for number, entry in enumerate(entries, start=1)]
    kept = lists if keep_unanswerable else [judged for judged in lists if judged.relevance]
    if not kept:
        raise InputError(f"no question in {str(path)!r} has gold paragraphs: name them in `gt_docs`")
    return kept


def _list(where: str, entry: Any) -> JudgedList:
    if not isinstance(entry, dict):
        raise InputError(f"{where}: no JSON object: write {_SHAPE}")
    name, query = identifier(entry, "idx", where), text_field(entry, "question", where)
    if not query.strip():
        raise InputError(f"{where}: the question is empty: write what is asked as `question`")
    documents = [
        _paragraph(f"{where}, paragraph {number}", paragraph)
        for number, paragraph in enumerate(_array(entry, "paragraphs", where), start=1)
    ]
    places: dict[str | None, int] = {}
    for place, document in enumerate(documents):
        if places.setdefault(document.id, place) != place:
            raise InputError(
                f"{where}: paragraph {document.id!r} stands twice: give every paragraph an `idx` of its own"
            )
    gold = [identifier({"gt_docs": given}, "gt_docs", where) for given in _array(entry, "gt_docs", where)]
    if unknown := [given for given in gold if given not in places]:
        raise InputError(f"{where}: `gt_docs` names {unknown[0]!r}: name paragraphs of the entry by their `idx`")
    return JudgedList(query, tuple(documents), {places[given]: 1 for given in gold}, id=name)


def _paragraph(where: str, paragraph: Any) -> Document:
    if not isinstance(paragraph, dict):
        raise InputError(f'{where}: no JSON object: write {{"idx": "...", "paragraph_text": "..."}}')
    title = None if paragraph.get("title") is None else text_field(paragraph, "title", where)
    text = text_field(paragraph, "paragraph_text", where).strip()
    return Document(text, title, identifier(paragraph, "idx", where))


def _array(entry: Mapping[str, Any], key: str, where: str) -> list[Any]:
    value = entry.get(key)
    if not isinstance(value, list):
        found = f"`{key}` is {value!r:.40}" if key in entry else f"no `{key}`"
        raise InputError(f"{where}: {found}: write an array as `{key}`")
    return value
