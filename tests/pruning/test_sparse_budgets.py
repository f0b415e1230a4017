"""How many tokens stay after which layers: the published table, and what holds for any other number of tokens."""

import pytest

TABLE = [  # kept, after merging, in the mean; of 576 tokens in 32 layers
    ("1.5", 192, (300, 200, 110), (309, 204, 113), 192.0),
    ("1.5", 128, (303, 110, 36), (312, 117, 39), 128.6),
    ("1.5", 96, (238, 48, 26), (249, 55, 27), 96.9),
    ("1.5", 64, (66, 30, 17), (82, 32, 18), 64.8),
    ("2.0", 192, (300, 200, 118), (300, 200, 118), 192.4),
    ("2.0", 128, (238, 108, 60), (238, 108, 60), 128.0),
    ("2.0", 96, (246, 54, 28), (246, 54, 28), 96.8),
    ("2.0", 64, (66, 34, 20), (66, 34, 20), 64.4),
]
SHAPES = [(576, 32), (576, 40), (2880, 28), (1320, 28), (100, 8), (64, 6), (16, 4), (5, 3)]


@pytest.mark.parametrize(("version", "keep", "kept", "after", "mean"), TABLE)
def test_the_published_table(
    version: str, keep: int, kept: tuple[int, ...], after: tuple[int, ...], mean: float
) -> None:
    from qr_integrations.pruning.sparse_budgets import booked_mean, budgets_for, tokens_after

    recycle = version == "1.5"
    assert budgets_for(keep, 576, (2, 6, 15), 32, version=version, recycle=recycle) == kept
    assert tokens_after(kept, 576, recycle) == after
    assert booked_mean(after, 576, (2, 6, 15), 32) == pytest.approx(mean, abs=0.07)


@pytest.mark.parametrize("recycle", [True, False])
@pytest.mark.parametrize("version", ["1.5", "2.0"])
@pytest.mark.parametrize(("num_tokens", "depth"), SHAPES)
def test_the_mean_is_what_was_asked_for(num_tokens: int, depth: int, version: str, recycle: bool) -> None:
    from qr_integrations.errors import InputError
    from qr_integrations.pruning.sparse_budgets import booked_mean, budgets_for, scaled_layers, tokens_after

    layers, reached = scaled_layers(version, depth), 0
    for keep in range(1, num_tokens, max(1, num_tokens // 40)):
        try:
            budgets = budgets_for(keep, num_tokens, layers, depth, version=version, recycle=recycle)
        except InputError:
            assert not reached, "less was possible"
            continue
        after = tokens_after(budgets, num_tokens, recycle)
        assert booked_mean(after, num_tokens, layers, depth) == pytest.approx(keep, abs=0.5)
        assert list(budgets) == sorted(budgets, reverse=True) and budgets[-1] >= 1
        reached += 1
    assert reached >= 3
    whole = budgets_for(num_tokens, num_tokens, layers, depth, version=version, recycle=recycle)
    assert whole == (num_tokens,) * len(layers)


@pytest.mark.parametrize(("depth", "layers"), [(32, (2, 6, 15)), (40, (3, 8, 19)), (24, (2, 4, 11)), (8, (2, 3, 4))])
def test_layers_move_with_the_depth(depth: int, layers: tuple[int, ...]) -> None:
    from qr_integrations.pruning.sparse_budgets import scaled_layers

    assert scaled_layers("1.5", depth) == scaled_layers("2.0", depth) == layers
    assert scaled_layers("1.0", depth)[:3] == layers


@pytest.mark.parametrize("depth", range(1, 12))
def test_the_last_layer_reads_what_is_left(depth: int) -> None:
    from qr_integrations.pruning.sparse_budgets import scaled_layers

    layers = scaled_layers("1.0", depth)
    assert list(layers) == sorted(set(layers)) and all(layer < depth - 1 for layer in layers)
    assert bool(layers) == (depth > 1)


def test_too_few_tokens_say_how_many_there_must_be() -> None:
    from qr_integrations.errors import InputError
    from qr_integrations.pruning.sparse_budgets import budgets_for

    with pytest.raises(InputError, match=r"keep=32 .* before layer 2 .* at least 40; .* layers=\(0, ...\)"):
        budgets_for(32, 576, (2, 6, 15), 32, version="1.5", recycle=True)
    with pytest.raises(InputError, match=r"keep=1 of 2 .* there are 2 at least; .* pass recycle=False"):
        budgets_for(1, 2, (0, 1, 3), 8, version="1.5", recycle=True)
    assert budgets_for(1, 2, (0, 1, 3), 8, version="1.5", recycle=False) == (1, 1, 1)
    budgets_for(40, 576, (2, 6, 15), 32, version="1.5", recycle=True)
    assert max(budgets_for(32, 576, (0, 6, 15), 32, version="1.5", recycle=True)) < 576


def test_any_number_of_layers() -> None:
    """Where there are not three of them, the published shares are read off at their depths."""
    from qr_integrations.pruning.sparse_budgets import booked_mean, budgets_for

    for layers in ((1,), (2, 15), (2, 4, 6, 10, 15)):
        budgets = budgets_for(192, 576, layers, 32, version="2.0", recycle=False)
        assert booked_mean(budgets, 576, layers, 32) == pytest.approx(192, abs=0.5)


def test_recycling_counts() -> None:
    from qr_integrations.pruning.sparse_budgets import num_recycled

    assert [num_recycled(number) for number in (0, 1, 33, 276, 510)] == [(0, 0), (1, 1), (10, 2), (83, 9), (154, 16)]
