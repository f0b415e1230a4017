"""Finding heads: on the bundled model, on a model with heads planted by hand, and in runs that are cut short."""

import gc
import json
import math
import os
import random
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

GOLDEN = Path(__file__).parents[1] / "golden" / "qrhead"
OBJECTIVES = ["qrscore", "ndcg", "contrastive"]
PLANTED = {(1, 2), (2, 0)}
LAYERS, HEADS, WIDTH, PER_HEAD, FAST = 3, 4, 256, 64, 4  # FAST: pairs of dimensions that RoPE turns quickly
RARE = [f"rare{i}" for i in range(120)]
COMMON = [f"common{i}" for i in range(20)]


def qr() -> Any:
    import qr_integrations  # not before jaxtyping's import hook is in place

    return qr_integrations


def detect(model: Any, lists: Any, state: Any = None, progress: Any = None, **options: Any) -> Any:
    return qr().HeadDetector(model, **options).detect(lists, data="made up", state=state, progress=progress)


def refused(says: str) -> Any:
    from qr_integrations.errors import InputError

    return pytest.raises(InputError, match=says)


# One list by every head


def naive(scores: np.ndarray, gold: set[int], objective: str, temperature: float) -> float:
    """One head on one list, written plainly."""
    from qr_integrations.evaluation import ndcg_at_k

    if objective == "qrscore":
        return float(sum(float(scores[n]) for n in gold))
    if objective == "ndcg":
        return ndcg_at_k(sorted(range(len(scores)), key=lambda n: -scores[n]), gold, 10)
    others = [float(scores[n]) / temperature for n in range(len(scores)) if n not in gold]
    return mean(1.0 / (1.0 + sum(math.exp(s - float(scores[n]) / temperature) for s in others)) for n in gold)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("documents", "gold"), [(20, {3}), (20, {0, 7, 19}), (4, {1, 2}), (30, set(range(13)))])
def test_an_objective_is_a_plain_loop_over_heads(objective: Any, documents: int, gold: set[int]) -> None:
    from qr_integrations.retrieval.detection import head_scores

    scores = 0.02 * torch.randn(7, documents, generator=torch.Generator().manual_seed(documents))
    scores[1] = 0.01  # ties keep the order
    scores[2] = (scores[2] * 50).round() / 50
    for temperature in (0.01, 0.3):
        expected = [naive(row, gold, objective, temperature) for row in scores.numpy()]
        found = head_scores(scores, gold, objective, temperature=temperature)
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found.numpy(), expected, rtol=2e-6, atol=1e-7)


def test_extreme_scores_do_not_overflow() -> None:
    from qr_integrations.retrieval.detection import head_scores

    scores = torch.tensor([[1e30, -1e30, 0.0], [-1e30, 1e30, 1e30], [1e5, 1e5, 1e5], [0.03, 0.01, 0.0]])
    by_default = math.exp(3) / (math.exp(3) + math.exp(1) + 1)  # attention masses of one head are told apart
    found = head_scores(scores, {0}, "contrastive")
    torch.testing.assert_close(found, torch.tensor([1.0, 0.0, 1 / 3, by_default]))
    assert head_scores(scores, {0}, "ndcg").tolist()[2] == 1.0
    assert torch.isfinite(head_scores(scores, {0, 1}, "qrscore")).all()


def test_the_score_of_a_head_is_that_of_the_authors_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random.Random, "shuffle", lambda self, x: None)
    case = json.loads((GOLDEN / "cases.json").read_text())[2]
    expected = np.load(GOLDEN / "scores.npz")[f"{case['id']}/per_head_detection"][[0, 2]].sum(0)
    documents = tuple(qr().Document(d["paragraph_text"], d.get("title")) for d in case["docs"])
    detector = qr().HeadDetector(qr().Backend.load(GOLDEN / case["model_dir"].strip("/")), first_occurrence=True)
    detection = detector.detect([qr().JudgedList(case["query"], documents, {0: 1, 1: 0, 2: 2})])
    clear = (np.load(GOLDEN / "scores.npz")[f"{case['id']}/per_head_threshold_margin"][[0, 2]] > 2e-5).all(0)
    assert clear.mean() > 0.9
    np.testing.assert_allclose(detection.grid()[clear], expected[clear], rtol=0, atol=1e-5)


# The bundled model


@pytest.fixture(scope="module")
def lists() -> list[Any]:
    from qr_integrations.bundled import read_detection_lists

    return read_detection_lists()[:8]


@pytest.fixture(scope="module")
def detection(qr_mini: Any, lists: list[Any]) -> Any:

    return detect(qr_mini, lists)


def test_a_few_lists_find_the_heads_that_ship(qr_mini: Any, detection: Any) -> None:
    shipped = qr().QRHeadReranker(qr_mini).heads
    assert set(detection.head_set(top_k=len(shipped)).heads) == set(shipped.heads)
    stability = detection.stability(top_k=len(shipped))
    assert stability.shared == stability.of == 5 and stability.rank_correlation > 0.7
    assert stability.by_chance == pytest.approx(25 / 16)


def test_heads_found_rank_other_questions_better_than_all_and_than_random_ones(qr_mini: Any, detection: Any) -> None:
    from qr_integrations.bundled import read_sample
    from qr_integrations.evaluation import ndcg_at_k
    from qr_integrations.retrieval.layout import Query
    from qr_integrations.retrieval.scoring import score_documents

    reranker = qr().QRHeadReranker(qr_mini, heads="all", keep_prefixes=0)
    rows = {head: row for row, head in enumerate(reranker.heads.heads)}
    asked = read_sample()[:15]
    read = [reranker.scorer.score(Query(q.question), q.documents, per_head=True) for q in asked]

    def ndcg(heads: Any) -> float:
        """As `rank` with these heads, from one pass for all choices of heads."""
        found = []
        for question, (layout, scores_KT) in zip(asked, read, strict=True):
            scores = score_documents(scores_KT[[rows[head] for head in heads]], layout.documents)
            found.append(ndcg_at_k(scores.argsort(descending=True, stable=True).tolist(), {question.gold}))
        return mean(found)

    draw = random.Random(0)
    best, every = ndcg(detection.head_set(top_k=5).heads), ndcg(rows)
    chance = mean(ndcg(draw.sample(sorted(rows), 5)) for _ in range(20))
    assert best > every + 0.03 and best > chance + 0.1


def test_a_limit_on_layers_changes_no_score(qr_mini: Any, lists: list[Any], detection: Any) -> None:

    capped = detect(qr_mini, lists, max_layer=1)
    kept = [i for i, head in enumerate(detection.heads) if head[0] <= 1]
    assert capped.heads == tuple(detection.heads[i] for i in kept)
    for objective in OBJECTIVES:
        assert capped.sums[objective] == [[half[i] for i in kept] for half in detection.sums[objective]]
        assert capped.ranked(objective) == detection.ranked(objective, max_layer=1)


# A model with planted heads


@pytest.fixture(scope="module")
def planted() -> Any:
    """A model whose heads look at everything alike, but for `PLANTED`, which look for the token they stand on."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from qr_integrations.retrieval.layout import FIND

    split = pre_tokenizers.Whitespace()
    prompt = f"Here are some paragraphs: [ ] N/A {' '.join(map(str, range(10)))} {FIND.format(query='')}"
    words = ["<unk>", *dict.fromkeys(word for word, _ in split.pre_tokenize_str(prompt)), *COMMON, *RARE]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    sizes = dict(hidden_size=WIDTH, intermediate_size=8, num_hidden_layers=LAYERS, max_position_embeddings=2048)
    sizes |= dict(num_attention_heads=HEADS, num_key_value_heads=HEADS, bos_token_id=None, eos_token_id=None)
    rope = {"rope_type": "default", "rope_theta": 1e30}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), rope_parameters=rope, **sizes)).eval()
    random_numbers = torch.Generator().manual_seed(1)
    slow = torch.ones(PER_HEAD)
    slow[:FAST] = slow[PER_HEAD // 2 : PER_HEAD // 2 + FAST] = 0.0
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(generator=random_numbers)
        for number, layer in enumerate(model.model.layers):
            layer.self_attn.q_proj.weight.zero_()
            layer.self_attn.o_proj.weight.zero_()  # the residual stream stays the embedding
            layer.mlp.down_proj.weight.zero_()
            for head in (h for la, h in PLANTED if la == number):
                basis = torch.linalg.qr(torch.randn(WIDTH, PER_HEAD, generator=random_numbers)).Q.T * slow[:, None]
                rows = slice(head * PER_HEAD, (head + 1) * PER_HEAD)
                layer.self_attn.q_proj.weight[rows] = 2.0 * basis
                layer.self_attn.k_proj.weight[rows] = basis
    return qr().Backend(model, PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>"), name="planted")


def made_up(number: int) -> list[Any]:
    """Lists of six documents; two of them hold the rare words of the question."""
    draw, found = random.Random(7), []
    for i in range(number):
        rare = draw.sample(RARE, 3 * 6)
        texts = [[*rare[3 * d : 3 * d + 3], *draw.choices(COMMON, k=9)] for d in range(6)]
        texts[4][:3] = rare[:3]
        for text in texts:
            draw.shuffle(text)
        documents = tuple(qr().Document(" ".join(text)) for text in texts)
        found.append(
            qr().JudgedList(" ".join([draw.choice(COMMON), *rare[:3]]), documents, {0: 1, 3: 0, 4: 2}, id=str(i))
        )
    return found


@pytest.fixture(scope="module")
def whole(planted: Any) -> Any:

    return detect(planted, made_up(20))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_exactly_the_planted_heads_are_found(whole: Any, objective: Any, tmp_path: Path) -> None:
    chosen = whole.head_set(objective, top_k=len(PLANTED))
    assert set(chosen.heads) == PLANTED
    scores = whole.scores(objective)
    lowest, highest = min(scores[h] for h in PLANTED), max(s for h, s in scores.items() if h not in PLANTED)
    assert lowest > highest + (0.05 if objective == "qrscore" else 0.2)
    assert set(whole.head_set(objective, top_k=1, max_layer=1).heads) == {(1, 2)}
    saved = whole.save(tmp_path / "heads.json", objective, top_k=len(PLANTED))
    assert saved == chosen == qr().HeadSet.load(tmp_path / "heads.json")
    assert (chosen.model, chosen.detection_data, chosen.objective) == ("planted", "made up", objective)
    entry = json.loads((tmp_path / "heads.json").read_text())
    assert {(layer, head): score for layer, head, score in entry["scores"]} == scores
    assert entry["lists"] == 20 and entry["seed"] == 0 and entry["versions"]["torch"] == torch.__version__


def test_the_stability_in_the_file_is_of_the_heads_in_the_file(whole: Any, tmp_path: Path) -> None:
    saved = whole.save(tmp_path / "heads.json", top_k=8, max_layer=0)
    entry = json.loads((tmp_path / "heads.json").read_text())
    assert len(saved) == HEADS and entry["split_half"]["of"] == HEADS


def test_layers_above_the_limit_do_not_run(planted: Any, monkeypatch: pytest.MonkeyPatch) -> None:

    _ = planted.attention_layers  # the survey runs all layers, once
    monkeypatch.setattr(planted.decoder.layers[2], "forward", Mock(side_effect=AssertionError("above max_layer")))
    assert detect(planted, made_up(3), max_layer=1).head_set(top_k=1).heads == ((1, 2),)
    with pytest.raises(AssertionError, match="above max_layer"):
        detect(planted, made_up(1))


def test_limits_that_leave_no_head_are_refused(planted: Any, whole: Any) -> None:
    for call in (lambda: qr().HeadDetector(planted, max_layer=-1), lambda: whole.head_set(max_layer=-1)):
        with refused("max_layer"):
            call()
    with refused("at least 1"):
        whole.head_set(top_k=0)
    assert len(whole.head_set(top_k=999)) == LAYERS * HEADS == len(whole.head_set(top_k=12))
    assert whole.head_set(top_k=12).heads[:5] == whole.head_set(top_k=5).heads


def test_lists_that_cannot_teach_are_refused_by_name(planted: Any) -> None:
    documents = (qr().Document("common1 rare1"), qr().Document("common2 rare2"))
    detector, good = qr().HeadDetector(planted), qr().JudgedList("rare1", documents, {0: 1})
    with refused("no lists"):
        detector.detect([])
    for relevance in ({}, {0: 0}, {0: 1, 1: 1}):
        with refused(r"#1 .*rare2"):
            detector.detect([good, qr().JudgedList("rare2", documents, relevance)])
    for place in (2, -1):
        with pytest.raises(ValueError, match=f"#{place} among 2"):
            qr().JudgedList("rare1", documents, {place: 1})


def test_lists_are_read_one_at_a_time(planted: Any) -> None:
    class Watched(str):
        """A text that can be watched."""

    alive: list[Any] = []

    def stream() -> Iterator[Any]:
        for judged in made_up(10):
            texts = [Watched(document.text) for document in judged.documents]
            alive.extend(weakref.ref(text) for text in texts)
            made = qr().JudgedList(judged.query, tuple(qr().Document(text) for text in texts), judged.relevance)
            del texts
            yield made
            del made
            gc.collect()
            assert sum(ref() is not None for ref in alive) <= 6  # the list just read

    calls: list[int] = []
    streamed = detect(planted, stream(), progress=calls.append)
    assert streamed.sums == detect(planted, made_up(10)).sums
    assert calls == list(range(1, 11))


# Runs cut short


def killed_after(number: int) -> Iterator[Any]:
    yield from made_up(20)[:number]
    raise TimeoutError


@pytest.fixture
def state(planted: Any, tmp_path: Path) -> Path:
    """What a run leaves that was killed after 12 lists."""

    path = tmp_path / "state.json"
    with pytest.raises(TimeoutError):
        detect(planted, killed_after(12), state=path)
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]
    return path


def test_a_killed_run_goes_on_and_gives_the_same_bytes(planted: Any, whole: Any, state: Path) -> None:

    with pytest.raises(TimeoutError):
        detect(planted, killed_after(17), state=state)
    calls: list[int] = []
    found = detect(planted, iter(made_up(20)), state=state, progress=calls.append)
    assert calls == [17, 18, 19, 20]  # what a state had seen is not read again
    assert found.sums == whole.sums and found.counts == whole.counts == (10, 10) and not state.exists()
    found.save(state.with_name("resumed.json"), top_k=3)
    whole.save(state.with_name("whole.json"), top_k=3)
    assert state.with_name("resumed.json").read_bytes() == state.with_name("whole.json").read_bytes()


@pytest.mark.parametrize("change", ["query", "relevance", "order", "fewer", "none"])
def test_a_state_of_other_lists_is_refused(planted: Any, state: Path, change: str) -> None:

    lists, before = made_up(20), state.read_bytes()
    other = {"query": replace(lists[5], query="rare1"), "relevance": replace(lists[5], relevance={1: 1})}
    lists[5] = other.get(change, lists[5])
    lists = {"fewer": lists[:4], "none": [], "order": [lists[1], lists[0], *lists[2:]]}.get(change, lists)
    with refused(r"remove it|no lists"):
        detect(planted, lists, state=state)
    assert state.read_bytes() == before


OTHER = [{"seed": 1}, {"temperature": 0.5}, {"max_layer": 1}, {"instruction": "common1"}, {"calibrated": False}]


@pytest.mark.parametrize("options", [*OTHER, {"model": "other"}], ids=str)
def test_a_state_of_other_settings_is_refused(planted: Any, state: Path, options: dict[str, Any]) -> None:
    model = qr().Backend(planted.model, planted.tokenizer, name="other") if options == {"model": "other"} else planted
    with refused("remove it"):
        detect(model, made_up(20), state=state, **{k: v for k, v in options.items() if k != "model"})


@pytest.mark.parametrize("damage", ["", "\x00\x01", "[]", "null", "{}", "cut", "identity", "sums", "shape", "done"])
def test_a_damaged_state_is_refused(planted: Any, state: Path, damage: str) -> None:

    entry = json.loads(state.read_text())
    wrong: dict[str, Any] = {"identity": [], "sums": "many", "shape": [[1.0]], "done": "eight"}
    text = damage
    if damage in wrong:
        text = json.dumps(entry | {"sums" if damage == "shape" else damage: wrong[damage]})
    state.write_text(state.read_text()[:-40] if damage == "cut" else text)
    with refused("remove it"):
        detect(planted, made_up(20), state=state)


def test_a_state_is_never_half_written(planted: Any, whole: Any, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    before = state.read_bytes()
    with monkeypatch.context() as patched, pytest.raises(OSError, match="no space"):
        patched.setattr(os, "replace", Mock(side_effect=OSError("no space")))
        detect(planted, made_up(20), state=state)
    assert state.read_bytes() == before and [p.name for p in state.parent.iterdir()] == ["state.json"]
    assert detect(planted, made_up(20), state=state).sums == whole.sums


# What two halves agree on


def by_hand(even: list[float], odd: list[float], heads: Any = None) -> Any:
    from qr_integrations.retrieval.detection import Detection

    heads = heads or tuple((0, h) for h in range(len(even)))
    return Detection(heads, {"qrscore": [even, odd]}, (3, 2), {"model": "m", "data": "d"})


def test_stability_compares_the_halves() -> None:
    same = by_hand([0.1, 0.4, 0.3, 0.2], [1.0, 4.0, 3.0, 2.0]).stability(top_k=2)
    assert (same.shared, same.of, same.by_chance) == (2, 2, 1.0) and same.rank_correlation == pytest.approx(1.0)
    opposite = by_hand([0.1, 0.4, 0.3, 0.2], [-0.1, -0.4, -0.3, -0.2]).stability(top_k=2)
    assert (opposite.shared, opposite.of) == (0, 2) and opposite.rank_correlation == pytest.approx(-1.0)
    every = by_hand([0.1, 0.4, 0.3, 0.2], [0.0, 0.4, 0.1, 0.2]).stability(top_k=16)
    assert (every.shared, every.of, every.by_chance) == (4, 4, 4.0)
    assert math.isnan(by_hand([0.1], [0.2]).stability().rank_correlation)


def test_heads_that_tie_share_a_rank_in_spearmans_correlation() -> None:
    found = by_hand([1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]).stability(top_k=1)
    assert found.rank_correlation == pytest.approx(-1 / 3)


def test_scores_are_means_and_the_grid_has_holes() -> None:
    found = by_hand([1.0, 2.0, 6.0], [0.5, 1.0, 4.0], heads=((1, 0), (1, 2), (3, 1)))
    grid = found.grid()
    assert grid.shape == (4, 3) and np.isnan(grid).sum() == 9
    assert [grid[head] for head in found.heads] == pytest.approx([0.3, 0.6, 2.0])
    assert found.ranked() == [(3, 1), (1, 2), (1, 0)] and found.ranked(max_layer=1) == [(1, 2), (1, 0)]
