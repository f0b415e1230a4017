"""Which words rate a picture's tokens, and how: the scores of SparseVLM.

Legend: H heads, r raters, n visual tokens, W words, D width, f frequencies of the rotation.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor


def word_weights(visual: Float[Tensor, "n D"], words: Float[Tensor, "W D"]) -> Float[Tensor, " W"]:
    """How much visual tokens resemble each word: products of embeddings, softmax over words, mean over tokens; fp32."""
    return (visual.float() @ words.float().T).softmax(-1).mean(0)


def text_raters(visual: Float[Tensor, "n D"], words: Float[Tensor, "W D"]) -> Int[Tensor, " r"]:
    """Numbers of the words that rate: those above the mean weight, which is 1 / W.

    Where no word is above it, as with a single one, all words rate; the authors' code then scores NaN.
    """
    weights = word_weights(visual, words)
    above = (weights > weights.mean()).nonzero()[:, 0]
    return above if len(above) else torch.arange(len(words), device=words.device)


def rotary_gravity(
    rows: Int[Tensor, "axes r"],
    columns: Int[Tensor, "axes n"],
    frequencies: Float[Tensor, " f"],
    sections: Sequence[int] | None = None,
) -> Float[Tensor, "r n"]:
    """How near rotary positions draw two tokens: the product of rotated vectors of ones over the root of their width.

    At distance 0 it is that root. It falls with the distance, oscillates, and can become negative.

    Args:
        rows, columns: positions, one axis, or time, height and width.
        frequencies: of the rotation, radians per position.
        sections: how many frequencies turn with each axis; None where there is one axis.
    """
    precision = torch.float32 if rows.device.type == "mps" else torch.float64  # angles are large
    numbers = torch.arange(len(rows), device=rows.device)
    counts = torch.tensor([len(frequencies)] if sections is None else list(sections), device=rows.device)
    axis = numbers[: len(counts)].repeat_interleave(counts)

    def waves(positions: Tensor) -> Tensor:
        angles = positions[axis].T.to(precision) * frequencies.to(precision)
        return torch.cat([angles.cos(), angles.sin()], -1)

    scale = 2 / (2 * len(frequencies)) ** 0.5
    return (scale * waves(rows) @ waves(columns).T).float()


def visual_scores(
    attention: Float[Tensor, "H r n"], heads: int | None = None
) -> tuple[Float[Tensor, " n"], Int[Tensor, " h"]]:
    """The mean attention of raters to each visual token, and the heads that were heard, the most attentive first.

    Args:
        attention: of raters, to visual tokens only.
        heads: hear so many, those with the largest sum; None hears all.
    """
    order = attention.sum((1, 2)).sort(descending=True, stable=True).indices
    heard = order if heads is None else order[:heads]
    return (attention if heads is None else attention[heard]).mean((0, 1)), heard
