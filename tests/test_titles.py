"""`title_key`: the same in both frameworks, and as `Document.title` in the core."""

from typing import Any

import pytest

QUERY = "who wrote dracula"
PASSAGES = [
    ("Cats", "They sleep most of the day."),
    ("Dracula", "A Gothic novel by the Irish author Bram Stoker."),
    ("", "x"),
]


@pytest.fixture
def expected(qr_mini: Any) -> list[tuple[int, float]]:
    from qr_integrations import Document, QRHeadReranker

    documents = [Document(text, title or None) for title, text in PASSAGES]
    return [(item.index, item.score) for item in QRHeadReranker(qr_mini).rank(QUERY, documents)]


def metadata(title: str, **more: Any) -> dict[str, Any]:
    return {"title": title, **more} if title else more


def test_langchain_reads_titles_from_the_metadata(qr_mini: Any, expected: Any) -> None:
    from langchain_core.documents import Document

    from qr_integrations.langchain import QRRerank, QRRetriever

    documents = [Document(text, metadata=metadata(title, n=i)) for i, (title, text) in enumerate(PASSAGES)]
    rerank = QRRerank(backend=qr_mini, title_key="title", top_n=None, explain=True)
    retriever = QRRetriever.from_documents(documents, backend=qr_mini, title_key="title", k=None)
    for found in (rerank.compress_documents(documents, QUERY), retriever.invoke(QUERY)):
        assert [(d.metadata["n"], d.metadata["relevance_score"]) for d in found] == expected
        assert [d.page_content for d in found] == [PASSAGES[i][1] for i, _ in expected]
    entries = [{"text": text, "title": title or None} for title, text in PASSAGES]
    assert [(e["index"], e["relevance_score"]) for e in rerank.rerank(entries, QUERY)] == expected


def test_llama_index_reads_titles_from_the_metadata_once(qr_mini: Any, expected: Any) -> None:
    from llama_index.core.schema import NodeWithScore, TextNode

    from qr_integrations.llama_index import QRRerank

    nodes = [
        NodeWithScore(node=TextNode(id_=str(i), text=text, metadata=metadata(title)))
        for i, (title, text) in enumerate(PASSAGES)
    ]
    rerank = QRRerank(backend=qr_mini, title_key="title", top_n=None, explain=True)
    found = rerank.postprocess_nodes(nodes, query_str=QUERY)
    assert [(int(n.node_id), n.score) for n in found] == expected
    for scored in found:
        assert {"title": scored.metadata.get("title")} == {"title": PASSAGES[int(scored.node_id)][0] or None}
        for span in scored.metadata["qr_spans"]:
            assert scored.text[span["start"] : span["end"]] == span["text"]


def test_without_it_titles_stay_where_they_are(qr_mini: Any) -> None:
    from langchain_core.documents import Document

    from qr_integrations.langchain import QRRerank

    titled, plain = ([Document(text, metadata=m(t)) for t, text in PASSAGES] for m in (metadata, lambda _: {}))
    rerank = QRRerank(backend=qr_mini, top_n=None)
    assert rerank.rerank(titled, QUERY) == rerank.rerank(plain, QUERY)
