"""Why a document was ranked where it is, as HTML: its spans marked, stronger for a larger part of its score."""

from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

_STRONG, _WEAK = 0.75, 0.2  # opacity of the strongest mark, and of one with no score at all


def highlight_html(text: str, spans: Iterable[Any]) -> str:
    """`text` as HTML with its spans in ``<mark>``; everything else is escaped.

    Args:
        text: what the spans were found in.
        spans: `ScoredDocument.spans`, or the list under ``qr_spans`` in the metadata of a node or document.

    Example:
        >>> from qr_integrations import highlight_html
        >>> highlight_html("a < b", [{"start": 4, "end": 5, "text": "b", "score": 0.1}])
        'a &lt; <mark style="background: rgba(255, 193, 7, 0.75); color: inherit" title="0.100">b</mark>'
    """
    marks = sorted(_mark(span) for span in spans)
    strongest = max((score for _, _, score in marks), default=0.0)
    parts, position = [], 0
    for start, stop, score in marks:
        share = score / strongest if strongest > 0 else 0.0
        opacity = round(_WEAK + (_STRONG - _WEAK) * max(0.0, share), 2)
        style = f"background: rgba(255, 193, 7, {opacity}); color: inherit"
        parts.append(_escaped(text[position:start]))
        parts.append(f'<mark style="{style}" title="{score:.3f}">{_escaped(text[start:stop])}</mark>')
        position = stop
    return "".join([*parts, _escaped(text[position:])])


def ranking_html(query: str, items: Iterable[Any]) -> str:
    """A table of a ranking: rank, score, title and marked text. How notebooks show a `Ranking`."""
    rows = []
    for rank, item in enumerate(items, start=1):
        title = item.document.title or item.document.id
        head = f"<b>{_escaped(str(title))}</b><br>" if title else ""
        body = head + highlight_html(item.document.text, item.spans)
        cells = f'<td>{rank}</td><td>{item.score:.3f}</td><td style="text-align: left">{body}</td>'
        rows.append(f'<tr style="vertical-align: top">{cells}</tr>')
    head = '<tr><th></th><th>score</th><th style="text-align: left">document</th></tr>'
    return f"<table><caption>{_escaped(query)}</caption>{head}{''.join(rows)}</table>"


def _mark(span: Any) -> tuple[int, int, float]:
    if isinstance(span, Mapping):
        return span["start"], span["end"], span["score"]
    return span.span.start, span.span.stop, span.score


def _escaped(text: str) -> str:
    return escape(text).replace("\n", "<br>")
