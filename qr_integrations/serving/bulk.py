"""Rankings and detected heads for millions of lists, with Ray Data: on this machine, or on a cluster.

The input is cut into shards; workers, which load the model once, write one Parquet file for each. Killed and started
again with the same arguments, a job goes on with the shards that are not finished; no row is lost, none is there twice.
A list that is wrong, or that the model cannot read, is noted and passed over. On a cluster, input, folder and package
must be found at the same paths by all nodes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import file_digest
from importlib.metadata import version
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from qr_integrations.errors import InputError, MissingExtra

if any(find_spec(name) is None for name in ("ray", "pyarrow")):
    raise MissingExtra("qr_integrations.serving.bulk", "ray")

from qr_integrations.evaluation.trec import write_run
from qr_integrations.model_settings import ModelSettings
from qr_integrations.reranking import RerankSettings
from qr_integrations.retrieval.detection import OBJECTIVES, Detection
from qr_integrations.serving.bulk_folder import BulkFolder
from qr_integrations.serving.bulk_inputs import ListsFile, RunFile, Shard, Source
from qr_integrations.serving.bulk_ray import ONE_WORKER, Workers, ray_started, work_through
from qr_integrations.serving.bulk_texts import TextIndex
from qr_integrations.serving.bulk_workers import DetectJob, Job, RankJob
from qr_integrations.version import __version__

__all__ = [
    "BulkReport",
    "ListsFile",
    "RunFile",
    "Workers",
    "detect_in_bulk",
    "rerank_in_bulk",
    "write_trec",
]

Progress = Callable[[int, int], None]
_FORMAT, _TEXTS = 1, "_texts.sqlite"


@dataclass(frozen=True, slots=True)
class BulkReport:
    """What came of a job.

    Attributes:
        lists: how many the input holds.
        bad: how many of them were passed over; ``_errors.jsonl`` in the folder says why.
        done_now: how many were worked on this time; the others were finished before.
    """

    lists: int
    bad: int
    done_now: int


@dataclass(frozen=True, slots=True)
class _Work:
    """A job, its input, and its folder."""

    job: Job
    source: Source
    folder: BulkFolder
    shard_lists: int
    strict: bool

    def run(self, asked: Mapping[str, Any], workers: Workers, device: str, progress: Progress | None) -> BulkReport:
        """Do what is not finished; `asked` is what results depend on, besides the input."""
        if self.shard_lists < 1:
            raise InputError(f"shard_lists is {self.shard_lists}: pass at least 1")
        shards, digest = self.source.cut(self.shard_lists)
        (cut, _), *others = self.source.files().items()
        inputs = {cut: digest} | {name: _digest(path) for name, path in others}
        versions = {"qr-integrations": __version__} | {name: version(name) for name in ("torch", "transformers")}
        fixed = {"format": _FORMAT, "shard_lists": self.shard_lists, **asked, **inputs, "versions": versions}
        with self.folder.claimed(fixed):
            finished = self.folder.finished()
            left = [shard for shard in shards if shard.number not in finished]
            total, done_now = sum(shard.lists for shard in shards), sum(shard.lists for shard in left)
            if left:
                self._do(left, total, workers, device, progress)
            (self.folder.path / _TEXTS).unlink(missing_ok=True)
            bad = [entry for shard in shards for entry in self.folder.notes(shard.number)["bad"]]
            self.folder.close(bad)
        if bad and self.strict:
            raise InputError(f"{len(bad)} lists are bad: {bad[0]['error']}")
        return BulkReport(total, len(bad), done_now)

    def _do(self, left: list[Shard], total: int, workers: Workers, device: str, progress: Progress | None) -> None:
        texts = self.folder.path / _TEXTS
        if isinstance(self.source, RunFile) and not texts.exists():
            TextIndex.write(texts, self.source.corpus, self.source.queries)
        before = self.folder.finished()
        identity = self.folder.notes(min(before))["model"] if before else None
        arguments = (self.job, self.source, self.folder, self.strict, identity)
        done = total - sum(shard.lists for shard in left)
        progress = progress or _silent
        progress(done, total)
        with ray_started(workers):
            for report in work_through(left, workers, device, arguments):
                if report.bad and self.strict:
                    raise InputError(report.first_bad)
                done += report.lists
                progress(done, total)


def rerank_in_bulk(
    source: ListsFile | RunFile,
    out: str | Path,
    settings: RerankSettings,
    *,
    top_n: int | None = None,
    batch_size: int = 16,
    shard_lists: int = 256,
    workers: Workers = ONE_WORKER,
    strict: bool = False,
    progress: Progress | None = None,
) -> BulkReport:
    """Rank every list and write Parquet files: one row for each query and document.

    The columns are ``query_id``, ``document_id`` (null where it has none), ``index`` (position in the list), ``rank``
    (from 1), ``score`` (after `RerankSettings.normalize`), ``qr_score`` (attention as it is), ``truncated``, ``model``
    and ``line``, where the list begins in the input: no two rows have the same line and index.

    Args:
        source: lists, or a run with its texts.
        out: a folder, made if it is not there. One that holds a part of the same job is completed.
        settings: the model, and how it ranks; no `backend`.
        top_n: the best so many documents of each list are written; None writes all.
        batch_size: so many lists go to the model at once; those over the same documents share a pass.
        shard_lists: so many are written at once: this much work is lost when a worker is killed.
        workers: how many, and what each may use.
        strict: stop at the first bad list.
        progress: called with the number of lists done and of all, after each shard.

    Raises:
        InputError: the input cannot be read, the folder is another job's, or a list is bad and `strict` is set.
        ModelError: the model cannot be used, or shards failed for another reason; what is finished stays.
    """
    if batch_size < 1 or (top_n is not None and top_n < 1):
        raise InputError("top_n and batch_size count from 1: pass at least 1")
    folder = BulkFolder(Path(out))
    asked = {"task": "rerank", **settings.model_dump(mode="json"), "top_n": top_n, "lists at once": batch_size}
    if isinstance(source, RunFile):
        source = replace(source, texts=folder.path / _TEXTS)
        asked["depth"] = source.depth
    work = _Work(RankJob(settings, top_n, batch_size), source, folder, shard_lists, strict)
    return work.run(asked, workers, settings.device, progress)


def detect_in_bulk(
    source: ListsFile,
    out: str | Path,
    settings: ModelSettings,
    *,
    data: str = "",
    shard_lists: int = 256,
    workers: Workers = ONE_WORKER,
    strict: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> tuple[Detection, BulkReport]:
    """Score all heads of a model on every list: what `HeadDetector.detect` gives for the same lists, but for rounding.

    Args:
        source: lists with ``judged=True``.
        out: a folder for what is finished; `Detection.save` writes the result.
        settings: the model; no `backend`.
        data: what to call the lists in the result.
        shard_lists, workers, strict, progress: as in `rerank_in_bulk`.
        options: of `HeadDetector`, such as `max_layer` and `seed`; JSON can hold them.

    Raises:
        InputError: as in `rerank_in_bulk`, or all lists are bad.
        ModelError: as in `rerank_in_bulk`.
    """
    asked = {"task": "detect", **settings.model_dump(mode="json"), **options}
    folder = BulkFolder(Path(out))
    work = _Work(DetectJob(settings, options), source, folder, shard_lists, strict)
    report = work.run(asked, workers, settings.device, progress)
    return _detection(folder, data), report


def _detection(folder: BulkFolder, data: str) -> Detection:
    """All shards added up, in their order."""
    numbers = sorted(folder.finished())
    notes = [folder.notes(number) for number in numbers]
    even, odd = (sum(note["counts"][half] for note in notes) for half in (0, 1))
    if not even + odd:
        raise InputError(f"no list could be used; {notes[0]['bad'][0]['error']}")
    tables = folder.tables()
    first = next(tables)
    sums = first["sum"].to_numpy().copy()
    for table in tables:
        sums += table["sum"].to_numpy()
    places = len(first) // (2 * len(OBJECTIVES))
    heads = zip(first["layer"].to_pylist()[:places], first["head"].to_pylist()[:places], strict=True)
    shaped = np.reshape(sums, (len(OBJECTIVES), 2, places)).tolist()
    by_objective = dict(zip(OBJECTIVES, shaped, strict=True))
    return Detection(tuple(heads), by_objective, (even, odd), {**notes[0]["detector"], "data": data})


def write_trec(folder: str | Path, path: str | Path, tag: str = "qr") -> None:
    """The results of `rerank_in_bulk` as a TREC run, with `qr_score` as score; one query at a time is in memory.

    A document without an id is called by its index.

    Raises:
        InputError: an id is not one word, or the ids of two lists are the same.
    """
    write_run(path, _rankings(BulkFolder(Path(folder))), tag)


def _rankings(folder: BulkFolder) -> Iterator[tuple[str, Sequence[tuple[str, float]]]]:
    names = ["line", "query_id", "document_id", "index", "qr_score"]
    for table in folder.tables():
        rows = zip(*(table[name].to_pylist() for name in names), strict=True)
        for (_, query), of_list in groupby(rows, key=lambda row: row[:2]):
            yield query, [(str(index) if name is None else name, score) for _, _, name, index, score in of_list]


def _silent(done: int, total: int) -> None:
    pass


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as handle:
            return file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be read ({error.strerror}): pass a JSONL file") from error
