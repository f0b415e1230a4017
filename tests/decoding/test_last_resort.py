"""When something else forbids every candidate: the model's own next best, never token 0, never NaN."""

from typing import Any

import pytest
import torch

from tests.decoding.tiny import PROMPT, bench, generate

SETTINGS = [{"top_k": 1}, {"top_k": 1, "skip_confident": True}, {"alpha": 50.0, "top_k": 3}]


def correctors() -> list[Any]:
    from qr_integrations.decoding import DeCo, DoLa

    return [*(DeCo(layers=(1, 2), **settings) for settings in SETTINGS), DoLa((1, 2), relative_top=1.0)]


def ranked(backend: Any) -> list[int]:
    """Tokens by the model's own logits after the prompt."""
    with torch.no_grad():
        return backend.model(torch.tensor([PROMPT])).logits[0, -1].argsort(descending=True).tolist()


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("name", ["Llama", "Gemma 2", "Granite", "Command R"])
def test_greedy_says_the_next_best(name: str, which: int) -> None:
    backend = bench(name)
    order = ranked(backend)
    with correctors()[which].on(backend):
        said = generate(backend, max_new_tokens=1, suppress_tokens=order[:5])
    assert said[0][-1] == order[5]


@pytest.mark.parametrize("which", range(4))
def test_sampling_draws_among_the_rest(which: int) -> None:
    backend = bench("Llama")
    order = ranked(backend)
    with correctors()[which].on(backend):
        torch.manual_seed(1)
        drawn = generate(backend, [PROMPT] * 64, do_sample=True, max_new_tokens=1, suppress_tokens=order[:5])
    said = {row[-1] for row in drawn}
    assert len(said) > 1 and not said & set(order[:5])


@pytest.mark.parametrize("which", range(4))
def test_beams_go_on_with_the_next_best(which: int) -> None:
    backend = bench("Llama")
    order = ranked(backend)
    with correctors()[which].on(backend):
        out = backend.model.generate(
            torch.tensor([PROMPT]),
            max_new_tokens=3,
            num_beams=3,
            do_sample=False,
            suppress_tokens=order[:5],
            return_dict_in_generate=True,
            output_scores=True,
            pad_token_id=0,
            eos_token_id=None,
        )
    tokens = out.sequences[0, len(PROMPT) :].tolist()
    assert not set(tokens) & set(order[:5]) and 0 not in tokens
    assert not out.sequences_scores.isnan().any()


def test_an_end_that_comes_too_early() -> None:
    """The only candidate ends the answer, and a minimum length forbids it."""
    backend = bench("Qwen3")
    order = ranked(backend)
    with correctors()[0].on(backend):
        said = generate(backend, eos_token_id=order[0], min_new_tokens=2, max_new_tokens=2)
    assert said[0][len(PROMPT)] == order[1]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("temperature", [0.2, 1.0, 5.0])
def test_nothing_else_is_drawn_while_a_candidate_may_be(settings: dict[str, Any], temperature: float) -> None:
    from qr_integrations.decoding import DeCo

    backend, ids = bench("Llama"), torch.tensor([PROMPT])
    with torch.no_grad():
        with DeCo(layers=(1, 2), **settings, last_resort=False).on(backend):
            published = backend.model(ids).logits
        with DeCo(layers=(1, 2), **settings).on(backend):
            ours = backend.model(ids).logits
    assert published.isneginf().any() and ours.isfinite().all()
    torch.testing.assert_close((ours / temperature).softmax(-1), (published / temperature).softmax(-1))
    assert ((ours / temperature).softmax(-1)[published.isneginf()] == 0).all()


def test_the_order_of_the_others_stays() -> None:
    from qr_integrations.decoding.last_resort import keep_reachable

    final = torch.tensor([[[3.0, 1.0, 2.5, -4.0, 2.4]]])
    corrected = torch.tensor([[[-torch.inf, -1e6, -torch.inf, 5.0, -torch.inf]]])
    found = keep_reachable(corrected, final)[0, 0]
    assert found.argsort(descending=True).tolist() == [3, 1, 0, 2, 4]
