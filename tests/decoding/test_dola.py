"""DoLa against a loop over probabilities, written from the paper, and from the authors' code where it differs."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from tests.decoding.tiny import PROMPT, bench, generate, llava, logits, seeing


def dola(*args: Any, **settings: Any) -> Any:
    from qr_integrations.decoding import DoLa

    return DoLa(*args, **settings)


def softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max())
    return powers / powers.sum()


def from_to(p: np.ndarray, q: np.ndarray) -> float:
    """Kullback and Leibler's divergence."""
    return float(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))


def one_position(final: np.ndarray, early: np.ndarray) -> tuple[np.ndarray, int, float]:
    """Section 2 of the paper: logits, index of the premature layer, its divergence."""
    p = softmax(final)
    distances = []
    for layer in early:
        q = softmax(layer)
        middle = (p + q) / 2
        distances.append(from_to(p, middle) / 2 + from_to(q, middle) / 2)
    chosen = int(np.argmax(distances))
    contrast = np.log(p) - np.log(softmax(early[chosen]))
    return np.where(p >= 0.1 * p.max(), contrast, -np.inf), chosen, distances[chosen]


def random_logits() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(2)
    return 2 * torch.randn(3, 4, 25, generator=draw), 2 * torch.randn(5, 3, 4, 25, generator=draw)


def test_the_rule_is_the_papers() -> None:
    final, early = random_logits()
    found = dola().contrast(final, early, (2, 4, 6, 8, 10))
    for row in range(3):
        for position in range(4):
            wanted, chosen, distance = one_position(
                final[row, position].double().numpy(), early[:, row, position].double().numpy()
            )
            np.testing.assert_allclose(found.logits[row, position].numpy(), wanted, atol=1e-4)
            assert found.premature[row, position] == 2 * chosen + 2
            assert found.divergence[row, position].item() == pytest.approx(distance, abs=1e-5)
    assert len(found.premature.unique()) > 1


def test_the_published_divergence_starts_at_the_middle_and_is_one_for_the_batch() -> None:
    final, early = random_logits()
    found = dola(published=True).contrast(final[:, :1], early[:, :, :1], (2, 4, 6, 8, 10))
    sums = np.zeros(5)
    for place in range(5):
        for row in range(3):
            p = softmax(final[row, 0].double().numpy())
            q = softmax(early[place, row, 0].double().numpy())
            sums[place] += (from_to((p + q) / 2, p) + from_to((p + q) / 2, q)) / 2
    assert set(found.premature.flatten().tolist()) == {2 * int(sums.argmax()) + 2}
    assert found.divergence.sum().item() == pytest.approx(sums.max(), abs=1e-4)


def test_only_plausible_tokens_can_be_said() -> None:
    final, early = logits([0.6, 0.3, 0.061, 0.039]), logits([0.6, 0.39, 0.0099, 0.0001])[None]
    found = dola(relative_top=0.1).contrast(final, early, (3,))
    assert found.logits[0, 0].isfinite().tolist() == [True, True, True, False]
    assert found.logits[0, 0, 2].item() == pytest.approx(math.log(0.061 / 0.0099), abs=1e-4)


def test_layers_that_are_equally_far_the_earliest() -> None:
    final, other = logits([0.7, 0.3]), logits([0.3, 0.7])
    assert dola().contrast(final, torch.stack([other, other]), (4, 6)).premature.item() == 4


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("name", ["Llama", "Gemma 3", "Granite", "LLaVA"])
def test_generate_contrasts_what_a_plain_pass_shows(name: str, published: bool) -> None:
    """Read along the path that was said: the embeddings and two layers."""
    backend = llava() if name == "LLaVA" else bench(name)
    inputs = seeing() if name == "LLaVA" else {"input_ids": torch.tensor([PROMPT])}
    rule = dola((0, 1, 2), published=published)
    with rule.on(backend) as record:
        ids = backend.model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)
    start = inputs["input_ids"].shape[1] - 1
    others = {name: value for name, value in inputs.items() if name == "pixel_values"}
    head, norm = backend.model.get_output_embeddings(), backend.decoder.norm
    with torch.no_grad():
        plain = backend.model(ids, output_hidden_states=True, **others)
        read = [head(state if published else norm(state)) for state in plain.hidden_states[:3]]
    early = torch.stack(read)[:, :, start:-1] / getattr(backend.config, "logits_scaling", 1.0)
    found = rule.contrast(plain.logits[:, start:-1], early, (0, 1, 2))
    assert found.logits[0].argmax(-1).tolist() == ids[0, start + 1 :].tolist()
    assert [step.premature[0] for step in record] == found.premature[0].tolist()
    assert [step.num_candidates[0] for step in record] == found.is_plausible[0].sum(-1).tolist()
    assert [step.divergence[0] for step in record] == pytest.approx(found.divergence[0].tolist(), rel=1e-3)


def test_batches_and_beams() -> None:
    backend, prompts = bench("Qwen3"), [PROMPT, [1, 8, 3, 30]]
    with dola("high").on(backend):
        for options in ({}, {"num_beams": 3}):
            together = generate(backend, prompts, **options)
            assert together == [generate(backend, [prompt], **options)[0] for prompt in prompts]


@pytest.mark.parametrize(
    ("depth", "tied", "low", "high"),
    [
        (32, False, range(0, 16, 2), range(16, 32, 2)),
        (32, True, range(2, 16, 2), range(16, 32, 2)),
        (40, False, range(0, 20, 2), range(20, 40, 2)),
        (48, False, range(0, 20, 2), range(28, 48, 2)),
        (80, True, range(2, 20, 2), range(60, 80, 2)),
        (5, True, [2], [2, 4]),
        (2, True, [1], [1]),
        (2, False, [0], [1]),
    ],
)
def test_buckets(depth: int, tied: bool, low: Any, high: Any) -> None:
    assert dola("low").layers_of(depth, tied=tied) == tuple(low)
    assert dola("high").layers_of(depth, tied=tied) == tuple(high)


def test_settings_that_cannot_be() -> None:
    from qr_integrations.errors import InputError

    for settings in ({"relative_top": 0.0}, {"relative_top": 1.5}):
        with pytest.raises(InputError, match="pass a share"):
            dola(**settings)
    with pytest.raises(InputError, match="pass distinct numbers from 0 to 2"), dola((3,)).on(bench("Llama")):
        pass


def test_unknown_layers(unchecked: None) -> None:
    from qr_integrations.errors import InputError

    with pytest.raises(InputError, match="pass 'low', 'high'"):
        dola("middle")
