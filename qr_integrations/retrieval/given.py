"""What callers pass: documents in one of three forms, and a query."""

from collections.abc import Mapping, Sequence
from typing import Any

from qr_integrations.errors import InputError
from qr_integrations.types import Document

DocumentLike = str | Document | Mapping[str, Any]


def as_documents(documents: Sequence[DocumentLike]) -> list[Document]:
    """What a caller may pass, as `Document`s.

    Raises:
        InputError: names the first entry that is none.
    """
    if isinstance(documents, str | Mapping | Document):
        raise InputError("documents is a single document: pass a list of them")
    return [_as_document(index, document) for index, document in enumerate(documents)]


def _as_document(index: int, given: DocumentLike) -> Document:
    document: Any = given
    if isinstance(given, str):
        document = Document(given)
    elif isinstance(given, Mapping) and "text" in given:
        document = Document(**{name: given[name] for name in ("text", "title", "id", "metadata") if name in given})
    good = isinstance(document, Document) and isinstance(document.text, str) and isinstance(document.title, str | None)
    if not good:
        raise InputError(
            f"document #{index} has no text: pass a string, a Document, or a mapping with 'text' (and 'title')"
        )
    _check_encodes(f"document #{index}", document.text + (document.title or ""))
    return document


def _check_encodes(what: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{what} holds half a character ({text[error.start]!r} at {error.start}): pass it after "
            "text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')"
        ) from error


def check_query(query: str, top_k: int | None) -> None:
    """Something is asked, and something wanted.

    Raises:
        InputError: no query, half a character in it, or no document wanted.
    """
    if not isinstance(query, str) or not query.strip():
        raise InputError(f"the query is empty ({query!r}): pass what is asked as a string")
    _check_encodes("the query", query)
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k must be at least 1, got {top_k}: pass None for all documents")


def check_max_spans(max_spans: int | None) -> None:
    """A number of spans that can be.

    Raises:
        InputError: it is below 1.
    """
    if max_spans is not None and max_spans < 1:
        raise InputError(f"max_spans must be at least 1, got {max_spans}: pass None for all spans")
