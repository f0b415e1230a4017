"""DeCo: dynamic correction decoding (arXiv 2410.11779).

Legend: B batch, N positions, J candidate layers, V vocabulary, k candidate tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from qr_integrations.backend import Backend
from qr_integrations.backend.early_logits import early_logits
from qr_integrations.errors import InputError

_FIRST, _LAST = 0.625, 0.875  # of the depth: 20..28 of 32 blocks, as published


@dataclass(frozen=True, slots=True)
class Correction:
    """What one pass was corrected with.

    Attributes:
        logits: corrected; minus infinity outside the candidates, unless they are not restricted to.
        candidates: token ids, the most probable first.
        is_candidate: which of them are; the others stand there because some row has more.
        anchor: the layer that was listened to.
        max_prob: how sure it was.
    """

    logits: Float[Tensor, "B N V"]
    candidates: Int[Tensor, "B N k"]
    is_candidate: Bool[Tensor, "B N k"]
    anchor: Int[Tensor, "B N"]
    max_prob: Float[Tensor, "B N"]


@dataclass(frozen=True, slots=True)
class DeCo:
    """Correct every token by the earlier layer that is surest of one of the final layer's candidates.

    Args:
        alpha: how strongly; 0.3 to 0.6 in the paper's experiments, 0.6 in the authors' scripts.
        layers: candidate layers, numbered like hidden states (i is the output of the i-th block, counted from 1). None
            takes those from 62.5 % to 87.5 % of the depth, which are the published 20 to 28 of 32; for other depths
            nothing is published.
        top_p, top_k: candidates are the most probable tokens until their sum reaches `top_p`, the one that reaches it
            included, and never more than `top_k`.
        restrict_to_candidates: no other token can be said, as in the authors' code; the paper does not say so.
        coefficient: ``"candidates"``: the anchor's largest probability among the candidates, as in the code;
            ``"vocabulary"``: among all tokens, as the paper can be read.

    With ``alpha=0``, greedy decoding is the model's own; sampling and beams are restricted to the candidates.

    Raises:
        InputError: a setting out of range.
    """

    alpha: float = 0.6
    layers: tuple[int, ...] | None = None
    top_p: float = 0.9
    top_k: int = 20
    restrict_to_candidates: bool = True
    coefficient: Literal["candidates", "vocabulary"] = "candidates"

    def __post_init__(self) -> None:
        if self.alpha < 0 or self.top_p <= 0 or self.top_k < 1:
            raise InputError(
                f"alpha={self.alpha}, top_p={self.top_p}, top_k={self.top_k} cannot be: alpha is at least 0, top_p "
                "above 0, top_k at least 1; pass such"
            )
        if self.coefficient not in ("candidates", "vocabulary"):
            raise InputError(f"unknown coefficient {self.coefficient!r}: pass 'candidates' or 'vocabulary'")

    def layers_of(self, num_layers: int) -> tuple[int, ...]:
        """The candidate layers in a model of so many blocks."""
        if self.layers is not None:
            return self.layers
        first = max(1, int(_FIRST * num_layers))
        return tuple(range(first, max(first, min(int(_LAST * num_layers), num_layers - 1)) + 1))

    @contextmanager
    def on(self, backend: Backend) -> Iterator[None]:
        """Within the block, ``backend.model.generate`` decodes with the correction: greedy, sampled or with beams.

        Other threads wait for the model meanwhile; afterwards it is as it was.

        Example:
            >>> from qr_integrations import Backend
            >>> from qr_integrations.decoding import DeCo
            >>> backend = Backend.load("qr-mini")
            >>> prompt = backend.tokenizer("dracula was written by", return_tensors="pt")
            >>> with DeCo(alpha=0.5, layers=(2, 3)).on(backend):
            ...     tokens = backend.model.generate(**prompt, max_new_tokens=3, do_sample=False)
        """
        layers = self.layers_of(backend.config.num_hidden_layers)
        with early_logits(backend, layers, lambda final, early: self.correct(final, early, layers).logits):
            yield

    def correct(
        self, final: Float[Tensor, "B N V"], early: Float[Tensor, "J B N V"], layers: tuple[int, ...]
    ) -> Correction:
        """The rule itself (section 3 of the paper, and what the authors' code, zjunlp/Deco fee8d75, adds to it).

        Args:
            final: the model's own logits, before any processor.
            early: those of the candidate layers, after the final norm.
            layers: their numbers.
        """
        sorted_probs, candidates = final.softmax(-1).topk(min(self.top_k, final.shape[-1]), dim=-1)
        before = sorted_probs.cumsum(-1).roll(1, dims=-1)
        before[..., 0] = 0.0
        is_candidate = before < self.top_p
        inside = candidates.expand(len(early), *candidates.shape)
        beliefs = early.gather(-1, inside) - early.logsumexp(-1, keepdim=True)  # log probabilities, [J, B, N, k]
        per_layer = beliefs.masked_fill(~is_candidate, -torch.inf).amax(-1)
        surest = per_layer.argmax(0)  # of equal ones the earliest
        anchor_logits = early.gather(0, surest[None, ..., None].expand(1, *final.shape))[0]
        of_all = self.coefficient == "vocabulary"
        max_prob = anchor_logits.softmax(-1).amax(-1) if of_all else per_layer.amax(0).exp()
        corrected = final + self.alpha * max_prob[..., None] * anchor_logits
        if self.restrict_to_candidates:
            allowed = torch.zeros_like(final, dtype=torch.bool).scatter(-1, candidates, is_candidate)
            corrected = corrected.masked_fill(~allowed, -torch.inf)
        numbers = torch.tensor(layers, device=final.device)
        return Correction(corrected, candidates, is_candidate, numbers[surest], max_prob)
