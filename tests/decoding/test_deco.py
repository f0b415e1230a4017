"""DeCo's rule on numbers made by hand, and its hooks against a plain loop."""

import re
import threading
from itertools import pairwise
from typing import Any

import pytest
import torch

from tests.decoding.tiny import PROMPT, bench, generate, logits

FAMILIES = ["Llama", "Qwen3", "Gemma 2", "Granite", "Command R", "GPT-2", "GPT-NeoX"]


def rule(**settings: Any) -> Any:
    from qr_integrations.decoding import DeCo

    return DeCo(**settings)


@pytest.mark.parametrize(
    ("probs", "settings", "count"),
    [
        ([0.95, 0.03, 0.02], {}, 1),
        ([0.5, 0.25, 0.25], {"top_p": 0.5}, 1),  # the sum is reached exactly: no further one
        ([0.5, 0.25, 0.25], {"top_p": 0.51}, 2),  # the one that crosses it is included
        ([0.25] * 4, {"top_p": 2.0, "top_k": 3}, 3),
        ([0.02] * 50, {}, 20),
        ([0.4, 0.3, 0.3], {"top_k": 1}, 1),
    ],
)
def test_candidates(probs: list[float], settings: dict[str, Any], count: int) -> None:
    final = logits(probs)
    found = rule(**settings).correct(final, final[None], (1,))
    assert int(found.is_candidate.sum()) == count
    assert int(found.logits.isfinite().sum()) == count


@pytest.mark.parametrize("top_p", [0.2, 0.7, 0.9, 1.0, 5.0])
@pytest.mark.parametrize("top_k", [1, 3, 20])
def test_candidates_one_after_the_other(top_p: float, top_k: int) -> None:
    """Take the most probable token until the sum of those before it reaches `top_p`."""
    draw = torch.Generator().manual_seed(3)
    final = torch.randn(2, 4, 30, generator=draw, dtype=torch.float32) * torch.tensor([0.1, 1.0, 3.0, 9.0])[:, None]
    found = rule(top_p=top_p, top_k=top_k).correct(final, final[None], (1,))
    for row in range(2):
        for position in range(4):
            probs = final[row, position].softmax(-1)
            expected, total = [], 0.0
            for token in probs.argsort(descending=True).tolist():
                if total < top_p and len(expected) < top_k:
                    expected.append(token)
                    total += float(probs[token])
            chosen = found.candidates[row, position][found.is_candidate[row, position]]
            assert chosen.tolist() == expected
            assert found.logits[row, position].isfinite().nonzero()[:, 0].tolist() == sorted(expected)


def test_the_surest_candidate_gains_with_alpha() -> None:
    """Over every other candidate, never losing; and with a large alpha it is said."""
    draw = torch.Generator().manual_seed(5)
    final, early = torch.randn(1, 6, 40, generator=draw), 3 * torch.randn(4, 1, 6, 40, generator=draw)
    leads = []
    for alpha in (0.0, 0.3, 0.6, 3.0, 1e4):
        found = rule(alpha=alpha, top_p=2.0, top_k=8).correct(final, early, (1, 2, 3, 4))
        assert ((found.max_prob > 0) & (found.max_prob <= 1)).all()
        anchors = early[found.anchor[0] - 1, 0, torch.arange(6)]
        wanted = anchors.gather(-1, found.candidates[0]).argmax(-1, keepdim=True)
        corrected = found.logits[0].gather(-1, found.candidates[0])
        leads.append(corrected.gather(-1, wanted) - corrected)
    assert all((more - less >= -1e-4).all() for less, more in pairwise(leads))
    assert (leads[-1] >= 0).all()


def test_the_anchor_is_surest_of_a_candidate() -> None:
    """Layer 4 is surer, but of a token that the final layer does not consider."""
    final = logits([0.55, 0.35, 0.1])
    early = torch.stack([logits([0.3, 0.6, 0.1]), logits([0.04, 0.06, 0.9])])
    found = rule(alpha=1.0).correct(final, early, (3, 4))
    assert found.anchor.item() == 3 and found.max_prob.item() == pytest.approx(0.6)
    torch.testing.assert_close(found.logits[0, 0, :2], (final + 0.6 * early[0])[0, 0, :2])
    assert found.logits[0, 0, 2] == -torch.inf
    free = rule(alpha=1.0, restrict_to_candidates=False).correct(final, early, (3, 4))
    assert free.logits.isfinite().all()


def test_equally_sure_layers_the_earliest() -> None:
    final = logits([0.5, 0.5])
    early = torch.stack([logits([0.2, 0.8]), logits([0.8, 0.2])])
    assert rule().correct(final, early, (5, 9)).anchor.item() == 5


def test_the_papers_coefficient_looks_at_all_tokens() -> None:
    final, early = logits([0.85, 0.1, 0.05]), logits([0.3, 0.2, 0.5])[None]
    assert rule(top_p=0.5).correct(final, early, (2,)).max_prob.item() == pytest.approx(0.3)
    whole = rule(top_p=0.5, coefficient="vocabulary").correct(final, early, (2,))
    assert whole.max_prob.item() == pytest.approx(0.5)


@pytest.mark.parametrize("name", FAMILIES)
def test_hooks_give_what_a_plain_loop_gives(name: str) -> None:
    """Hidden states of a plain pass, normed and read by the head layer by layer; caps and scales are the model's."""
    backend = bench(name)
    model, layers = backend.model, (1, 2)
    seen: list[Any] = []
    from qr_integrations.backend.early_logits import early_logits

    with torch.no_grad():
        plain = model(torch.tensor([PROMPT]), output_hidden_states=True)
        with early_logits(backend, layers, lambda final, early: seen.append((final, early)) or final):
            again = model(torch.tensor([PROMPT]))
    ((final, early),) = seen
    assert torch.allclose(again.logits, plain.logits, atol=1e-5) and torch.allclose(final, plain.logits, atol=1e-5)
    norm = next(m for n, m in backend.decoder.named_children() if n in ("norm", "ln_f", "final_layer_norm"))
    with torch.no_grad():
        read = [model.get_output_embeddings()(norm(plain.hidden_states[layer])) for layer in layers]
        behind = model.get_output_embeddings()(plain.hidden_states[-1])
    for found, expected in zip(early, read, strict=True):
        if torch.allclose(behind, plain.logits, atol=1e-4):
            assert torch.allclose(found, expected, atol=1e-4)
        else:  # what is done behind the head, told from the model's own logits: a scale, or a soft cap
            cap = getattr(model.config, "final_logit_softcapping", None)
            done = torch.tanh(expected / cap) * cap if cap else expected * (plain.logits / behind).median()
            assert torch.allclose(found, done, atol=1e-3)


def test_alpha_0_is_plain_greedy() -> None:
    backend = bench("Llama")
    plain, beams = generate(backend), generate(backend, num_beams=3)
    with rule(alpha=0.0, layers=(1, 2)).on(backend):
        assert generate(backend) == plain
    with rule(alpha=0.0, layers=(1, 2), restrict_to_candidates=False).on(backend):
        assert generate(backend, num_beams=3) == beams


@pytest.mark.parametrize("name", FAMILIES)
def test_alpha_0_without_restriction_changes_no_bit(name: str) -> None:
    backend, ids = bench(name), torch.tensor([PROMPT])
    with torch.no_grad():
        plain = backend.model(ids).logits
        with rule(alpha=0.0, layers=(1, 2), restrict_to_candidates=False).on(backend):
            found = [backend.model(ids).logits for _ in range(2)]
    assert all(torch.equal(logits, plain) for logits in found)


def test_a_padded_batch_is_its_rows() -> None:
    backend = bench("Llama")
    prompts = [[5, 6], PROMPT]
    padded, mask = torch.tensor([[0, 0, 5, 6], PROMPT]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    with rule(alpha=2.0, layers=(1, 2)).on(backend):
        together = generate(backend, padded.tolist(), attention_mask=mask)
        alone = [generate(backend, [prompt])[0] for prompt in prompts]
    assert [row[4:] for row in together] == [alone[0][2:], alone[1][4:]]


def test_rows_that_have_ended_do_not_disturb_the_others() -> None:
    backend, prompts = bench("Llama"), [[1, 7, 9, last] for last in range(12, 18)]
    with rule(alpha=2.0, layers=(1, 2)).on(backend):
        free = generate(backend, prompts)
        ends = [row[5] for row in free[:2]]  # said second by the first two rows
        together = generate(backend, prompts, eos_token_id=ends)
        alone = [generate(backend, [prompt], eos_token_id=ends)[0] for prompt in prompts]
    lengths = {len(row) for row in alone}
    assert len(lengths) > 1
    assert [row[: len(other)] for row, other in zip(together, alone, strict=True)] == alone


def test_beams_of_a_batch_are_its_rows_beams() -> None:
    backend, prompts = bench("Qwen3"), [PROMPT, [1, 8, 3, 30]]
    with rule(alpha=2.0, layers=(1, 2)).on(backend):
        together = generate(backend, prompts, num_beams=3)
        assert together == [generate(backend, [prompt], num_beams=3)[0] for prompt in prompts]


def test_sampled_beams_are_corrected_too() -> None:
    """With one candidate per step, nothing but greedy's tokens is left to draw."""
    backend = bench("Llama")
    plain = generate(backend)
    with rule(layers=(1, 2), top_k=1).on(backend):
        torch.manual_seed(0)
        assert generate(backend, num_beams=3, do_sample=True, temperature=3.0) == plain


def test_the_order_of_layers_makes_no_difference() -> None:
    backend = bench("Granite")
    with rule(alpha=2.0, layers=(1, 2)).on(backend) as record:
        tokens = generate(backend)
    with rule(alpha=2.0, layers=(2, 1)).on(backend) as other:
        assert generate(backend) == tokens
    assert other.steps == record.steps


def test_a_streamer_receives_every_token() -> None:
    backend, pieces = bench("Llama"), []

    class Streamer:
        def put(self, tokens: torch.Tensor) -> None:
            pieces.extend(tokens.flatten().tolist())

        def end(self) -> None:
            pieces.append("end")

    with rule(alpha=2.0, layers=(1, 2)).on(backend):
        (tokens,) = generate(backend, streamer=Streamer())
    assert pieces == [*tokens, "end"]


def test_half_precision_is_corrected_in_single() -> None:
    """Corrected logits that were rounded back to bfloat16 would often tie."""
    from qr_integrations import Backend
    from tests.backend import measure

    model = measure.random_model(measure.named("Llama")).bfloat16()
    backend = Backend(model, measure.tiny_tokenizer(), name="half")
    with torch.no_grad(), rule(layers=(1, 2), restrict_to_candidates=False).on(backend):
        found = backend.model(torch.tensor([PROMPT])).logits
    assert found.dtype == torch.float32 and not torch.equal(found, found.bfloat16().float())


def test_the_head_reads_one_position_of_each_layer() -> None:
    backend, widths = bench("Llama"), []
    with rule(layers=(1,)).on(backend):
        watch = backend.model.get_output_embeddings().register_forward_hook(
            lambda module, args, out: widths.append(out.shape[1])
        )
        generate(backend, max_new_tokens=3)
        watch.remove()
    assert widths == [2, 2, 2]  # the last layer and one before it; the prompt's other positions are not read


def test_the_first_token_is_corrected_too() -> None:
    backend = bench("Llama")
    prompts = [[1, 7, 9, last] for last in range(20)]
    plain = generate(backend, prompts, max_new_tokens=1)
    with rule(alpha=50.0, layers=(1,), top_p=1.0).on(backend):
        assert generate(backend, prompts, max_new_tokens=1) != plain


@pytest.mark.parametrize("skip", [False, True])
def test_nothing_stays_behind_after_an_error(skip: bool) -> None:
    """Wherever it happens: between the layers, or while a token is chosen."""
    backend, ids = bench("Llama"), torch.tensor([PROMPT])

    def fail(*args: Any) -> None:
        raise RuntimeError("inside")

    with torch.no_grad():
        before = backend.model(ids).logits
        for module in (backend.decoder.layers[1], backend.decoder.norm):
            with rule(layers=(1, 2), skip_confident=skip).on(backend) as record:
                clean = backend.model(ids).logits
                hook = module.register_forward_hook(fail)
                with pytest.raises(RuntimeError, match="inside"):
                    backend.model(ids)
                hook.remove()
                torch.testing.assert_close(backend.model(ids).logits, clean)
                assert len(record) == 2 * len(PROMPT)
        with pytest.raises(RuntimeError, match="inside"), rule(layers=(1, 2), skip_confident=skip).on(backend):
            generate(backend, logits_processor=[fail])
        assert torch.equal(backend.model(ids).logits, before)
    modules = [backend.model, backend.model.get_output_embeddings(), *backend.decoder.layers]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def test_other_threads_wait_and_are_not_corrected() -> None:
    backend, found = bench("Llama"), []
    plain = backend.prefill(PROMPT, top_layer=1)

    def read() -> None:
        found.append(backend.prefill(PROMPT, top_layer=1).num_bytes)

    with rule(alpha=50.0, layers=(1,)).on(backend):
        thread = threading.Thread(target=read)
        thread.start()
        thread.join(0.2)
        assert thread.is_alive() and not found
    thread.join()
    assert found == [plain.num_bytes]


@pytest.mark.parametrize(
    ("depth", "layers"), [(32, range(20, 29)), (28, range(17, 25)), (40, range(25, 36)), (2, [1]), (4, [2, 3])]
)
def test_default_layers(depth: int, layers: Any) -> None:
    assert rule().layers_of(depth) == tuple(layers)


@pytest.mark.parametrize("layers", [(0,), (3,), (1, 1), ()])
def test_layers_that_cannot_be_looked_at(layers: tuple[int, ...]) -> None:
    from qr_integrations.errors import InputError

    with pytest.raises(InputError, match="pass distinct numbers from 1 to 2"), rule(layers=layers).on(bench("Llama")):
        pass


@pytest.mark.parametrize(
    "settings", [{"alpha": -1.0}, {"alpha": float("nan")}, {"top_p": 0.0}, {"top_p": float("nan")}, {"top_k": 0}]
)
def test_settings_that_cannot_be(settings: dict[str, Any]) -> None:
    from qr_integrations.errors import InputError

    with pytest.raises(InputError, match="pass such"):
        rule(**settings)


def test_layers_are_several_numbers(unchecked: None) -> None:
    from qr_integrations.errors import InputError

    assert rule(layers=[2, 3]) == rule(layers=(2, 3)) and hash(rule(layers=[2, 3])) == hash(rule(layers=(2, 3)))
    for wrong, cure in ((5, "(5,)"), (7, "(7,)"), ("all", "(5,)"), ((1, "2"), "(5,)"), ((1.0,), "(5,)")):
        with pytest.raises(InputError, match=re.escape(f"pass layers={cure}")):
            rule(layers=wrong)


def test_skipping_needs_candidates_to_restrict_to() -> None:
    from qr_integrations.errors import InputError

    with pytest.raises(InputError, match="pass one of the two"):
        rule(skip_confident=True, restrict_to_candidates=False)
