"""DoLa: decoding by contrasting layers (arXiv 2309.03883), to compare with.

Legend: B batch, N positions, J premature layers, V vocabulary.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from qr_integrations.backend import Backend
from qr_integrations.backend.early_logits import early_logits
from qr_integrations.decoding.last_resort import keep_reachable
from qr_integrations.decoding.record import DoLaRecord
from qr_integrations.errors import InputError

_DEEP, _REACH = 40, 20  # blocks: in deeper models than this, the buckets reach so far


@dataclass(frozen=True, slots=True)
class Contrast:
    """What one pass was contrasted with.

    Attributes:
        logits: log probability of the last layer minus that of the premature one; minus infinity for tokens that are
            not plausible.
        is_plausible: to the last layer.
        premature: the layer that differs most from the last one.
        divergence: how much, in nats.
    """

    logits: Float[Tensor, "B N V"]
    is_plausible: Bool[Tensor, "B N V"]
    premature: Int[Tensor, "B N"]
    divergence: Float[Tensor, "B N"]


@dataclass(frozen=True, slots=True)
class DoLa:
    """Say what the last layer believes more than the earlier layer that differs most from it.

    Args:
        layers: premature layers, numbered like hidden states (0 the embeddings, i the output of the i-th block), or
            ``"low"`` and ``"high"``: every second one of the lower or the upper half of the model, of the outer 20
            in models of more than 40 blocks; ``"low"`` leaves out the first two where embeddings and head are tied.
        relative_top: a token is plausible if the last layer gives it this share of the most probable one's probability.
        published: as the authors' code does it: earlier states are read without the final norm, the divergence is
            measured from the mixture instead of towards it, and a batch has one premature layer. Else the final norm
            comes first, as for the last layer, the divergence is Jensen and Shannon's, and rows do not see each other.

    The paper adds a repetition penalty of 1.2: pass ``repetition_penalty`` to `generate`.

    Raises:
        InputError: a setting out of range.
    """

    layers: Literal["low", "high"] | tuple[int, ...] = "low"
    relative_top: float = 0.1
    published: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.relative_top <= 1:
            raise InputError(f"relative_top={self.relative_top} cannot be: pass a share above 0, up to 1")
        if isinstance(self.layers, str) and self.layers not in ("low", "high"):
            raise InputError(f"unknown layers {self.layers!r}: pass 'low', 'high', or numbers of layers")

    def layers_of(self, num_layers: int, *, tied: bool) -> tuple[int, ...]:
        """The premature layers in a model of so many blocks, whose head may be its embeddings."""
        if not isinstance(self.layers, str):
            return tuple(sorted(self.layers))
        half, reach = num_layers // 2, _REACH if num_layers > _DEEP else num_layers
        if self.layers == "high":
            return tuple(range(max(half, num_layers - reach), num_layers, 2))
        first = min(2, num_layers - 1) if tied else 0
        return tuple(range(first, min(half, reach), 2)) or (first,)

    @contextmanager
    def on(self, backend: Backend) -> Iterator[DoLaRecord]:
        """Within the block, ``backend.model.generate`` contrasts layers: greedy, sampled or with beams.

        Other threads wait for the model meanwhile; afterwards it is as it was. What was done is in the record.

        Example:
            >>> from qr_integrations import Backend
            >>> from qr_integrations.decoding import DoLa
            >>> backend = Backend.load("qr-mini")
            >>> prompt = backend.tokenizer("dracula was written by", return_tensors="pt")
            >>> with DoLa("high").on(backend) as record:
            ...     tokens = backend.model.generate(**prompt, max_new_tokens=3, do_sample=False, repetition_penalty=1.2)
            >>> len(record)
            3
        """
        embeddings: Tensor = backend.model.get_input_embeddings().weight
        tied = getattr(backend.model.get_output_embeddings(), "weight", None) is embeddings
        layers, record = self.layers_of(backend.config.num_hidden_layers, tied=tied), DoLaRecord()

        def say(final: Float[Tensor, "B N V"], early: Float[Tensor, "J B N V"]) -> Float[Tensor, "B N V"]:
            found = self.contrast(final, early, layers)
            changed = found.logits.argmax(-1) != final.argmax(-1)
            record.add(found.premature, found.divergence, found.is_plausible.sum(-1), changed)
            return keep_reachable(found.logits, final)

        with early_logits(backend, layers, say, normed=not self.published, first=0):
            yield record

    def contrast(
        self, final: Float[Tensor, "B N V"], early: Float[Tensor, "J B N V"], layers: tuple[int, ...]
    ) -> Contrast:
        """The rule itself (section 2 of the paper).

        Args:
            final: the model's own logits, before any processor.
            early: those of the premature layers.
            layers: their numbers.
        """
        last, before = final.log_softmax(-1), early.log_softmax(-1)
        divergence = torch.stack([_divergence(last, other, reverse=self.published) for other in before])  # [J, B, N]
        if self.published:
            farthest = divergence.mean(1, keepdim=True).argmax(0).expand(final.shape[:2])
        else:
            farthest = divergence.argmax(0)  # of equal ones the earliest
        rows, positions = torch.arange(final.shape[0])[:, None], torch.arange(final.shape[1])
        is_plausible = last >= last.amax(-1, keepdim=True) + math.log(self.relative_top)
        logits = (last - before[farthest, rows, positions]).masked_fill(~is_plausible, -torch.inf)
        numbers = torch.tensor(layers, device=final.device)
        return Contrast(logits, is_plausible, numbers[farthest], divergence[farthest, rows, positions])


def _divergence(last: Float[Tensor, "B N V"], other: Float[Tensor, "B N V"], *, reverse: bool) -> Float[Tensor, "B N"]:
    """Between two distributions of log probabilities, in nats: the mean distance to or, reversed, from their middle."""
    middle = torch.logaddexp(last, other) - math.log(2)
    if reverse:
        return 0.5 * (middle.exp() * ((middle - last) + (middle - other))).sum(-1)
    return 0.5 * (last.exp() * (last - middle) + other.exp() * (other - middle)).sum(-1)
