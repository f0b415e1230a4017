"""The doctor's checks pass on a sound model, fail on a broken reading, and leave the model as it was."""

import math
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from typing import TYPE_CHECKING, Any

import pytest
import torch

from qr_integrations.errors import HeadError, InputError

if TYPE_CHECKING:
    from qr_integrations.backend import Backend


def kernels(backend: "Backend") -> list[str]:
    return [layer.kernel for layer in backend.attention_layers.values()]


def test_all_checks_pass_on_the_bundled_model_and_change_nothing(qr_mini: "Backend") -> None:
    from qr_integrations.backend.selfcheck import run_checks

    before = kernels(qr_mini)
    checks = list(run_checks(qr_mini, num_tokens=320))
    assert len({check.name for check in checks}) == 7
    for check in checks:
        assert check.outcome == "passed", check
        assert check.value is not None and check.limit is not None and check.value <= check.limit, check
    assert kernels(qr_mini) == before
    assert not any(module._forward_pre_hooks for module in qr_mini.model.modules())


def test_a_check_is_frozen(qr_mini: "Backend") -> None:
    from qr_integrations.backend.selfcheck import Check

    with pytest.raises(FrozenInstanceError):
        Check("a", "passed").name = "b"  # type: ignore[misc]


def test_what_the_model_is(qr_mini: "Backend") -> None:
    from qr_integrations.backend.selfcheck import describe

    facts = describe(qr_mini)
    assert facts["architecture"] == "LlamaForCausalLM (llama)"
    assert facts["parameters"] == f"{sum(p.numel() for p in qr_mini.model.parameters()):,}"
    assert facts["dtype"] == "float32" and facts["prompt"] == "the model's chat template"


def wrong_scale(read: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return read(*args, **{**kwargs, "scaling": 0.5 * kwargs["scaling"]})


def next_row(read: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return read(*args, **kwargs).roll(1, dims=2)


@pytest.mark.parametrize("break_it", [wrong_scale, next_row])
def test_a_wrong_reading_fails(
    qr_mini: "Backend", monkeypatch: pytest.MonkeyPatch, break_it: Callable[..., Any]
) -> None:
    from qr_integrations.backend import attention_tap
    from qr_integrations.backend.selfcheck import check_kernel, check_rows

    read = attention_tap.attention_rows
    monkeypatch.setattr(attention_tap, "attention_rows", lambda *a, **k: break_it(read, *a, **k))
    for check in (check_rows(qr_mini), check_kernel(qr_mini)):
        assert check.outcome == "failed", check
        assert check.value is not None and check.limit is not None and check.value > 10 * check.limit


def test_a_pass_that_does_not_stop_fails(qr_mini: "Backend", monkeypatch: pytest.MonkeyPatch) -> None:
    from qr_integrations.backend.selfcheck import check_early_stop

    run = type(qr_mini)._run
    top = max(qr_mini.attention_layers)
    monkeypatch.setattr(type(qr_mini), "_run", lambda *a, **k: run(*a, **{**k, "stop_after": top}))
    assert check_early_stop(qr_mini).outcome == "failed"


def test_a_square_of_all_heads_fails(qr_mini: "Backend", monkeypatch: pytest.MonkeyPatch) -> None:
    from qr_integrations.backend.selfcheck import check_memory

    prefill = type(qr_mini).prefill

    def wasteful(self: Any, token_ids: Any, **kwargs: Any) -> Any:
        torch.zeros(4, len(token_ids), len(token_ids))
        return prefill(self, token_ids, **kwargs)

    monkeypatch.setattr(type(qr_mini), "prefill", wasteful)
    assert check_memory(qr_mini, num_tokens=320).outcome == "failed"


def test_the_memory_check_needs_some_tokens(qr_mini: "Backend") -> None:
    from qr_integrations.backend.selfcheck import check_memory

    with pytest.raises(InputError, match="300"):
        check_memory(qr_mini, num_tokens=8)


def test_the_models_own_kernel_comes_back_after_an_error(qr_mini: "Backend", monkeypatch: pytest.MonkeyPatch) -> None:
    from qr_integrations.backend import selfcheck

    before = kernels(qr_mini)
    seen: list[str] = []

    def fail(*_: Any) -> None:
        seen.extend(kernels(qr_mini))
        raise RuntimeError("no weights today\nand more")

    monkeypatch.setattr(selfcheck, "_own_weights", fail)
    with pytest.raises(RuntimeError, match="no weights"):
        selfcheck.check_rows(qr_mini)
    assert set(seen) == {"eager"} and kernels(qr_mini) == before
    first = next(selfcheck.run_checks(qr_mini))
    assert (first.outcome, first.detail) == ("failed", "RuntimeError: no weights today")


def test_a_model_without_weights_to_compare_is_skipped(qr_mini: "Backend", monkeypatch: pytest.MonkeyPatch) -> None:
    from qr_integrations.backend import selfcheck

    monkeypatch.setattr(selfcheck, "_own_weights", lambda *_: None)
    assert selfcheck.check_rows(qr_mini).outcome == selfcheck.check_kernel(qr_mini).outcome == "skipped"


def test_nan_fails(qr_mini: "Backend") -> None:
    from qr_integrations.backend.selfcheck import _judged

    assert _judged("a", math.nan, qr_mini, "").outcome == "failed"


def test_half_precision_is_held_to_its_own_limits(qr_mini: "Backend") -> None:
    import copy

    from qr_integrations.backend import Backend
    from qr_integrations.backend.selfcheck import run_checks

    half = Backend(copy.deepcopy(qr_mini.model).to(torch.bfloat16), qr_mini.tokenizer, name="half")
    for check in run_checks(half, num_tokens=320):
        assert check.outcome == "passed", check


def test_the_official_example_is_for_one_model(qr_mini: "Backend", monkeypatch: pytest.MonkeyPatch) -> None:
    from qr_integrations.retrieval import selfcheck

    skipped = selfcheck.check_official_example(qr_mini)
    assert skipped.outcome == "skipped" and "not for qr-mini" in skipped.detail
    names = {
        "/models/Llama-3.1-8B-Instruct": False,
        "meta-llama/Llama-3.1-8B-Instruct": False,
        "meta-llama/Llama-3.2-3B-Instruct": True,
        "meta-llama/Llama-3.2-1B-Instruct": True,  # nothing published on LME
    }
    for name, skips in names.items():
        monkeypatch.setattr(qr_mini, "name", name)
        if skips:
            assert selfcheck.check_official_example(qr_mini).outcome == "skipped"
        else:  # it is tried: this small model lacks those heads
            with pytest.raises(HeadError, match="has no head"):
                selfcheck.check_official_example(qr_mini)


@pytest.mark.parametrize(("scores", "outcome"), [((0.64, 1.15), "passed"), ((1.17, 0.63), "failed")])
def test_the_official_example_compares_scores(
    qr_mini: "Backend", monkeypatch: pytest.MonkeyPatch, scores: tuple[float, float], outcome: str
) -> None:
    from qr_integrations.retrieval import selfcheck
    from qr_integrations.types import Ranking, ScoredDocument

    class Scripted:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def rank(self, query: str, documents: Any) -> Ranking:
            items = [ScoredDocument(i, s, documents[i], 20) for i, s in enumerate(scores)]
            return Ranking(query, tuple(sorted(items, key=lambda item: -item.score)))

    monkeypatch.setattr(qr_mini, "name", selfcheck.EXAMPLE_MODEL)
    monkeypatch.setattr(selfcheck, "QRHeadReranker", Scripted)
    assert selfcheck.check_official_example(qr_mini).outcome == outcome


def test_ranking_with_and_without_known_heads(qr_mini: "Backend", monkeypatch: pytest.MonkeyPatch) -> None:
    from qr_integrations.retrieval.selfcheck import check_ranking, known_heads

    known = check_ranking(qr_mini)
    assert known.outcome == "passed" and "(known heads)" in known.detail
    monkeypatch.setattr(qr_mini, "name", "nobody/knows-this")
    unknown = check_ranking(qr_mini)
    assert unknown.outcome == "passed" and "(all heads)" in unknown.detail
    assert known_heads(qr_mini).startswith("none known")
