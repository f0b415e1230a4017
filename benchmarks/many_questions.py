"""How fast further questions about the same documents are: cold, warm, together, from disk; and what that takes.

``python -m benchmarks.many_questions`` measures qr-mini and a random model of 197 M parameters. The floor is the bare
forward pass of a question's tokens over the kept documents (stock cache, stock kernel). One query by one and all
together are compared on the same index. Times are minima over rounds in turns; ratios by processor time beside them.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from benchmarks.rank_jobs import floor_warm, ours_cold_half
from benchmarks.rank_workload import GPU_ONLY, SHAPES, Workload, load
from qr_integrations import DocumentIndex, HeadSet, QRHeadReranker

_RESULTS = Path(__file__).parent / "results"
_SHORT = 5  # runs per round of what takes milliseconds
_KEPT = ("auto", "bfloat16", "int8")
_GOALS = "goals: warm >= 50 x faster than cold at 8,192 tokens and <= 1.25 x the floor; together >= 4 x faster"


def workload(name: str, num_tokens: int) -> Workload:
    """A bundled model with its own heads, or a random one with heads up to half its depth."""
    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    backend = load(name, dtype, device)
    work = Workload.make(backend, num_tokens)
    return work if name in SHAPES else replace(work, half=HeadSet.resolve("auto", backend))


def index_of(work: Workload, layout: str, kept: str) -> DocumentIndex:
    """The documents of the workload, read once."""
    reranker = QRHeadReranker(work.backend, heads=work.half, refinements={"layout": layout}, truncation="chunk")
    return DocumentIndex.build(work.documents, reranker, kv_dtype=kept)  # type: ignore[arg-type]


def jobs(work: Workload, layout: str, kept: str, together: int, folder: Path) -> list[measure.Measurable]:
    """One question or many, over the same documents."""
    index = index_of(work, layout, kept)
    queries = [work.query(1 + number) for number in range(together)]
    index.rank_batch(queries)
    index.save(folder)

    def from_disk(repeat: int) -> None:
        DocumentIndex.load(folder, work.backend).rank(queries[repeat % together])

    found: list[measure.Measurable] = [
        measure.Job("warm", lambda repeat: index.rank(queries[repeat % together])),
        measure.Job("together", lambda repeat: index.rank_batch(queries)),
        measure.Job("from disk", from_disk),
    ]
    if layout == "joint" and kept == "auto":
        found = [ours_cold_half(work), floor_warm(work), *found]
    return found


def measured(work: Workload, layout: str, kept: str, together: int, repeats: int) -> dict[str, Any]:
    """Seconds of each job, and bytes."""
    with tempfile.TemporaryDirectory() as folder:
        some = jobs(work, layout, kept, together, Path(folder) / "index")
        times = measure.interleaved(some, repeats, lambda name: _SHORT if name in ("warm", "floor_warm") else 1)
    index = index_of(work, layout, kept)
    return {
        "layout": layout,
        "kept": kept,
        "bytes": index.num_bytes,
        "jobs": {name: measure.summary(taken) for name, taken in times.items()},
    }


def row(found: dict[str, Any], basis: dict[str, Any], together: int, tokens: int) -> str:
    """A line of the table; `basis` holds the cold ranking and the floor."""
    jobs, least = found["jobs"], {"wall": "min_s", "processor": "cpu_min_s"}
    warm, cold, floor = jobs["warm"], basis["ours_cold_half"], basis["floor_warm"]
    each = {name: jobs["together"][key] / together for name, key in least.items()}
    cells = [
        found["layout"],
        found["kept"],
        f"{found['bytes'] / 2**20:.1f} ({found['bytes'] / tokens / 1024:.1f})",
        f"{1000 * warm['min_s']:.1f}",
        _ratios([cold[key] / warm[key] for key in least.values()]),
        _ratios([warm[key] / floor[key] for key in least.values()]),
        f"{1000 * each['wall']:.1f}",
        _ratios([warm[key] / each[name] for name, key in least.items()]),
        f"{1000 * jobs['from disk']['min_s']:.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


def _ratios(numbers: Sequence[float]) -> str:
    wall, processor = numbers
    return f"{wall:.2f} ({processor:.2f})" if wall < 10 else f"{wall:.0f} ({processor:.0f})"


def table(name: str, num_tokens: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Print the table of one model at one length; return its numbers."""
    work = workload(name, num_tokens)
    tokens = len(work.layout())
    rows = []
    for layout in options.layouts:
        for kept in options.kept:
            found = measured(work, layout, kept, options.together, options.repeats)
            basis = (rows or [found])[0]["jobs"]
            if not rows:
                print(
                    f"\n{name}, {tokens:,} tokens, {len(work.documents)} documents; cold "
                    f"{1000 * basis['ours_cold_half']['min_s']:.0f} ms, floor of a further question "
                    f"{1000 * basis['floor_warm']['min_s']:.1f} ms\n\n"
                    "| layout | kept as | MiB (KiB per token) | warm ms | cold / warm | warm / floor "
                    f"| one of {options.together} together ms | one by one / together | load and ask ms |\n"
                    "|---|---|---|---|---|---|---|---|---|"
                )
            print(row(found, basis, options.together, tokens), flush=True)
            rows.append({"model": name, "tokens": tokens, "documents": len(work.documents), **found})
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.many_questions", description=__doc__)
    parser.add_argument("--model", nargs="+", default=["qr-mini", "random-cpu"], help="bundled, a folder, or a shape")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--layouts", nargs="+", default=["joint", "block"])
    parser.add_argument("--kept", nargs="+", default=list(_KEPT))
    parser.add_argument("--together", type=int, default=32, help="questions in one call")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; default: torch's own choice")
    parser.add_argument("--out", type=Path, default=_RESULTS / "many-questions.json")
    options = parser.parse_args()
    if options.layouts[0] != "joint" or options.kept[0] != "auto":
        parser.error("joint and auto come first: the others are compared with them")
    if options.threads:
        torch.set_num_threads(options.threads)
    machine = measure.machine()
    print(f"{machine['gpu'] or machine['processor']}, {machine['threads']} threads; ratios: wall time (processor time)")
    rows = []
    for name in options.model:
        if name in GPU_ONLY and not torch.cuda.is_available():
            parser.error(f"{name} needs a GPU: pass --model qr-mini random-cpu")
        for num_tokens in options.tokens:
            rows += table(name, num_tokens, options)
    print(f"\n{_GOALS}")
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
