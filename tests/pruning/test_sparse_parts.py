"""The parts of SparseVLM: raters, gravity, scores and merging, each by what must hold whatever the numbers."""

import pytest
import torch
from torch import Tensor

LINE = [0, 0.2, 0.5, 5, 5.3, 5.4, 9, 9.7, 10]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- who rates


def test_weights_are_shares_and_raters_are_above_the_mean() -> None:
    from qr_integrations.pruning.sparse_scores import text_raters, word_weights

    visual, words = random(50, 16), random(20, 16, seed=1)
    weights = word_weights(visual, words)
    assert float(weights.sum()) == pytest.approx(1, abs=1e-5)
    assert text_raters(visual, words).tolist() == [i for i, weight in enumerate(weights.tolist()) if weight > 1 / 20]


def test_raters_do_not_care_for_the_order_of_visual_tokens() -> None:
    from qr_integrations.pruning.sparse_scores import text_raters

    visual, words = random(50, 16), random(20, 16, seed=1)
    shuffled = visual[torch.randperm(50, generator=torch.Generator().manual_seed(2))]
    assert torch.equal(text_raters(shuffled, words), text_raters(visual, words))


def test_words_that_none_exceeds_all_rate() -> None:
    from qr_integrations.pruning.sparse_scores import text_raters

    visual, word = random(50, 16), random(1, 16, seed=1)
    assert text_raters(visual, word).tolist() == [0]
    assert text_raters(visual, word.expand(4, -1)).tolist() == [0, 1, 2, 3]


def test_scores_are_means_and_heads_are_the_most_attentive() -> None:
    from qr_integrations.pruning.sparse_scores import visual_scores

    attention = random(6, 3, 10).softmax(-1) * torch.tensor([1.0, 5, 2, 5, 0, 3])[:, None, None]
    scores, heard = visual_scores(attention, 3)
    assert heard.tolist() == [1, 3, 5]
    torch.testing.assert_close(scores, attention[[1, 3, 5]].mean(1).mean(0))
    whole, everyone = visual_scores(attention, 14)
    assert sorted(everyone.tolist()) == list(range(6))
    torch.testing.assert_close(whole, visual_scores(attention)[0])


# ---- gravity


@pytest.mark.parametrize("width", [8, 64, 128])
def test_gravity_at_distance_0_and_both_ways(width: int) -> None:
    from qr_integrations.pruning.sparse_scores import rotary_gravity

    frequencies = 10_000.0 ** (-torch.arange(0, width, 2) / width)
    places = torch.arange(60, 0, -1)[None]
    weights = rotary_gravity(places, places, frequencies)
    torch.testing.assert_close(weights.diagonal(), torch.full((60,), width**0.5))
    torch.testing.assert_close(weights, weights.T)
    torch.testing.assert_close(weights[3, 10:], weights[0, 7:57])  # the distance alone counts


@pytest.mark.parametrize(
    ("name", "places"),
    [("llava", [[0, 3, 4, 90]]), ("qwen2_vl", [[0, 5, 5, 9], [0, 5, 6, 9], [0, 7, 5, 11]])],
    ids=["one axis", "time, height and width"],
)
def test_gravity_is_the_product_of_rotated_ones(name: str, places: list[list[int]]) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    from qr_integrations.pruning.sparse_scores import rotary_gravity
    from tests.backend.seeing import backend

    opened = backend(name)
    rotary, sections = opened.decoder.rotary_emb, opened.config.rope_parameters.get("mrope_section")
    positions = torch.tensor(places)
    ones = torch.ones(1, 1, 4, 2 * len(rotary.inv_freq))
    rotation = rotary(ones, positions if sections is None else positions[:, None])
    queries, keys = apply_rotary_pos_emb(ones, ones, *rotation)
    expected = (queries @ keys.transpose(-1, -2))[0, 0] / ones.shape[-1] ** 0.5
    found = rotary_gravity(positions, positions, rotary.inv_freq, sections)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# ---- merging


def test_a_line_of_three_groups() -> None:
    from qr_integrations.pruning.sparse_merge import density_peaks

    states = torch.zeros(9, 4)
    states[:, 0] = torch.tensor(LINE)
    found = density_peaks(states, 3)
    assert found.centers.tolist() == [4, 1, 7]
    assert found.assignment.tolist() == [1, 1, 1, 0, 0, 0, 2, 2, 2]
    expected = torch.tensor([15.7 / 3, 0.7 / 3, 28.7 / 3])
    torch.testing.assert_close(found.means(states)[:, 0], expected)


def test_merged_tokens_lie_among_their_own() -> None:
    from qr_integrations.pruning.sparse_merge import density_peaks

    states = random(60, 12)
    found = density_peaks(states, 7)
    assert found.assignment[found.centers].tolist() == list(range(7))
    for number, mean in enumerate(found.means(states)):
        own = states[found.assignment == number]
        torch.testing.assert_close(mean, own.mean(0))
        assert bool((mean >= own.amin(0) - 1e-6).all() and (mean <= own.amax(0) + 1e-6).all())


def test_as_many_clusters_as_tokens_change_the_order_only() -> None:
    from qr_integrations.pruning.sparse_merge import density_peaks

    states = random(9, 5)
    found = density_peaks(states, 9)
    assert sorted(found.centers.tolist()) == list(range(9))
    assert torch.equal(found.means(states), states[found.centers])


def test_every_token_goes_to_its_nearest_centre() -> None:
    from qr_integrations.pruning.sparse_merge import density_peaks

    states = random(40, 6)
    found = density_peaks(states, 5)
    assert torch.equal(torch.cdist(states, states[found.centers]).argmin(-1), found.assignment)


def test_equal_densities_are_decided_for_the_earlier_token_each_time() -> None:
    from qr_integrations.pruning.sparse_merge import density_peaks

    states = random(6, 8).repeat(2, 1)  # token i and i + 6 are the same
    found = [density_peaks(states, 4) for _ in range(3)]
    assert all(torch.equal(one.centers, found[0].centers) for one in found)
    assert len({center % 6 for center in found[0].centers.tolist()}) == 4  # never a token and its copy
    by_chance = density_peaks(states, 4, torch.zeros(12))  # which published draws may leave undecided
    assert len({center % 6 for center in by_chance.centers.tolist()}) < 4
