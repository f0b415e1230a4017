"""What the probe shows is what a plain pass over the answer shows."""

from typing import Any

import numpy as np
import pytest
import torch

from tests.decoding.tiny import PROMPT, bench, llava, seeing


def probe(backend: Any, inputs: Any, **options: Any) -> Any:
    from qr_integrations.decoding import probe_layers

    return probe_layers(backend, inputs, **options)


@pytest.mark.parametrize("name", ["Llama", "Gemma 3", "LLaVA"])
def test_a_plain_pass_shows_the_same(name: str) -> None:
    backend = llava() if name == "LLaVA" else bench(name)
    inputs = seeing() if name == "LLaVA" else {"input_ids": torch.tensor([PROMPT])}
    found = probe(backend, inputs, max_new_tokens=5)
    assert found.layers == (1, 2) and found.num_layers == 3
    said = [int(guess.token.removeprefix("w")) for guess in found.said]
    start, ids = inputs["input_ids"].shape[1] - 1, torch.tensor([[*inputs["input_ids"][0].tolist(), *said]])
    others = {name: value for name, value in inputs.items() if name == "pixel_values"}
    with torch.no_grad():
        plain = backend.model(ids, output_hidden_states=True, **others)
        read = [backend.model.lm_head(backend.decoder.norm(plain.hidden_states[layer])) for layer in (1, 2)]
    own = plain.logits[0, start:-1].softmax(-1)
    assert own.argmax(-1).tolist() == said
    assert [guess.prob for guess in found.said] == pytest.approx(own.amax(-1).tolist(), abs=1e-4)
    probs = torch.stack(read, dim=1)[0, :, start:-1].softmax(-1)  # [J, S, V]
    of_said = probs.gather(-1, torch.tensor(said).expand(2, -1)[..., None])[..., 0].T
    np.testing.assert_allclose(found.probs, of_said.numpy(), atol=1e-4)
    for step, by_layer in enumerate(found.guesses):
        for place, guesses in enumerate(by_layer):
            top = probs[place, step].topk(5)
            assert [guess.token for guess in guesses] == [f"w{token}" for token in top.indices.tolist()]
            assert [guess.prob for guess in guesses] == pytest.approx(top.values.tolist(), abs=1e-4)
            assert found.agrees[step, place] == (top.indices[0] == said[step])
    assert found.mean_prob == pytest.approx(dict(zip((1, 2), of_said.mean(0).tolist(), strict=True)), abs=1e-4)


def made_up(agrees: list[list[bool]], layers: tuple[int, ...] = (2, 5, 7), num_layers: int = 9) -> Any:
    from qr_integrations.decoding.probe import Guess, LayerProbe

    said = tuple(Guess(f"t{step}", 0.5) for step in range(len(agrees)))
    guesses = tuple(tuple((Guess("x", 0.25),) for _ in row) for row in agrees)
    return LayerProbe(layers, num_layers, said, guesses, np.full((len(agrees), len(layers)), 0.125), np.array(agrees))


def test_a_token_settles_where_no_later_layer_disagrees() -> None:
    found = made_up([[True, True, True], [True, False, True], [False, False, False], [True, True, False]])
    assert found.settled_at == (2, 7, 9, 9)
    assert found.agreement == {2: 0.75, 5: 0.5, 7: 0.5}


def test_printed() -> None:
    found = made_up([[True, True, True], [True, False, True], [False, True, True], [True, True, False]])
    lines = str(found).splitlines()
    assert lines[0] == "4 tokens, layers 2 to 7 of 9"
    assert [line.split() for line in lines[3:6]] == [
        ["2", "75%", "0.125", "25%"],
        ["5", "75%", "0.125", "50%"],
        ["7", "75%", "0.125", "75%"],
    ]
    assert lines[-1].split() == ["3", "'t3'", "0.500", "9"]
    assert len({len(line) for line in lines[2:6]}) == len({len(line) for line in lines[7:]}) == 1
    assert found.step(1).splitlines() == ["step 1: 't1' 0.500", *(f"{at:5}  0.125  'x' 0.250" for at in (7, 5, 2))]


def test_a_text_is_taken_as_it_stands(qr_mini: Any) -> None:
    found = probe(qr_mini, "dracula was written by", max_new_tokens=3, layers=(3, 2))
    tokens = qr_mini.tokenizer("dracula was written by", return_tensors="pt")
    out = qr_mini.model.generate(**tokens, max_new_tokens=3, do_sample=False)
    new = out[0, tokens["input_ids"].shape[1] :]
    assert [guess.token for guess in found.said] == [qr_mini.tokenizer.decode([token]) for token in new.tolist()]
    assert found.layers == (2, 3)
    same = probe(qr_mini, tokens, max_new_tokens=3, layers=(2, 3))
    assert same.said == found.said and same.guesses == found.guesses


def test_several_rows_are_refused() -> None:
    from qr_integrations.errors import InputError

    with pytest.raises(InputError, match="pass one"):
        probe(bench("Llama"), {"input_ids": torch.tensor([PROMPT, PROMPT])})
    with pytest.raises(InputError, match="from 1 to 2"):
        probe(bench("Llama"), {"input_ids": torch.tensor([PROMPT])}, layers=(3,))
