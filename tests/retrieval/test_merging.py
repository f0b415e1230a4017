"""Scores of several windows: what they promise is checked against one softmax over everything."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

HEADS, ROWS, BEGINNING, TAIL = 3, 5, 4, 6


class Drawn:
    """Documents that draw the same in every window, as in layer 0: logits of every token for every row and head."""

    def __init__(self, lengths: Sequence[int], seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.common = torch.randn(HEADS, ROWS, BEGINNING, generator=generator)
        self.tail = torch.randn(HEADS, ROWS, TAIL, generator=generator)
        self.documents = [2 * torch.randn(HEADS, ROWS, length, generator=generator) for length in lengths]

    def window(self, numbers: Sequence[int]) -> tuple[Any, list[Any]]:
        """The shares of a prompt that holds some of the documents, and their spans."""
        from qr_integrations.retrieval.merging import Shares
        from qr_integrations.types import Span

        spans, position = [], BEGINNING
        for number in numbers:
            spans.append(Span(position, position + self.documents[number].shape[-1]))
            position = spans[-1].stop
        logits = torch.cat([self.common, *(self.documents[number] for number in numbers), self.tail], dim=-1)
        rows = logits.softmax(-1)
        by_document = torch.stack([rows[..., span.slice()].sum(-1) for span in spans], dim=-1)
        common = rows[..., :BEGINNING].sum(-1) + rows[..., position:].sum(-1)
        return Shares(rows[..., :position].mean(1), by_document, common), spans

    def scaled(self, split: Sequence[Sequence[int]], **options: Any) -> dict[int, Tensor]:
        """Document -> its tokens' shares, by head."""
        from qr_integrations.retrieval.merging import on_one_scale

        windows = [self.window(numbers) for numbers in split]
        found = on_one_scale([shares for shares, _ in windows], [spans for _, spans in windows], **options)
        return {
            number: tokens[:, span.slice()]
            for numbers, (_, spans), tokens in zip(split, windows, found, strict=True)
            for number, span in zip(numbers, spans, strict=True)
        }


@pytest.fixture
def drawn() -> Drawn:
    draw = random.Random(0)
    return Drawn([draw.randint(1, 9) for _ in range(12)])


@pytest.mark.parametrize("rivals", [0, 3, 10, 1000])
def test_how_documents_are_split_makes_no_difference_to_their_sums(drawn: Drawn, rivals: int) -> None:
    splits = [[[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]], [[11], [3, 0, 7], [1, 2, 4, 5, 6, 8, 9, 10]]]
    one, other = (drawn.scaled(split, rivals=rivals) for split in splits)
    for number in range(12):
        torch.testing.assert_close(one[number].sum(-1), other[number].sum(-1))


def test_with_all_as_rivals_it_is_the_share_of_one_prompt(drawn: Drawn) -> None:
    whole, spans = drawn.window(range(12))
    scaled = drawn.scaled([[0, 1, 2, 3], [4, 5, 6], [7, 8, 9, 10, 11]], rivals=11)
    for number, span in enumerate(spans):
        torch.testing.assert_close(scaled[number].sum(-1), whole.tokens_KT[:, span.slice()].sum(-1))


def test_each_stands_among_average_rivals(drawn: Drawn) -> None:
    """The definition, row by row."""
    weights = [logits.exp().sum(-1) for logits in drawn.documents]
    common = torch.cat([drawn.common, drawn.tail], -1).exp().sum(-1)
    scaled = drawn.scaled([range(5), range(5, 12)], rivals=4)
    for number, own in enumerate(weights):
        others = (sum(weights) - own) / 11
        expected = (own / (common + own + 4 * others)).mean(1)
        torch.testing.assert_close(scaled[number].sum(-1), expected)


def test_one_window_stays_as_it_is(drawn: Drawn) -> None:
    shares, spans = drawn.window(range(12))
    scaled = drawn.scaled([range(12)])
    for number, span in enumerate(spans):
        assert torch.equal(scaled[number], shares.tokens_KT[:, span.slice()])


def test_a_good_document_does_not_lose_by_good_neighbours() -> None:
    lengths = [4] * 12
    drawn = Drawn(lengths)
    for number in (0, 1, 2):
        drawn.documents[number] += 6.0  # three that answer, in one window; in the other the best of the rest
    drawn.documents[6] += 4.0
    split = [range(6), range(6, 12)]
    raw = {
        number: shares.tokens_KT[:, span.slice()].sum().item()
        for numbers, (shares, spans) in zip(split, [drawn.window(numbers) for numbers in split], strict=True)
        for number, span in zip(numbers, spans, strict=True)
    }
    scaled = {number: tokens.sum().item() for number, tokens in drawn.scaled(split).items()}
    assert max(raw, key=raw.__getitem__) == 6
    assert set(sorted(scaled, key=scaled.__getitem__)[-3:]) == {0, 1, 2}


def test_nothing_left_for_what_is_common_is_still_a_number() -> None:
    drawn = Drawn([3, 3, 3])
    drawn.documents[0] += 200.0
    scaled = drawn.scaled([[0], [1, 2]])
    assert all(torch.isfinite(tokens).all() and (tokens >= 0).all() for tokens in scaled.values())
    assert scaled[0].sum() > 0.5 * HEADS
