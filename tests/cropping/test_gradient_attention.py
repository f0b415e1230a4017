"""grad-att: attention weighed by how much it moves the answer."""

from typing import Any

import numpy as np
import pytest
import torch

from qr_integrations.backend.picture_reading import find_pictures
from qr_integrations.cropping.asking import SHORT_ANSWER, asked
from qr_integrations.cropping.gradient_attention import GradientAttention
from tests.backend.found_pictures import TALL, WIDE
from tests.backend.seeing import OTHER, QUESTION, backend, eager, equal, fresh, pictures, seen

FAMILIES = ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "gemma3", "internvl", "paligemma"]


def by_hand(name: str, prompt: Any, layer: int) -> list[torch.Tensor]:
    """Autograd through full attention matrices, as the authors do."""
    output = eager(name)(**prompt.inputs, output_attentions=True, use_cache=False)
    attention = output.attentions[layer]
    (gradient,) = torch.autograd.grad(output.logits[0, -1].log_softmax(-1).max(), attention)
    row = (attention * gradient.relu())[0, :, -1].mean(0).detach()
    found = find_pictures(backend(name), prompt)
    return [row[list(one.positions)].view(one.grid.rows, one.grid.columns) for one in found]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_map_is_what_full_gradients_give(name: str) -> None:
    opened = backend(name)
    found = GradientAttention(opened, layers=1).of_conversation(seen(2))
    expected = by_hand(name, opened.lay_out(asked(seen(2))), 1)
    assert max(float(one.max()) for one in expected) > 0
    equal([torch.from_numpy(one.values) for one in found.maps], expected, 1e-4)
    assert [(one.image_size, one.method) for one in found.maps] == [(WIDE, "gradient"), (TALL, "gradient")]
    assert (found.read is None) == (name == "paligemma")


def test_what_speaks_against_the_answer_counts_nothing() -> None:
    values = GradientAttention(backend("llava"), layers=2).importance(pictures(1)[0], QUESTION).values
    assert values.min() >= 0 and values.max() > 0


def test_several_layers_are_averaged() -> None:
    opened, (picture,) = backend("llava"), pictures(1)
    single = [GradientAttention(opened, layers=layer).importance(picture, QUESTION).values for layer in (0, 3)]
    both = GradientAttention(opened, layers=(0, 3)).importance(picture, QUESTION).values
    np.testing.assert_allclose(both, np.mean(single, axis=0), rtol=1e-4, atol=1e-9)


def test_the_question_and_its_instruction_matter() -> None:
    opened, (picture,) = backend("llava"), pictures(1)
    found = [
        GradientAttention(opened, layers=1, instruction=instruction).importance(picture, question).values
        for question, instruction in [(QUESTION, ""), (OTHER, ""), (QUESTION, SHORT_ANSWER)]
    ]
    assert len({one.tobytes() for one in found}) == 3


def test_the_answer_does_not_depend_on_a_layer_without_values() -> None:
    """Where a layer brings nothing home, no attention of it moves the answer, and the map is flat."""
    opened = fresh("llava")
    opened.decoder.layers[2].self_attn.v_proj.weight.zero_()
    found = GradientAttention(opened, layers=2).importance(pictures(1)[0], QUESTION)
    assert not found.values.any() and not found.is_informative
    assert GradientAttention(opened, layers=1).importance(pictures(1)[0], QUESTION).is_informative
