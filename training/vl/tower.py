"""The first stage: the tower learns what covers every patch, so that the language model need not discover it."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

from qr_integrations.evaluation.drawn_world.world import COLOURS, KINDS, MARKS, seeded

from .labels import IGNORED, PatchLabels, patch_labels
from .views import draw_view, to_pixel_values

GROUND_WEIGHT = 0.1
"""Patches of the ground are many and easy."""


@dataclass(frozen=True)
class TowerBatch:
    """Pixel values (B, 3, R, R) and the labels of all patches, (B, patches) each; `present` is per picture."""

    pixel_values: Tensor
    labels: dict[str, Tensor]

    def to(self, device: torch.device) -> TowerBatch:
        """The batch on a device."""
        return TowerBatch(self.pixel_values.to(device), {k: v.to(device) for k, v in self.labels.items()})


def tower_batch(name: str, step: int, progress: float, pictures: int, resolution: int, patch: int) -> TowerBatch:
    """The batch of a step; the same name, step and progress always give the same batch."""
    views = [draw_view(seeded(name, step, i), progress, resolution) for i in range(pictures)]
    labels = [patch_labels(view, patch) for view in views]
    stacked = {f.name: torch.from_numpy(np.stack([getattr(x, f.name) for x in labels])) for f in fields(PatchLabels)}
    return TowerBatch(to_pixel_values([view.pixels() for view in views]), stacked)


class DenseHeads(nn.Module):
    """Linear readers of the patch features, and one of the class token: which coloured kinds the picture shows.

    Without `place` the features forget where a patch is, and the language model cannot tell left from right.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.kind = nn.Linear(width, 1 + len(KINDS))
        self.colour = nn.Linear(width, len(COLOURS))
        self.mark = nn.Linear(width, 1 + len(MARKS))
        self.centre = nn.Linear(width, 1)
        self.place = nn.Linear(width, 2)
        self.present = nn.Linear(width, len(KINDS) * len(COLOURS))

    def forward(self, patches: Tensor, pooled: Tensor) -> dict[str, Tensor]:
        """Logits of (B, patches, width) and (B, width)."""
        patches = self.norm(patches)
        per_patch = {name: getattr(self, name)(patches) for name in ("kind", "colour", "mark", "place")}
        return {**per_patch, "centre": self.centre(patches).squeeze(-1), "present": self.present(pooled)}


def read_tower(tower: nn.Module, heads: DenseHeads, pixel_values: Tensor) -> dict[str, Tensor]:
    """Logits from the layer that the language model will see, and from the class token after the last."""
    output = tower(pixel_values, output_hidden_states=True)
    logits = heads(output.hidden_states[-2][:, 1:], output.pooler_output)
    return {name: value.float() for name, value in logits.items()}


def patch_places(like: Tensor) -> Tensor:
    """(B, patches, 2): row and column of every patch, from -1 to 1."""
    side = math.isqrt(like.shape[1])
    steps = torch.linspace(-1, 1, side, device=like.device)
    return torch.cartesian_prod(steps, steps).expand_as(like)


def tower_losses(logits: dict[str, Tensor], labels: dict[str, Tensor]) -> dict[str, Tensor]:
    """One loss for every head; marks of things that carry one count as much as all bare things together."""
    kind = labels["kind"].flatten()
    weight = torch.full((1 + len(KINDS),), 1.0, device=kind.device)
    weight[0] = GROUND_WEIGHT
    mark_weight = torch.ones(1 + len(MARKS), device=kind.device)
    mark_weight[0] = 0.2
    positive = torch.tensor(10.0, device=kind.device)
    return {
        "kind": cross_entropy(logits["kind"].flatten(0, 1), kind, weight),
        "colour": cross_entropy(logits["colour"].flatten(0, 1), labels["colour"].flatten(), ignore_index=IGNORED),
        "mark": cross_entropy(
            logits["mark"].flatten(0, 1), labels["mark"].flatten(), mark_weight, ignore_index=IGNORED
        ),
        "place": mse_loss(logits["place"], patch_places(logits["place"])),
        "centre": binary_cross_entropy_with_logits(logits["centre"], labels["centre"], pos_weight=positive),
        "present": binary_cross_entropy_with_logits(logits["present"], labels["present"], pos_weight=positive),
    }


@torch.no_grad()
def tower_accuracy(logits: dict[str, Tensor], labels: dict[str, Tensor]) -> dict[str, float]:
    """Share of the things' patches read right: kind, colour, and the mark where there is one to be read."""
    covered = labels["kind"] > 0
    asked = {"kind": covered, "colour": covered, "mark": labels["mark"] > 0}
    right = {name: (logits[name].argmax(-1) == labels[name])[mask] for name, mask in asked.items()}
    return {name: float(hits.float().mean()) if hits.numel() else float("nan") for name, hits in right.items()}
