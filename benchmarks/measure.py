"""Time and memory, measured so that a busy machine harms every system alike.

Times: one run of every job per round, in turns; the minimum and the median over the rounds; wall time, and the
processor time of all threads, which a busy machine disturbs less. Memory on a CPU: the peak of the process's resident
memory above what the loaded model holds, each job in a process of its own; on a GPU the allocator's peak.
"""

import ctypes
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Measurable(Protocol):
    """What is measured: `run`; `prepare` and `finish` are not."""

    @property
    def name(self) -> str: ...
    @property
    def run(self) -> Callable[[int], Any]: ...
    @property
    def prepare(self) -> Callable[[int], None]: ...
    @property
    def finish(self) -> Callable[[int], None]: ...


Taken = tuple[float, float]
"""Seconds: wall, processor."""


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(job: Measurable, repeat: int) -> Taken:
    """Time of one run, tokenizing and everything else on the host included."""
    job.prepare(repeat)
    synchronize()
    gc.collect()
    gc.disable()
    try:
        start, cpu = time.perf_counter(), time.process_time()
        job.run(repeat)
        synchronize()
        return time.perf_counter() - start, time.process_time() - cpu
    finally:
        gc.enable()
        job.finish(repeat)


def interleaved(jobs: Sequence[Measurable], repeats: int, inner: Callable[[str], int]) -> dict[str, list[Taken]]:
    """Seconds of each job, `repeats` rounds after one that does not count; `inner` runs of a short job per round."""
    times: dict[str, list[Taken]] = {job.name: [] for job in jobs}
    for turn in range(repeats + 1):
        order = jobs if turn % 2 else list(reversed(jobs))
        for job in order:
            taken = [seconds_of(job, turn * inner(job.name) + i) for i in range(inner(job.name) if turn else 1)]
            times[job.name] += taken if turn else []
    return times


def summary(times: Sequence[Taken]) -> dict[str, float]:
    """Minimum and median, seconds."""
    wall, cpu = zip(*times, strict=True)
    return {
        "min_s": min(wall),
        "median_s": statistics.median(wall),
        "cpu_min_s": min(cpu),
        "cpu_median_s": statistics.median(cpu),
        "runs": len(times),
    }


@dataclass(frozen=True)
class Job:
    """One thing to time that keeps nothing between runs (a `Measurable`)."""

    name: str
    run: Callable[[int], Any]

    def prepare(self, repeat: int) -> None:
        """Nothing is kept between runs."""

    def finish(self, repeat: int) -> None:
        """Nothing is kept between runs."""


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes, self.op = 0, ""
        self.shape: tuple[int, ...] = ()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and not func.is_view and leaf.nbytes > self.nbytes:
                self.nbytes, self.shape, self.op = leaf.nbytes, tuple(leaf.shape), str(func)
        return out


def peak_memory(job: Measurable) -> dict[str, Any]:
    """Peak bytes of one run above what was held before it, after one run that looks for the largest tensor."""
    job.prepare(0)
    with LargestTensor() as largest:
        job.run(0)
    job.finish(0)
    job.prepare(1)
    on_gpu = torch.cuda.is_available()
    before = _start_peak(on_gpu)
    job.run(1)
    extra = max(0, _peak(on_gpu) - before)
    job.finish(1)
    how = "cuda.max_memory_allocated" if on_gpu else _how()
    return {
        "extra_bytes": extra,
        "largest_bytes": largest.nbytes,
        "largest_shape": list(largest.shape),
        "largest_op": largest.op,
        "how": how,
    }


def _start_peak(on_gpu: bool) -> int:
    gc.collect()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if platform.system() == "Linux":
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
        return _status("VmRSS")
    return _max_rss()


def _peak(on_gpu: bool) -> int:
    if on_gpu:
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return _status("VmHWM") if platform.system() == "Linux" else _max_rss()


def _how() -> str:
    return "VmHWM - VmRSS of a process" if platform.system() == "Linux" else "ru_maxrss of a process"


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def _max_rss() -> int:
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else 1024 * peak


def available_bytes(device: torch.device) -> int:
    """Memory that a job may still take."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) // 2
    line = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
    return 1024 * int(line.split()[1])


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "gpu": gpu,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
