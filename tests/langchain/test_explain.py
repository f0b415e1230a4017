"""`explain=True`: spans are places in `page_content`, in every script, and never inside a word."""

import unicodedata
from itertools import pairwise
from typing import Any

import pytest
from langchain_core.documents import Document

NFD = unicodedata.normalize("NFD", "Émile Zola a écrit « Germinal » à Médan, en été.")
TEXTS = {
    "devanagari": "ड्रैकुला एक उपन्यास है जिसे ब्रैम स्टोकर ने लिखा था। हिन्दी में भी मिलता है।",
    "accents apart": NFD,
    "joined emoji": "👩‍👩‍👧‍👦 Dracula 🧛‍♂️ was written by Bram Stoker 🇮🇪, I ❤️ it!",
    "chinese and japanese": "東京都は日本の首都です。ドラキュラはブラム・ストーカーの小説です。",
    "thai": "แดรกคูลาเป็นนวนิยายที่เขียนโดยบรามสโตกเกอร์",
    "arabic": "كَتَبَ برام ستوكر رواية دراكولا في عام ١٨٩٧.",
    "hangul, letters apart": unicodedata.normalize("NFD", "드라큘라는 브램 스토커가 쓴 소설이다."),
    "white space around": "\n\n   Dracula is a novel.\t\r\n\r\n It was written by Bram Stoker.  \u00a0\n",
    "beyond the base plane": "𝔇𝔯𝔞𝔠𝔲𝔩𝔞 by 𝐁𝐫𝐚𝐦 Stoker, 𠮷野家",
}
QUERY = "who wrote dracula ड्रैकुला ドラキュラ Émile Zola"


@pytest.fixture(scope="module")
def explaining(qr_mini: Any) -> Any:
    """All documents come back with all of their spans."""
    from qr_integrations.langchain import QRRerank

    return QRRerank(backend=qr_mini, top_n=None, explain=True, max_spans=None)


def is_of_a_word(character: str) -> bool:
    return unicodedata.category(character)[0] in "LN"


def unspaced(character: str) -> bool:
    """Of a script that is written without spaces, where any letter may begin a word."""
    return unicodedata.name(character, "").split()[0] in ("CJK", "HIRAGANA", "KATAKANA", "THAI")


def assert_whole(text: str, start: int, end: int) -> None:
    """Neither end of the span cuts a word, parts an accent from its letter or stands inside a joined emoji."""
    assert is_of_a_word(text[start]), "it begins with a letter"
    for place in (start, end):
        before, after = text[place - 1 : place], text[place : place + 1]
        if before and after:
            assert unicodedata.category(after)[0] != "M" and "\u200d" not in (before, after), (before, after)
            cut = is_of_a_word(after) and (is_of_a_word(before) or unicodedata.category(before)[0] == "M")
            assert not cut or unspaced(before) or unspaced(after), (before, after)


@pytest.mark.parametrize("name", TEXTS)
def test_spans_are_places_in_the_text_and_cut_no_word(explaining: Any, name: str) -> None:
    text = TEXTS[name]
    for query in (QUERY, "stoker", text.split()[0]):
        (found,) = explaining.compress_documents([Document(text)], query)
        spans = found.metadata["qr_spans"]
        assert found.page_content == text
        for span in spans:
            assert set(span) == {"start", "end", "text", "score"}
            assert type(span["start"]) is type(span["end"]) is int and type(span["score"]) is float
            assert text[span["start"] : span["end"]] == span["text"] != ""
            assert_whole(text, span["start"], span["end"])
        assert [span["score"] for span in spans] == sorted((span["score"] for span in spans), reverse=True)
        assert all(a["end"] <= b["start"] for a, b in pairwise(sorted(spans, key=lambda span: span["start"])))
        if found.metadata["qr_score"] > 0.05:
            assert spans or query == "👩‍👩‍👧‍👦"  # emoji are no words


def test_the_spans_hold_what_was_asked_for(explaining: Any, queries: list[str], documents: list[Document]) -> None:
    for query, words in zip(queries[:3], ["Cats", "Dracula", "Vienna"], strict=True):
        best = explaining.compress_documents(documents, query)[0]
        assert any(words in span["text"] for span in best.metadata["qr_spans"])


def test_without_explain_there_are_no_spans(reranker: Any, documents: list[Document]) -> None:
    assert all("qr_spans" not in d.metadata for d in reranker.compress_documents(documents, QUERY))


def test_explaining_does_not_change_the_scores(explaining: Any, reranker: Any, documents: list[Document]) -> None:
    plain = [document.metadata for document in reranker.compress_documents(documents, QUERY)]
    told = [dict(document.metadata) for document in explaining.compress_documents(documents, QUERY)]
    assert all(isinstance(metadata.pop("qr_spans"), list) for metadata in told) and told == plain


def test_max_spans_keeps_the_strongest(qr_mini: Any, explaining: Any) -> None:
    from qr_integrations.langchain import QRRerank

    text = (
        "Dracula is a novel.\n\nWho wrote Dracula? Bram Stoker.\n\nStoker wrote it.\n\nDracula was written by Stoker."
    )
    (every,) = explaining.compress_documents([Document(text)], "who wrote dracula")
    assert len(every.metadata["qr_spans"]) > 3  # none goes across an empty line
    for count in (1, 2):
        few = QRRerank(backend=qr_mini, explain=True, max_spans=count)
        (found,) = few.compress_documents([Document(text)], "who wrote dracula")
        assert found.metadata["qr_spans"] == every.metadata["qr_spans"][:count]
    (usual,) = QRRerank(backend=qr_mini, explain=True).compress_documents([Document(text)], "who wrote dracula")
    assert len(usual.metadata["qr_spans"]) == 3
    with pytest.raises(ValueError, match="max_spans"):
        QRRerank(backend=qr_mini, max_spans=0)


def test_every_one_of_equal_documents_has_spans_of_its_own(explaining: Any, texts: list[str]) -> None:
    given = [Document(texts[1], metadata={"n": n}) for n in range(3)]
    found = explaining.compress_documents(given, "who wrote dracula")
    assert sorted(document.metadata["n"] for document in found) == [0, 1, 2]
    for document in found:
        assert document.metadata["qr_spans"]
        assert all(texts[1][span["start"] : span["end"]] == span["text"] for span in document.metadata["qr_spans"])


def test_whoever_comes_back_is_explained_also_where_normalize_changes_the_order(
    qr_mini: Any, explaining: Any, documents: list[Document]
) -> None:
    from qr_integrations.langchain import QRRerank

    query = "who wrote dracula and frankenstein"
    second = explaining.compress_documents(documents, query)[1]
    assert second.metadata["qr_spans"]
    promoting = QRRerank(
        backend=qr_mini, top_n=1, explain=True, max_spans=None, normalize=lambda raw: [0.0, 1.0, 0.0, 0.0]
    )
    (found,) = promoting.compress_documents(documents, query)
    assert found.id == second.id and found.metadata["qr_spans"] == second.metadata["qr_spans"]


def test_spans_of_a_document_read_in_pieces_are_places_in_the_whole(qr_mini: Any, texts: list[str]) -> None:
    from qr_integrations.langchain import QRRerank

    text = "  " + "The Danube flows through Vienna. " * 40 + texts[1] + " Cats sleep most of the day." * 10
    in_pieces = QRRerank(backend=qr_mini, explain=True, truncation="chunk", max_doc_tokens=60)
    found = in_pieces.compress_documents([Document(text), Document(texts[0])], "who wrote dracula")
    best = found[0]
    assert best.page_content == text and any("Dracula" in span["text"] for span in best.metadata["qr_spans"])
    assert all(text[span["start"] : span["end"]] == span["text"] for span in best.metadata["qr_spans"])
