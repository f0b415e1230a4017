"""Numbers of heads and exit layers: the one pass for all of them says what a reranker with those heads would."""

from typing import Any

import pytest


@pytest.fixture(scope="module")
def lists() -> list[Any]:
    """Three questions with ten passages each, as far as their first words."""
    from dataclasses import replace

    from qr_integrations.bundled import read_detection_lists

    return [
        replace(one, documents=tuple(replace(document, text=document.text[:150]) for document in one.documents))
        for one in read_detection_lists()[:3]
    ]


@pytest.fixture(scope="module")
def ranked(qr_mini: Any) -> list[tuple[int, int]]:
    """The heads that ship first, then the others; layers 0 to 3 hold four each."""
    from qr_integrations import HeadSet

    best = HeadSet.resolve("auto", qr_mini).heads
    return [*best, *(head for head in HeadSet.all(qr_mini).heads if head not in best)]


def sweep(*args: Any, **options: Any) -> list[Any]:
    from qr_integrations.evaluation.sweeps import sweep_heads

    return sweep_heads(*args, **options)


def point(top_layer: int, heads: int, mean: float) -> Any:
    from qr_integrations.evaluation.statistics import Estimate
    from qr_integrations.evaluation.sweeps import SweepPoint

    estimate = Estimate(mean, mean, mean)
    return SweepPoint(top_layer, heads, estimate, estimate, seconds=1.0, share=1.0)


def refused(says: str, error: str = "InputError") -> Any:
    from qr_integrations import errors

    return pytest.raises(getattr(errors, error), match=says)


def test_a_point_is_worth_what_a_reranker_with_its_heads_is(
    qr_mini: Any, ranked: list[tuple[int, int]], lists: list[Any]
) -> None:
    from qr_integrations import QRHeadReranker
    from qr_integrations.evaluation.measuring import RETRIEVED, SHUFFLED, quality, run_systems
    from qr_integrations.evaluation.systems import AttentionSystem

    done: list[tuple[int, int]] = []
    points = sweep(
        qr_mini,
        ranked,
        lists,
        counts=(1, 3, 99),
        depths=(0, 2),
        seeds=(1,),
        metric="RR",
        progress=lambda *step: done.append(step),
    )
    assert done == [(1, 3), (2, 3), (3, 3)]
    systems = []
    for one in points:
        heads = [head for head in ranked if head[0] <= one.top_layer][: one.heads]
        assert len(heads) == one.heads and max(layer for layer, _ in heads) == one.top_layer
        reranker = QRHeadReranker(qr_mini, heads=heads, truncation="head")
        systems.append(AttentionSystem(reranker, f"{one.top_layer}-{one.heads}"))
    found = quality(run_systems(systems, lists, seeds=(1,)), lists, ["RR"])
    for one, system in zip(points, systems, strict=True):
        assert one.retrieved.mean == pytest.approx(found[RETRIEVED][system.name]["RR"].mean())
        assert one.shuffled.mean == pytest.approx(found[SHUFFLED][system.name]["RR"].mean())
    assert len({one.shuffled.mean for one in points}) > 2, "all points are alike: this tests nothing"


def test_counts_above_the_number_of_heads_are_all_of_them(
    qr_mini: Any, ranked: list[tuple[int, int]], lists: list[Any]
) -> None:
    points = sweep(qr_mini, ranked, lists[:1], counts=(2, 4, 8, 50, 60), depths=(0,))
    assert [(one.top_layer, one.heads) for one in points] == [(0, 2), (0, 4)]


def test_a_layer_that_adds_no_head_adds_no_point(qr_mini: Any, lists: list[Any]) -> None:
    ranked = [(1, 1), (1, 0), (3, 2), (0, 0), (0, 1)]
    points = sweep(qr_mini, ranked, lists[:1], counts=(1, 3))
    assert [(one.top_layer, one.heads) for one in points] == [(0, 1), (0, 2), (1, 1), (1, 3), (3, 3)]


def test_layers_above_the_last_one_do_not_run(
    qr_mini: Any, ranked: list[tuple[int, int]], lists: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import time

    calls = [0] * 4
    hooks = [
        layer.register_forward_pre_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
        for i, layer in enumerate(qr_mini.decoder.layers)
    ]
    monkeypatch.setattr(time, "perf_counter", lambda: float(sum(calls)))  # a clock that counts layers
    try:
        points = sweep(qr_mini, ranked, lists[:2], counts=(1, 2), depths=(0, 1))
    finally:
        for hook in hooks:
            hook.remove()
    passes = 4  # documents, the task's words, the query's own, the empty query's
    timed, orders = 3, 4  # a warm-up and two lists; two of each list
    assert calls[2] == calls[3] == passes * timed  # all layers run for comparison, and only then
    assert calls[1] == calls[2] + passes * (timed + orders) and calls[0] == calls[1] + passes * timed
    assert {one.top_layer: one.seconds for one in points} == {0: 1.0 * passes, 1: 2.0 * passes}
    assert {one.top_layer: one.share for one in points} == {0: 0.25, 1: 0.5}


def test_what_nothing_beats() -> None:
    from qr_integrations.evaluation.sweeps import _beats

    points = {
        "early and weak": point(0, 1, 0.3),
        "early, weak, with more heads": point(0, 4, 0.3),
        "early and worse": point(0, 2, 0.2),
        "middle": point(2, 8, 0.8),
        "middle with fewer heads": point(2, 1, 0.8),
        "late and no better": point(3, 1, 0.8),
        "late and best": point(3, 16, 0.9),
    }
    best = {name for name, one in points.items() if not any(_beats(other, one) for other in points.values())}
    assert best == {"early and weak", "middle with fewer heads", "late and best"}


def test_the_points_say_whether_they_are_beaten(qr_mini: Any, ranked: list[tuple[int, int]], lists: list[Any]) -> None:
    points = sweep(qr_mini, ranked, lists[:2], counts=(1, 4), depths=(0, 3), metric="RR")
    best = [one for one in points if one.best]
    highest = max(one.shuffled.mean for one in points)
    assert highest in [one.shuffled.mean for one in best]
    by_layer = sorted(best, key=lambda one: one.top_layer)
    assert [one.shuffled.mean for one in by_layer] == sorted({one.shuffled.mean for one in best})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ranked": []}, "no heads to choose from: pass"),
        ({"ranked": [(3, 0)], "depths": (0, 1)}, "no heads to choose from: pass"),
        ({"counts": ()}, "pass at least one of each"),
        ({"counts": (0, 4)}, "counts from 1"),
        ({"seeds": ()}, "pass at least one of each"),
        ({"lists": []}, "no lists to measure on: pass"),
        ({"metric": "nDCG"}, None),
        ({"metric": "foo"}, "'foo' cannot be measured"),
        ({"ranked": [(0, 99)]}, "head"),
    ],
)
def test_what_cannot_be_swept_is_refused(
    qr_mini: Any, ranked: list[tuple[int, int]], lists: list[Any], options: dict[str, Any], says: str | None
) -> None:
    given = {"ranked": ranked[:1], "lists": lists[:1], **options}
    rest = {name: value for name, value in given.items() if name not in ("ranked", "lists")}
    if says is None:
        assert len(sweep(qr_mini, given["ranked"], given["lists"], **rest)) == 1
        return
    with refused(says):
        sweep(qr_mini, given["ranked"], given["lists"], **rest)


def test_what_does_not_fit_into_one_prompt_is_refused(qr_mini: Any, ranked: list[tuple[int, int]]) -> None:
    from qr_integrations import Document, JudgedList

    long = JudgedList("q", tuple(Document("word " * 400 + str(i)) for i in range(150)), {0: 1})
    with refused("documents need .* prompts, but heads are compared within one", "WindowError"):
        sweep(qr_mini, ranked, [long], counts=(1,), depths=(0,))
