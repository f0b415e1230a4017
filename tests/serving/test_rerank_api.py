"""Rankings over HTTP, read as JSON: what comes back, what is refused, and in whose words."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

LONG = "The harbour was quiet. " * 120 + "Stoker wrote Dracula in 1897."
REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"query": " \n\x1c\x85"}, "the query is empty: pass what is asked"),
    ({"query": None}, "query"),
    ({"query": "who \ud800 wrote"}, "the query holds half a character"),
    ({"instruction": "\udfff"}, "the instruction holds half a character"),
    ({"explain": "yes"}, "explain"),
    ({"max_spans": 0}, "max_spans"),
]
COHERE_REFUSALS: list[tuple[dict[str, Any], str]] = [
    *REFUSALS,
    ({"documents": []}, "`documents` is empty: pass at least one"),
    ({"documents": "Dracula"}, "documents"),
    ({"documents": [3]}, "documents[0]"),
    ({"documents": ["a", "b \ud800"]}, "document #1 holds half a character"),
    ({"documents": ["a", {"text": "\udc00 b"}]}, "'text' of document #1 holds half a character"),
    ({"documents": ["a", {"title": "b"}]}, "document #1 has no text"),
    ({"documents": [{"text": 3}]}, "document #0: 'text' is no string: pass one"),
    ({"documents": [{"text": "a", "year": 1897}], "rank_fields": ["year"]}, "document #0: 'year' is no string"),
    ({"rank_fields": ["text"] * 65}, "rank_fields: List should have at most 64 items"),
    ({"top_n": 0}, "top_n"),
    ({"top_n": -1}, "top_n"),
    ({"top_n": "2"}, "top_n"),
    ({"top_n": 1.5}, "top_n"),
    ({"top_n": True}, "top_n"),
    ({"top_n": float("nan")}, "top_n"),
    ({"top_n": float("inf")}, "top_n"),
    ({"max_tokens_per_doc": 0}, "max_tokens_per_doc"),
    ({"relevant_spans": {"mode": "enabled", "threshold": 1.5}}, "relevant_spans.threshold"),
    ({"relevant_spans": {"mode": "perhaps"}}, "relevant_spans.mode"),
]
TEI_REFUSALS: list[tuple[dict[str, Any], str]] = [
    *REFUSALS,
    ({"texts": []}, "`texts` is empty: pass at least one"),
    ({"texts": [{"text": "an object"}]}, "texts[0]"),
    ({"texts": ["\ud800"]}, "text #0 holds half a character"),
    ({"truncation_direction": "Up"}, "truncation_direction"),
]


@pytest.fixture(scope="module")
def url(serving: Any, qr_mini: Any) -> Iterator[str]:
    from qr_integrations.serving import ServerSettings

    with serving(ServerSettings(model="qr-mini", device="cpu", max_documents=120)) as url:
        yield url


@pytest.fixture(scope="module")
def narrow_url(serving: Any, qr_mini: Any) -> Iterator[str]:
    """A server whose prompts are short."""
    from qr_integrations.serving import ServerSettings

    with serving(ServerSettings(model="qr-mini", device="cpu", max_context_tokens=200)) as url:
        yield url


@pytest.fixture
def ask(url: str) -> Callable[..., Any]:
    """Post to a path; returns the JSON of an answer that must be one."""

    def post(path: str, **body: Any) -> Any:
        response = httpx.post(url + path, json=body, timeout=30)
        assert response.status_code == 200, response.text
        return response.json()

    return post


def send(url: str, body: dict[str, Any]) -> httpx.Response:
    """Post what `httpx` would not write: NaN, and halves of characters."""
    return httpx.post(url, content=json.dumps(body), headers={"Content-Type": "application/json"}, timeout=30)


def shares(ranking: Any) -> list[float]:
    positive = [max(0.0, item.score) for item in ranking]
    return [score / sum(positive) for score in positive]


# ---- Cohere and Jina


@pytest.mark.parametrize(("path", "number"), [("/v1/rerank", 0), ("/v2/rerank", 1)])
def test_ranks_as_the_reranker_does(ask: Callable[..., Any], qr_mini: Any, path: str, number: int) -> None:
    from qr_integrations import QRHeadReranker
    from qr_integrations.bundled import read_sample

    sample = read_sample()[number]
    documents = [{"text": document.text, "title": document.title} for document in sample.documents]
    expected = QRHeadReranker(qr_mini).rank(sample.question, sample.documents)

    told = ask(path, query=sample.question, documents=documents, rank_fields=["title", "text"], model="anything")

    lines = told["results"]
    assert [line["index"] for line in lines] == expected.order
    assert [line["qr_score"] for line in lines] == pytest.approx([item.score for item in expected], abs=1e-5)
    assert [line["relevance_score"] for line in lines] == pytest.approx(shares(expected), abs=1e-4)
    assert [line["qr_rank"] for line in lines] == list(range(1, len(documents) + 1))
    assert not any(line["qr_truncated"] for line in lines)


def test_says_what_both_apis_say_besides(ask: Callable[..., Any], texts: list[str]) -> None:
    told = ask("/v1/rerank", query="who wrote dracula", documents=texts)
    again = ask("/v2/rerank", query="who wrote dracula", documents=texts)

    assert told["model"] == "qr-mini" and told["object"] == "list"
    assert told["meta"] == {"api_version": {"version": "1"}, "billed_units": {"search_units": 1}}
    assert again["meta"]["api_version"] == {"version": "2"}
    assert told["usage"]["total_tokens"] == told["usage"]["prompt_tokens"] > sum(len(text.split()) for text in texts)
    assert told["id"] != again["id"]
    assert "notes" not in told


def test_counts_a_search_unit_for_every_hundred_documents(ask: Callable[..., Any]) -> None:
    told = ask("/v2/rerank", query="which number", documents=[str(number) for number in range(101)])

    assert told["meta"]["billed_units"] == {"search_units": 2}


@pytest.mark.parametrize(
    ("path", "asked", "come"),
    [
        ("/v1/rerank", None, True),
        ("/v1/rerank", False, False),
        ("/v2/rerank", None, False),
        ("/v2/rerank", True, True),
    ],
)
def test_documents_come_back(
    ask: Callable[..., Any], texts: list[str], path: str, asked: bool | None, come: bool
) -> None:
    lines = ask(path, query="who wrote dracula", documents=texts, return_documents=asked)["results"]

    for line in lines:
        assert ("document" in line) == come
        assert not come or line["document"] == {"text": texts[line["index"]]}


def test_keeps_the_best(ask: Callable[..., Any], texts: list[str]) -> None:
    whole = ask("/v1/rerank", query="who wrote dracula", documents=texts)["results"]

    assert ask("/v1/rerank", query="who wrote dracula", documents=texts, top_n=2)["results"] == whole[:2]
    assert ask("/v1/rerank", query="who wrote dracula", documents=texts, top_n=2.0)["results"] == whole[:2]
    assert ask("/v1/rerank", query="who wrote dracula", documents=texts, top_n=2**31 - 1)["results"] == whole


def test_reads_the_fields_that_are_named(ask: Callable[..., Any], qr_mini: Any) -> None:
    from qr_integrations import Document, QRHeadReranker

    objects: list[Any] = [
        {"author": "Stoker", "title": "Dracula", "text": "left out", "body": "A Gothic novel."},
        {"author": None, "title": "Cats", "body": "They sleep.", "year": 1999},
        {"title": "Only a title"},
        "A plain text.",
    ]
    read = [
        Document("Stoker\nA Gothic novel.", title="Dracula"),
        Document("They sleep.", title="Cats"),
        Document("Only a title"),
        Document("A plain text."),
    ]
    expected = QRHeadReranker(qr_mini).rank("who wrote dracula", read)

    told = ask("/v1/rerank", query="who wrote dracula", documents=objects, rank_fields=["author", "title", "body"])

    assert [(line["index"], line["document"]["text"]) for line in told["results"]] == [
        (item.index, item.document.text) for item in expected
    ]
    assert [line["qr_score"] for line in told["results"]] == pytest.approx([item.score for item in expected], abs=1e-5)


def test_a_title_is_read_only_if_it_is_named(ask: Callable[..., Any]) -> None:
    plain = ask("/v1/rerank", query="who wrote dracula", documents=["A novel.", "Cats."])["results"]

    titled = [{"text": "A novel.", "title": "Dracula"}, {"text": "Cats.", "title": "Sleep"}]
    assert ask("/v1/rerank", query="who wrote dracula", documents=titled)["results"] == plain


def test_says_where_the_named_fields_are_missing(ask: Callable[..., Any]) -> None:
    objects = [{"text": "Dracula is a novel.", "titel": "Dracula"}, {"text": "Cats sleep."}]

    told = ask("/v2/rerank", query="who wrote dracula", documents=objects, rank_fields=["titel"], return_documents=True)

    note = "none of the fields ['titel'] in 1 of the documents: their text was read"
    assert told["notes"] == told["meta"]["warnings"] == [note]
    assert {line["index"]: line["document"]["text"] for line in told["results"]} == {0: "Dracula", 1: "Cats sleep."}


def test_few_of_many_fields_are_told_and_each_is_read_once(ask: Callable[..., Any]) -> None:
    objects = [{"text": "Dracula is a novel.", "b": "Dracula"}, {"text": "Cats sleep."}]
    fields = ["a" * 1000, *["b"] * 32, *"cdefg"]

    told = ask("/v2/rerank", query="who", documents=objects, rank_fields=fields, return_documents=True)

    few = f"['{'a' * 60}', 'b', 'c', 'd', 'e'] and 2 others"
    assert told["notes"] == [f"none of the fields {few} in 1 of the documents: their text was read"]
    assert {line["index"]: line["document"]["text"] for line in told["results"]} == {0: "Dracula", 1: "Cats sleep."}


def test_what_the_apis_know_comes_first(ask: Callable[..., Any]) -> None:
    told = ask("/v1/rerank", query="who", documents=["a", "b"])
    lines = ask("/rerank", query="who", texts=["a", "b"], return_text=True)

    assert list(told["results"][0])[:3] == ["index", "relevance_score", "document"]
    assert list(lines[0])[:3] == ["index", "score", "text"]


def test_equal_documents_stay_two_and_may_be_empty(ask: Callable[..., Any]) -> None:
    lines = ask(
        "/v1/rerank", query="who wrote dracula", documents=["Stoker wrote Dracula.", "", "", "Stoker wrote it."]
    )

    assert sorted(line["index"] for line in lines["results"]) == [0, 1, 2, 3]


def test_tells_what_a_document_was_ranked_by(ask: Callable[..., Any], texts: list[str], qr_mini: Any) -> None:
    from qr_integrations import QRHeadReranker

    expected = QRHeadReranker(qr_mini).rank("who wrote dracula", texts, explain=True, max_spans=2)

    told = ask("/v1/rerank", query="who wrote dracula", documents=texts, explain=True, max_spans=2)

    for line, item in zip(told["results"], expected, strict=True):
        assert [(span["start"], span["end"], span["text"]) for span in line["qr_spans"]] == [
            (span.span.start, span.span.stop, span.text) for span in item.spans
        ]
        assert "relevant_spans" not in line
    assert told["results"][0]["qr_spans"]


def test_tells_it_in_coheres_shape(ask: Callable[..., Any], texts: list[str]) -> None:
    body: dict[str, Any] = {"query": "who wrote dracula", "documents": texts}
    own = ask("/v2/rerank", **body, explain=True, max_spans=None)["results"][0]
    strict, all_of_them = {"mode": "enabled", "threshold": 0.99}, {"mode": "enabled", "threshold": 0.0}

    best = ask("/v2/rerank", **body, relevant_spans=all_of_them)["results"][0]
    assert "qr_spans" not in best
    assert [(span["start"], span["end"]) for span in best["relevant_spans"]] == [
        (span["start"], span["end"]) for span in own["qr_spans"]
    ]
    expected = [min(1.0, span["score"] / own["qr_score"]) for span in own["qr_spans"]]
    assert [span["score"] for span in best["relevant_spans"]] == pytest.approx(expected)

    few = ask("/v2/rerank", **body, relevant_spans=strict)["results"]
    assert all(span["score"] >= 0.99 for line in few for span in line.get("relevant_spans", []))
    assert all("relevant_spans" not in line for line in few if line["qr_score"] <= 0)
    assert not any("relevant_spans" in line for line in ask("/v2/rerank", **body)["results"])
    off = ask("/v2/rerank", **body, relevant_spans={"mode": "disabled"})["results"]
    assert not any("relevant_spans" in line for line in off)


def test_both_ways_of_asking_have_limits_of_their_own(ask: Callable[..., Any]) -> None:
    text = "Dracula was written by Bram Stoker. The weather was dull all day, and nothing happened. Stoker wrote it."
    relevant = {"mode": "enabled", "threshold": 0.0, "max_spans": 2}
    for own in (1, None):
        told = ask(
            "/v2/rerank",
            query="who wrote dracula",
            documents=[text, "Cats."],
            explain=True,
            max_spans=own,
            relevant_spans=relevant,
        )
        best = told["results"][0]
        assert len(best["relevant_spans"]) == 2
        assert len(best["qr_spans"]) == 1 if own else len(best["qr_spans"]) >= 2


def test_heeds_an_instruction(ask: Callable[..., Any], texts: list[str], qr_mini: Any) -> None:
    from qr_integrations import QRHeadReranker

    wish = "Only passages about rivers count."
    expected = QRHeadReranker(qr_mini).rank("vienna", texts, instruction=wish)

    lines = ask("/v1/rerank", query="vienna", documents=texts, instruction=wish)["results"]

    assert [line["index"] for line in lines] == expected.order
    assert [line["qr_score"] for line in lines] == pytest.approx([item.score for item in expected], abs=1e-5)


def test_reads_no_more_tokens_of_a_document_than_asked(ask: Callable[..., Any], qr_mini: Any) -> None:
    from qr_integrations import QRHeadReranker

    texts = [LONG, "Cats sleep."]
    expected = QRHeadReranker(qr_mini, truncation="head", max_doc_tokens=20).rank("who wrote dracula", texts)

    lines = ask("/v2/rerank", query="who wrote dracula", documents=texts, max_tokens_per_doc=20)["results"]

    assert {line["index"]: line["qr_truncated"] for line in lines} == {0: True, 1: False}
    assert [line["qr_score"] for line in lines] == pytest.approx([item.score for item in expected], abs=1e-5)
    whole = ask("/v2/rerank", query="who wrote dracula", documents=texts)["results"]
    assert not any(line["qr_truncated"] for line in whole)


def test_some_fields_have_no_effect(ask: Callable[..., Any], texts: list[str]) -> None:
    plain = ask("/v1/rerank", query="who wrote dracula", documents=texts)["results"]

    fields = {"model": "rerank-v3.5", "max_chunks_per_doc": 1, "priority": 3, "unheard_of": [{}]}
    assert ask("/v1/rerank", query="who wrote dracula", documents=texts, **fields)["results"] == plain


# ---- TEI


def test_tei_ranks_as_the_reranker_does(ask: Callable[..., Any], texts: list[str], qr_mini: Any) -> None:
    from qr_integrations import QRHeadReranker

    expected = QRHeadReranker(qr_mini).rank("who wrote dracula", texts)

    lines = ask("/rerank", query="who wrote dracula", texts=texts)

    assert [line["index"] for line in lines] == expected.order
    assert [line["score"] for line in lines] == pytest.approx(shares(expected), abs=1e-4)
    assert not any("text" in line or "qr_spans" in line for line in lines)


def test_tei_tells_more_if_asked(ask: Callable[..., Any], texts: list[str]) -> None:
    lines = ask("/rerank", query="who wrote dracula", texts=texts, return_text=True, raw_scores=True, explain=True)

    assert [line["text"] for line in lines] == [texts[line["index"]] for line in lines]
    assert [line["score"] for line in lines] == [line["qr_score"] for line in lines]
    for span in lines[0]["qr_spans"]:
        assert lines[0]["text"][span["start"] : span["end"]] == span["text"]


@pytest.mark.parametrize(
    ("body", "cut"),
    [
        ({}, True),
        ({"truncate": None}, True),
        ({"truncate": True, "truncation_direction": "right"}, True),
        ({"truncate": False}, False),
        ({"truncation_direction": "Left"}, False),
        ({"truncate": True, "truncation_direction": "left"}, False),
    ],
)
def test_tei_cuts_only_where_it_may(narrow_url: str, body: dict[str, Any], cut: bool) -> None:
    asked = {"query": "who wrote dracula", "texts": [LONG, "Cats sleep."], **body}

    lines = {line["index"]: line for line in httpx.post(f"{narrow_url}/rerank", json=asked, timeout=30).json()}

    assert lines[0]["qr_truncated"] == cut and not lines[1]["qr_truncated"]


# ---- refusals


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank"])
@pytest.mark.parametrize(("change", "words"), COHERE_REFUSALS)
def test_what_cannot_be_used_is_refused(url: str, path: str, change: dict[str, Any], words: str) -> None:
    response = send(url + path, {"query": "who", "documents": ["a", "b"], **change})

    assert response.status_code == 400
    told = response.json()
    assert words in told["message"] and told["detail"] == told["message"]


@pytest.mark.parametrize(("change", "words"), TEI_REFUSALS)
def test_tei_refuses_in_its_own_way(url: str, change: dict[str, Any], words: str) -> None:
    response = send(f"{url}/rerank", {"query": "who", "texts": ["a", "b"], **change})

    assert response.status_code == 422
    told = response.json()
    assert words in told["error"] and told["error_type"] == "Validation"


@pytest.mark.parametrize(
    ("path", "name"), [("/v1/rerank", "documents"), ("/v2/rerank", "documents"), ("/rerank", "texts")]
)
def test_too_many_documents_are_refused(url: str, path: str, name: str) -> None:
    response = httpx.post(url + path, json={"query": "who", name: ["a"] * 121})

    assert response.status_code == 413
    assert "121" in response.text and "120" in response.text


@pytest.mark.parametrize("name", ["documents", "texts", "rank_fields"])
def test_one_mistake_is_enough(name: str) -> None:
    from qr_integrations.serving.rerank_shapes import RerankRequest, TeiRequest

    shape = TeiRequest if name == "texts" else RerankRequest
    with pytest.raises(ValidationError) as caught:
        shape.model_validate({"query": "who", "documents": [], "texts": [], name: [1] * 1000})

    assert caught.value.error_count() <= 2  # neither a text nor an object


@pytest.mark.parametrize("content", [b"", b"nope", b"\xff\xfe", b"[]", b'{"query":"a","documents":' + b"[" * 40_000])
def test_what_is_no_json_object_is_refused(url: str, content: bytes) -> None:
    response = httpx.post(f"{url}/v1/rerank", content=content, headers={"Content-Type": "application/json"})

    assert response.status_code == 400 and response.json()["message"]


# ---- the description


def test_the_description_tells_limits_and_errors(url: str) -> None:
    told = httpx.get(f"{url}/openapi.json").json()
    shapes = told["components"]["schemas"]

    assert shapes["RerankRequest"]["properties"]["documents"]["minItems"] == 1
    assert shapes["TeiRequest"]["properties"]["texts"]["minItems"] == 1
    assert shapes["RerankRequest"]["properties"]["query"]["pattern"].startswith(r"[^\s")
    assert shapes["RerankRequest"]["properties"]["top_n"]["anyOf"][0]["minimum"] == 1
    assert shapes["RelevantSpans"]["properties"]["max_spans"]["anyOf"][0]["minimum"] == 1
    assert shapes["RerankRequest"]["required"] == ["query", "documents"]
    shared = {"200", "401", "413", "429", "500", "503", "504", "default"}
    for path, unusable, error in [
        ("/v1/rerank", "400", "RerankError"),
        ("/v2/rerank", "400", "RerankError"),
        ("/rerank", "422", "TeiError"),
    ]:
        responses = told["paths"][path]["post"]["responses"]
        assert set(responses) == {*shared, unusable}
        for status in responses.keys() - {"200"}:
            assert responses[status]["content"]["application/json"]["schema"]["$ref"].endswith(f"/{error}")
