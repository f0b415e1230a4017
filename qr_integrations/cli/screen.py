"""What the commands share on the screen: consoles, bars, highlighted words. Works in a pipe and a narrow terminal."""

import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from qr_integrations.types import Document, ScoredDocument, ScoredSpan

NARROW = 70  # columns below which tables lose what can be spared
_NAMED, _NAME_LENGTH = 4, 48  # spans in a line of the strongest, and characters of each
_SHADES = (
    (0.6, "bold black on bright_yellow"),
    (0.3, "black on yellow"),
    (0.12, "underline"),
)  # share of the strongest

# a byte-order mark has no width but moves borders; the others turn the direction of writing
_UNSEEN = "\ufeff\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def stdout() -> Console:
    """For results. Characters that the terminal's encoding lacks become question marks."""
    _never_fail_on_a_character()
    return Console(highlight=False, soft_wrap=False)


def stderr() -> Console:
    """For notes and progress."""
    _never_fail_on_a_character()
    return Console(stderr=True, highlight=False)


def write_json(text: str) -> None:
    """One line to standard output, as it is: rich would wrap it."""
    _never_fail_on_a_character()
    sys.stdout.write(text + "\n")


def note(message: str) -> None:
    """One line to standard error."""
    _never_fail_on_a_character()
    sys.stderr.write(f"note: {message}\n")


def _never_fail_on_a_character() -> None:
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


@contextmanager
def counting(what: str, total: int | None) -> Iterator[Callable[[int, int | None], None]]:
    """A bar for people who wait at a terminal; gives the function to call with what is done, and of how many."""
    console = stderr()
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done, of: progress.update(task, completed=done, total=of)


def bar(share: float, width: int, console: Console) -> Text:
    """A bar of `width` columns for a share of 0 to 1; eighths of a column where the terminal can draw them."""
    eighths = round(max(0.0, min(1.0, share)) * width * 8)
    if console.options.ascii_only:
        return Text("#" * round(eighths / 8))
    return Text("█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip(), style="cyan")


def printable(text: str) -> str:
    """`text` without control characters, with which a document could steer the terminal; line ends and tabs stay."""
    return "".join(c for c in text if c in "\n\t" or (unicodedata.category(c) != "Cc" and c not in _UNSEEN))


def one_line(text: str) -> str:
    """`text` in one line."""
    return " ".join(printable(text).split())


def label(document: Document) -> Text:
    """Title, or id where there is none, and how the text begins; the table cuts what is too long."""
    name = one_line(document.title or document.id or "")
    start = one_line(document.text[:400])
    return Text.assemble((name, "bold"), "  " if name else "", (start, "dim" if name else ""))


def highlighted(text: str, spans: Sequence[ScoredSpan]) -> Text:
    """`text` with the spans it was ranked by marked, stronger for a larger part of the score."""
    strongest = max((span.score for span in spans), default=0.0)
    result, position = Text(), 0
    for span in sorted(spans, key=lambda span: span.span):
        result.append(_spaced(text[position : span.span.start]))
        result.append(_spaced(span.text), style=_shade(span.score / strongest) if strongest > 0 else "")
        position = span.span.stop
    return result.append(_spaced(text[position:]))


def _shade(share: float) -> str:
    return next((style for limit, style in _SHADES if share >= limit), "")


def _spaced(text: str) -> str:
    return printable(text.replace("\r", ""))


def most_attended(item: ScoredDocument) -> str:
    """The strongest spans of a document, each with its percentage of the document's score."""
    whole = max(item.score, sum(span.score for span in item.spans))  # tokens below zero lower the score
    named = [(_shortened(one_line(span.text)), span.score / whole if whole > 0 else 0.0) for span in item.spans]
    return ", ".join(f"{name} {share:.0%}" for name, share in named[:_NAMED] if share >= 0.005)


def _shortened(text: str) -> str:
    return text if len(text) <= _NAME_LENGTH else f"{text[: _NAME_LENGTH - 4].rsplit(' ', 1)[0]} ..."
