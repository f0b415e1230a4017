"""How fast ranking is, beside the published procedure and the floor: ``python -m benchmarks.rank --help``."""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure, rank_report
from benchmarks.published import Published
from benchmarks.rank_jobs import JOBS
from benchmarks.rank_workload import GPU_ONLY, Workload, load
from qr_integrations import QRHeadReranker

_RESULTS = Path(__file__).parent / "results"
_SHORT = {"ours_warm": 5, "floor_warm": 5}  # runs per round of the short jobs
_TOLERANCE = {torch.float32: 1e-3}  # largest difference of a score, as a share of the largest score
_TOLERANCE_HALF = 0.25  # half precision rounds every layer's states; the authors' fp16 lies as far from fp32
_EXACT_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # freed memory goes back


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.rank", description=__doc__)
    parser.add_argument("--model", nargs="+", default=["random-cpu"], help="random-cpu, random-llama-8b, qr-mini, PATH")
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048, 6144], help="prompt lengths")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; default: torch's own choice")
    parser.add_argument("--dtype", default=None, help="default: float32 on the CPU, bfloat16 on a GPU")
    parser.add_argument("--jobs", nargs="+", choices=list(JOBS), default=list(JOBS))
    parser.add_argument("--no-memory", action="store_true", help="times only")
    parser.add_argument("--out", type=Path, default=None, help="default: benchmarks/results/rank-<machine>.json")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    parser.add_argument("--profile", metavar="JOB", choices=list(JOBS), help="print where the time of one job goes")
    parser.add_argument("--memory-of", metavar="JOB", choices=list(JOBS), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _dtype(name: str | None) -> torch.dtype:
    dtype = getattr(torch, name or ("float32" if _device() == "cpu" else "bfloat16"))
    assert isinstance(dtype, torch.dtype)
    return dtype


def _same_scores(work: Workload) -> dict[str, Any]:
    """Ours against the published procedure on the same prompt: they must say the same, or times mean nothing."""
    published = Published(work, work.half)
    published.install()
    try:
        theirs = torch.tensor(published.rank(work.query(0)))
    finally:
        published.uninstall()
    ranking = QRHeadReranker(work.backend, heads=work.half).rank(work.query(0), work.documents)
    ours = torch.tensor([item.score for item in sorted(ranking, key=lambda item: item.index)])
    off = float((ours - theirs).abs().max() / theirs.abs().max())
    limit = _TOLERANCE.get(work.backend.model.dtype, _TOLERANCE_HALF)
    assert off <= limit, f"the published procedure gives other scores: {off:.1e} of the largest, {limit:.0e} allowed"
    same_order = bool((ours.argsort() == theirs.argsort()).all())
    return {"largest_difference": off, "allowed": limit, "same_order": same_order}


def _memory(args: argparse.Namespace, model: str, tokens: int, job: str) -> dict[str, Any]:
    """One job's peak, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.rank", "--memory-of", job, "--model", model, "--tokens", str(tokens)]
    command += ["--dtype", args.dtype] if args.dtype else []
    command += ["--threads", str(args.threads)] if args.threads else []
    env = {**os.environ, **_EXACT_MALLOC}
    out = subprocess.run(command, env=env, cwd=Path(__file__).parents[1], check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(out.stdout.splitlines()[-1])
    return result


def _memory_here(args: argparse.Namespace) -> dict[str, Any]:
    work = Workload.make(load(args.model[0], _dtype(args.dtype), _device()), args.tokens[0])
    job = JOBS[args.memory_of](work)
    return {"skipped": job.skip} if job.skip else measure.peak_memory(job)


def _measure(args: argparse.Namespace, model: str, tokens: int) -> dict[str, Any]:
    """Everything about one model and one length."""
    work = Workload.make(load(model, _dtype(args.dtype), _device()), tokens)
    result: dict[str, Any] = {"model": model, **work.describe(), "same_scores": _same_scores(work)}
    jobs = [JOBS[name](work) for name in args.jobs]
    times = measure.interleaved([j for j in jobs if not j.skip], args.repeats, lambda name: _SHORT.get(name, 1))
    result["jobs"] = {
        job.name: {"what": job.what, **({"skipped": job.skip} if job.skip else measure.summary(times[job.name]))}
        for job in jobs
    }
    skipped = [job.name for job in jobs if job.skip]
    work.backend.close()
    del work, jobs
    for name in [] if args.no_memory else args.jobs:
        if name not in skipped:
            result["jobs"][name]["memory"] = _memory(args, model, tokens, name)
    return result


def _profile(args: argparse.Namespace) -> None:
    work = Workload.make(load(args.model[0], _dtype(args.dtype), _device()), args.tokens[0])
    job = JOBS[args.profile](work)
    print(f"{job.name}: {measure.seconds_of(job, 0)[0]:.3f} s the first time")
    job.prepare(1)
    with torch.profiler.profile(record_shapes=True) as profile:
        job.run(1)
    print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))


def _default_out(machine: dict[str, Any]) -> Path:
    name = machine["gpu"] or f"{machine['processor']} {machine['cores']} cores"
    return _RESULTS / f"rank-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write."""
    args = _arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.memory_of:
        print(json.dumps(_memory_here(args)))
        return 0
    if args.profile:
        _profile(args)
        return 0
    machine, results = measure.machine(), []
    for model in args.model:
        if model in GPU_ONLY and _device() == "cpu":
            print(f"{model}: skipped, it needs a CUDA device and this machine has none")
            continue
        for tokens in args.tokens:
            results.append(_measure(args, model, tokens))
            print(rank_report.text(machine, results[-1:], markdown=args.markdown), flush=True)
    out = args.out or _default_out(machine)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n", encoding="utf-8")
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
