"""How fast CDPruner chooses tokens, beside the published loop and the least that must be computed.

``python -m benchmarks.cdpruner_speed`` measures views of 576 tokens with random features, on one thread or on torch's
own choice, where small operations of the published loop wait for each other. Before anything is timed, the picks are
compared with the published ones. The kernel, which both need, is timed by itself.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks import measure
from qr_integrations.pruning.cdpruner import kernel_of
from qr_integrations.pruning.greedy import greedy_map

_RESULTS = Path(__file__).parent / "results"
_GOAL, _AT = 10.0, 128  # x faster than published, with that many of one view's tokens


def published(kernels: Tensor, num_picks: int) -> Tensor:
    """Theia-4869/CDPruner, commit 9541616, does this: small operations on tensors, all views of a batch at once."""
    views = torch.arange(len(kernels))
    factor = torch.zeros(num_picks, *kernels.shape[:2])
    residual = kernels.diagonal(dim1=1, dim2=2).clone()
    picks = torch.empty(num_picks, len(kernels), dtype=torch.long)
    for pick in range(num_picks):
        token = residual.argmax(-1)
        picks[pick] = token
        explained = torch.einsum("tb,tbn->bn", factor[:pick, views, token], factor[:pick])
        factor[pick] = (kernels[views, token] - explained) / residual[views, token].sqrt()[:, None]
        residual -= factor[pick].square()
        residual[views, token] = -float("inf")
    return picks.T


def floor(kernel: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """One product of a vector and a matrix, and one row of the kernel, for each pick."""
    row = kernel[0]
    for pick in range(len(factor)):
        row = kernel[pick] - factor[:pick, pick] @ factor[:pick]
    return row


def jobs(features: Tensor, relevance: Tensor, num_picks: int) -> list[measure.Job]:
    """The same picks of the same views."""
    kernels = torch.stack([kernel_of(*one) for one in zip(features, relevance, strict=True)])
    arrays = list(kernels.numpy())
    factor = np.full((num_picks, features.shape[1]), 0.01, dtype=np.float32)
    theirs, ours = published(kernels, num_picks), np.stack([greedy_map(one, num_picks).order for one in arrays])
    assert theirs.tolist() == ours.tolist()
    return [
        measure.Job("floor", lambda _: [floor(one, factor) for one in arrays]),
        measure.Job("ours", lambda _: [greedy_map(one, num_picks) for one in arrays]),
        measure.Job("published", lambda _: published(kernels, num_picks)),
        measure.Job("kernel", lambda _: [kernel_of(*one) for one in zip(features, relevance, strict=True)]),
    ]


def row(views: int, num_picks: int, found: dict[str, dict[str, float]]) -> str:
    """A line of the table: milliseconds, and ratios of minima by wall time and by processor time."""
    times = " | ".join(f"{1000 * found[name]['min_s']:.2f}" for name in ("floor", "ours", "published", "kernel"))
    ratios = [found["published"][field] / found["ours"][field] for field in ("min_s", "cpu_min_s")]
    return f"| {views} | {num_picks} | {times} | {ratios[0]:.1f} ({ratios[1]:.1f}) |"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.cdpruner_speed", description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[32, 64, 128, 192], help="that are kept of a view")
    parser.add_argument("--views", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--width", type=int, default=1024, help="of the features")
    parser.add_argument("--repeats", type=int, default=7, help="rounds that count")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; default: torch's own choice")
    parser.add_argument("--out", type=Path, default=None, help="default: cdpruner-speed-<n>-threads.json in results/")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    features, relevance = torch.randn(max(options.views), 576, options.width), torch.rand(max(options.views), 576)
    print(
        f"{measure.machine()['processor']}, {threads} threads\n\n"
        "| views | tokens | floor ms | ours ms | published ms | kernel ms | published / ours (processor) |\n"
        "|---|---|---|---|---|---|---|"
    )
    rows, reached = [], 0.0
    for views in options.views:
        for num_picks in options.tokens:
            timed = jobs(features[:views], relevance[:views], num_picks)
            taken = measure.interleaved(timed, options.repeats, lambda name: 5)
            found = {name: measure.summary(times) for name, times in taken.items()}
            print(row(views, num_picks, found), flush=True)
            rows.append({"views": views, "tokens": num_picks, "jobs": found})
            if (views, num_picks) == (1, _AT):
                reached = found["published"]["min_s"] / found["ours"]["min_s"]
    print(f"\n{'PASS' if reached >= _GOAL else 'FAIL'}  one view, {_AT} tokens: {reached:.1f} x, goal {_GOAL:.0f} x")
    out = options.out or _RESULTS / f"cdpruner-speed-{threads}-threads.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps({"machine": measure.machine(), "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
