"""A pruner to test the surgery with: keeps the first visual tokens of each prompt, wherever it is asked to."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qr_integrations.backend.visual_tokens import Embedded, Left


@dataclass(frozen=True)
class KeepFirst:
    """A share of the visual tokens `first` before the language model, and of the rest `share` after each of `layers`.

    `merge` makes the first two that go into one token at the place of the first.
    """

    first: float = 1.0
    layers: tuple[int, ...] = ()
    share: float = 1.0
    compact: bool = True
    merge: bool = False
    fails: bool = False

    def start(self, backend: Any, seen: Embedded) -> "Keeping":
        return Keeping(self, seen, self.layers, self.compact)


@dataclass
class Keeping:
    settings: KeepFirst
    seen: Embedded
    layers: tuple[int, ...]
    compact: bool
    record: list[Any] = field(default_factory=list)

    def before(self) -> Left | None:
        return Left(first_of(self.seen, self.settings.first)[0])

    def rows(self, now: Embedded) -> list[Tensor]:
        return [now.words_behind(prompt)[-3:] for prompt in range(len(now.mask))]

    def after(self, layer: int, now: Embedded, attention: Any) -> Left | None:
        if self.settings.fails:
            raise ZeroDivisionError("the hardware is on fire")
        self.record.append((layer, now, attention))
        kept, gone = first_of(now, self.settings.share)
        if not self.settings.merge:
            return Left(kept)
        merged = [now.states[prompt, places[:2]].mean(0, keepdim=True) for prompt, places in enumerate(gone)]
        return Left(kept, merged, [places[:1] for places in gone])


def first_of(now: Embedded, share: float) -> tuple[list[Tensor], list[Tensor]]:
    """The places of what stays, words included, and of what goes."""
    kept, gone = [], []
    for prompt, visual in enumerate(now.visual):
        places = visual.nonzero()[:, 0]
        goes = places[round(len(places) * share) :]
        stays = now.mask[prompt].clone()
        stays[goes] = False
        kept.append(stays.nonzero()[:, 0])
        gone.append(goes)
    return kept, gone


def by_hand(opened: Any, now: Embedded, pruner: KeepFirst) -> Tensor:
    """The logits behind one prompt, layer by layer, with a mask of all pairs and nothing of the surgery's hooks."""
    decoder = opened.decoder
    for number, layer in enumerate(decoder.layers):
        length = now.states.shape[1]
        seen = torch.zeros(1, 1, length, length).masked_fill(
            ~torch.ones(length, length, dtype=torch.bool).tril(), -1e30
        )
        rotation = decoder.rotary_emb(now.states, now.positions)
        output = layer(now.states, attention_mask=seen, position_embeddings=rotation)
        states = output[0] if isinstance(output, tuple) else output
        now = Embedded(**{name: getattr(now, name) for name in Embedded.__slots__} | {"states": states})
        if number in pruner.layers:
            left = Keeping(pruner, now, (), pruner.compact).after(number, now, [])
            assert left is not None
            now = now.take(left, pruner.compact)
    logits: Tensor = opened.model.lm_head(decoder.norm(now.states)[:, -1])
    return logits
