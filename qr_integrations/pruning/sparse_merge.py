"""Merges similar tokens: density-peak clustering over nearest neighbours, then the mean of each cluster.

Legend: R tokens, K clusters, D width.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

_NOISE = 1e-6


@dataclass(frozen=True, slots=True)
class Clusters:
    """Tokens by what they resemble.

    Attributes:
        centers: the token at the centre of each cluster, the most prominent first.
        assignment: the cluster of each token.
    """

    centers: Int[Tensor, " K"]
    assignment: Int[Tensor, " R"]

    def means(self, states: Float[Tensor, "R D"]) -> Float[Tensor, "K D"]:
        """The mean of each cluster, fp32."""
        sums = torch.zeros(len(self.centers), states.shape[1], device=states.device)
        sums.index_add_(0, self.assignment, states.float())
        return sums / self.assignment.bincount(minlength=len(self.centers))[:, None]


def density_peaks(
    states: Float[Tensor, "R D"], num_clusters: int, noise: Float[Tensor, " R"] | None = None
) -> Clusters:
    """Cluster tokens around those that are dense and far from anything denser (DPC-kNN).

    A token's density is the exponential of minus its mean squared distance to as many nearest tokens as there are
    clusters, itself included; distances are per root of the width. Prominence is density times the distance to the
    nearest denser token.

    Args:
        states: the tokens; distances are taken in fp32 from differences.
        num_clusters: from 1 to R.
        noise: uniform draws that decide between equal densities, a millionth of them is added, as published. None
            decides for the earlier token, which is the same each time.
    """
    distances = torch.cdist(states.float(), states.float(), compute_mode="donot_use_mm_for_euclid_dist")
    distances = distances / states.shape[1] ** 0.5
    nearest = distances.topk(num_clusters, dim=-1, largest=False).values
    density = (-nearest.square().mean(-1)).exp()
    density = density if noise is None else density + noise * _NOISE
    is_denser = density > density[:, None]
    if noise is None:
        order = torch.arange(len(density), device=density.device)
        is_denser |= (density == density[:, None]) & (order < order[:, None])
    farthest = distances.max()
    separation = torch.where(is_denser, distances, farthest).amin(-1)
    centers = (density * separation).sort(descending=True, stable=True).indices[:num_clusters]
    assignment = distances[:, centers].argmin(-1)
    assignment[centers] = torch.arange(num_clusters, device=centers.device)
    return Clusters(centers, assignment)
