"""Fused models: what is native to transformers, what starts as the model it was made of, and what is left alone."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

IMAGE, CELLS = 4, 9
EXTERNAL = ("linear", "external_direct", "external_modular")
WIRINGS = ("pre", "post", "parallel")


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    """Random weights, twelve layers in the tower and four in the language model."""
    tower = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=12, num_attention_heads=2, image_size=42, patch_size=14
    )
    sizes: dict[str, Any] = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=4, num_attention_heads=4)
    text = LlamaConfig(vocab_size=40, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes)
    config = LlavaConfig(vision_config=tower, text_config=text, image_token_index=IMAGE, vision_feature_layer=-2)
    torch.manual_seed(0)
    made = LlavaForConditionalGeneration(config).float().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
    return made.requires_grad_(False)


def fused(model: Any, *settings: Any, **more: Any) -> Any:
    from qr_integrations.encoding.fusion import fuse
    from qr_integrations.encoding.fusion_layers import FusionSpec

    return fuse(model, FusionSpec(*settings, **more))


def inputs(pictures: int = 1, behind: int = 5, padding: int = 0) -> dict[str, Any]:
    torch.manual_seed(1)
    ids = [1] + [IMAGE] * (CELLS * pictures) + [7 + i for i in range(behind)]
    given: dict[str, Any] = {"input_ids": torch.tensor([[0] * padding + ids])}
    given["attention_mask"] = torch.tensor([[0] * padding + [1] * len(ids)])
    if pictures:
        given["pixel_values"] = torch.randn(pictures, 3, 42, 42)
    return given


def stacked(*prompts: dict[str, Any]) -> dict[str, Any]:
    """One batch, padded at the left."""
    longest = max(p["input_ids"].shape[1] for p in prompts)
    rows = {
        name: torch.cat([torch.nn.functional.pad(p[name], (longest - p[name].shape[1], 0)) for p in prompts])
        for name in ("input_ids", "attention_mask")
    }
    return {**rows, "pixel_values": torch.cat([p["pixel_values"] for p in prompts if "pixel_values" in p])}


def randomize(module: Any, scale: float = 1.0) -> None:
    """Everything that starts at zero gets something to say."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, scale * (parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.5))


def old_projector(model: Any, made: Any) -> None:
    """The fused model makes tokens of the final layer as the model that it was made of."""
    for name in ("linear_1", "linear_2"):
        old = getattr(model.model.multi_modal_projector, name).state_dict()
        getattr(made.model.multi_modal_projector, name).load_state_dict(old)


# ---- external


@pytest.mark.parametrize("layers", ["double", "triple", (4, 7)])
def test_external_direct_fusion_of_single_layers_is_transformers_own(model: Any, layers: Any) -> None:
    made = fused(model, layers)
    config = copy.deepcopy(model.config)
    config.vision_feature_layer = [4, 7, 11] if layers == (4, 7) else [2, 9, 11]
    native = LlavaForConditionalGeneration(config).eval()
    native.load_state_dict(made.state_dict())  # strict: the same names and shapes
    assert torch.equal(native(**inputs(2)).logits, made(**inputs(2)).logits)


def test_means_of_groups_are_a_concatenation_of_all_layers_with_folded_weights(model: Any) -> None:
    from qr_integrations.encoding.fusion_layers import FusionSpec, fusion_layers

    made = fused(model, "all")
    layers = fusion_layers(FusionSpec("all"), 12, 4)
    assert [len(group) for group in layers.groups] == [6, 6, 1]
    config = copy.deepcopy(model.config)
    config.vision_feature_layer = [v for group in layers.groups for v in group]
    native = LlavaForConditionalGeneration(config).eval()
    state = made.state_dict()
    name = "model.multi_modal_projector.linear_1.weight"
    parts = state[name].split(32, dim=1)
    folded = [part / len(group) for part, group in zip(parts, layers.groups, strict=True) for _ in group]
    native.load_state_dict({**state, name: torch.cat(folded, dim=1)})
    torch.testing.assert_close(native(**inputs()).logits, made(**inputs()).logits, atol=1e-5, rtol=1e-5)


def test_the_order_within_a_group_does_not_matter(model: Any) -> None:
    made = fused(model, "former")
    projector = made.model.multi_modal_projector
    torch.manual_seed(0)
    parts = list(torch.randn(2, CELLS, 7 * 32).split(32, -1))
    shuffled = [*parts[5::-1], parts[6]]
    tokens = [projector(torch.cat(p, -1)) for p in (parts, shuffled)]
    torch.testing.assert_close(*tokens, atol=1e-6, rtol=1e-6)
    moved = projector(torch.cat([parts[6], *parts[1:6], parts[0]], -1))
    assert not torch.allclose(tokens[0], moved, atol=1e-3)


def test_external_modular_fusion_starts_as_the_plain_projector(model: Any) -> None:
    made = fused(model, "all", "external_modular")
    old_projector(model, made)
    assert torch.equal(made(**inputs(2)).logits, model(**inputs(2)).logits)
    randomize(made.model.multi_modal_projector.fuser)
    assert not torch.allclose(made(**inputs(2)).logits, model(**inputs(2)).logits, atol=1e-2)


def test_linear_fusion_is_one_linear_layer(model: Any) -> None:
    made = fused(model, "triple", "linear")
    assert set(made.model.multi_modal_projector.state_dict()) == {"linear_1.weight", "linear_1.bias"}
    torch.manual_seed(0)
    one, two = torch.randn(2, 1, CELLS, 96)
    tokens = made.model.multi_modal_projector
    torch.testing.assert_close(tokens(one) + tokens(two), tokens(one + two) + tokens(one * 0), atol=1e-5, rtol=1e-5)


# ---- internal


def test_internal_direct_fusion_starts_as_the_model_it_was_made_of(model: Any) -> None:
    for layers in ("single", "double", "triple", "former", "latter", "all"):
        made = fused(model, layers, "internal_direct")
        old_projector(model, made)
        assert torch.equal(made(**inputs(2)).logits, model(**inputs(2)).logits), layers


@pytest.mark.parametrize("wiring", WIRINGS)
def test_internal_modular_fusion_starts_as_the_model_it_was_made_of(model: Any, wiring: str) -> None:
    made = fused(model, "all", "internal_modular", wiring)
    old_projector(model, made)
    assert torch.equal(made(**inputs(2)).logits, model(**inputs(2)).logits)


def gated(model: Any, wiring: str = "pre", layers: str = "triple") -> Any:
    made = fused(model, layers, "internal_modular", wiring)
    randomize(made.model.multi_modal_projector)
    return made


def direct(model: Any) -> Any:
    made = fused(model, "triple", "internal_direct")
    randomize(made.model.multi_modal_projector)
    return made


INTERNAL: dict[str, Callable[[Any], Any]] = {
    "direct": direct,
    "pre": gated,
    "post": lambda model: gated(model, "post"),
    "parallel": lambda model: gated(model, "parallel"),
}
each_internal = pytest.mark.parametrize("make", INTERNAL.values(), ids=INTERNAL.keys())


def test_the_wirings_differ(model: Any) -> None:
    logits = [make(model)(**inputs()).logits for make in INTERNAL.values()]
    for i, one in enumerate(logits):
        for other in logits[:i]:
            assert (one - other).abs().max() > 1e-2


def test_internal_direct_fusion_adds_to_the_rows_of_pictures_alone(model: Any) -> None:
    made = fused(model, "single", "internal_direct")  # layer 9 of 12 arrives at layer 2 of 4
    old_projector(model, made)
    randomize(made.model.multi_modal_projector.projectors)
    states, places = [], inputs(2)["input_ids"][0] == IMAGE
    for one in (model, made):
        made_states = one(**inputs(2), output_hidden_states=True).hidden_states
        states.append(made_states)
        entered: list[torch.Tensor] = []
        hook = one.model.language_model.layers[2].input_layernorm.register_forward_pre_hook(
            lambda module, args, entered=entered: entered.append(args[0])
        )
        one(**inputs(2))
        hook.remove()
        states[-1] = (*made_states[:3], entered[0])
    for before in range(3):
        assert torch.equal(states[0][before], states[1][before])  # also what is recorded: nothing changes in place
    change = states[1][3] - states[0][3]
    assert torch.equal(change[0, ~places], torch.zeros_like(change[0, ~places]))
    assert bool((change[0, places].abs().sum(-1) > 0).all())


@each_internal
def test_tokens_that_follow_one_by_one_get_what_they_get_at_once(model: Any, make: Any) -> None:
    made, given = make(model), inputs(2, behind=8)
    whole = made(**given).logits
    cut = given["input_ids"].shape[1] - 3
    beginning = {name: given[name][:, :cut] for name in ("input_ids", "attention_mask")}
    output = made(**beginning, pixel_values=given["pixel_values"], use_cache=True)
    rest = []
    for place in range(cut, cut + 3):
        ids, mask = given["input_ids"][:, place : place + 1], given["attention_mask"][:, : place + 1]
        step = made(input_ids=ids, attention_mask=mask, past_key_values=output.past_key_values, use_cache=True)
        rest.append(step.logits)
    torch.testing.assert_close(torch.cat(rest, 1), whole[:, cut:], atol=2e-5, rtol=1e-4)


@each_internal
def test_a_prefix_takes_the_pictures_along(model: Any, make: Any) -> None:
    from transformers import DynamicCache

    from qr_integrations.backend.prefix import Prefix

    made, given, cache = make(model), inputs(2, behind=8), DynamicCache()
    cut = given["input_ids"].shape[1] - 3
    made(input_ids=given["input_ids"][:, :cut], pixel_values=given["pixel_values"], past_key_values=cache)
    prefix = Prefix(tuple(given["input_ids"][0, :cut].tolist()), 3, cache)
    whole = made(**given).logits[:, cut:]
    for continued in (prefix.branch(), prefix.growing()):
        rest = made(input_ids=given["input_ids"][:, cut:], past_key_values=continued).logits
        torch.testing.assert_close(rest, whole, atol=2e-5, rtol=1e-4)


@each_internal
def test_a_cache_that_was_emptied_forgets_its_pictures(model: Any, make: Any) -> None:
    from transformers import DynamicCache

    made, cache = make(model), DynamicCache()
    made(**inputs(1), past_key_values=cache)
    cache.reset()
    cache.layers.clear()
    made(**inputs(0), past_key_values=cache)
    following = made(input_ids=torch.tensor([[9]]), past_key_values=cache).logits
    fresh = DynamicCache()
    made(**inputs(0), past_key_values=fresh)
    assert torch.equal(following, made(input_ids=torch.tensor([[9]]), past_key_values=fresh).logits)


@each_internal
def test_prompts_in_a_batch_are_read_as_alone(model: Any, make: Any) -> None:
    """Two pictures, one, none; padded at the left."""
    made = make(model)
    prompts = [inputs(2, 3), inputs(1, 9), inputs(0, 6)]
    prompts[1]["pixel_values"] = prompts[1]["pixel_values"] * 0.5
    together = made(**stacked(*prompts)).logits
    for row, prompt in zip(together, prompts, strict=True):
        alone = made(**prompt).logits[0]
        torch.testing.assert_close(row[-len(alone) :], alone, atol=2e-5, rtol=1e-4)


@each_internal
def test_what_is_passed_by_position_counts_as_well(model: Any, make: Any) -> None:
    made, given = make(model).model, inputs(2, padding=3)
    by_position = made(given["input_ids"], given["pixel_values"], given["attention_mask"]).last_hidden_state
    assert torch.equal(by_position[:, 3:], made(**given).last_hidden_state[:, 3:])


@each_internal
def test_text_is_read_as_by_the_model_it_was_made_of(model: Any, make: Any) -> None:
    made = make(model)
    made(**inputs(1))
    assert torch.equal(made(**inputs(0)).logits, model(**inputs(0)).logits)


@each_internal
def test_beams_and_chunks_carry_the_pictures_along(model: Any, make: Any) -> None:
    made, prompts = make(model), stacked(inputs(2, 3), inputs(1, 7))
    options: dict[str, Any] = dict(max_new_tokens=4, do_sample=False, suppress_tokens=[IMAGE, 2], length_penalty=0.0)
    several = dict(num_beams=3, num_return_sequences=3, return_dict_in_generate=True, output_scores=True)
    beams = made.generate(**prompts, **options, **several)
    for number in range(3):
        scores = total_score(made, prompts, beams.sequences.view(2, 3, -1)[:, number])
        torch.testing.assert_close(beams.sequences_scores.view(2, 3)[:, number], scores, atol=1e-4, rtol=1e-4)
    chunked = made.generate(**prompts, **options, prefill_chunk_size=40)
    assert torch.equal(chunked, made.generate(**prompts, **options))


def total_score(made: Any, prompts: dict[str, Any], ids: torch.Tensor) -> torch.Tensor:
    """Log probability of what was generated, by a pass over all of it."""
    length = prompts["input_ids"].shape[1]
    mask = torch.cat([prompts["attention_mask"], torch.ones_like(ids[:, length:])], 1)
    logits = made(input_ids=ids, attention_mask=mask, pixel_values=prompts["pixel_values"]).logits[:, length - 1 : -1]
    return logits.log_softmax(-1).gather(-1, ids[:, length:, None]).sum((1, 2))


def test_chunks_may_cut_through_pictures_in_internal_direct_fusion(model: Any) -> None:
    made, prompts = direct(model), stacked(inputs(2, 3), inputs(1, 7))
    options: dict[str, Any] = dict(max_new_tokens=4, do_sample=False, suppress_tokens=[IMAGE, 2])
    whole = made.generate(**prompts, **options)
    assert torch.equal(made.generate(**prompts, **options, prefill_chunk_size=5), whole)


def test_all_rows_see_all_patches_in_internal_modular_fusion(model: Any) -> None:
    """The published mask lets a row at place p see the first p patches only."""
    made = gated(model, layers="single")
    given = inputs()
    changed = {**given, "pixel_values": given["pixel_values"].clone()}
    changed["pixel_values"][..., 28:, 28:] += 1.0  # the last patch, and what the tower makes of the others
    first = [made(**one).logits[0, 0] for one in (given, changed)]
    assert not torch.allclose(*first, atol=1e-4)


def test_a_gradient_reaches_every_new_weight(model: Any) -> None:
    for make in (
        direct,
        gated,
        lambda model: fused(model, "all"),
        lambda model: fused(model, "all", "external_modular"),
    ):
        made = make(model)
        projector = made.model.multi_modal_projector.requires_grad_(True)
        if hasattr(projector, "fuser"):
            randomize(projector.fuser, 0.3)
        made(**inputs(), labels=inputs()["input_ids"]).loss.backward()
        assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in projector.parameters())


def test_gradient_checkpointing_gives_the_same_gradients_or_is_refused(model: Any) -> None:
    """Within internal modular fusion layers would be computed again without their pictures."""
    from qr_integrations.errors import InputError

    gradients = []
    for checkpointing in (False, True):
        made = direct(model).train()
        projector = made.model.multi_modal_projector.requires_grad_(True)
        if checkpointing:
            made.gradient_checkpointing_enable({"use_reentrant": False})
        made(**inputs(), use_cache=False).logits.square().sum().backward()
        gradients.append([parameter.grad for parameter in projector.parameters()])
    torch.testing.assert_close(*gradients)
    for wiring in WIRINGS:
        made = gated(model, wiring).train()
        made.gradient_checkpointing_enable({"use_reentrant": False})
        with pytest.raises(InputError, match="gradient_checkpointing_disable"):
            made(**inputs(), use_cache=False)
        made.eval()(**inputs())


def test_pictures_and_text_may_be_read_one_by_one(model: Any) -> None:
    """As a training loop does that packs many questions into one sequence."""
    from qr_integrations.encoding.fusion import pictures_at

    for made in (direct(model), gated(model), fused(model, "triple")):
        given = inputs(2)
        features = torch.stack(made.get_image_features(given["pixel_values"], return_dict=True).pooler_output)
        places = given["input_ids"] == IMAGE
        with pictures_at(made, places, features) as tokens:
            assert tokens.shape == (2, CELLS, 24)
            embedded = made.get_input_embeddings()(given["input_ids"])
            embedded = embedded.masked_scatter(places[..., None], tokens.flatten(0, 1))
            states = made.model.language_model(inputs_embeds=embedded).last_hidden_state
        torch.testing.assert_close(made.lm_head(states), made(**given).logits, atol=1e-5, rtol=1e-5)


# ---- what is left alone


@each_internal
def test_the_old_model_stays_as_it_is(model: Any, make: Any) -> None:
    before, weights = model(**inputs(2)).logits, {k: v.clone() for k, v in model.state_dict().items()}
    made = make(model)
    made(**inputs(2))
    assert torch.equal(model(**inputs(2)).logits, before)
    assert model.config.vision_feature_layer == -2
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    shared = {p.data_ptr() for p in model.parameters()}
    own = [n for n, p in made.named_parameters() if p.data_ptr() not in shared]
    assert all(name.startswith("model.multi_modal_projector.") for name in own)


@each_internal
def test_a_pass_that_fails_leaves_nothing_behind(model: Any, make: Any) -> None:
    made = make(model)
    before = made(**inputs(0)).logits
    with pytest.raises(Exception, match=r"do not match|not fit"):
        made(**{**inputs(2), "pixel_values": torch.randn(1, 3, 42, 42)})
    assert torch.equal(made(**inputs(0)).logits, before)


# ---- refused


def test_what_cannot_be_fused_is_refused(model: Any, qr_mini: Any) -> None:
    from qr_integrations.encoding.fusion import save_fusion
    from qr_integrations.errors import InputError, UnsupportedModelError

    with pytest.raises(InputError, match="fused already"):
        fused(fused(model, "triple"), "triple")
    with pytest.raises(UnsupportedModelError, match="LLaVA"):
        fused(qr_mini, "triple")
    with pytest.raises(InputError, match="hidden states 0 to 12"):
        fused(model, (3, 14))
    with pytest.raises(InputError, match="is not fused"):
        save_fusion(model, "nowhere")
    several = copy.copy(model.config)
    several.vision_feature_layer = [3, 11]
    other = copy.copy(model)
    other.config = several
    with pytest.raises(InputError, match="final"):
        fused(other, "triple")


def test_tokens_of_another_projector_are_refused(model: Any) -> None:
    from qr_integrations.errors import InputError

    given = inputs(1)
    pixels = given.pop("pixel_values")
    encoded = model.model.get_image_features(pixels, return_dict=True)
    with pytest.raises(InputError, match="get_image_features"):
        direct(model)(**given, mm_encoder_outputs={"image": encoded})
    made = direct(model)
    encoded = made.model.get_image_features(pixels, return_dict=True)
    given = inputs(1)
    assert torch.equal(
        made(input_ids=given["input_ids"], mm_encoder_outputs={"image": encoded}).logits,
        made(input_ids=given["input_ids"], pixel_values=given["pixel_values"]).logits,
    )


def test_only_internal_direct_fusion_refuses_to_be_pruned(qr_mini_vl: Any) -> None:
    from PIL import Image

    from qr_integrations.backend import Backend
    from qr_integrations.errors import InputError
    from qr_integrations.pruning.cdpruner import CDPruner
    from qr_integrations.types import Message

    question = [Message.user("what color is the box ?", Image.new("RGB", (140, 140), "red"))]
    for strategy in ("external_modular", "internal_modular", "internal_direct"):
        made = fused(qr_mini_vl, "triple", strategy)
        old_projector(qr_mini_vl.model, made)
        backend = Backend(made, qr_mini_vl.tokenizer, processor=qr_mini_vl.processor)
        if strategy == "internal_direct":
            with pytest.raises(InputError, match="every token of a picture"):
                backend.answer(question, prune=CDPruner(keep=50))
        else:
            pruned = backend.answer(question, prune=CDPruner(keep=50)).text
            assert pruned == qr_mini_vl.answer(question, prune=CDPruner(keep=50)).text


# ---- on disk


@pytest.mark.parametrize("strategy", [*EXTERNAL, "internal_direct", "internal_modular"])
def test_a_fusion_is_written_and_read(model: Any, strategy: str, tmp_path: Path) -> None:
    from qr_integrations.encoding.fusion import load_fusion, save_fusion

    made = fused(model, "triple", strategy)
    randomize(made.model.multi_modal_projector)
    save_fusion(made, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fusion.json", "fusion.safetensors"]
    again = load_fusion(model, tmp_path)
    assert torch.equal(made(**inputs(2)).logits, again(**inputs(2)).logits)


def test_a_trained_language_model_travels_along(model: Any, tmp_path: Path) -> None:
    from qr_integrations.encoding.fusion import load_fusion, save_fusion

    trained = copy.deepcopy(model)
    made = gated(trained)
    randomize(trained.model.language_model)
    save_fusion(made, tmp_path, language_model=True)
    before = model(**inputs()).logits
    again = load_fusion(model, tmp_path)
    assert torch.equal(made(**inputs()).logits, again(**inputs()).logits)
    assert torch.equal(model(**inputs()).logits, before)


def test_an_output_layer_of_its_own_travels_with_the_language_model(model: Any, tmp_path: Path) -> None:
    from qr_integrations.encoding.fusion import load_fusion, save_fusion

    made = fused(copy.deepcopy(model), "triple")
    assert made.lm_head.weight is not made.get_input_embeddings().weight
    with torch.no_grad():
        made.lm_head.weight.neg_()
    save_fusion(made, tmp_path, language_model=True)
    before = model(**inputs()).logits
    assert torch.equal(made(**inputs()).logits, load_fusion(model, tmp_path)(**inputs()).logits)
    assert torch.equal(model(**inputs()).logits, before)


def test_foreign_and_missing_tensors_are_refused(model: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from qr_integrations.encoding.fusion import load_fusion, save_fusion
    from qr_integrations.errors import LoadError

    save_fusion(fused(model, "triple"), tmp_path)
    weights = load_file(tmp_path / "fusion.safetensors")
    for changed in (
        {**weights, "foreign": torch.zeros(1)},
        {name: value for name, value in weights.items() if name != "linear_2.bias"},
        {**weights, "linear_2.bias": torch.zeros(3)},
    ):
        save_file(changed, tmp_path / "fusion.safetensors")
        with pytest.raises(LoadError, match=r"1 tensors .* 'foreign'|'linear_2.bias'"):
            load_fusion(model, tmp_path)
    for broken in ("{", "{}", '{"spec": {"layers": "most"}, "read": []}', '{"spec": {"colour": 1}, "read": []}'):
        (tmp_path / "fusion.json").write_text(broken)
        with pytest.raises(LoadError, match="save_fusion"):
            load_fusion(model, tmp_path)
    with pytest.raises(LoadError, match="no fusion"):
        load_fusion(model, tmp_path / "nowhere")


# ---- in the house


def test_a_fused_model_answers_in_a_backend(qr_mini_vl: Any) -> None:
    from PIL import Image

    from qr_integrations.backend import Backend
    from qr_integrations.types import Message

    made = fused(qr_mini_vl, "triple", "internal_modular")
    old_projector(qr_mini_vl.model, made)
    backend = Backend(made, qr_mini_vl.tokenizer, processor=qr_mini_vl.processor)
    question = [Message.user("what color is the box ?", Image.new("RGB", (200, 140), "red"))]
    assert backend.answer(question).text == qr_mini_vl.answer(question).text
