"""What DeCo and DoLa note about every step."""

from typing import Any

import pytest
import torch

from tests.decoding.tiny import PROMPT, bench, generate


def deco(**settings: Any) -> Any:
    from qr_integrations.decoding import DeCo

    return DeCo(layers=(1, 2), **settings)


def test_rows_of_a_batch_stand_side_by_side() -> None:
    backend, prompts = bench("Llama"), [PROMPT, [1, 8, 3, 30]]
    with deco(alpha=2.0).on(backend) as together:
        generate(backend, prompts)
    alone = []
    for prompt in prompts:
        with deco(alpha=2.0).on(backend) as record:
            generate(backend, [prompt])
        alone.append(record)
    assert len(together) == 6
    for step, first, second in zip(together, *alone, strict=True):
        assert step.anchor == first.anchor + second.anchor
        assert step.num_candidates == first.num_candidates + second.num_candidates
        assert step.changed == first.changed + second.changed
        assert step.max_prob == pytest.approx(first.max_prob + second.max_prob, abs=1e-4)


def test_beams_are_rows() -> None:
    backend = bench("Llama")
    with deco().on(backend) as record:
        generate(backend, [PROMPT, [1, 8, 3, 30]], num_beams=3)
    assert len(record) == 6
    assert {len(step.anchor) for step in record} == {len(step.changed) for step in record} == {6}


def test_every_position_of_a_pass_is_a_step() -> None:
    backend = bench("Llama")
    with torch.no_grad(), deco().on(backend) as record:
        backend.model(torch.tensor([PROMPT, PROMPT]))
    assert len(record) == len(PROMPT)
    assert all(step.anchor[0] == step.anchor[1] for step in record)


def test_changed_says_where_greedy_goes_another_way() -> None:
    backend = bench("Qwen3")
    with deco(alpha=3.0).on(backend) as record:
        (tokens,) = generate(backend, max_new_tokens=12)
    with torch.no_grad():
        own = backend.model(torch.tensor([tokens])).logits[0, len(PROMPT) - 1 : -1].argmax(-1).tolist()
    changed = [said != mine for said, mine in zip(tokens[len(PROMPT) :], own, strict=True)]
    assert [step.changed for step in record] == [(here,) for here in changed]
    assert 0 < sum(changed) < 12 and record.share_changed == pytest.approx(sum(changed) / 12)


def test_a_record_belongs_to_its_block_and_can_be_read_meanwhile() -> None:
    backend = bench("Llama")
    with deco().on(backend) as record:
        assert (len(record), record.steps, record.share_changed) == (0, (), 0.0)
        generate(backend, max_new_tokens=2)
        first = record.steps
        generate(backend, max_new_tokens=3)
    assert len(first) == 2 and record.steps[:2] == first and len(record) == 5
    assert record[0] == first[0] and list(record) == list(record.steps)
    with deco().on(backend) as other:
        generate(backend, max_new_tokens=1)
    assert len(other) == 1 and len(record) == 5


def test_steps_are_made_of_python_numbers() -> None:
    import json
    from dataclasses import asdict

    backend = bench("Llama")
    with deco(skip_confident=True, top_p=0.2).on(backend) as record:
        generate(backend)
    steps = [asdict(step) for step in record]
    assert json.loads(json.dumps(steps))[0]["anchor"] == list(record[0].anchor)
    assert repr(record).startswith("DeCoRecord(6 steps, ")
