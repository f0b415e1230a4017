"""On several families, one of which sees pictures: the hooks, the skip, and the record against a plain loop."""

from typing import Any

import pytest
import torch

from tests.decoding.tiny import PROMPT, bench, generate, llava, seeing

FAMILIES = ["Llama", "Qwen3", "Gemma 2", "Gemma 3", "Granite", "Command R"]
STEPS = 8


def named(name: str) -> Any:
    return llava() if name == "LLaVA" else bench(name)


def inputs_of(name: str) -> dict[str, torch.Tensor]:
    ids = torch.tensor([PROMPT])
    return seeing() if name == "LLaVA" else {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def plain_greedy(backend: Any, inputs: dict[str, torch.Tensor], rule: Any, layers: tuple[int, ...]) -> Any:
    """Token by token without a cache: hidden states of a plain pass, read layer by layer."""
    model, ids, tokens, notes = backend.model, inputs["input_ids"], [], []
    others = {name: value for name, value in inputs.items() if name == "pixel_values"}
    head, norm = model.get_output_embeddings(), backend.decoder.norm
    cap = getattr(backend.config, "final_logit_softcapping", None)
    scale = getattr(backend.config, "logit_scale", None) or 1 / getattr(backend.config, "logits_scaling", 1.0)
    for _ in range(STEPS):
        with torch.no_grad():
            out = model(ids, output_hidden_states=True, **others)
            read = [head(norm(out.hidden_states[layer][:, -1:])) for layer in layers]
        early = torch.stack([torch.tanh(x / cap) * cap if cap else x * scale for x in read])
        found = rule.correct(out.logits[:, -1:], early, layers)
        tokens.append(int(found.logits.argmax()))
        notes.append((int(found.anchor), float(found.max_prob), int(found.is_candidate.sum())))
        ids = torch.cat([ids, torch.tensor([[tokens[-1]]])], dim=1)
    return tokens, notes


@pytest.mark.parametrize("name", [*FAMILIES, "LLaVA"])
def test_generate_says_what_a_plain_loop_says(name: str) -> None:
    from qr_integrations.decoding import DeCo

    backend, inputs, layers = named(name), inputs_of(name), (1, 2)
    rule = DeCo(alpha=1.5, layers=layers)
    tokens, notes = plain_greedy(backend, inputs, rule, layers)
    with rule.on(backend) as record:
        out = backend.model.generate(**inputs, max_new_tokens=STEPS, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert out[0, inputs["input_ids"].shape[1] :].tolist() == tokens
    assert len(record) == STEPS
    for step, (anchor, max_prob, count) in zip(record, notes, strict=True):
        assert (step.anchor, step.num_candidates) == ((anchor,), (count,))
        assert step.max_prob[0] == pytest.approx(max_prob, abs=1e-4)


@pytest.mark.parametrize("how", ["greedy", "batch", "sample", "beams"])
@pytest.mark.parametrize("name", [*FAMILIES, "LLaVA"])
def test_skipping_confident_tokens_says_the_same(name: str, how: str) -> None:
    """`top_p` is such that about half of the tokens have one candidate."""
    from qr_integrations.decoding import DeCo

    backend = named(name)
    options: dict[str, Any] = {
        "greedy": {},
        "batch": {"ids": [PROMPT, [1, 8, 3, 30], [5, 5, 5, 5]]},
        "sample": {"do_sample": True, "temperature": 1.3},
        "beams": {"num_beams": 3},
    }[how] | {"max_new_tokens": STEPS}
    top_p = typical_certainty(backend)
    tokens, records = [], []
    for skip in (False, True):
        with DeCo(alpha=2.0, layers=(1, 2), top_p=top_p, skip_confident=skip).on(backend) as record:
            torch.manual_seed(4)
            tokens.append(generate(backend, **options))
            records.append(record.steps)
    assert tokens[0] == tokens[1]
    assert [step.num_candidates for step in records[0]] == [step.num_candidates for step in records[1]]
    assert [step.changed for step in records[0]] == [step.changed for step in records[1]]


def typical_certainty(backend: Any) -> float:
    with torch.no_grad():
        draw = torch.Generator().manual_seed(0)
        logits = backend.model(torch.randint(3, 90, (4, 12), generator=draw)).logits
    return float(logits.softmax(-1).amax(-1).median())


def test_confident_tokens_read_no_earlier_layer() -> None:
    from qr_integrations.decoding import DeCo

    backend, rows = bench("Llama"), []
    with DeCo(alpha=2.0, layers=(1, 2), top_p=typical_certainty(backend), skip_confident=True).on(backend) as record:
        watch = backend.model.get_output_embeddings().register_forward_pre_hook(
            lambda module, args: rows.append(args[0].shape[1])
        )
        generate(backend, max_new_tokens=20)
        watch.remove()
    skipped = [step.num_candidates == (1,) for step in record][1:]  # the first pass always reads all
    assert 2 < sum(skipped) < 17  # or the test means nothing
    assert [step.anchor == (None,) for step in record][1:] == skipped
    assert [step.max_prob == (None,) for step in record][1:] == skipped
    assert rows == [1, 2, *(count for skip in skipped for count in ([1] if skip else [1, 2]))]


def test_a_doubled_norm_doubles_what_earlier_layers_say() -> None:
    """The final norm stands before the head for earlier layers too, and once only for the last."""
    import copy

    from qr_integrations import Backend
    from qr_integrations.backend.early_logits import early_logits
    from tests.backend.measure import tiny_tokenizer

    seen: list[Any] = []
    for factor in (1.0, 2.0):
        model = copy.deepcopy(bench("Llama").model)
        with torch.no_grad():
            model.model.norm.weight.mul_(factor)
            with early_logits(Backend(model, tiny_tokenizer()), (1, 2), lambda *both: seen.append(both) or both[0]):
                model(torch.tensor([PROMPT]))
    for once, twice in zip(*seen, strict=True):
        torch.testing.assert_close(twice, 2 * once)


def test_pictures_move_what_is_corrected() -> None:
    from qr_integrations.decoding import DeCo

    with torch.no_grad(), DeCo(alpha=2.0, layers=(1, 2)).on(llava()):
        first, second = (llava().model(**seeing(seed)).logits[:, -1] for seed in (0, 1))
    assert not torch.allclose(first, second)
