"""Equations 2-4 against a plain loop, on numbers drawn to be awkward."""

import math
import statistics

import pytest
import torch


def plain(tokens: list[float]) -> float:
    """One document's score, written out."""
    if len(tokens) < 2:
        return sum(tokens)
    limit = statistics.mean(tokens) - 2 * statistics.stdev(tokens)
    return sum(token for token in tokens if token > limit)


def drawn(heads: int, tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(heads * 1000 + tokens)
    scores = torch.randn(heads, tokens, generator=generator) * 1e-3
    for head in range(heads):
        scores[head, head::17] -= 0.02  # outliers that the null query liked, others in every head
    return scores


def spans() -> list[object]:
    from qr_integrations import Span

    return [Span(0, 1), Span(1, 3), Span(3, 40), Span(38, 60), Span(60, 200)]


def test_both_orders_equal_the_plain_loop() -> None:
    from qr_integrations.retrieval.scoring import score_documents, score_documents_per_head

    scores = drawn(5, 200)
    ranking, detection = score_documents(scores, spans()), score_documents_per_head(scores, spans())
    for n, span in enumerate(spans()):
        summed = scores.double().sum(0)[span.slice()].tolist()  # type: ignore[attr-defined]
        assert ranking[n].item() == pytest.approx(plain(summed), abs=1e-6)
        for k in range(5):
            row = scores[k].double()[span.slice()].tolist()  # type: ignore[attr-defined]
            assert detection[k, n].item() == pytest.approx(plain(row), abs=1e-6)
    both = score_documents(scores, spans(), order="filter_then_sum")
    torch.testing.assert_close(both, detection.sum(0))
    assert not torch.allclose(both, ranking, atol=1e-4)  # the order matters


def test_calibration_cuts_to_the_shorter() -> None:
    from qr_integrations.retrieval.scoring import calibrate

    query, null = drawn(3, 50), drawn(3, 40)
    torch.testing.assert_close(calibrate(query, null), query[:, :40] - null)
    torch.testing.assert_close(calibrate(null, query), null - query[:, :40])


def test_a_constant_document_is_dropped_by_the_strict_limit_and_one_token_stays() -> None:
    from qr_integrations.retrieval.scoring import drop_outliers

    assert drop_outliers(torch.full((1, 5), 0.25)).sum() == 0  # mean - 0 is not above itself, as published
    assert drop_outliers(torch.tensor([[0.25]])).item() == 0.25


def test_all_documents_at_once_equal_one_by_one() -> None:
    from qr_integrations.retrieval.scoring import drop_outliers, score_documents_per_head

    scores = drawn(7, 200)
    plainly = [drop_outliers(scores[:, span.slice()]).sum(-1) for span in spans()]  # type: ignore[attr-defined]
    torch.testing.assert_close(score_documents_per_head(scores, spans()), torch.stack(plainly, -1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_a_number_is_an_error_with_a_cure(bad: float) -> None:
    from qr_integrations.errors import ScoreError
    from qr_integrations.retrieval.scoring import score_documents

    scores = drawn(2, 200)
    scores[1, 45] = bad
    with pytest.raises(ScoreError, match="dtype"):
        score_documents(scores, spans())
