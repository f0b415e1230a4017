"""DeCo against the authors' own numbers (tests/golden/deco/README.md says which code, which commit, which limits)."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

GOLDEN = Path(__file__).parents[1] / "golden" / "deco"
CASES = json.loads((GOLDEN / "cases.json").read_text(encoding="utf-8"))
OF_LOGITS, OF_PROBABILITIES, OF_BEAMS = 2e-3, 1e-4, 1e-3


@cache
def backend(name: str) -> Any:
    from transformers import AutoModelForCausalLM

    from qr_integrations import Backend
    from tests.backend.measure import tiny_tokenizer

    model = AutoModelForCausalLM.from_pretrained(GOLDEN / name, dtype=torch.float32).eval()
    return Backend(model, tiny_tokenizer(), name=name)  # which nothing reads: prompts are token ids


@pytest.fixture(scope="module", autouse=True)
def arrays() -> Any:
    return np.load(GOLDEN / "arrays.npz")


def deco(case: dict[str, Any]) -> Any:
    from qr_integrations.decoding import DeCo

    return DeCo(alpha=case["alpha"], layers=tuple(case["layers"]), top_p=case["top_p"], top_k=case["top_k"])


def of_kind(*kinds: str) -> Any:
    chosen = [case for case in CASES if case["kind"] in kinds]
    assert chosen
    return pytest.mark.parametrize("case", chosen, ids=lambda case: case["id"])


def generate(case: dict[str, Any], prompts: list[list[int]], **options: Any) -> Any:
    """Of prompts padded at the left, the new tokens."""
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    on = backend(case["model"])
    with deco(case).on(on) as record:
        out = on.model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=case.get("max_new_tokens", 16),
            eos_token_id=case.get("eos_token_id"),
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )
    return out, out.sequences[:, length:].tolist(), record


@of_kind("greedy", "greedy_extra", "greedy_eos")
def test_greedy_tokens(case: dict[str, Any]) -> None:
    _, tokens, record = generate(case, [case["prompt"]], **case.get("processors", {}))
    assert tokens == [case["tokens"]]
    if "anchor_layer" in case:
        assert [step.anchor[0] for step in record] == case["anchor_layer"]
        assert [step.num_candidates[0] for step in record] == case["n_candidates"]
        assert [step.max_prob[0] for step in record] == pytest.approx(case["max_prob"], abs=OF_PROBABILITIES)


@of_kind("greedy", "greedy_extra")
def test_candidates_anchors_and_logits(case: dict[str, Any], arrays: Any) -> None:
    """Read along the authors' path in one pass: the rule looks at each position by itself."""
    from qr_integrations.backend.early_logits import early_logits

    on, rule, found = backend(case["model"]), deco(case), []

    def keep(final: torch.Tensor, early: torch.Tensor) -> torch.Tensor:
        found.append((final, early))
        return final

    with torch.no_grad(), early_logits(on, case["layers"], keep):
        on.model(torch.tensor([case["prompt"] + case["tokens"][:-1]]))
    ((final, early),) = found
    steps = len(case["tokens"])
    final, early = final[:, -steps:], early[:, :, -steps:]
    corrected = rule.correct(final, early, tuple(case["layers"]))
    counts = corrected.is_candidate[0].sum(-1).tolist()
    assert counts == case["n_candidates"] and corrected.anchor[0].tolist() == case["anchor_layer"]
    assert corrected.max_prob[0].tolist() == pytest.approx(case["max_prob"], abs=OF_PROBABILITIES)
    for step, expected in enumerate(case["candidates"]):
        assert corrected.candidates[0, step, : counts[step]].tolist() == expected
    computed = {"final": final[0], "corrected": corrected.logits[0], "early": early[:, 0].movedim(0, 1)}
    for name, values in computed.items():
        if (key := f"{case['id']}/{name}") in arrays:
            expected = torch.from_numpy(arrays[key])
            torch.testing.assert_close(values[: len(expected)], expected, atol=OF_LOGITS, rtol=0)


@of_kind("beam")
def test_beams(case: dict[str, Any]) -> None:
    out, tokens, _ = generate(
        case, case["prompts"], num_beams=5, num_return_sequences=5, length_penalty=case["length_penalty"]
    )
    end = case["eos_token_id"]
    expected = [beam for beams in case["sequences"] for beam in beams]
    usable = [fine for fines in case["usable"] for fine in fines]
    scores = [score for row in case["scores"] for score in row]
    for beam, wanted, fine, score, found in zip(
        tokens, expected, usable, scores, out.sequences_scores.tolist(), strict=True
    ):
        if fine:
            assert until(beam, end) == until(wanted, end)
            assert found == pytest.approx(score, abs=OF_BEAMS)


def until(tokens: list[int], end: int | None) -> list[int]:
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens


@of_kind("sample")
def test_distributions_that_are_drawn_from(case: dict[str, Any], arrays: Any) -> None:
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    on, settings = backend(case["model"]), case["sampling"]
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(settings["temperature"]))])
    if settings["top_k"]:
        warpers.append(TopKLogitsWarper(settings["top_k"]))
    if settings["top_p"] < 1.0:
        warpers.append(TopPLogitsWarper(settings["top_p"]))
    path = torch.tensor([case["prompt"] + case["tokens"]])
    with torch.no_grad(), deco(case).on(on):
        logits = on.model(path[:, :-1]).logits[0, len(case["prompt"]) - 1 :]
    expected = torch.from_numpy(arrays[f"{case['id']}/probs"])
    for step, probs in enumerate(expected):
        seen = path[:, : len(case["prompt"]) + step]
        found = warpers(seen, logits[step : step + 1]).softmax(-1)[0]
        torch.testing.assert_close(found, probs, atol=OF_PROBABILITIES, rtol=0)
