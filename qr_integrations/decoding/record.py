"""What a correction did, step by step.

Legend: B batch (or beams), N positions of a pass.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from jaxtyping import Shaped
from torch import Tensor


@dataclass(frozen=True, slots=True)
class DeCoStep:
    """One token of every row; with beams, of the rows as they were at that step.

    Attributes:
        anchor: the layer that was listened to; None where no layer was read, see `DeCo.skip_confident`.
        max_prob: how sure it was; None likewise.
        num_candidates: how many tokens the last layer considered.
        changed: whether another token became the most probable one, before processors and sampling.
    """

    anchor: tuple[int | None, ...]
    max_prob: tuple[float | None, ...]
    num_candidates: tuple[int, ...]
    changed: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class DoLaStep:
    """One token of every row; with beams, of the rows as they were at that step.

    Attributes:
        premature: the layer that was contrasted with the last one.
        divergence: how far it was from the last one, in nats.
        num_candidates: how many tokens were plausible to the last layer.
        changed: whether another token became the most probable one, before processors and sampling.
    """

    premature: tuple[int, ...]
    divergence: tuple[float, ...]
    num_candidates: tuple[int, ...]
    changed: tuple[bool, ...]


Step = TypeVar("Step", DeCoStep, DoLaStep)


class _Record(Sequence[Step], Generic[Step]):
    """Steps in the order in which they were taken; grows while the model generates.

    Every position whose logits were asked for is a step: one per token in `generate`, the first one included; rows that
    have ended go on until all have. Numbers are fetched from the device when they are looked at.
    """

    def __init__(self) -> None:
        self._passes: list[tuple[Tensor, ...]] = []
        self._steps: list[Step] = []

    def add(self, *columns: Shaped[Tensor, "B N"]) -> None:
        """Note one pass: the attributes of a step, in their order."""
        self._passes.append(columns)

    @property
    def steps(self) -> tuple[Step, ...]:
        """All steps so far."""
        while self._passes:
            columns = [column.T.tolist() for column in self._passes.pop(0)]
            self._steps += [self._step(*map(tuple, rows)) for rows in zip(*columns, strict=True)]
        return tuple(self._steps)

    @property
    def share_changed(self) -> float:
        """Of all rows of all steps, the share in which another token became the most probable one; 0 without steps."""
        changed = [row for step in self.steps for row in step.changed]
        return sum(changed) / len(changed) if changed else 0.0

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, key: Any) -> Any:
        return self.steps[key]

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} steps, {self.share_changed:.0%} changed)"

    def _step(self, *columns: tuple[Any, ...]) -> Step:
        raise NotImplementedError


class DeCoRecord(_Record[DeCoStep]):
    """What `DeCo` did: a sequence of `DeCoStep`, which grows while the model generates."""

    @property
    def anchors(self) -> dict[int, int]:
        """Layer -> how often it was listened to."""
        return dict(sorted(Counter(layer for step in self for layer in step.anchor if layer is not None).items()))

    def as_dict(self) -> dict[str, Any]:
        """``{"num_steps", "share_changed", "anchors"}``, as it stands in JSON and in the adapters' metadata."""
        anchors = {str(layer): count for layer, count in self.anchors.items()}
        return {"num_steps": len(self), "share_changed": self.share_changed, "anchors": anchors}

    def _step(self, *columns: tuple[Any, ...]) -> DeCoStep:
        anchor, max_prob, num_candidates, changed = columns
        return DeCoStep(
            tuple(layer or None for layer in anchor),  # 0 and NaN where no layer was read
            tuple(None if math.isnan(prob) else prob for prob in max_prob),
            num_candidates,
            changed,
        )


class DoLaRecord(_Record[DoLaStep]):
    """What `DoLa` did: a sequence of `DoLaStep`, which grows while the model generates."""

    def _step(self, *columns: tuple[Any, ...]) -> DoLaStep:
        return DoLaStep(*columns)
