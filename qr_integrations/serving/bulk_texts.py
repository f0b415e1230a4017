"""Where the texts of a corpus stand, in a database of SQLite: documents are read when they are wanted."""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from qr_integrations.errors import InputError
from qr_integrations.evaluation.reading import identifier, json_object, text_field
from qr_integrations.types import Document

_SHAPES = {
    "documents": '{"_id": "...", "title": "...", "text": "..."}',
    "queries": '{"_id": "...", "text": "..."}',
}


class TextIndex:
    """Finds documents and queries by their ids.

    Args:
        path: what `write` wrote.
        corpus, queries: the files that it was written for.
    """

    def __init__(self, path: Path, corpus: Path, queries: Path) -> None:
        self._files = {"documents": corpus.open("rb"), "queries": queries.open("rb")}
        self._places = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True)

    def __enter__(self) -> "TextIndex":
        return self

    def __exit__(self, *error: object) -> None:
        self._places.close()
        for handle in self._files.values():
            handle.close()

    @staticmethod
    def write(path: Path, corpus: Path, queries: Path) -> None:
        """Read both files once and note where everything stands; the database is whole or not there.

        Raises:
            InputError: names file and line: no document or query, or an id for the second time.
        """
        writing = path.with_name(f"{path.name}.writing")
        writing.unlink(missing_ok=True)
        with closing(sqlite3.connect(writing)) as places:
            places.executescript("PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA cache_size=-200000;")
            for table, file in (("documents", corpus), ("queries", queries)):
                places.execute(f"CREATE TABLE {table} (id TEXT PRIMARY KEY, byte INTEGER) WITHOUT ROWID")
                for where, name, byte in _entries(file, _SHAPES[table]):
                    try:
                        places.execute(f"INSERT INTO {table} VALUES (?, ?)", (name, byte))
                    except sqlite3.IntegrityError as error:
                        raise InputError(
                            f"{where}: the id {name!r} stands there for the second time: keep one line of it"
                        ) from error
            places.commit()
        os.replace(writing, path)

    def document(self, name: str, where: str) -> Document:
        """The document with this id.

        Raises:
            InputError: there is none, or no text; `where` it was asked for.
        """
        entry = self._entry("documents", name, where)
        title = text_field(entry, "title", where) if entry.get("title") is not None else ""
        return Document(text_field(entry, "text", where), title if title.strip() else None, name)

    def query(self, name: str, where: str) -> str:
        """What the query with this id asks.

        Raises:
            InputError: there is none, or no text; `where` it was asked for.
        """
        text = text_field(self._entry("queries", name, where), "text", where)
        if not text.strip():
            raise InputError(f"{where}: query {name!r} is empty: write what is asked as `text`")
        return text

    def _entry(self, table: str, name: str, where: str) -> dict[str, Any]:
        found = self._places.execute(f"SELECT byte FROM {table} WHERE id = ?", (name,)).fetchone()
        handle = self._files[table]
        if found is None:
            raise InputError(f"{where}: {name!r} is not in {handle.name}: correct one of the files")
        handle.seek(found[0])
        return json_object(where, handle.readline().decode("utf-8-sig"), _SHAPES[table])


def _entries(path: Path, shape: str) -> Iterator[tuple[str, str, int]]:
    """Where each stands in words, its id, and its first byte."""
    byte = 0
    try:
        with path.open("rb") as handle:
            for number, line in enumerate(handle, start=1):
                if line.strip():
                    where = f"{path}, line {number}"
                    yield where, identifier(json_object(where, line.decode("utf-8-sig"), shape), "_id", where), byte
                byte += len(line)
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be read ({error.strerror}): write lines of {shape}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{str(path)!r} is not UTF-8 text ({error.reason}): unpack or convert it") from error
