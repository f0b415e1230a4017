"""Highlighted text: nothing of a document reaches the page unescaped, and marks stand where the spans are."""

import re
from html import unescape
from typing import Any

TEXT = 'Dracula <script>alert("1")</script> & sons\nwas written by Bram Stoker 🙂.'
MARK = re.compile(r"<mark[^>]*>(.*?)</mark>", re.DOTALL)


def spans_of(text: str, *words: str) -> list[dict[str, Any]]:
    return [
        {"start": text.index(word), "end": text.index(word) + len(word), "text": word, "score": 0.1 * (i + 1)}
        for i, word in enumerate(words)
    ]


def plain(html: str) -> str:
    return unescape(re.sub(r"</?mark[^>]*>", "", html).replace("<br>", "\n"))


def test_marks_stand_where_the_spans_are_and_the_rest_is_escaped() -> None:
    from qr_integrations import highlight_html

    html = highlight_html(TEXT, spans_of(TEXT, "Bram Stoker", "Dracula", "<script>"))
    assert [unescape(marked) for marked in MARK.findall(html)] == ["Dracula", "<script>", "Bram Stoker"]
    assert "<script>" not in html and plain(html) == TEXT


def test_a_larger_part_of_the_score_is_marked_more_strongly() -> None:
    from qr_integrations import highlight_html

    html = highlight_html(TEXT, spans_of(TEXT, "Dracula", "Bram Stoker"))
    weak, strong = (float(opacity) for opacity in re.findall(r"rgba\(255, 193, 7, ([\d.]+)\)", html))
    assert 0 < weak < strong <= 1


def test_without_spans_the_text_is_only_escaped() -> None:
    from qr_integrations import highlight_html

    assert plain(highlight_html(TEXT, [])) == TEXT and "<mark" not in highlight_html(TEXT, [])


def test_a_ranking_shows_itself_in_a_notebook(qr_mini: Any) -> None:
    from qr_integrations import Document, QRHeadReranker

    documents = [Document("Cats sleep.", title="<Cats>"), Document("Dracula was written by Bram Stoker.", id="d")]
    ranking = QRHeadReranker(qr_mini).rank("who wrote dracula & sons", documents, explain=True)
    html = ranking._repr_html_()
    assert "&lt;Cats&gt;" in html and "dracula &amp; sons" in html and "<b>d</b>" in html
    marked = [unescape(text) for text in MARK.findall(html)]
    assert marked and all(any(text in document.text for document in documents) for text in marked)
