"""Similarity of layers: its properties on made-up states, groups on made-up matrices, probes, and the bundled tower."""

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor

if TYPE_CHECKING:
    from qr_integrations.backend import Backend

LAYERS, TOKENS, WIDTH = 7, 10, 16
BAND, MIDDLE, DEEP = range(0, 12), range(13, 21), range(21, 25)


def rooms() -> Any:
    from qr_integrations.encoding import layers

    return layers


def probing() -> Any:
    from qr_integrations.encoding import layer_probes

    return layer_probes


def made_up(count: int = 6, layers: int = LAYERS, seed: int = 0) -> Tensor:
    """States [layers, pictures, tokens, width] that drift from layer to layer."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(layers, count, TOKENS, WIDTH, generator=generator).cumsum(0)


def batches(states: Tensor, batch_size: int = 100, class_token: bool = False) -> Iterator[Any]:
    from qr_integrations.backend.tower_states import TowerStates

    numbers = torch.arange(states.shape[1])[:, None].expand(-1, states.shape[2])
    cell = torch.arange(states.shape[2])[None].expand_as(numbers) - int(class_token)
    for first in range(0, states.shape[1], batch_size):
        some = slice(first, first + batch_size)
        number, place = numbers[some].flatten(), cell[some].flatten()
        yield TowerStates(states[:, some].flatten(1, 2), number, place >= 0, place)


def similarity(states: Tensor, batch_size: int = 100, class_token: bool = False, **options: Any) -> Any:
    return rooms().similarity_of_states(batches(states, batch_size, class_token), **options)


# ---- similarity


def test_it_is_the_mean_cosine_of_tokens() -> None:
    states = made_up()
    found = similarity(states)
    each = torch.nn.functional.cosine_similarity(states[:, None], states[None], dim=-1).double().numpy()
    by_picture = each.mean(-1)
    np.testing.assert_allclose(found.matrix, by_picture.mean(-1), atol=1e-6)
    np.testing.assert_allclose(found.error, by_picture.std(-1, ddof=1) / np.sqrt(6), atol=1e-6)
    assert found.num_pictures == 6 and found.num_layers == LAYERS - 1
    np.testing.assert_array_equal(found.adjacent, [found.matrix[i, i + 1] for i in range(LAYERS - 1)])


@pytest.mark.parametrize("compare", ["tokens", "mean", "flat"])
def test_it_is_symmetric_with_ones_on_the_diagonal(compare: str) -> None:
    matrix = similarity(made_up(), compare=compare).matrix
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-6)
    np.testing.assert_allclose(np.diag(matrix), 1.0, atol=1e-5)
    assert np.abs(matrix).max() <= 1.0


def test_other_comparisons_are_what_they_say() -> None:
    states = made_up()
    mean, flat = states.mean(2), states.flatten(2)
    for compare, vectors in (("mean", mean), ("flat", flat)):
        expected = torch.nn.functional.cosine_similarity(vectors[:, None], vectors[None], dim=-1).mean(-1)
        np.testing.assert_allclose(similarity(states, compare=compare).matrix, expected, atol=1e-5)


def test_the_length_of_states_and_a_common_rotation_do_not_matter() -> None:
    states = made_up()
    generator = torch.Generator().manual_seed(1)
    scales = torch.rand(*states.shape[:-1], 1, generator=generator) + 0.1
    rotation = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator))[0]
    expected = similarity(states).matrix
    np.testing.assert_allclose(similarity(states * scales).matrix, expected, atol=1e-5)
    np.testing.assert_allclose(similarity(states @ rotation).matrix, expected, atol=1e-5)
    assert np.abs(similarity(states * scales, compare="flat").matrix - expected).max() > 1e-3


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_neither_order_nor_batches_matter(batch_size: int) -> None:
    states = made_up()
    whole, streamed = similarity(states), similarity(states.flip(1), batch_size)
    np.testing.assert_allclose(streamed.matrix, whole.matrix, atol=1e-6)
    np.testing.assert_allclose(streamed.error, whole.error, atol=1e-6)


def test_layers_that_do_nothing_are_all_alike() -> None:
    found = similarity(made_up(layers=1).expand(LAYERS, -1, -1, -1))
    np.testing.assert_allclose(found.matrix, 1.0, atol=1e-6)
    np.testing.assert_allclose(found.error, 0.0, atol=1e-6)


def test_class_tokens_count_only_if_asked_for() -> None:
    states = made_up()
    odd = states.clone()
    odd[3, :, 0] *= -1  # the class token turns around in one layer
    told = [similarity(one, class_token=True).matrix for one in (states, odd)]
    np.testing.assert_array_equal(*told)
    told = [similarity(one, class_token=True, tokens="all").matrix for one in (states, odd)]
    assert np.abs(told[0] - told[1]).max() > 0.05


def test_one_picture_has_no_error_and_none_is_refused() -> None:
    from qr_integrations.errors import InputError

    found = similarity(made_up(1))
    assert np.isnan(found.error).all()
    told = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert told["error"][0] == [None] * LAYERS and told["num_layers"] == LAYERS - 1
    with pytest.raises(InputError, match="no pictures"):
        rooms().similarity_of_states(iter(()))


def test_numbers_that_are_none_are_refused() -> None:
    from qr_integrations.errors import ScoreError

    states = made_up()
    states[2, 1, 3] = torch.nan
    with pytest.raises(ScoreError, match="NaN"):
        similarity(states)


def test_the_bundled_tower(qr_mini_vl: "Backend") -> None:
    from qr_integrations.evaluation.layer_skills import skill_scenes

    pictures = [one.picture() for one in skill_scenes(6)]
    found = rooms().layer_similarity(qr_mini_vl, pictures, batch_size=4)
    with torch.no_grad():
        pixels = qr_mini_vl.processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
        tower = qr_mini_vl.model.base_model.vision_tower
        states = torch.stack(tower(pixels, output_hidden_states=True).hidden_states)[:, :, 1:]
    np.testing.assert_allclose(found.matrix, similarity(states).matrix, atol=1e-5)
    assert (found.tower, found.feature_layers) == ("qr-mini-vl", (11,))
    assert found.matrix[0, 12] < 0.4 < 0.9 < found.adjacent[1:-2].min()


# ---- groups


def like_the_figure(seed: int | None = None) -> np.ndarray:
    """As the paper's figure reads: a wide band, layer 12 between, and two tight blocks."""

    def read(a: int, b: int) -> float:
        gap = b - a
        if a in DEEP:
            return 0.9 - 0.03 * (gap - 1)
        if a in MIDDLE and b in MIDDLE:
            return max(0.75, 0.97 - 0.03 * (gap - 1))
        if a == 12 and b in MIDDLE:
            return 0.65
        if a in BAND:
            return max(0.1, 0.95 - 0.1 * gap) if b <= 12 else max(0.1, 0.7 - 0.06 * gap) if b in MIDDLE else 0.05
        return 0.5

    matrix = np.eye(25)
    for a in range(25):
        for b in range(a + 1, 25):
            matrix[a, b] = matrix[b, a] = read(a, b)
    if seed is not None:
        noise = np.random.default_rng(seed).normal(0, 0.02, (25, 25))
        matrix += np.where(np.eye(25), 0, (noise + noise.T) / 2)
    return matrix


@pytest.mark.parametrize("rule", ["novelty", "adjacent"])
@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_the_groups_of_the_paper_are_found(rule: str, seed: int | None) -> None:
    assert rooms().group_layers(like_the_figure(seed), 3, rule) == (range(0, 13), range(13, 21), range(21, 25))


@pytest.mark.parametrize("rule", ["novelty", "adjacent"])
def test_blocks_are_cut_where_they_end(rule: str) -> None:
    ends = [0, 4, 9, 13]
    direction = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)))[0][:3]
    block = torch.repeat_interleave(torch.arange(3), torch.tensor(ends).diff())
    states = direction[block][:, None, None].expand(-1, 2, TOKENS, -1)
    assert rooms().group_layers(similarity(states), 3, rule) == (range(0, 4), range(4, 9), range(9, 13))


@pytest.mark.parametrize("rule", ["novelty", "adjacent"])
def test_one_group_and_as_many_as_layers(rule: str) -> None:
    for matrix in (like_the_figure(), np.ones((25, 25))):
        assert rooms().group_layers(matrix, 1, rule) == (range(0, 25),)
        assert rooms().group_layers(matrix, 25, rule) == tuple(range(layer, layer + 1) for layer in range(25))
        for count in range(2, 25):
            groups = rooms().group_layers(matrix, count, rule)
            assert len(groups) == count and [la for group in groups for la in group] == list(range(25))
    assert rooms().group_layers(np.ones((1, 1)), 1) == (range(0, 1),)


def test_cuts_keep_apart_while_there_is_room() -> None:
    matrix = like_the_figure()
    groups = rooms().group_layers(matrix, 5, apart=4)
    assert min(map(len, groups[1:-1])) > 4
    close = rooms().group_layers(matrix, 5, "adjacent", apart=0)
    strengths = rooms().cut_strengths(matrix, "adjacent")
    cuts = {group[0] - 1 for group in close[1:]}
    assert min(strengths[list(cuts)]) >= max(s for cut, s in enumerate(strengths) if cut not in cuts)


def test_novelty_of_equal_layers_is_zero_and_a_step_is_seen() -> None:
    np.testing.assert_allclose(rooms().cut_strengths(np.ones((9, 9))), 0.0, atol=1e-12)
    steps = np.kron(np.eye(2), np.ones((4, 4)))
    assert rooms().cut_strengths(steps).argmax() == 3 and rooms().cut_strengths(steps)[3] == pytest.approx(2.0)


def test_representatives() -> None:
    matrix = like_the_figure()
    groups = rooms().group_layers(matrix)
    medoid = rooms().representatives(matrix, groups, "medoid")
    for layer, group in zip(medoid, groups, strict=True):
        assert layer in group
        assert matrix[layer, list(group)].mean() == max(matrix[la, list(group)].mean() for la in group)
    assert rooms().representatives(matrix, groups) == (*medoid[:-1], 23)
    assert rooms().representatives(matrix) == rooms().representatives(matrix, groups)


@pytest.mark.parametrize(
    ("layers", "chosen"), [(24, (3, 18, 23)), (48, (6, 36, 46)), (12, (1, 9, 11)), (2, (1, 2)), (1, (1,)), (0, (0,))]
)
def test_the_papers_layers_at_other_depths(layers: int, chosen: tuple[int, ...]) -> None:
    assert rooms().representatives(np.eye(layers + 1), rule="paper") == chosen


def test_a_last_group_of_one_layer_is_that_layer() -> None:
    groups = (range(0, 3), range(3, 4))
    assert rooms().representatives(np.eye(4), groups)[-1] == 3


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: rooms().group_layers(np.eye(4), 5), "5 groups of 4 layers"),
        (lambda: rooms().group_layers(np.eye(4), 0), "pass 1 to 4"),
        (lambda: rooms().group_layers(np.eye(4), 2, apart=-1), "apart=-1"),
        (lambda: rooms().cut_strengths(np.eye(4), window=0), "window=0"),
        (lambda: rooms().cut_strengths(np.full((3, 3), np.nan)), "no similarity of layers"),
        (lambda: rooms().representatives(np.eye(4), [range(0, 2)]), "no groups of layers 0 to 3"),
        (lambda: rooms().representatives(np.eye(4), [range(0, 4), range(4, 4)]), "no groups"),
    ],
)
def test_what_is_refused(call: Any, told: str) -> None:
    from qr_integrations.errors import InputError

    with pytest.raises(InputError, match=told):
        call()


def test_unknown_settings_are_refused(unchecked: None) -> None:
    from qr_integrations.errors import InputError

    for call in (
        lambda: similarity(made_up(), compare="median"),
        lambda: similarity(made_up(), tokens="class"),
        lambda: rooms().group_layers(np.eye(4), 2, "kmeans"),
        lambda: rooms().representatives(np.eye(4), rule="best"),
        lambda: probing().probe_layers(torch.randn(1, 9, 2), ["a", "b", "c"] * 3, probe="svm"),
    ):
        with pytest.raises(InputError, match="is not known: pass '"):
            call()


# ---- probes


def knowing(
    layers: Sequence[float], count: int = 200, classes: int = 3, width: int = 8, seed: int = 0
) -> tuple[Tensor, list[str]]:
    """States in which layer i shifts each class by ``layers[i]`` along an axis of its own."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    shift = torch.nn.functional.one_hot(labels, width).float()
    states = torch.stack([torch.randn(count, width, generator=generator) + size * shift for size in layers])
    return states, [f"class {label}" for label in labels.tolist()]


@pytest.mark.parametrize("probe", ["ridge", "knn"])
def test_probes_find_the_layer_that_knows(probe: str) -> None:
    states, labels = knowing([0.0, 2.0, 8.0])
    found = probing().probe_layers(states, labels, probe=probe)
    assert found.best == 2 and found.accuracy[2] == 1.0 and found.as_good_as_best == (2,)
    assert found.accuracy[0] < 0.5 < found.accuracy[1] < 1.0
    assert abs(found.guess - 1 / 3) < 0.1 and found.classes == ("class 0", "class 1", "class 2")
    assert (found.num_learned, found.num_held_out) == (120, 80)
    assert bool((found.low <= found.accuracy).all()) and bool((found.accuracy <= found.high).all())
    json.dumps(found.as_dict(), allow_nan=False)


def test_a_ridge_probe_is_least_squares_with_the_strength_that_leaves_out_best() -> None:
    states, labels = knowing([1.0], count=40)
    learned = probing()._standardised(states[0].double(), torch.ones(40, dtype=torch.bool))
    told = torch.tensor([int(label[-1]) for label in labels])
    one_hot = torch.nn.functional.one_hot(told).double()

    def fit(rows: Tensor, strength: float, asked: Tensor) -> Tensor:
        """Ridge whose offset is not shrunk: the plain solution."""
        x, y = learned[rows], one_hot[rows]
        centre, mean = x.mean(0), y.mean(0)
        gram = (x - centre).T @ (x - centre) + strength * torch.eye(x.shape[1], dtype=x.dtype)
        return (asked - centre) @ torch.linalg.solve(gram, (x - centre).T @ (y - mean)) + mean

    def left_out(strength: float) -> float:
        everyone = torch.arange(40)
        said = [fit(everyone != one, strength, learned[one]).argmax() == told[one] for one in everyone]
        return float(torch.stack(said).double().mean())

    strengths = [40 * one for one in probing()._STRENGTHS]
    best = max(strengths, key=lambda one: (left_out(one), one))
    asked = torch.randn(50, learned.shape[1], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = fit(torch.arange(40), best, asked).argmax(1)
    assert torch.equal(probing()._ridge(learned, told, asked, 3), expected)


def test_nothing_can_be_read_from_noise() -> None:
    states, labels = knowing([0.0, 0.0, 0.0], count=400, classes=2)
    found = probing().probe_layers(states, labels)
    assert bool((found.low < 0.55).all()) and bool((found.high > 0.45).all())
    assert len(found.as_good_as_best) >= 2


def test_patches_of_a_picture_are_not_parted() -> None:
    """Each picture has a look of its own and a random label: only who has seen the picture can know it."""
    generator = torch.Generator().manual_seed(0)
    looks, labels = torch.randn(60, 32, generator=generator), np.random.default_rng(0).integers(0, 2, 60)
    states = (looks.repeat_interleave(6, 0) + 0.01 * torch.randn(360, 32, generator=generator))[None]
    told, pictures = np.repeat(labels, 6).tolist(), np.repeat(np.arange(60), 6).tolist()
    cheating = probing().probe_layers(states, told, probe="knn", neighbours=1)
    honest = probing().probe_layers(states, told, groups=pictures, probe="knn", neighbours=1)
    assert cheating.accuracy[0] == 1.0 and honest.accuracy[0] < 0.75
    assert honest.high[0] - honest.low[0] > 0.15  # 24 pictures, not 144 patches


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"labels": ["a", "b"]}, "2 labels"),
        ({"labels": ["a"] * 9}, "at least two"),
        ({"held_out": 1.0}, "held_out=1.0"),
        ({"neighbours": 0}, "neighbours=0"),
        ({"held_out": 0.01}, "cannot be split"),
        ({"groups": [0] * 9}, "1 groups"),
        ({"labels": ["a"] * 8 + ["b"], "groups": [0] * 8 + [1], "held_out": 0.5}, "all of one class"),
    ],
)
def test_what_cannot_be_probed(options: dict[str, Any], told: str) -> None:
    from qr_integrations.errors import InputError

    given = {"labels": ["a", "b", "c"] * 3} | options
    with pytest.raises(InputError, match=told):
        probing().probe_layers(torch.randn(2, 9, 4), **given)


def test_features_are_means_and_the_patch_at_a_place(qr_mini_vl: "Backend") -> None:
    from qr_integrations.backend.tower_states import open_tower
    from qr_integrations.errors import InputError
    from qr_integrations.evaluation.layer_skills import skill_scenes

    pictures = [one.picture() for one in skill_scenes(3)]
    (states,) = open_tower(qr_mini_vl).states(pictures)
    patches = states.states[:, states.patch].unflatten(1, (3, 100))
    found = probing().picture_features(qr_mini_vl, pictures, [(0.0, 0.0), (0.55, 0.19), (1.0, 1.0)], batch_size=2)
    torch.testing.assert_close(found.mean, patches.mean(2), rtol=1e-4, atol=1e-4)
    expected = torch.stack([patches[:, 0, 0], patches[:, 1, 15], patches[:, 2, 99]], 1)
    torch.testing.assert_close(found.at, expected, rtol=1e-4, atol=1e-4)
    wide = pictures[0].resize((80, 40))
    for given, places, told in (
        (pictures, [(0.0, 0.0)], "3 pictures and 1 places"),
        (pictures[:1], [(30.0, 45.0)], r"\(30.0, 45.0\) is no place: pass shares"),
        (pictures[:1], [(float("nan"), 0.5)], "is no place"),
        ([wide], [(0.9, 0.5)], "80 x 40 pixels: cut or pad it"),
    ):
        with pytest.raises(InputError, match=told):
            probing().picture_features(qr_mini_vl, given, places)
    assert probing().picture_features(qr_mini_vl, [wide]).at is None


def test_places_are_refused_where_they_are_not_known() -> None:
    from qr_integrations.errors import UnsupportedModelError
    from tests.backend.seeing import backend, pictures

    square = pictures(3)[2]
    for family in ("llava_next", "qwen2_5_vl"):
        features = probing().picture_features(backend(family), pictures(1))
        assert features.at is None and features.mean.shape[:2] == (3, 1)
        with pytest.raises(UnsupportedModelError, match="leave out places"):
            probing().picture_features(backend(family), [square], [(0.5, 0.5)])


def test_skills_of_the_drawn_world(qr_mini_vl: "Backend") -> None:
    from qr_integrations.evaluation.layer_skills import SKILLS, probe_skills, skill_scenes

    found = probe_skills(qr_mini_vl, 60)
    assert tuple(found) == SKILLS and all(len(one.accuracy) == 13 for one in found.values())
    assert found["color"].accuracy[11] > found["color"].accuracy[0] + 0.1
    assert found["color"].accuracy[11] > 3 * found["color"].guess
    scenes = skill_scenes(60)
    assert all(one.scene.width == one.scene.height for one in scenes)
    assert sum("letter" in one.labels for one in scenes) >= 30
    assert all((one.place[0] < 0.5) == (one.labels["side"] == "left") for one in scenes if "side" in one.labels)
