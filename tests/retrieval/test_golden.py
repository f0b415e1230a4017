"""The authors' own numbers (tests/golden/qrhead/README.md says which code, which commit, which limits)."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

GOLDEN = Path(__file__).parents[1] / "golden" / "qrhead"
CASES = json.loads((GOLDEN / "cases.json").read_text(encoding="utf-8"))
ICR_CASES = json.loads((GOLDEN / "icr_cases.json").read_text(encoding="utf-8"))
PER_TOKEN, OF_LARGEST, PER_HEAD, MARGIN = 2e-6, 2e-5, 5e-6, 2e-5


@pytest.fixture(scope="module")
def arrays() -> Any:
    return np.load(GOLDEN / "scores.npz")


def backend(case: dict[str, Any]) -> Any:
    from qr_integrations import Backend

    return Backend.load(GOLDEN / case["model_dir"].strip("/"))


def documents(case: dict[str, Any]) -> list[Any]:
    from qr_integrations import Document

    return [Document(d["paragraph_text"], d.get("title"), id=d["idx"]) for d in case["docs"]]


def head_list(case: dict[str, Any]) -> list[tuple[int, int]]:
    named = case["head_set"].split(",") if isinstance(case["head_set"], str) else case["head_set"]
    return [(int(layer), int(head)) for layer, head in (name.split("-") for name in named)]


def ids(case: dict[str, Any]) -> str:
    return str(case["id"])


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_prompt_token_ids_and_spans_are_the_authors(case: dict[str, Any]) -> None:
    from qr_integrations import PromptLayout
    from qr_integrations.retrieval.layout import PromptStyle

    style = PromptStyle(first_occurrence=True)
    layout = PromptLayout.build(backend(case), case["query"], documents(case), style)
    null = PromptLayout.build(backend(case), "N/A", documents(case), style)
    assert layout.text == case["prompt"] and null.text == case["null_prompt"]
    assert list(layout.token_ids) == case["token_ids"] and list(null.token_ids) == case["null_token_ids"]
    assert [layout.query.start, layout.query.stop - 1] == case["query_span"]
    assert [null.query.start, null.query.stop - 1] == case["null_query_span"]
    spans = case["doc_spans"].values() if isinstance(case["doc_spans"], dict) else case["doc_spans"]
    assert [[span.start, span.stop - 1] for span in layout.documents] == list(spans)


def test_recorded_spans_differ_from_searched_ones_only_where_a_text_is_quoted() -> None:
    from qr_integrations import PromptLayout

    for case in CASES:
        spans = case["doc_spans"].values() if isinstance(case["doc_spans"], dict) else case["doc_spans"]
        layout = PromptLayout.build(backend(case), case["query"], documents(case))
        ours = [[span.start, span.stop - 1] for span in layout.documents]
        wrong = [i for i, (a, b) in enumerate(zip(ours, spans, strict=True)) if a != list(b)]
        assert wrong == ([1] if "first_occurrence" in case["id"] else [])
        starts = [span.start for span in layout.documents]
        assert starts == sorted(starts)  # recorded spans never lie inside an earlier document


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_token_scores_before_and_after_calibration(case: dict[str, Any], arrays: Any) -> None:
    from qr_integrations import HeadSet
    from qr_integrations.retrieval.layout import PromptStyle, Query
    from qr_integrations.retrieval.token_scores import TokenScorer

    heads, style = HeadSet.of(head_list(case)), PromptStyle(first_occurrence=True)
    raw = TokenScorer(backend(case), heads, style, calibrated=False, null_instruction=0.0, keep_prefixes=1)
    calibrated = TokenScorer(backend(case), heads, style, calibrated=True, null_instruction=0.0, keep_prefixes=1)
    layout, scores = raw.score(Query(case["query"]), documents(case), per_head=True)
    _, difference = calibrated.score(Query(case["query"]), documents(case), per_head=True)
    shared = layout.shared.slice()
    query, null = (arrays[f"{case['id']}/{name}"][:, shared] for name in ("query_scores", "null_scores"))
    np.testing.assert_allclose(scores.numpy(), query, rtol=0, atol=PER_TOKEN)
    np.testing.assert_allclose(difference.numpy(), query - null, rtol=0, atol=2 * PER_TOKEN)


@pytest.mark.parametrize("which", ["selected", "all"])
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_document_scores_and_order(case: dict[str, Any], which: str) -> None:
    from qr_integrations import QRHeadReranker

    heads: Any = "all" if which == "all" else head_list(case)
    expected = case["scores_all_heads" if which == "all" else "scores_selected_heads"]
    ranking = QRHeadReranker(backend(case), heads=heads, first_occurrence=True).rank(case["query"], documents(case))
    limit = OF_LARGEST * max(abs(score) for score in expected.values())
    assert [item.document.id for item in ranking] == sorted(expected, key=lambda name: -expected[name])
    for item in ranking:
        assert item.score == pytest.approx(expected[item.document.id], abs=limit, rel=0)


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_detection_scores_of_every_head(case: dict[str, Any], arrays: Any) -> None:
    from qr_integrations import QRHeadReranker

    expected = arrays[f"{case['id']}/per_head_detection"]  # [N, layers, heads]
    clear = arrays[f"{case['id']}/per_head_threshold_margin"] > MARGIN
    reranker = QRHeadReranker(backend(case), heads="all", first_occurrence=True)
    scores = reranker.score_per_head(case["query"], documents(case)).T.numpy().reshape(expected.shape)
    assert clear.mean() > 0.99
    np.testing.assert_allclose(scores[clear], expected[clear], rtol=0, atol=PER_HEAD)


@pytest.mark.parametrize("case", ICR_CASES, ids=ids)
def test_icr(case: dict[str, Any]) -> None:
    from qr_integrations import Document, ICRReranker, PromptLayout
    from qr_integrations.retrieval.icr import STYLES

    passages = [Document(text) for text in case["passages"]]
    layout = PromptLayout.build(backend(case), case["query"], passages, STYLES[case["retrieval_type"]])
    assert layout.text == case["prompt"] and list(layout.token_ids) == case["token_ids"]
    assert [[span.start, span.stop] for span in layout.documents] == case["doc_spans_end_exclusive"]
    assert [layout.query.start, layout.query.stop - 1] == case["query_rows_inclusive"]
    ranking = ICRReranker(backend(case), retrieval_type=case["retrieval_type"]).rank(case["query"], passages)
    assert ranking.order == case["rerank_order"]
    limit = OF_LARGEST * max(map(abs, case["scores"]))
    for item in ranking:
        assert item.score == pytest.approx(case["scores"][item.index], abs=limit, rel=0)


def test_icr_is_qrhead_with_all_heads() -> None:
    from qr_integrations import ICRReranker, QRHeadReranker

    case = CASES[2]
    stripped = [d for d in documents(case) if d.text == d.text.strip()]
    icr = ICRReranker(backend(case)).rank(case["query"], stripped)
    qrhead = QRHeadReranker(backend(case), heads="all").rank(case["query"], stripped)
    assert icr.order == qrhead.order
    assert [a.score for a in icr] == pytest.approx([b.score for b in qrhead], abs=1e-5)
