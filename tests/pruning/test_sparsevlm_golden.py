"""SparseVLM against the authors' own numbers (tests/golden/vision/README.md: which code, which commit, which limits).

Their version 1_0 has the rules of 1.5. The whole road runs in a LLaVA whose tower hands out the stored features.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

GOLDEN = Path(__file__).parents[1] / "golden" / "vision"
CASES: Any = json.loads((GOLDEN / "sparsevlm.json").read_text(encoding="utf-8"))
ROADS: Any = json.loads((GOLDEN / "sparsevlm_e2e.json").read_text(encoding="utf-8"))["cases"]
VERSIONS = {"1_0": "1.5", "2_0": "2.0"}
LAYERS, VOCAB = (2, 6, 15), 96
OF_LOGITS, OF_GRAVITY, OF_MEANS = 2e-4, 1e-4, 1e-5


@cache
def arrays(name: str = "sparsevlm") -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: torch.from_numpy(value.astype(np.float32)) for key, value in file.items()}


def of_kind(kind: str, **wanted: Any) -> Any:
    chosen = [case for case in CASES[kind] if all(case.get(name) == value for name, value in wanted.items())]
    assert chosen
    return pytest.mark.parametrize("case", chosen, ids=lambda case: case["id"])


@pytest.mark.parametrize("version", VERSIONS)
def test_budgets(version: str) -> None:
    from qr_integrations.pruning import SparseVLM

    for keep, budgets in CASES["budgets"][version].items():
        found = SparseVLM(keep=int(keep), version=VERSIONS[version]).budgets_of(576, LAYERS, 32)
        assert list(found) == budgets


@of_kind("raters", dtype="float32")
def test_raters(case: dict[str, Any]) -> None:
    from qr_integrations.pruning.sparse_scores import text_raters, word_weights

    start, stop = case["visual_start"], case["visual_start"] + case["visual_count"]
    for row, states in enumerate(arrays()[case["x"]]):
        visual, words = states[start:stop], states[stop:]
        weights = word_weights(visual, words)
        torch.testing.assert_close(weights, arrays()[case["m"]][row], atol=1e-6, rtol=1e-5)
        places = zip(case["rater_batch_index"], case["rater_text_index"], strict=True)
        theirs = [place for batch, place in places if batch == row]
        everything = list(range(case["text_count"]))
        assert text_raters(visual, words).tolist() == (theirs or everything)  # they score NaN without raters


@of_kind("topk")
def test_scores_and_what_is_kept(case: dict[str, Any]) -> None:
    from qr_integrations.pruning import SparseVLM
    from qr_integrations.pruning.sparse_scores import visual_scores

    start, stop = case["visual_start"], case["visual_start"] + case["visual_count"]
    attention = arrays()[case["attn"]][:, case["rater_text_index"], start:stop]
    scores, _ = visual_scores(attention)
    torch.testing.assert_close(scores, arrays()[case["scores"]], atol=1e-7, rtol=1e-5)
    settings = SparseVLM(keep=case["retained"], version=VERSIONS[case["version"]], always_drop=True)
    budget = settings.budgets_of(576, LAYERS, 32)[LAYERS.index(case["layer"])]
    count = settings.count(budget, attention)
    assert sorted(scores.sort(descending=True, stable=True).indices[:count].tolist()) == case["kept"]


@of_kind("merge")
def test_merging(case: dict[str, Any]) -> None:
    from qr_integrations.pruning.sparse_merge import density_peaks

    if case["kind"] == "pairs" and case["torch_seed"] is None:
        pytest.skip("equal densities without noise: their order is not defined")
    for row, states in enumerate(arrays()[case["x"]]):
        noise = torch.zeros(case["R"]) if case["torch_seed"] is None else arrays()[case["noise"]][row]
        found = density_peaks(states, case["clusters"], noise)
        if case["clusters"] > 1:  # all densities are equal where there is one cluster
            assert found.centers.tolist() == case["centers"][row]
        assert found.assignment.tolist() == case["assignment"][row]
        theirs = arrays()[case["merged"]][row]
        torch.testing.assert_close(found.means(states), theirs, atol=OF_MEANS, rtol=OF_MEANS)


@of_kind("gravity")
def test_gravity(case: dict[str, Any]) -> None:
    from qr_integrations.pruning.sparse_scores import rotary_gravity

    places = torch.tensor([case.get("position_ids") or list(range(case["count"]))])
    width = case["head_dim"]
    frequencies = case["rope_base"] ** (-torch.arange(0, width, 2) / width)
    if "count" in case:
        found = rotary_gravity(places[:, :1], places, frequencies)[0]
        expected = arrays()[case["weights_by_distance"]]
    else:
        found, expected = rotary_gravity(places, places, frequencies), arrays()[case["weights"]]
        corrected = arrays()[case["attention"]] / found
        torch.testing.assert_close(corrected, arrays()[case["corrected"]], atol=OF_GRAVITY, rtol=1e-3)
    torch.testing.assert_close(found, expected, atol=OF_GRAVITY, rtol=0)


@of_kind("heads")
def test_priority_heads(case: dict[str, Any]) -> None:
    from qr_integrations.pruning.sparse_scores import visual_scores

    if "exception" in case:
        pytest.skip("theirs fails with fewer than 14 heads")
    start, stop = case["visual_start"], case["visual_start"] + case["visual_count"]
    attention = arrays()[case["text_rows"]][:, case["rater_text_index"], start:stop]
    assert visual_scores(attention, 14)[1].tolist() == case["selected_heads_by_descending_sum"]


# ---- the whole road


class Watched:
    """A pruner, and its own pass, that notes what each layer is left with and draws the stored noise."""

    def __init__(self, settings: Any, noise: list[Tensor]) -> None:
        self.settings, self.noise = settings, noise
        self.cuts: list[tuple[Any, Any]] = []

    def start(self, backend: Any, seen: Any) -> Any:
        self.pruning = self.settings.start(backend, seen)
        if self.noise:
            self.pruning.noise = lambda number: self.noise.pop(0)[0]
        self.layers, self.compact, self.record = self.pruning.layers, self.pruning.compact, self.pruning.record
        return self

    def before(self) -> None:
        assert self.pruning.before() is None

    def rows(self, now: Any) -> Any:
        return self.pruning.rows(now)

    def after(self, layer: int, now: Any, attention: Any) -> Any:
        left = self.pruning.after(layer, now, attention)
        self.cuts.append((now, left))
        return left


@cache
def backend_of(case_id: str) -> Any:
    """Words of the prompt are tokens of their own, behind the 96 that can be said."""
    from qr_integrations import Backend
    from tests.backend.measure import tiny_tokenizer

    case = next(case for case in ROADS if case["id"] == case_id)
    stored, states = arrays("sparsevlm_e2e"), arrays("sparsevlm_e2e")[case["x"]][0]
    sizes = dict(hidden_size=case["hidden"], intermediate_size=case["intermediate"], num_hidden_layers=case["layers"])
    heads = dict(num_attention_heads=case["heads"], num_key_value_heads=case["kv_heads"], head_dim=case["head_dim"])
    rope = dict(rope_theta=case["rope_base"], rope_type="default")
    text = dict(model_type="llama", vocab_size=VOCAB + len(states) + 1, max_position_embeddings=4096)
    text |= dict(sizes | heads, rms_norm_eps=case["rms_eps"], rope_parameters=rope)
    tower = dict(model_type="clip_vision_model", hidden_size=8, num_hidden_layers=2, intermediate_size=8)
    tower |= dict(num_attention_heads=1, image_size=28, patch_size=14)
    config = LlavaConfig(text_config=text, vision_config=tower, image_token_index=VOCAB + len(states))
    model = LlavaForConditionalGeneration(config).eval().requires_grad_(False)
    decoder = model.model.language_model
    for number, layer in enumerate(decoder.layers):
        prefix = f"{case['weights']}.set{number % case['weight_sets']}."
        weights = {name.removeprefix(prefix): value for name, value in stored.items() if name.startswith(prefix)}
        layer.load_state_dict(weights, strict=False)
        assert len(weights) >= 7
        assert all(name in weights or "norm" in name for name in layer.state_dict())
    head = stored[f"{case['weights']}.lm_head.weight"]
    decoder.norm.weight.copy_(stored[f"{case['weights']}.norm.weight"])
    decoder.embed_tokens.weight.copy_(
        torch.cat([stored[f"{case['weights']}.embed_tokens.weight"], states, torch.zeros(1, case["hidden"])])
    )
    model.lm_head.weight.copy_(torch.nn.functional.pad(head, (0, 0, 0, len(states) + 1)))
    model.model.get_image_features = lambda pixel_values, **_: BaseModelOutputWithPooling(
        pooler_output=list(pixel_values[:, 0])
    )
    model.generation_config.update(eos_token_id=None, pad_token_id=0)
    return Backend(model, tiny_tokenizer(), name=case_id)


def inputs_of(case: dict[str, Any]) -> dict[str, Tensor]:
    states = arrays("sparsevlm_e2e")[case["x"]][0]
    start, stop = case["visual_start"], case["visual_start"] + case["visual_count"]
    ids = torch.arange(VOCAB, VOCAB + len(states))
    ids[start:stop] = VOCAB + len(states)
    return {
        "input_ids": ids[None],
        "attention_mask": torch.ones(1, len(ids)),
        "pixel_values": states[None, None, start:stop],
    }


def settings_of(case: dict[str, Any]) -> Any:
    from qr_integrations.pruning import SparseVLM

    budgets = tuple(CASES["budgets"][case["version"]][str(case["retained"])])
    version = VERSIONS[case["version"]]
    return SparseVLM(version=version, layers=LAYERS, budgets=budgets, gravity_floor=None, always_drop=True)


@pytest.mark.parametrize("case", ROADS, ids=lambda case: case["id"])
def test_the_whole_road(case: dict[str, Any]) -> None:
    from qr_integrations.backend.surgery import prefill_pruned

    stored, backend, inputs = arrays("sparsevlm_e2e"), backend_of(case["id"]), inputs_of(case)
    noise = [stored[f"{case['id']}.noise{i}"] for i in range(3)] if case["cluster_noise"] == "seeded" else []
    pruner = Watched(settings_of(case), noise)
    read = prefill_pruned(backend, inputs, pruner)
    first = case["visual_start"] + case["visual_count"]
    assert [place - first for place in read.record.raters[0]] == case["rater_text_index"]
    assert list(read.lengths) == case["seq_len_into_layer"]
    for (now, left), theirs in zip(pruner.cuts, case["pruning_layers"], strict=True):
        visual = now.visual[0].nonzero()[:, 0]
        kept = torch.isin(visual, left.kept[0]).nonzero()[:, 0]
        assert (len(visual), kept.tolist()) == (theirs["visual_before"], theirs["kept_visual_index"])
        assert sum(map(len, left.merged or [])) == theirs["merged_count"]
        if theirs["merged_count"]:
            expected = stored[theirs["merged_tokens"]]
            torch.testing.assert_close(left.merged[0], expected, atol=OF_LOGITS, rtol=0)
    assert generated(case, backend, read) == case["tokens"]


def generated(case: dict[str, Any], backend: Any, read: Any) -> list[int]:
    """Five tokens by `generate`, greedy; logits, and positions in each layer and step, are as in the authors' code."""
    seen: list[Tensor] = []
    hooks = []

    def look(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(kwargs["position_embeddings"][0][0, -1])

    with read.decoding(backend):
        for layer in backend.decoder.layers:
            hooks.append(layer.register_forward_pre_hook(look, with_kwargs=True))
        made = backend.model.generate(
            **read.continued(), max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    for hook in hooks:
        hook.remove()
    logits = torch.stack(made.logits)[:, 0, :VOCAB]
    torch.testing.assert_close(logits, arrays("sparsevlm_e2e")[case["logits"]], atol=OF_LOGITS, rtol=0)
    steps = torch.tensor(case["decode_positions_used"])
    expected = backend.decoder.rotary_emb(torch.zeros(1), steps.reshape(1, -1))[0][0]
    found = torch.stack(seen).view(5, len(steps[0]), -1)[1:]  # the first one reads the prompt's last token
    torch.testing.assert_close(found.reshape(expected.shape), expected)
    assert [read.cache.get_seq_length(number) for number in range(case["layers"])] == case["cache_len_after_generation"]
    return made.sequences[0, -5:].tolist()
