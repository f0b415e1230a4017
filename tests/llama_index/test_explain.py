"""`qr_spans`: characters of the node's own text, whatever was read together with it."""

import json
from itertools import pairwise
from typing import Any

import pytest
import regex
from llama_index.core.schema import MetadataMode, NodeWithScore, TextNode

DRACULA = "who wrote dracula"
METADATA = {"title": "Dracula", "author": "Bram Stoker", "about": "who wrote dracula? Stoker wrote Dracula."}
LETTER = regex.compile(r"[\p{L}\p{N}\p{M}_]")
SPACELESS = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}]")
BODIES = [
    "Dracula was written by Bram Stoker.",
    "  \n\t Dracula was written by Bram Stoker. \n\n ",
    "\u00a0\u2003Dracula\r\nwas written\r\n\r\nby Bram Stoker.\u2028",
    "Dracula. Dracula! Dracula? Who wrote Dracula, wrote Dracula.",
    "Dra\u0301cula\u0308 was wri\u0323tten by Bra\u0303m Sto\u0308ker.",
    "🧛‍♂️ Dracula 🧛🏽 was written 👩‍👩‍👧 by Bram Stoker 🦇.",
    "德古拉是布拉姆·斯托克写的小说。Dracula 東京都は日本の首都",
    "كتب برام ستوكر رواية دراكولا. Dracula",
    "title: Dracula\n\nDracula was written by Bram Stoker.",
    "x",
]


def spans_of(scored: NodeWithScore) -> list[dict[str, Any]]:
    """The spans of a node, after a check of what every span promises."""
    spans: list[dict[str, Any]] = scored.metadata["qr_spans"]
    text = scored.text
    for span in spans:
        start, end = span["start"], span["end"]
        assert set(span) == {"start", "end", "text", "score"} and type(span["score"]) is float
        assert 0 <= start < end <= len(text) and text[start:end] == span["text"]
        for left, right in ((start - 1, start), (end - 1, end)):  # no word is cut
            if left >= 0 and right < len(text) and not SPACELESS.search(text[left : right + 1]):
                assert not (LETTER.match(text[left]) and LETTER.match(text[right])), text[left - 5 : right + 5]
    assert [span["score"] for span in spans] == sorted((span["score"] for span in spans), reverse=True)
    in_order = sorted(spans, key=lambda span: span["start"])
    assert all(a["end"] <= b["start"] for a, b in pairwise(in_order))
    assert json.loads(json.dumps(spans)) == spans
    return spans


def explained(node: TextNode, query: str = DRACULA, **settings: Any) -> list[dict[str, Any]]:
    """The spans of the node, ranked beside another one."""
    from qr_integrations.llama_index import QRRerank

    other = NodeWithScore(node=TextNode(id_="other", text="Cats sleep most of the day."))
    rerank = QRRerank(model="qr-mini", explain=True, **settings)
    found = rerank.postprocess_nodes([other, NodeWithScore(node=node)], query_str=query)
    return spans_of(next(scored for scored in found if scored.node_id == node.node_id))


@pytest.mark.parametrize("metadata", [{}, METADATA], ids=["plain", "with metadata"])
@pytest.mark.parametrize("body", BODIES)
def test_spans_are_characters_of_the_text(body: str, metadata: dict[str, str]) -> None:
    for mode in (MetadataMode.EMBED, MetadataMode.ALL, MetadataMode.NONE):
        spans = explained(TextNode(text=body, metadata=metadata), metadata_mode=mode, max_spans=None)
        assert spans or len(body) == 1


def test_the_words_of_the_answer_are_named() -> None:
    assert explained(TextNode(text="It is said that Dracula is older than we think."))[0]["text"].startswith("Dracula")


def test_spans_are_those_of_the_reranker(qr_mini: Any, texts: Any, plain: Any) -> None:
    from qr_integrations import QRHeadReranker
    from qr_integrations.llama_index import QRRerank

    core = QRHeadReranker(qr_mini).rank(DRACULA, texts, explain=True)
    found = QRRerank(model="qr-mini", explain=True).postprocess_nodes(plain(texts), query_str=DRACULA)
    for scored, item in zip(found, core, strict=True):
        expected = [(span.span.start, span.span.stop, span.text) for span in item.spans]
        assert [(span["start"], span["end"], span["text"]) for span in spans_of(scored)] == expected
        assert [s["score"] for s in spans_of(scored)] == pytest.approx([s.score for s in item.spans], abs=1e-6)


def test_words_of_the_metadata_are_no_spans_and_take_no_place_among_them() -> None:
    node = TextNode(text="A count lives in a castle. Stoker wrote it.", metadata=METADATA)
    alone = explained(node, max_spans=1)
    assert len(alone) == 1 and alone == explained(node, max_spans=None)[:1]


def test_max_spans_are_the_strongest() -> None:
    text = "\n\n".join(["Dracula was written by Stoker.", "Cats sleep.", "Stoker wrote Dracula.", "Dracula."] * 3)
    everything = explained(TextNode(text=text), max_spans=None)
    assert len(everything) > 3
    assert explained(TextNode(text=text)) == everything[:3]
    for number in (1, 2, 99):
        assert explained(TextNode(text=text), max_spans=number) == everything[:number]


@pytest.mark.parametrize("max_spans", [0, -1])
def test_no_spans_at_all_is_said_by_explain(max_spans: int) -> None:
    from qr_integrations.llama_index import QRRerank

    with pytest.raises(ValueError, match="max_spans"):
        QRRerank(model="qr-mini", max_spans=max_spans)


def test_without_explain_there_are_no_spans_not_even_old_ones(nodes: Any) -> None:
    from qr_integrations.llama_index import QRRerank

    plain, explaining = QRRerank(model="qr-mini"), QRRerank(model="qr-mini", explain=True)
    once = explaining.postprocess_nodes(nodes, query_str=DRACULA)
    assert all("qr_spans" in scored.metadata for scored in once)
    assert not any("qr_spans" in s.metadata for s in plain.postprocess_nodes(nodes, query_str=DRACULA))
    again = plain.postprocess_nodes(once, query_str="what do cats do")
    assert not any("qr_spans" in scored.metadata for scored in again)


def test_an_empty_text_has_no_spans() -> None:
    assert explained(TextNode(text="")) == []
    assert explained(TextNode(text=" \n ", metadata=METADATA)) == []


@pytest.mark.parametrize("truncation", ["head", "chunk"])
def test_spans_of_a_long_text_are_its_characters(truncation: str) -> None:
    text = (
        "Cats sleep most of the day. " * 60 + "Dracula was written by Bram Stoker. " + "Rivers flow to the sea. " * 60
    )
    node = TextNode(text=text, metadata={"file_name": "report.txt"})
    spans = explained(node, truncation=truncation, max_doc_tokens=120)
    assert any("Dracula" in span["text"] for span in spans) == (truncation == "chunk")


def test_spans_are_right_in_several_prompts(texts: Any, plain: Any) -> None:
    from qr_integrations.llama_index import QRRerank

    given = plain([f"Number {i}. {text * 4}" for i, text in enumerate(texts * 6)])
    rerank = QRRerank(model="qr-mini", explain=True, max_context_tokens=400, top_n=None)
    found = rerank.postprocess_nodes(given, query_str=DRACULA)
    assert len(found) == 24 and "Dracula" in spans_of(found[0])[0]["text"]
    for scored in found:
        spans_of(scored)


def test_those_that_come_back_are_explained_whatever_normalize_does(nodes: Any) -> None:
    from qr_integrations.llama_index import QRRerank

    settings: dict[str, Any] = {"model": "qr-mini", "explain": True, "max_spans": None}
    found = QRRerank(**settings).postprocess_nodes(nodes, query_str="cats dracula danube frankenstein")
    assert all(spans_of(scored) for scored in found)
    backwards = QRRerank(**settings, top_n=1, normalize=lambda scores: [-score for score in scores])
    last = backwards.postprocess_nodes(nodes, query_str="cats dracula danube frankenstein")[0]
    assert last.node_id == found[-1].node_id and spans_of(last) == spans_of(found[-1])


@pytest.mark.parametrize(
    "template", ["{metadata_str}\n\n{content}", "{content}\n\n{metadata_str}", "<{metadata_str}>\n\n{content}\n\n<end>"]
)
@pytest.mark.parametrize("text", ["Dracula", "   Dracula   ", "Dracula was written by Bram Stoker."])
def test_spans_are_right_in_every_template(template: str, text: str) -> None:
    node = TextNode(text=text, metadata={"title": text, "also": "Dracula"}, text_template=template)
    spans = explained(node, max_spans=None)
    assert any("Dracula" in span["text"] for span in spans)


@pytest.mark.parametrize("template", ["{metadata_str} {content}", "{content} {metadata_str}"])
def test_a_span_that_begins_or_ends_in_the_metadata_is_cut_not_lost(template: str) -> None:
    node = TextNode(text="Dracula", metadata={"title": "Dracula"}, text_template=template, metadata_template="{value}")
    assert [span["text"] for span in explained(node)] == ["Dracula"]


def test_a_template_without_the_text_gives_no_spans() -> None:
    node = TextNode(
        text="Bram Stoker was an Irish author.", metadata={"title": "Dracula novel"}, text_template="{metadata_str}"
    )
    assert explained(node) == []
