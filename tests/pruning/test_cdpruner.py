"""CDPruner: the authors' numbers, its properties, and what it leaves of the prompts of each family."""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from qr_integrations.backend import Backend
from qr_integrations.backend.clip_text import clip_text, tower_norm
from qr_integrations.backend.surgery import Prefilled, prefill_pruned
from qr_integrations.errors import InputError, LoadError, ScoreError, UnsupportedModelError
from qr_integrations.pruning import CDPruner
from qr_integrations.pruning.cdpruner import kernel_of
from qr_integrations.pruning.greedy import greedy_map
from qr_integrations.pruning.relevance import mean_cosine, relevance_of
from qr_integrations.types import Message
from tests.backend.found_pictures import WIDE, noise
from tests.backend.seeing import OTHER, QUESTION, backend, fresh, pictures, seen
from tests.backend.test_surgery import PRUNED, together
from tests.backend.tiny_vlms import WORDS
from tests.pruning.seen import prompts

GOLDEN = Path(__file__).parents[1] / "golden" / "vision" / "cdpruner"
CASES: list[dict[str, Any]] = json.loads(GOLDEN.with_suffix(".json").read_text())["cases"]
LONG = " ".join(WORDS.split()[:30])


@cache
def arrays() -> dict[str, np.ndarray]:
    with np.load(GOLDEN.with_suffix(".npz")) as file:
        return dict(file)


def cells(prefilled: Prefilled) -> list[tuple[int, ...]]:
    return [view.cells for view in prefilled.record.stages[0].views]


def read(opened: Backend, messages: Sequence[Message], pruner: Any) -> Prefilled:
    return prefill_pruned(opened, opened.lay_out(messages).inputs, pruner, [messages[-1].text])


# ---- the authors' numbers


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['id']} {case['kind']}")
def test_relevance_and_kernel_are_the_authors(case: dict[str, Any]) -> None:
    images, texts, features = (
        torch.from_numpy(arrays()[f"{case['id']}_{name}"]) for name in ("image_embeds", "text_embeds", "features")
    )
    features = features.to(getattr(torch, case["features_dtype"]))
    cosines = [mean_cosine(view, texts) for view in images.float()]
    found = relevance_of(cosines, sign=-1, published=True)
    expected = torch.from_numpy(arrays()[case["relevance"]])
    if not case["kernel_finite"]:
        assert all(bool((one == 1).all()) for one in relevance_of(cosines, sign=-1))
        assert bool(relevance_of([torch.full((9,), 0.3)], published=True)[0].isinf().all())
        return
    torch.testing.assert_close(torch.stack(found), expected, atol=1e-5, rtol=1e-5)
    for view, (some, relevance) in enumerate(zip(features, expected, strict=True)):
        kernel = kernel_of(some, relevance, published=True)
        if case["kernel"] in arrays():
            torch.testing.assert_close(kernel, torch.from_numpy(arrays()[case["kernel"]][view]), atol=1e-5, rtol=1e-5)
        else:
            rows = torch.from_numpy(arrays()[case["kernel_rows"]][view])
            torch.testing.assert_close(kernel[[0, 1, len(kernel) // 2]], rows, atol=1e-5, rtol=1e-5)


ANGLES = torch.tensor([0.0, 10, 90, 100, 180, 270]).deg2rad()
SIX = torch.stack([ANGLES.cos(), ANGLES.sin(), torch.full((6,), 0.5)], 1)
COSINES = torch.tensor([0.10, 0.12, 0.08, 0.05, 0.20, 0.15])


def test_six_angles() -> None:
    def order(sign: int, published: bool) -> Any:
        relevance = relevance_of([COSINES], sign=sign, published=published)[0]
        return greedy_map(kernel_of(SIX, relevance, published=published).numpy(), 3)

    for published in (True, False):
        assert order(-1, published).order.tolist() == [3, 0, 5]
        assert order(1, published).order.tolist() == [4, 5, 1]
    np.testing.assert_allclose(order(-1, True).pivots, [1.000013, 0.442795, 0.066511], atol=2e-6)


# ---- relevance


def test_relevance_does_not_depend_on_scale_and_offset() -> None:
    cosines = torch.rand(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain = relevance_of([cosines])[0]
    torch.testing.assert_close(relevance_of([3 * cosines + 7])[0], plain, atol=1e-5, rtol=0)
    torch.testing.assert_close(relevance_of([-cosines], sign=-1)[0], plain)
    torch.testing.assert_close(relevance_of([cosines], theta=0.0)[0], torch.ones_like(cosines))
    strong = relevance_of([cosines], theta=0.9)[0]
    assert strong.argsort().tolist() == cosines.argsort().tolist() and strong.max() == pytest.approx(
        np.exp(4.5), rel=1e-3
    )


def test_views_that_are_given_together_share_their_range() -> None:
    one, other = torch.tensor([0.0, 0.5]), torch.tensor([0.5, 1.0])
    assert torch.cat(relevance_of([one, other])).tolist() == pytest.approx([0, 0.5, 0.5, 1], abs=1e-5)
    assert relevance_of([]) == []


def test_zeros_have_no_relevance_and_no_cosines() -> None:
    features = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    assert mean_cosine(features, features[1:]).tolist() == [0, 1]
    assert kernel_of(features, torch.ones(2)).tolist() == [[0, 0], [0, 1]]


def test_language_finds_the_token_that_is_like_the_question() -> None:
    opened = backend("llava")
    words = opened.model.get_input_embeddings().weight
    features = torch.randn(12, words.shape[1], generator=torch.Generator().manual_seed(0))
    features[5] = words[opened.tokenizer("red", add_special_tokens=False).input_ids[0]]
    shown = prompts([12], features=[features], questions=("red",))
    kept = CDPruner(1, relevance="language", sign=1).start(opened, shown)
    assert kept.record.stages[0].views[0].cells == (5,)
    assert CDPruner(1, relevance="language", sign=-1).start(opened, shown).record.stages[0].views[0].cells != (5,)


def test_an_unknown_question_is_read_from_behind_the_picture() -> None:
    opened = backend("llava")
    width = opened.model.config.text_config.hidden_size
    features = torch.randn(12, width, generator=torch.Generator().manual_seed(0))
    shown = prompts([12], features=[features])
    shown.states[0, 4] = shown.states[0, -2:].sum(0)
    assert CDPruner(1, sign=1).start(opened, shown).record.stages[0].views[0].cells == (3,)


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("questions", [(), ("",)])
def test_where_nothing_is_asked_diversity_alone_decides(questions: tuple[str, ...], published: bool) -> None:
    opened = backend("llava")
    width = opened.model.config.text_config.hidden_size
    features = torch.randn(12, width, generator=torch.Generator().manual_seed(0))
    shown = prompts([12], words=1, features=[features], questions=questions)
    assert len(shown.words_behind(0)) == 0
    found = CDPruner(5, relevance="language", published=published).start(opened, shown).record.stages[0]
    alone = CDPruner(5, relevance=None, published=published).start(opened, shown).record.stages[0]
    assert found.kept == 5 and found.views == alone.views


def test_ends_of_lines_behind_the_last_cell_ask_nothing() -> None:
    opened = backend("llava")
    width = opened.model.config.text_config.hidden_size
    features = torch.randn(12, width, generator=torch.Generator().manual_seed(0))
    shown = prompts([12], words=2, features=[features])
    shown.states[0, -1] = features[5]
    shown.picture[0, -1] = 0
    assert (
        CDPruner(3, sign=1, theta=None).start(opened, shown).record
        == CDPruner(3, relevance=None).start(opened, shown).record
    )


def test_a_prompt_that_asks_nothing_leaves_the_others_alone() -> None:
    opened, generator = backend("llava"), torch.Generator().manual_seed(3)
    width = opened.model.config.text_config.hidden_size
    features = [torch.randn(20, width, generator=generator) for _ in range(2)]
    both = prompts([20, 20], words=1, features=features, questions=("", "red"))
    silent = prompts([20], words=1, features=features[:1])
    asked = prompts([20], words=1, features=features[1:], questions=("red",))
    pruner = CDPruner(6, theta=0.9)
    kept = [view.cells for view in pruner.start(opened, both).record.stages[0].views]
    alone = [pruner.start(opened, one).record.stages[0].views[0].cells for one in (silent, asked)]
    assert (
        kept == alone and alone[1] != CDPruner(6, relevance=None).start(opened, asked).record.stages[0].views[0].cells
    )


def test_a_question_of_broken_embeddings_is_refused() -> None:
    opened = fresh("llava")
    words = opened.model.get_input_embeddings().weight
    with torch.no_grad():
        words[opened.tokenizer("red", add_special_tokens=False).input_ids] = float("nan")
    shown = prompts([12], features=[torch.randn(12, words.shape[1])], questions=("red",))
    with pytest.raises(ScoreError, match="cosines of picture and question hold NaN"):
        CDPruner(4).start(opened, shown)


def test_pictures_do_not_influence_each_other_unless_published() -> None:
    opened, generator = backend("llava"), torch.Generator().manual_seed(3)
    width = opened.model.config.text_config.hidden_size
    base = torch.randn(width, generator=generator)
    features = [base + spread * torch.randn(20, width, generator=generator) for spread in (0.3, 3.0)]
    questions = ("red", "blue square")

    def kept(published: bool, which: Sequence[int]) -> list[tuple[int, ...]]:
        shown = prompts(
            [20] * len(which),
            features=[features[number] for number in which],
            questions=tuple(questions[number] for number in which),
        )
        pruning = CDPruner(6, sign=1, published=published).start(opened, shown)
        return [view.cells for view in pruning.record.stages[0].views]

    assert kept(False, [0, 1]) == kept(False, [0]) + kept(False, [1])
    assert kept(True, [0, 1]) != kept(True, [0]) + kept(True, [1])


def test_features_that_lack_rank_still_leave_as_many_as_asked_for() -> None:
    opened, generator = backend("llava"), torch.Generator().manual_seed(0)
    width = opened.model.config.text_config.hidden_size
    features = torch.randn(40, 3, generator=generator) @ torch.randn(3, width, generator=generator)
    for keep, expected in ((10, 10), (0.5, 20), (39, 39), (40, 40), (99, 40)):
        shown = prompts([40], features=[features], questions=("red",))
        assert CDPruner(keep).start(opened, shown).record.stages[0].kept == expected
    assert CDPruner(20, published=True).start(opened, shown).record.stages[0].kept < 20


# ---- prompts of each family


@pytest.mark.parametrize("name", PRUNED)
def test_keeping_all_changes_no_bit(name: str) -> None:
    opened = backend(name)
    laid = [opened.lay_out(one) for one in (seen(1), (Message.user(*pictures(1), "what ?"),))]
    for inputs in (laid[0].inputs, together(opened, laid)):
        plain = opened.model(**inputs, use_cache=True, logits_to_keep=1).logits[:, -1]
        for keep in (1.0, 10_000):
            questions = ["what is in the picture ?", "what ?"][: len(plain)]
            assert torch.equal(prefill_pruned(opened, inputs, CDPruner(keep), questions).logits, plain)


@pytest.mark.parametrize("name", PRUNED)
def test_a_batch_keeps_what_its_prompts_keep_alone(name: str) -> None:
    opened, pruner = backend(name), CDPruner(0.4)
    asked = [(Message.user(noise(WIDE, seed), text),) for seed, text in enumerate([QUESTION, "what colour ?"])]
    alone = [read(opened, one, pruner) for one in asked]
    batch = together(opened, [opened.lay_out(one) for one in asked])
    both = prefill_pruned(opened, batch, pruner, [one[-1].text for one in asked])
    assert cells(both) == [view for one in alone for view in cells(one)]
    torch.testing.assert_close(both.logits, torch.cat([one.logits for one in alone]), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", PRUNED)
def test_each_view_keeps_its_share_in_ascending_order(name: str) -> None:
    opened = backend(name)
    prefilled = read(opened, seen(2), CDPruner(3))
    for view in prefilled.record.stages[0].views:
        assert len(view.cells) == 3 < view.of and sorted(set(view.cells)) == list(view.cells)


def test_ends_of_lines_stay() -> None:
    opened = backend("llava_next")
    prompt = opened.lay_out(seen(2))
    image = opened.model.config.image_token_id
    prefilled = prefill_pruned(opened, prompt.inputs, CDPruner(3), [QUESTION])
    views = prefilled.record.stages[0].views
    ends = int((prompt.inputs["input_ids"] == image).sum()) - sum(view.of for view in views)
    assert ends > 0 and int((prefilled.token_ids == image).sum()) == 3 * len(views) + ends


def test_positions_of_three_directions_are_kept() -> None:
    flat, three = (read(backend(name), seen(1), CDPruner(2)) for name in ("llava", "qwen2_5_vl"))
    assert flat.positions.tolist() == [list(range(flat.positions.shape[1]))]
    whole = read(backend("qwen2_5_vl"), seen(1), CDPruner(1.0))
    assert three.positions.shape[0] == 3 and torch.equal(three.positions[..., -1], whole.positions[..., -1])
    compact = read(backend("qwen2_5_vl"), seen(1), CDPruner(2, positions="compact"))
    assert int(compact.positions.max()) == compact.positions.shape[-1] - 1
    kept = read(backend("llava"), seen(1), CDPruner(2, positions="kept"))
    assert int(kept.positions.max()) > kept.positions.shape[-1]


def test_threads_share_a_pruner() -> None:
    opened, pruner = backend("llava"), CDPruner(5)
    asked = [seen(1, question) for question in (QUESTION, OTHER)] * 4
    alone = [opened.answer(one, prune=pruner, max_new_tokens=4).text for one in asked]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda one: opened.answer(one, prune=pruner, max_new_tokens=4).text, asked)) == alone


def test_without_a_picture_there_is_nothing_to_do() -> None:
    opened = backend("llava")
    plain = opened.answer(QUESTION, max_new_tokens=4)
    assert opened.answer(QUESTION, prune=CDPruner(4), max_new_tokens=4).text == plain.text
    assert CDPruner(4).start(opened, prompts([0])).before() is None


def test_broken_features_are_refused() -> None:
    opened = fresh("llava")
    with torch.no_grad():
        opened.model.model.multi_modal_projector.linear_2.bias.fill_(float("nan"))
    with pytest.raises(ScoreError, match="features of the picture hold NaN"):
        opened.answer(seen(1), prune=CDPruner(4))


# ---- CLIP


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny CLIP whose special tokens come last, as in the published one, with a window of 16 tokens."""
    words = {word: number for number, word in enumerate(["!", *dict.fromkeys(WORDS.split()), "<s>", "</s>"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="!"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(token, words[token]) for token in ("<s>", "</s>")]
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    tokens = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="!")
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    text = dict(vocab_size=len(words), max_position_embeddings=16, bos_token_id=0, eos_token_id=2, **sizes)
    config = CLIPConfig(text_config=text, vision_config=dict(image_size=56, patch_size=14, **sizes), projection_dim=24)
    torch.manual_seed(0)
    model = CLIPModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    tokens.save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def text_features(folder: str, ids: list[int]) -> Tensor:
    model = CLIPModel.from_pretrained(folder)
    found: Tensor = model.text_projection(model.text_model(input_ids=torch.tensor([ids])).pooler_output)
    return found


def test_a_short_text_is_one_segment(clip: str) -> None:
    encoder = clip_text(clip, torch.device("cpu"))
    for published in (False, True):
        (ids,) = encoder.segments("what is in the picture ?", published=published)
        torch.testing.assert_close(
            encoder.texts("what is in the picture ?", published=published), text_features(clip, ids)
        )
    assert len(encoder.segments("")) == 1


def test_a_long_text_is_read_whole_in_segments_that_end(clip: str) -> None:
    encoder, other = clip_text(clip, torch.device("cpu")), " ".join(reversed(LONG.split()))
    assert [len(part) for part in encoder.segments(LONG)] == [16, 16, 4]
    torch.testing.assert_close(encoder.texts(LONG)[:1], text_features(clip, encoder.segments(LONG)[0]))
    assert not torch.allclose(encoder.texts(LONG)[0], encoder.texts(other)[0], atol=1e-3)
    assert [len(part) for part in encoder.segments(LONG, published=True)] == [16, 16]
    first = [encoder.texts(text, published=True)[0] for text in (LONG, other)]
    torch.testing.assert_close(first[0], first[1])  # what begins and does not end is the same for all texts


def test_clip_relevance_is_that_of_patches_and_question(clip: str) -> None:
    opened = fresh("llava")
    with torch.no_grad():
        opened.model.model.vision_tower.post_layernorm.bias.normal_()
    prompt = opened.lay_out(seen(1))
    prefilled = prefill_pruned(opened, prompt.inputs, CDPruner(1, text_encoder=clip), [QUESTION])
    model = CLIPModel.from_pretrained(clip)
    with torch.no_grad():
        tower = opened.model.model.vision_tower
        states = tower(prompt.inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][0, 1:]
        images = model.visual_projection(tower.post_layernorm(states))
    texts = clip_text(clip, torch.device("cpu")).texts(QUESTION)
    cosines = torch.cosine_similarity(images, texts)
    assert cells(prefilled) == [(int(cosines.argmin()),)]
    most = prefill_pruned(opened, prompt.inputs, CDPruner(1, text_encoder=clip, sign=1), [QUESTION])
    assert cells(most) == [(int(cosines.argmax()),)]


def test_a_norm_that_was_never_trained_is_not_used() -> None:
    opened = fresh("llava")
    assert tower_norm(opened.model) is None
    opened.model.model.vision_tower.post_layernorm.weight.mul_(2)
    assert tower_norm(opened.model) is opened.model.model.vision_tower.post_layernorm
    assert tower_norm(backend("qwen2_vl").model) is None


@pytest.mark.parametrize("name", ["qwen2_5_vl", "mqt_llava"])
def test_clip_needs_patches(name: str, clip: str) -> None:
    with pytest.raises(UnsupportedModelError, match="are not the patches of CLIP's tower: pass relevance='language'"):
        read(backend(name), seen(1), CDPruner(2, text_encoder=clip))


def test_clip_needs_a_question(clip: str) -> None:
    opened = backend("llava")
    with pytest.raises(InputError, match="needs a question"):
        prefill_pruned(opened, opened.lay_out(seen(1)).inputs, CDPruner(2, text_encoder=clip))


def test_clip_of_another_width_says_so(clip: str, qr_mini_vl: Backend) -> None:
    with pytest.raises(UnsupportedModelError, match=r"192 wide .* one of 32: pass as text_encoder"):
        read(qr_mini_vl, seen(1), CDPruner(2, text_encoder=clip))


@pytest.mark.parametrize("name", ["./nowhere", "qr-mini"])
def test_what_is_no_clip_is_refused(name: str) -> None:
    with pytest.raises(LoadError, match=r"pass (a folder|the CLIP model)"):
        read(backend("llava"), seen(1), CDPruner(2, text_encoder=name))
