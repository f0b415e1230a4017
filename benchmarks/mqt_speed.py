"""How fast the matryoshka query transformer is, beside the published module and the least that must be computed.

``python -m benchmarks.mqt_speed`` measures one of the published size with random weights: a tower 1,024 wide with 576
patches, 16 heads, tokens 4,096 wide. Before anything is timed, our tokens are compared with the published ones.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks import measure
from benchmarks.rank_workload import seeded_in
from qr_integrations.backend.query_transformer import QueryTransformer, stretch_table

_RESULTS = Path(__file__).parent / "results"
_GOAL = 2.0  # x faster than published
WIDTH, HEADS, OUT, PATCHES = 1024, 16, 4096, 576


def published(module: QueryTransformer, patches: Tensor, count: int) -> Tensor:
    """gordonhu608/MQT-LLaVA, commit 92c35d0: each call stretches the table, norms three times and, as
    ``nn.MultiheadAttention`` is asked for weights, computes and averages them."""
    many = len(patches)
    keys = module.ln_k(stretch_table(module.pos_embed, module.side).to(patches.dtype))
    queries = module.ln_q(module.query[:count] + module.pos_embed[:count])
    tokens, _ = module.attn(queries.expand(many, -1, -1), keys.expand(many, -1, -1), module.ln_v(patches))
    result: Tensor = tokens @ module.proj
    return result


class Floor:
    """What depends on the picture, of tensors made beforehand: a pooling with the attention and two products."""

    def __init__(self, module: QueryTransformer, patches: Tensor, count: int) -> None:
        self.first = count < PATCHES * WIDTH // (HEADS * PATCHES + WIDTH - PATCHES)
        self.attention = module.attention().to(patches.dtype)[:, :count].contiguous()
        self.weight_v = module.attn.in_proj_weight.chunk(3)[2].clone()
        self.out = module.attn.out_proj.weight.mT @ module.proj
        self.patches = module.ln_v(patches)

    def run(self, repeat: int) -> Tensor:
        """No norm and no check."""
        if self.first:
            pooled = (self.attention.flatten(0, 1) @ self.patches).unflatten(1, (HEADS, -1))
            values = torch.einsum("bhmv,hkv->bmhk", pooled, self.weight_v.unflatten(0, (HEADS, -1)))
        else:
            projected = linear(self.patches, self.weight_v).unflatten(-1, (HEADS, -1))
            values = torch.einsum("hmn,bnhk->bmhk", self.attention, projected)
        return values.flatten(2) @ self.out


def jobs(module: QueryTransformer, patches: Tensor, count: int) -> list[measure.Job]:
    """The same tokens of the same pictures."""
    return [
        measure.Job("floor", Floor(module, patches, count).run),
        measure.Job("ours", lambda _: module(patches, count)),
        measure.Job("published", lambda _: published(module, patches, count)),
    ]


@torch.no_grad()
def measured(module: QueryTransformer, patches: Tensor, count: int, repeats: int) -> dict[str, Any]:
    """Seconds of each job, and the largest difference of the tokens as a share of their maximum."""
    theirs = published(module, patches, count)
    difference = float((module(patches, count) - theirs).abs().max() / theirs.abs().max())
    assert difference < (1e-5 if patches.dtype is torch.float32 else 5e-2), difference
    times = measure.interleaved(jobs(module, patches, count), repeats, lambda name: 5)
    return {"difference": difference, "jobs": {name: measure.summary(taken) for name, taken in times.items()}}


def row(pictures: int, count: int, jobs: dict[str, dict[str, float]]) -> str:
    """A line of the table: milliseconds, and ratios of minima by wall time and by processor time."""
    floor, ours, theirs = (1000 * jobs[name]["min_s"] for name in ("floor", "ours", "published"))
    least, own, all_of_it = (1000 * jobs[name]["cpu_min_s"] for name in ("floor", "ours", "published"))
    return (
        f"| {pictures} | {count} | {floor:.2f} | {ours:.2f} | {theirs:.2f} | {ours / floor:.2f} ({own / least:.2f}) "
        f"| {theirs / ours:.2f} ({all_of_it / own:.2f}) |"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.mqt_speed", description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 64, 16, 2], help="of a picture")
    parser.add_argument("--pictures", type=int, nargs="+", default=[1, 8], help="of a batch")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; default: torch's own choice")
    parser.add_argument("--out", type=Path, default=_RESULTS / "mqt-speed.json")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    dtype, device = (torch.bfloat16, "cuda") if torch.cuda.is_available() else (torch.float32, "cpu")
    with seeded_in(dtype, device):
        module = QueryTransformer(WIDTH, HEADS, OUT, num_patches=PATCHES).eval()
        patches = torch.randn(max(options.pictures), PATCHES, WIDTH)
    print(
        f"{measure.machine()['gpu'] or measure.machine()['processor']}, {torch.get_num_threads()} threads\n\n"
        "| pictures | tokens | floor ms | ours ms | published ms | ours / floor (processor) "
        "| published / ours (processor) |\n"
        "|---|---|---|---|---|---|---|"
    )
    rows = []
    for pictures in options.pictures:
        for count in options.tokens:
            found = measured(module, patches[:pictures], count, options.repeats)
            print(row(pictures, count, found["jobs"]), flush=True)
            rows.append({"pictures": pictures, "tokens": count, **found})
    print(f"goal: {_GOAL} x faster than published, and no slower than the floor")
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps({"machine": measure.machine(), "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
