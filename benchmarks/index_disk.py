"""How long an index takes to be saved and loaded, beside reading its files and nothing else.

``python -m benchmarks.index_disk`` measures qr-mini with 8,192, 32,768 and 100,000 tokens of documents. ``cold`` means
that the files were dropped from the memory of the system before each run, where it can be asked to. ``tokens`` is the
part of loading that writes the prompts again and compares their tokens.
"""

import argparse
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from benchmarks.rank_workload import documents_for
from qr_integrations import Backend, DocumentIndex

_RESULTS = Path(__file__).parent / "results"
_CHUNK = 2**20


@dataclass(frozen=True)
class Job(measure.Job):
    """With the files of a folder dropped from memory first, or removed."""

    folder: Path
    before: str = ""

    def prepare(self, repeat: int) -> None:
        """``"cold"`` or ``"new"``."""
        if self.before == "cold":
            drop(self.folder)
        if self.before == "new":
            shutil.rmtree(self.folder, ignore_errors=True)


def drop(folder: Path) -> None:
    """Forget what the system remembers of these files."""
    for path in folder.iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def read(folder: Path) -> None:
    """All bytes, looked at by nobody."""
    for path in folder.iterdir():
        with path.open("rb", buffering=0) as handle:
            while handle.read(_CHUNK):
                pass


def jobs(index: DocumentIndex, folder: Path, backend: Backend) -> list[measure.Measurable]:
    """Saving, loading, and the floor of each."""
    kept, new = folder / "kept", folder / "new"
    index.save(kept)
    scorer = index.reranker.scorer
    windows = [[candidate.read for candidate in window.candidates] for window in index.windows]
    return [
        Job("read", lambda repeat: read(kept), kept),
        Job("read, cold", lambda repeat: read(kept), kept, "cold"),
        Job("save", lambda repeat: index.save(new), new, "new"),
        Job("save again", lambda repeat: index.save(kept), kept),
        Job("load", lambda repeat: DocumentIndex.load(kept, backend), kept),
        Job("load, cold", lambda repeat: DocumentIndex.load(kept, backend), kept, "cold"),
        Job("load unverified", lambda repeat: DocumentIndex.load(kept, backend, verify=False), kept),
        Job("load unverified, cold", lambda repeat: DocumentIndex.load(kept, backend, verify=False), kept, "cold"),
        Job("tokens", lambda repeat: [scorer.lay_out(window) for window in windows], kept),
    ]


def measured(backend: Backend, num_tokens: int, layout: str, repeats: int) -> dict[str, Any]:
    """Seconds of each job, and bytes on disk."""
    documents = documents_for(backend, num_tokens)
    index = DocumentIndex.build(documents, backend, layout=layout)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder:
        some = jobs(index, Path(folder), backend)
        size = sum(path.stat().st_size for path in (Path(folder) / "kept").iterdir())
        times = measure.interleaved(some, repeats, lambda name: 1)
    return {
        "tokens": num_tokens,
        "windows": len(index.windows),
        "bytes": size,
        "jobs": {name: measure.summary(taken) for name, taken in times.items()},
    }


def main() -> None:
    """Measure, print a table, write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="qr-mini")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768, 100_000])
    parser.add_argument("--layout", default="block")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=_RESULTS / "index-disk.json")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    backend = Backend.load(given.model)
    found = []
    for num_tokens in given.tokens:
        found.append(measured(backend, num_tokens, given.layout, given.repeats))
        print(f"\n{num_tokens:,} tokens, {found[-1]['windows']} windows, {found[-1]['bytes'] / 2**20:.1f} MiB")
        for name, taken in found[-1]["jobs"].items():
            print(f"{name:24}{1e3 * taken['min_s']:10.1f} ms, processor {1e3 * taken['cpu_min_s']:8.1f} ms", flush=True)
    report = {"machine": measure.machine(), "layout": given.layout, "model": given.model, "sizes": found}
    given.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
