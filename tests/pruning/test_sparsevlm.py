"""SparseVLM on tiny models of several families: what must hold whatever the weights."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from tests.backend.seeing import OTHER, QUESTION, backend, eager, fresh, seen

FAMILIES = ["llava", "llava_next", "qwen2_vl", "internvl"]
VERSIONS = ["1.0", "1.5", "2.0"]
RULE = (0.5, 1.0)  # of ranks up to the number of raters


def sparse(version: str = "1.5", keep: int | float = 0.5, **settings: Any) -> Any:
    from qr_integrations.pruning import SparseVLM

    return SparseVLM(keep, version, rank_rule=RULE if version == "1.0" else None, **settings)


def read(name: str, pruner: Any, *conversations: Any) -> Any:
    """Read prompts as one batch."""
    from qr_integrations.backend.surgery import prefill_pruned

    opened = backend(name)
    prompts = [opened.lay_out(one).inputs for one in conversations]
    longest = max(prompt["input_ids"].shape[1] for prompt in prompts)
    batch = {}
    for key, first in prompts[0].items():
        parts = [prompt[key] for prompt in prompts]
        if first.shape == prompts[0]["input_ids"].shape:
            parts = [pad(part, (longest - part.shape[1], 0)) for part in parts]
        batch[key] = torch.cat(parts)
    return prefill_pruned(opened, batch, pruner)


class Watched:
    """A pruner, and its own pass, that notes what it is given and what it leaves."""

    def __init__(self, settings: Any) -> None:
        self.settings = settings
        self.cuts: list[tuple[Any, Any, Any]] = []

    def start(self, backend: Any, seen: Any) -> Any:
        self.seen, self.pruning = seen, self.settings.start(backend, seen)
        self.layers, self.compact, self.record = self.pruning.layers, self.pruning.compact, self.pruning.record
        return self

    def before(self) -> None:
        return self.pruning.before()

    def rows(self, now: Any) -> Any:
        return self.pruning.rows(now)

    def after(self, layer: int, now: Any, attention: Any) -> Any:
        left = self.pruning.after(layer, now, attention)
        self.cuts.append((now, attention, left))
        return left


# ---- who drops nothing


@pytest.mark.parametrize("keep", [1.0, 10_000])
@pytest.mark.parametrize("version", ["1.5", "2.0"])
@pytest.mark.parametrize("name", FAMILIES)
def test_keeping_all_changes_no_bit(name: str, version: str, keep: int | float) -> None:
    opened = backend(name)
    plain = opened.model(**opened.lay_out(seen()).inputs, use_cache=True, logits_to_keep=1).logits[:, -1]
    found = read(name, sparse(version, keep), seen())
    assert torch.equal(found.logits, plain) and len(set(found.lengths)) == 1
    assert found.record.stages == [] and found.record.mean_tokens is None


# ---- who drops some


@pytest.mark.parametrize("version", ["1.5", "2.0"])
def test_as_many_stay_as_the_budgets_say(version: str) -> None:
    from qr_integrations.pruning.sparse_budgets import tokens_after

    opened, pruner = backend("llava"), sparse(version, 6)
    found = read("llava", pruner, seen(1))
    after = tokens_after(pruner.budgets_of(16, (0, 1, 2), 4), 16, pruner.recycles)
    words = len(opened.lay_out(seen(1))) - 16
    assert [length - words for length in found.lengths] == [16, *after]
    assert found.record.mean_tokens == pytest.approx(6, abs=0.5)
    assert json.loads(json.dumps(found.record.as_dict()))["mean_tokens"] == found.record.mean_tokens


@pytest.mark.parametrize("keep", [8, 25, 0.33, 64])
def test_the_bundled_model_reads_as_many_as_were_asked_for(qr_mini_vl: Any, keep: int | float) -> None:
    from PIL import Image

    from qr_integrations.types import Message

    asked = [Message.user(Image.new("RGB", (140, 140), "red"), "What colour is it?")]
    answer = qr_mini_vl.answer(asked, prune=sparse(keep=keep), max_new_tokens=4)
    wanted = keep if isinstance(keep, int) else 100 * keep
    assert answer.steps["prune"].mean_tokens == pytest.approx(wanted, abs=0.5)


@pytest.mark.parametrize("settings", [{}, {"positions": "kept"}, {"recycle": False}], ids=str)
@pytest.mark.parametrize("version", VERSIONS)
def test_words_stay_and_positions_are_counted_or_kept(version: str, settings: dict[str, Any]) -> None:
    watched = Watched(sparse(version, **settings))
    found = read("llava", watched, seen(), seen(1, OTHER))
    compact = version != "2.0" and not settings.get("positions")
    assert len(watched.cuts) == len(watched.layers) >= 2
    dropping = [(now, left) for now, _, left in watched.cuts if left is not None]
    assert dropping
    for now, left in dropping:
        taken = now.take(left, watched.compact)
        for prompt in range(2):
            words = now.source[prompt, now.mask[prompt] & ~now.visual[prompt]]
            assert torch.equal(taken.source[prompt, taken.mask[prompt] & ~taken.visual[prompt]], words)
            positions = taken.positions[prompt, taken.mask[prompt]]
            if compact:
                assert positions.tolist() == list(range(len(positions)))
            elif left.merged is None:
                assert bool((positions.diff() > 0).all())
                assert torch.equal(positions, watched.seen.positions[prompt, taken.source[prompt, taken.mask[prompt]]])
    assert found.compact == compact


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_reads_as_its_prompts_alone(name: str, version: str) -> None:
    conversations = [seen(2), seen(2, OTHER)]
    alone = [read(name, sparse(version), one) for one in conversations]
    both = read(name, sparse(version), *conversations)
    torch.testing.assert_close(both.logits, torch.cat([one.logits for one in alone]), atol=2e-5, rtol=1e-4)
    assert both.lengths == tuple(map(max, zip(*(one.lengths for one in alone), strict=True)))
    if version == "1.0":  # by rank, one prompt may lose nothing where the other one does
        return
    for stage, *theirs in zip(both.record.stages, *(one.record.stages for one in alone), strict=True):
        assert [view.cells for view in stage.views] == [view.cells for one in theirs for view in one.views]


def test_prompts_without_pictures_go_along() -> None:
    from qr_integrations.backend.surgery import prefill_pruned

    opened = backend("llava")
    shown, plain = opened.lay_out(seen(1)).inputs, opened.lay_out(QUESTION).inputs
    alone = read("llava", sparse(), seen(1))
    short = shown["input_ids"].shape[1] - plain["input_ids"].shape[1]
    batch = {key: torch.cat([shown[key], pad(plain[key], (short, 0))]) for key in ("input_ids", "attention_mask")}
    both = prefill_pruned(opened, batch | {"pixel_values": shown["pixel_values"]}, sparse())
    expected = opened.model(**plain).logits[:, -1]
    torch.testing.assert_close(both.logits, torch.cat([alone.logits, expected]), atol=2e-5, rtol=1e-4)


# ---- who rates, and what


def test_the_best_rated_stay() -> None:
    """By the model's own eager attention, all of it."""
    watched = Watched(sparse(keep=6, recycle=False))
    read("llava", watched, seen())
    now, _, left = watched.cuts[0]
    prompt = backend("llava").lay_out(seen())
    with torch.no_grad():
        matrices = eager("llava")(**prompt.inputs, output_attentions=True).attentions[watched.layers[0]][0]
    raters, visual = torch.tensor(watched.record.raters[0]), now.visual[0].nonzero()[:, 0]
    scores = matrices.mean(0)[raters].mean(0)[visual]
    best = visual[scores.argsort(descending=True)[: 2 * watched.settings.budgets_of(16, (0, 1, 2), 4)[0]]]
    assert sorted(best.tolist()) == [place for place in left.kept[0].tolist() if now.visual[0, place]]


def test_only_the_raters_rows_are_read() -> None:
    watched = Watched(sparse())
    read("llava", watched, seen(), seen(1, OTHER))
    for now, attention, _ in watched.cuts:
        for prompt, rows in enumerate(attention):
            assert rows.shape[1:] == (len(watched.record.raters[prompt]), now.mask.shape[1])
            sources = now.source[prompt, watched.rows(now)[prompt]]
            assert tuple(sources.tolist()) == watched.record.raters[prompt]


def test_pictures_compete_for_a_budget_of_each() -> None:
    found = read("llava", sparse(keep=6, recycle=False), seen(2))
    alone = read("llava", sparse(keep=6, recycle=False), seen(1))
    assert [stage.kept for stage in found.record.stages] == [2 * stage.kept for stage in alone.record.stages]
    assert found.record.mean_tokens == alone.record.mean_tokens


def test_ends_of_lines_and_markers_of_pictures_do_not_rate() -> None:
    watched = Watched(sparse())
    read("llava_next", watched, seen())
    assert all(int(watched.seen.picture[0, place]) < 0 for place in watched.record.raters[0])
    last = int(watched.seen.visual[0].nonzero()[-1])
    assert all(place > last for place in watched.record.raters[0])


@pytest.mark.parametrize(("heads", "floor"), [(1, 0.1), (4, None), (14, 1.0)])
def test_gravity_and_heads_have_their_say(heads: int, floor: float | None) -> None:
    """Scored again from full matrices and a rotation of ones."""
    watched = Watched(sparse("2.0", 6, heads=heads, gravity_floor=floor))
    read("llava", watched, seen(1))
    now, _, left = watched.cuts[0]
    with torch.no_grad():
        inputs = backend("llava").lay_out(seen(1)).inputs
        matrices = eager("llava")(**inputs, output_attentions=True).attentions[watched.layers[0]][0]
    rotary = backend("llava").decoder.rotary_emb
    visual, raters = now.visual[0].nonzero()[:, 0], torch.tensor(watched.record.raters[0])
    angles = (now.positions[0, raters][:, None] - now.positions[0, visual])[..., None] * rotary.inv_freq
    weights = angles.cos().sum(-1) * 2 / (2 * len(rotary.inv_freq)) ** 0.5
    weights = weights if floor is None else weights.clamp(min=floor * (2 * len(rotary.inv_freq)) ** 0.5)
    corrected = matrices[:, raters][..., visual] / weights
    heard = corrected.sum((1, 2)).argsort(descending=True)[:heads]
    best = visual[
        corrected[heard].mean((0, 1)).argsort(descending=True)[: watched.settings.budgets_of(16, (0, 1, 2), 4)[0]]
    ]
    assert sorted(best.tolist()) == [place for place in left.kept[0].tolist() if now.visual[0, place]]


def test_the_rank_says_how_many_stay() -> None:
    pruner = sparse("1.0")
    few = torch.rand(4, 3, 40)
    assert pruner.count(40, few) == int(0.5 * 3 + 1.0)
    assert pruner.count(40, few.repeat(1, 2, 1)) == 2  # raters of one mind count once
    assert pruner.count(3, torch.rand(4, 9, 3)) == 3  # of full rank: nothing goes


@pytest.mark.parametrize("version", ["1.5", "2.0"])
def test_one_goes_at_least_where_it_is_asked_for(version: str) -> None:
    found = read("llava", sparse(version, 1.0, always_drop=True), seen(1))
    stages = found.record.stages
    assert [stage.of - stage.kept - stage.merged_before for stage in stages] == [1, 1, 1]


def test_draws_are_the_same_for_a_seed() -> None:
    one, same = (read("llava", sparse(noise_seed=3), seen()).logits for _ in range(2))
    assert torch.equal(one, same)


# ---- answers


@pytest.mark.parametrize(
    "generation", [{}, {"num_beams": 2}, {"temperature": 3.0, "seed": 1}, {"deco": True, "num_beams": 2}], ids=str
)
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_answers_go_on_from_fewer_tokens(name: str, version: str, generation: dict[str, Any]) -> None:
    from qr_integrations.decoding import DeCo

    steps = {"deco": DeCo(layers=(1, 2))} if generation.get("deco") else {}
    given: Any = {key: value for key, value in generation.items() if key != "deco"} | steps
    answers = [backend(name).answer(seen(), prune=sparse(version), max_new_tokens=4, **given) for _ in range(2)]
    assert answers[0].text == answers[1].text
    assert answers[0].steps["prune"].stages and answers[0].usage.completion_tokens >= 1


@pytest.mark.parametrize("version", VERSIONS)
def test_eager_attention_answers_the_same(version: str) -> None:
    opened = fresh("llava")
    plain = opened.answer(seen(), prune=sparse(version), max_new_tokens=4)
    opened.model.set_attn_implementation("eager")
    assert opened.answer(seen(), prune=sparse(version), max_new_tokens=4).text == plain.text


def test_threads_do_not_mix_their_prompts() -> None:
    asked = [(sparse(version), seen(count)) for version in VERSIONS for count in (1, 2)]

    def say(job: tuple[Any, Any]) -> str:
        return backend("llava").answer(job[1], prune=job[0], max_new_tokens=3).text

    alone = [say(job) for job in asked]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(say, asked)) == alone


# ---- refusals


@pytest.mark.parametrize(
    ("settings", "cure"),
    [
        ({"keep": 0}, "from 1"),
        ({"keep": 1.5}, "share"),
        ({"version": "3.0"}, "pass '1.0', '1.5' or '2.0'"),
        ({"layers": ()}, r"\(2, 6, 15\)"),
        ({"layers": (6, 2)}, r"\(2, 6, 15\)"),
        ({"layers": (-1, 2)}, r"\(2, 6, 15\)"),
        ({"budgets": (5, 0)}, "from 1"),
        ({"layers": (0, 1), "budgets": (9, 8, 7)}, "one budget for each layer"),
        ({"heads": 0}, "at least 1"),
        ({"gravity_floor": 0.0}, "above 0"),
        ({"positions": "anew"}, "compact"),
        ({"version": "1.0", "budgets": (5, 4)}, "rank_rule"),
        ({"version": "1.0", "keep": 100}, "rank_rule"),
        ({"version": "2.0", "rank_rule": (1.0, 0.0)}, "version='1.0'"),
    ],
    ids=str,
)
def test_settings_out_of_range(settings: dict[str, Any], cure: str, unchecked: None) -> None:
    from qr_integrations.errors import InputError
    from qr_integrations.pruning import SparseVLM

    with pytest.raises(InputError, match=cure):
        SparseVLM(**settings)


def test_settings_go_through_json(unchecked: None) -> None:
    from dataclasses import asdict

    from qr_integrations.pruning import SparseVLM

    given = SparseVLM(layers=(0, 2), budgets=(9, 4), version="2.0")
    assert SparseVLM(**json.loads(json.dumps(asdict(given)))) == given
    assert SparseVLM(**json.loads(json.dumps(asdict(sparse("1.0"))))) == sparse("1.0")


@pytest.mark.parametrize("layers", [(0, 3), (1, 6)])
def test_layers_that_the_model_has_not(layers: tuple[int, ...]) -> None:
    from qr_integrations.errors import InputError

    with pytest.raises(InputError, match=r"4 layers, .* pass layers=\(...\) up to 2"):
        read("llava", sparse(layers=layers), seen())


def test_a_budget_too_many() -> None:
    from qr_integrations.errors import InputError

    with pytest.raises(InputError, match=r"2 budgets for layers \(0, 1, 2\)"):
        read("llava", sparse(budgets=(5, 4)), seen())


def test_somebody_must_rate() -> None:
    from dataclasses import replace

    from qr_integrations.errors import InputError

    watched = Watched(sparse())
    read("llava", watched, seen(1))
    last = int(watched.seen.visual[0].nonzero()[-1]) + 1
    names = ("states", "mask", "positions", "picture", "view", "cell", "source")
    silent = replace(watched.seen, **{name: getattr(watched.seen, name)[:, :last] for name in names})
    with pytest.raises(InputError, match="put the question there"):
        sparse().start(backend("llava"), silent)


def test_numbers_that_are_none_choose_nothing() -> None:
    from qr_integrations.errors import ScoreError

    watched = Watched(sparse())
    read("llava", watched, seen(1))
    now, attention, _ = watched.cuts[0]
    broken: list[Tensor] = [rows * torch.nan for rows in attention]
    with pytest.raises(ScoreError, match="load the model with dtype"):
        watched.pruning.after(watched.layers[0], now, broken)


@pytest.mark.parametrize(("keep", "layers"), [(0.5, (2, 3, 4)), (0.33, (2, 3, 4)), (0.2, (1, 2, 3)), (0.1, (0, 1, 3))])
def test_the_first_cut_comes_earlier_only_where_it_must(qr_mini_vl: Any, keep: float, layers: tuple[int, ...]) -> None:
    from PIL import Image

    from qr_integrations.pruning import SparseVLM
    from qr_integrations.types import Message

    asked = [Message.user(Image.effect_noise((300, 200), 90).convert("RGB"), "what color is the box ?")]
    record = qr_mini_vl.answer(asked, prune=SparseVLM(keep=keep), max_new_tokens=1).steps["prune"]
    assert tuple(stage.layer for stage in record.stages) == layers
    assert record.mean_tokens == pytest.approx(100 * keep, abs=1)
