"""How fast SparseVLM scores visual tokens and recycles dropped ones, beside the published way over full matrices.

``python -m benchmarks.sparsevlm_speed`` measures the three layers of LLaVA-1.5-7B that drop tokens, at 192 tokens in
the mean: 32 heads of 128, 576 visual tokens, random queries and keys. Before anything is timed, scores and the tokens
kept are compared. On a busy machine processor time counts.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.rank_workload import seeded_in
from qr_integrations.backend.attention_rows import attention_rows
from qr_integrations.pruning.sparse_budgets import PUBLISHED_BUDGETS, num_recycled, tokens_after
from qr_integrations.pruning.sparse_merge import density_peaks
from qr_integrations.pruning.sparse_scores import rotary_gravity, visual_scores
from qr_integrations.types import Span

_RESULTS = Path(__file__).parent / "results"
_GOAL = 4.0  # x faster than published
HEADS, HEAD_WIDTH, WIDTH, BEFORE, VISUAL, BEHIND = 32, 128, 4096, 35, 576, 57
FREQUENCIES = 10_000.0 ** (-torch.arange(0, HEAD_WIDTH, 2) / HEAD_WIDTH)


@dataclass(frozen=True)
class Layer:
    """What a layer that drops tokens holds when it is asked."""

    query: Tensor
    key: Tensor
    raters: Tensor
    visual: slice
    keep: int

    @classmethod
    def random(cls, num_visual: int, keep: int, num_raters: int) -> "Layer":
        length = BEFORE + num_visual + BEHIND
        query, key = torch.randn(2, 1, HEADS, length, HEAD_WIDTH).unbind()
        raters = torch.arange(BEFORE + num_visual, length)[torch.randperm(BEHIND)[:num_raters].sort().values]
        return cls(query, key, raters, slice(BEFORE, BEFORE + num_visual), keep)

    def positions(self) -> Tensor:
        """As if nothing had been dropped."""
        return torch.arange(self.query.shape[2], device=self.query.device)[None]


def published(layer: Layer, gravity: bool = False) -> tuple[Tensor, Tensor]:
    """Gumpest/SparseVLMs, commit 26a5f48: whole matrices of all heads, a bias of all pairs, then a few rows of them."""
    length = layer.query.shape[2]
    bias = torch.zeros(length, length, dtype=layer.query.dtype)
    bias.masked_fill_(torch.ones(length, length, dtype=torch.bool).tril().logical_not(), float("-inf"))
    matrix = layer.query @ layer.key.transpose(-2, -1) * HEAD_WIDTH**-0.5
    matrix = (matrix + bias.to(layer.query.device)).softmax(-1)
    if gravity:
        angles = layer.positions()[0, :, None] * FREQUENCIES.to(layer.query.device)
        waves = torch.cat([angles.cos(), angles.sin()], -1)
        matrix = matrix / (waves @ waves.T * (2 / HEAD_WIDTH**0.5))
        heads = matrix[0][:, layer.raters][..., layer.visual].sum((1, 2)).topk(14).indices
        matrix = matrix[:, heads]
    scores = matrix.mean(1)[0, layer.raters, layer.visual].mean(0)
    return scores, scores.topk(layer.keep).indices.sort().values


def ours(layer: Layer, gravity: bool = False) -> tuple[Tensor, Tensor]:
    """The raters' rows only."""
    places = layer.positions()[0]
    visible = (places <= layer.raters[:, None])[None, None]
    rows = attention_rows(
        layer.query[:, :, layer.raters],
        layer.key,
        visible,
        rows=Span(0, len(layer.raters)),
        heads=list(range(HEADS)),
        reduce="none",
    )[0][..., layer.visual]
    if gravity:
        columns = layer.positions()[:, layer.visual]
        rows = rows / rotary_gravity(layer.positions()[:, layer.raters], columns, FREQUENCIES.to(rows.device))
    scores = visual_scores(rows, 14 if gravity else None)[0]
    return scores, scores.sort(descending=True, stable=True).indices[: layer.keep].sort().values


def published_merging(states: Tensor, num_clusters: int) -> Tensor:
    """Distances from all differences at once; noise left out, so that both do the same."""
    distances = (states[:, None] - states[None]).norm(dim=-1) / states.shape[1] ** 0.5
    density = (-distances.topk(num_clusters, largest=False).values.square().mean(-1)).exp()
    farther = torch.where(density[None] > density[:, None], distances, distances.max()).amin(-1)
    centers = (density * farther).topk(num_clusters).indices
    cluster = distances[centers].argmin(0)
    cluster[centers] = torch.arange(num_clusters, device=centers.device)
    weights = torch.nn.functional.one_hot(cluster, num_clusters).to(states.dtype)
    return (weights / (weights.sum(0) + 1e-6)).T @ states


def jobs(layers: list[Layer], dropped: Tensor, num_clusters: int) -> list[measure.Job]:
    """Three layers each, and the recycling after the first of them."""
    return [
        measure.Job("scores, ours", lambda _: [ours(layer) for layer in layers]),
        measure.Job("scores, published", lambda _: [published(layer) for layer in layers]),
        measure.Job("scores of 2.0, ours", lambda _: [ours(layer, True) for layer in layers]),
        measure.Job("scores of 2.0, published", lambda _: [published(layer, True) for layer in layers]),
        measure.Job("recycling, ours", lambda _: density_peaks(dropped, num_clusters).means(dropped)),
        measure.Job("recycling, published", lambda _: published_merging(dropped, num_clusters)),
    ]


def compare(layers: list[Layer], dropped: Tensor, num_clusters: int) -> float:
    """The largest difference of the scores as a share of their maximum; the same tokens must be kept and merged."""
    largest = 0.0
    for gravity in (False, True):
        for layer in layers:
            (mine, kept), (theirs, their_kept) = ours(layer, gravity), published(layer, gravity)
            largest = max(largest, float((mine - theirs).abs().max() / theirs.abs().max()))
            assert torch.equal(kept, their_kept)
    torch.testing.assert_close(
        density_peaks(dropped, num_clusters).means(dropped), published_merging(dropped, num_clusters)
    )
    assert largest < 1e-4, largest
    return largest


@torch.no_grad()
def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.sparsevlm_speed", description=__doc__)
    parser.add_argument("--raters", type=int, default=29, help="words that rate, of 57")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; default: torch's own choice")
    parser.add_argument("--out", type=Path, default=_RESULTS / "sparsevlm-speed.json")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    budgets = PUBLISHED_BUDGETS["1.5"][192]
    sizes = (VISUAL, *tokens_after(budgets, VISUAL, True))
    with seeded_in(torch.float32, "cuda" if torch.cuda.is_available() else "cpu"):
        layers = [Layer.random(size, keep, options.raters) for size, keep in zip(sizes, budgets, strict=False)]
        recycled, num_clusters = num_recycled(VISUAL - budgets[0])
        dropped = torch.randn(recycled, WIDTH)
    difference = compare(layers, dropped, num_clusters)
    times = measure.interleaved(jobs(layers, dropped, num_clusters), options.repeats, lambda name: 1)
    rows = {name: measure.summary(taken) for name, taken in times.items()}
    machine = measure.machine()
    where = f"{machine['gpu'] or machine['processor']}, {machine['threads']} threads"
    print(f"| {where} | ours ms | published ms | x (wall) | x (processor) |\n|---|---|---|---|---|")
    for what in ("scores", "scores of 2.0", "recycling"):
        mine, theirs = rows[f"{what}, ours"], rows[f"{what}, published"]
        wall, processor = (theirs[key] / mine[key] for key in ("min_s", "cpu_min_s"))
        times_ms = f"{1000 * mine['min_s']:.1f} | {1000 * theirs['min_s']:.1f}"
        print(f"| {what} | {times_ms} | {wall:.1f} | {processor:.1f} |")
    print(f"goal: scores {_GOAL} x faster; largest difference of a score {difference:.1e} of the maximum")
    options.out.parent.mkdir(exist_ok=True)
    told = {"machine": machine, "raters": options.raters, "difference": difference, "jobs": rows}
    options.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
