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
from qr_integrations.backend.early_logits import Needed, early_logits
from qr_integrations.decoding.last_resort import keep_reachable
from qr_integrations.decoding.record import DeCoRecord
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
            nothing is published. `probe_layers` shows what a model's layers say.
        top_p, top_k: candidates are the most probable tokens until their sum reaches `top_p`, the one that reaches it
            included, and never more than `top_k`.
        restrict_to_candidates: no other token can be said, as in the authors' code; the paper does not say so.
        coefficient: ``"candidates"``: the anchor's largest probability among the candidates, as in the code;
            ``"vocabulary"``: among all tokens, as the paper can be read.
        last_resort: where a minimum length, bad words or suppressed tokens forbid all candidates, the model's own next
            best token is said. Without, as published, transformers then says token 0, or sampling fails.
        skip_confident: read earlier layers only where there is more than one candidate. The same tokens come out. It
            pays where nine of ten tokens have one candidate; with fewer, reading all layers at once is faster.

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
    last_resort: bool = True
    skip_confident: bool = False

    def __post_init__(self) -> None:
        if self.layers is not None and not _are_numbers(self.layers):
            one = self.layers if isinstance(self.layers, int) else 5
            raise InputError(f"layers={self.layers!r} cannot be: pass layers=({one},), several of them, or None")
        if isinstance(self.layers, list):
            object.__setattr__(self, "layers", tuple(self.layers))
        if not 0 <= self.alpha < float("inf") or not self.top_p > 0 or self.top_k < 1:
            raise InputError(
                f"alpha={self.alpha}, top_p={self.top_p}, top_k={self.top_k} cannot be: alpha is at least 0, top_p "
                "above 0, top_k at least 1; pass such"
            )
        if self.coefficient not in ("candidates", "vocabulary"):
            raise InputError(f"unknown coefficient {self.coefficient!r}: pass 'candidates' or 'vocabulary'")
        if self.skip_confident and not self.restrict_to_candidates:
            raise InputError("a single candidate decides only where no other token can be said: pass one of the two")

    def layers_of(self, num_layers: int) -> tuple[int, ...]:
        """The candidate layers in a model of so many blocks, the earliest first."""
        if self.layers is not None:
            return tuple(sorted(self.layers))
        first = max(1, int(_FIRST * num_layers))
        return tuple(range(first, max(first, min(int(_LAST * num_layers), num_layers - 1)) + 1))

    @contextmanager
    def on(self, backend: Backend) -> Iterator[DeCoRecord]:
        """Within the block, ``backend.model.generate`` decodes with the correction: greedy, sampled or with beams.

        Other threads wait for the model meanwhile; afterwards it is as it was. What was done is in the record.

        Example:
            >>> from qr_integrations import Backend
            >>> from qr_integrations.decoding import DeCo
            >>> backend = Backend.load("qr-mini")
            >>> prompt = backend.tokenizer("dracula was written by", return_tensors="pt")
            >>> with DeCo(alpha=0.5, layers=(2, 3)).on(backend) as record:
            ...     tokens = backend.model.generate(**prompt, max_new_tokens=3, do_sample=False)
            >>> len(record)
            3
        """
        layers, record = self.layers_of(backend.config.num_hidden_layers), DeCoRecord()

        def say(final: Float[Tensor, "B N V"], early: Float[Tensor, "J B N V"]) -> Float[Tensor, "B N V"]:
            found = self.correct(final, early, layers) if len(early) else _only_candidate(final)
            changed = found.logits.argmax(-1) != found.candidates[..., 0]
            record.add(found.anchor, found.max_prob, found.is_candidate.sum(-1), changed)
            reachable = self.last_resort and self.restrict_to_candidates
            return keep_reachable(found.logits, final) if reachable else found.logits

        with early_logits(backend, layers, say, needed=self._needed()):
            yield record

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
        rows, positions = torch.arange(final.shape[0])[:, None], torch.arange(final.shape[1])
        anchor_logits = early[surest, rows, positions]
        of_all = self.coefficient == "vocabulary"
        max_prob = anchor_logits.softmax(-1).amax(-1) if of_all else per_layer.amax(0).exp()
        corrected = final + self.alpha * max_prob[..., None] * anchor_logits
        if self.restrict_to_candidates:
            allowed = torch.zeros_like(final, dtype=torch.bool).scatter(-1, candidates, is_candidate)
            corrected = corrected.masked_fill(~allowed, -torch.inf)
        numbers = torch.tensor(layers, device=final.device)
        return Correction(corrected, candidates, is_candidate, numbers[surest], max_prob)

    def _needed(self) -> Needed | None:
        """Where earlier layers must be read; None reads them with the last one, which rounds its logits differently."""
        if self.skip_confident:
            return self._has_choice
        return (lambda final: torch.ones_like(final[..., 0], dtype=torch.bool)) if self.alpha == 0 else None

    def _has_choice(self, final: Float[Tensor, "B N V"]) -> Bool[Tensor, "B N"]:
        """Whether there is more than one candidate."""
        return (final.softmax(-1).amax(-1) < self.top_p) & (self.top_k > 1)


def _are_numbers(layers: object) -> bool:
    return isinstance(layers, tuple | list) and all(type(layer) is int for layer in layers)


def _only_candidate(final: Float[Tensor, "B N V"]) -> Correction:
    """The most probable token, uncorrected: no layer was read."""
    best, token = final.max(-1, keepdim=True)
    logits = torch.full_like(final, -torch.inf).scatter(-1, token, best)
    unread = torch.zeros_like(token[..., 0])
    return Correction(logits, token, torch.ones_like(token, dtype=torch.bool), unread, best[..., 0] * torch.nan)
