"""Documents as JSON, one a line."""

import json
from collections.abc import Iterable, Iterator, Mapping

from qr_integrations.errors import InputError
from qr_integrations.types import Document, Span


def as_lines(documents: Iterable[Document]) -> Iterator[bytes]:
    """A line for each.

    Raises:
        InputError: metadata or an id that would not come back as it is.
    """
    for number, document in enumerate(documents):
        metadata, body = document.metadata, document.body
        entry = {
            "text": document.text,
            "title": document.title,
            "id": document.id,
            "metadata": dict(metadata) if isinstance(metadata, Mapping) else metadata,
            "body": None if body is None else [body.start, body.stop],
        }
        try:
            line = json.dumps(entry, allow_nan=False)
            same = json.loads(line) == entry
        except (TypeError, ValueError, RecursionError) as error:
            raise _unfit(number, str(error)) from error
        if not same:
            raise _unfit(number, "it would come back changed")
        yield line.encode() + b"\n"


def from_lines(content: bytes) -> Iterator[Document]:
    """The documents again.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: `as_lines` did not write this.
    """
    for line in content.splitlines():
        entry = json.loads(line)
        body = entry.pop("body")
        yield Document(**entry, body=None if body is None else Span(*body))


def _unfit(number: int, why: str) -> InputError:
    return InputError(
        f"the metadata or id of document #{number} cannot be kept as JSON ({why}): pass strings, finite numbers, "
        "booleans, None, lists, and dicts with strings as keys"
    )
