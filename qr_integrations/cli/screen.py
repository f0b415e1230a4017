"""What the commands share on the screen: consoles, bars, highlighted words. Works in a pipe and a narrow terminal."""

import sys
import unicodedata
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.text import Text

from qr_integrations.types import Document, ScoredSpan

NARROW = 70  # columns below which tables lose what can be spared
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


def highlighted(text: str, words: Sequence[ScoredSpan]) -> Text:
    """`text` with its most attended words marked, stronger for a larger share."""
    strongest = max((word.score for word in words), default=0.0)
    shades = [_shade(word.score / strongest) if strongest > 0 else "" for word in words]
    result, position = Text(), 0
    for word, style in zip(words, shades, strict=True):
        result.append(_spaced(text[position : word.span.start]))
        result.append(printable(word.text), style=style)
        position = word.span.stop
    return result.append(_spaced(text[position:]))


def _shade(share: float) -> str:
    return next((style for limit, style in _SHADES if share >= limit), "")


def _spaced(text: str) -> str:
    return printable(text.replace("\r", ""))


def strongest_words(words: Iterable[ScoredSpan], count: int = 6) -> str:
    """The most attended words with their percentage of all words' attention, equal words added up."""
    totals: dict[str, float] = {}
    names: dict[str, str] = {}
    for word in words:
        key = word.text.casefold()
        names.setdefault(key, printable(word.text))
        totals[key] = totals.get(key, 0.0) + max(0.0, word.score)
    whole = sum(totals.values())
    best = sorted(totals, key=lambda key: -totals[key])[:count]
    return ", ".join(f"{names[key]} {totals[key] / whole:.0%}" for key in best if totals[key] >= 0.005 * whole > 0)
