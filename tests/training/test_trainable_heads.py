"""Heads that can be trained: their scores are the package's, their gradients right, whatever the family."""

import math
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch

from tests.training.tiny import FAMILIES, LAYERS, finetune, made_up, moved, qr, refused, scores, settings, tiny, trainer

# Scores and loss


def summed(reranker: Any, query: str, documents: Any) -> torch.Tensor:
    """What the package computes, each document's tokens summed plainly."""
    from qr_integrations.retrieval.layout import Query

    layout, scores_KT = reranker.scorer.score(Query(query), documents, per_head=True)
    return torch.stack([scores_KT[:, span.slice()].sum() for span in layout.documents])


@pytest.mark.parametrize("cap", [None, 40])
def test_scores_are_those_of_the_package_before_its_filter(qr_mini: Any, lists: list[Any], cap: int | None) -> None:
    from training.trainable_heads import ListwiseScorer

    reranker = qr().QRHeadReranker(qr_mini, keep_prefixes=0)
    scorer = ListwiseScorer(qr_mini, reranker.heads, max_doc_tokens=cap)
    for judged in lists[:2]:
        read = judged.documents
        if cap is not None:
            asked = reranker.query(judged.query, None)
            limits = replace(reranker.limits, truncation="head", max_doc_tokens=cap)
            read = tuple(candidate.read for candidate in reranker.fit(asked, judged.documents, limits)[0])
            assert any(new.text != old.text for new, old in zip(read, judged.documents, strict=True))
        scores, expected = scorer.scores(judged.query, judged.documents), summed(reranker, judged.query, read)
        assert scores.requires_grad and expected.abs().max() > 0.01
        torch.testing.assert_close(scores.detach(), expected, rtol=0, atol=2e-6)


def test_an_adapter_changes_nothing_before_the_first_step() -> None:
    from training.trainable_heads import ListwiseScorer

    heads, judged = ((0, 1), (1, 3)), made_up(1)[0]
    before = ListwiseScorer(tiny(), qr().HeadSet.of(heads)).scores(judged.query, judged.documents)
    run = trainer(tiny(), heads)
    assert torch.equal(run.scorer.scores(judged.query, judged.documents), before)
    assert not torch.allclose(moved(run).scorer.scores(judged.query, judged.documents), before, atol=1e-5)


def test_gold_documents_share_the_target() -> None:
    from training.trainable_heads import listwise_loss

    scores, factor = [0.3, -0.1, 0.2, 0.0], 5.0
    total = sum(math.exp(factor * score) for score in scores)
    expected = -mean(math.log(math.exp(factor * scores[n]) / total) for n in (0, 3))
    assert float(listwise_loss(torch.tensor(scores), [0, 3], torch.tensor(factor))) == pytest.approx(expected)


def test_every_list_comes_once_a_round_in_a_new_order(monkeypatch: pytest.MonkeyPatch) -> None:
    run, seen = trainer(tiny(), ((0, 0),)), []
    scores = run.scorer.scores
    monkeypatch.setattr(run.scorer, "scores", lambda query, given: seen.append((query, *given)) or scores(query, given))
    for number in range(12):
        run.loss(number)
    rounds = [seen[start : start + 4] for start in (0, 4, 8)]
    assert all({query for query, *_ in asked} == {judged.query for judged in run.lists} for asked in rounds)
    assert len({tuple(query for query, *_ in asked) for asked in rounds}) > 1
    same = [given for query, *given in seen if query == run.lists[0].query]
    assert len({tuple(map(id, given)) for given in same}) > 1
    assert all(set(map(id, given)) == set(map(id, run.lists[0].documents)) for given in same)


def test_the_first_temperature_is_the_spread_of_the_scores() -> None:
    run = trainer(tiny(), ((0, 1), (1, 3)))
    run.start()
    spread = mean(float(run.scorer.scores(x.query, x.documents).detach().std()) for x in run.lists)
    assert run.temperature == pytest.approx(spread, rel=1e-5)
    run = trainer(tiny(), ((0, 1),), temperature=0.25)
    run.start()
    assert run.temperature == pytest.approx(0.25)


def test_the_rate_rises_and_falls() -> None:
    shares = [settings(steps=100, warmup=0.2).share_of_rate(step) for step in range(100)]
    assert shares[0] == pytest.approx(1 / 20) and shares[19] == shares[20] == max(shares) == 1.0
    assert shares[:20] == sorted(shares[:20]) and shares[20:] == sorted(shares[20:], reverse=True)
    assert shares[60] == pytest.approx(0.515) and 0.03 < shares[99] < 0.032
    assert settings(steps=1, warmup=0.0).share_of_rate(0) == 1.0


def longest_move(run: Any) -> float:
    """Of any number of the adapter, in one step."""
    before = run.adapter.state()
    run.one_step()
    return max(float((p.detach() - before[name]).abs().max()) for name, p in run.adapter.parameters.items())


def test_a_step_is_as_long_as_the_schedule_says_and_takes_several_lists() -> None:
    run = trainer(tiny(), ((0, 1), (1, 3)), accumulate=3, steps=20, warmup=0.5, rate=1e-2)
    run.start()
    expected = mean(float(run.loss(number).detach()) for number in range(3))
    assert longest_move(run) == pytest.approx(1e-2 / 10, rel=1e-2)  # Adam's first step has the length of the rate
    assert run.losses == [pytest.approx(expected, rel=1e-5)]


def test_gradients_are_clipped() -> None:
    run = trainer(tiny(), ((0, 1), (1, 3)), rate=1e-2, clip=1e-14)  # far below what Adam adds to its denominator
    run.start()
    assert longest_move(run) < 1e-6


# Gradients


def test_gradients_reach_the_adapter_of_the_layers_that_run_and_nothing_else() -> None:
    run = moved(trainer(tiny(), ((0, 1), (1, 3))))
    run.backend.decoder.layers[LAYERS - 1].register_forward_pre_hook(lambda *_: pytest.fail("above the top head"))
    run.loss(0).backward()
    reached = {name for name, p in run.backend.model.named_parameters() if p.grad is not None and p.grad.any()}
    matrices = [f"model.layers.{n}.self_attn.{x}_proj" for n in (0, 1) for x in "qk"]
    assert reached == {f"{matrix}.lora_{x}.default.weight" for matrix in matrices for x in "AB"}
    assert reached == set(run.adapter.parameters)
    assert {name for name, p in run.backend.model.named_parameters() if p.requires_grad} == reached
    assert run.log_factor.grad is not None and run.log_factor.grad.abs() > 1e-6


@pytest.mark.parametrize(
    "place", ["0.self_attn.q_proj.lora_B", "0.self_attn.k_proj.lora_A", "1.self_attn.k_proj.lora_B"]
)
def test_gradients_are_finite_differences(place: str) -> None:
    run = moved(trainer(tiny(), ((0, 1), (1, 3)), temperature=0.02))
    run.start()
    run.loss(0).backward()
    (parameter,) = [p for name, p in run.adapter.parameters.items() if place in name]
    steepest = int(parameter.grad.abs().argmax())
    gradient = float(parameter.grad.flatten()[steepest])

    def at(shift: float) -> float:
        with torch.no_grad():
            parameter.view(-1)[steepest] += shift
            value = float(run.loss(0))
            parameter.view(-1)[steepest] -= shift
        return value

    assert abs(gradient) > 1e-3
    assert (at(5e-3) - at(-5e-3)) / 1e-2 == pytest.approx(gradient, rel=0.02)


# Any family


@pytest.mark.parametrize("family", FAMILIES)
def test_matrices_of_queries_and_keys_are_found_in_any_family(family: str) -> None:
    from training.trainable_heads import query_key_matrices

    backend, expected = tiny(family), FAMILIES[family][2]
    found = query_key_matrices(backend, 1)
    assert {name.split(".")[-1] for name in found} == set(expected) and len(found) == 2 * len(expected)
    assert query_key_matrices(backend, 1, expected[0]) == [name for name in found if name.endswith(expected[0])]
    with refused(f"match one of .*'{expected[0]}'"):
        query_key_matrices(backend, 1, "nothing")


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_ranks_as_the_model_in_memory(family: str, tmp_path: Path) -> None:
    backend, judged, heads = tiny(family), made_up(1)[0], [(0, 1), (1, 3)]
    untrained = scores(qr().QRHeadReranker(backend, heads=heads), judged)
    done = finetune(
        backend, made_up(4), tmp_path / "new", heads=heads, settings=settings(steps=3, rate=1e-2), data="made up"
    )
    assert done.folder == tmp_path / "new" and [p.name for p in tmp_path.iterdir()] == ["new"]
    written = qr().QRHeadReranker(tmp_path / "new")
    assert written.heads.heads == tuple(heads) and "made up" in written.heads.source
    after = scores(qr().QRHeadReranker(backend, heads=heads), judged)
    assert scores(written, judged) == after and after != untrained
    assert not [name for name, _ in written.backend.model.named_parameters() if "lora" in name]


def test_half_precision_is_trained_in_full(tmp_path: Path) -> None:
    backend = tiny()
    backend.model.bfloat16()
    run = trainer(backend, ((0, 1), (1, 3)), rate=1e-2)
    run.start()
    before = run.adapter.state()
    assert run.scorer.scores("rare1", made_up(1)[0].documents).dtype == torch.float32
    run.one_step()
    assert all(p.dtype == torch.float32 for p in run.adapter.parameters.values())
    assert any(not torch.equal(before[name], p) for name, p in run.adapter.parameters.items())
    run.finish(tmp_path)
    assert {p.dtype for p in backend.model.parameters()} == {torch.bfloat16}


# Settings


WRONG = {"steps": 0, "rank": 0, "accumulate": 0, "rate": 0.0, "temperature": -1.0, "clip": math.nan, "warmup": 2.0}


@pytest.mark.parametrize("name", WRONG)
def test_settings_that_make_no_sense_are_refused(name: str) -> None:
    with refused(name):
        settings(**{name: WRONG[name]})


def test_a_loss_that_is_not_finite_ends_the_run() -> None:
    run = trainer(tiny(), ((0, 1),))
    run.start()
    with torch.no_grad():
        next(iter(run.adapter.parameters.values())).fill_(math.nan)
    with refused("lower rate", "ScoreError"):
        run.one_step()
