"""What a worker does with a shard: read its lists, rank them or score all heads on them, write one file.

A worker is an actor of Ray Data and loads the model once. Lists that are wrong are noted and passed over.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa

from qr_integrations.backend import Backend, ModelIdentity
from qr_integrations.errors import InputError, QRError
from qr_integrations.model_settings import ModelSettings
from qr_integrations.reranking import RerankSettings
from qr_integrations.retrieval import HeadDetector
from qr_integrations.retrieval.detection import OBJECTIVES
from qr_integrations.serving.bulk_folder import BulkFolder
from qr_integrations.serving.bulk_inputs import GivenList, Shard, Source
from qr_integrations.types import JudgedList, Ranking

RANKED = pa.schema(
    [
        ("query_id", pa.string()),
        ("document_id", pa.string()),
        ("index", pa.int32()),
        ("rank", pa.int32()),
        ("score", pa.float64()),
        ("qr_score", pa.float64()),
        ("truncated", pa.bool_()),
        ("model", pa.string()),
        ("line", pa.int64()),
    ]
)
SUMS = pa.schema(
    [
        ("objective", pa.string()),
        ("half", pa.int8()),
        ("layer", pa.int32()),
        ("head", pa.int32()),
        ("sum", pa.float64()),
    ]
)
_MOST_DEATHS = 3  # of workers with the same shard
Bad = dict[str, Any]  # line, query_id, error


@dataclass(frozen=True, slots=True)
class Results:
    """What came of a shard: a table, notes for its footer, and the lists that were passed over."""

    table: pa.Table
    notes: Mapping[str, Any]
    bad: list[Bad]


@dataclass(frozen=True, slots=True)
class ShardReport:
    """What a worker tells of a shard.

    Attributes:
        number: of the shard.
        lists, bad: how many it holds, and how many of them were passed over.
        first_bad: what is wrong with the first of those.
        refused: why no shard can be worked on, such as a model that is not there; "" if they can.
        failed: why this one is not finished; "" if it is.
    """

    number: int
    lists: int
    bad: int = 0
    first_bad: str = ""
    refused: str = ""
    failed: str = ""


@runtime_checkable
class Job(Protocol):
    """What is to be done with lists; goes to the workers."""

    def load(self) -> Backend:
        """The model; the first call loads it."""

    def results(self, lists: Iterable[GivenList]) -> Results:
        """Of one shard."""


@dataclass(frozen=True, slots=True)
class RankJob:
    """Rank every list.

    Attributes:
        settings: how.
        top_n: the best so many documents of a list are written; None writes all.
        batch_size: so many lists go to the model at once; those over the same documents share a pass.
    """

    settings: RerankSettings
    top_n: int | None = None
    batch_size: int = 16

    def load(self) -> Backend:
        """The model, and the heads, which may not be there either."""
        return self.settings.open().backend

    def results(self, lists: Iterable[GivenList]) -> Results:
        """A row for every document of every list, best first."""
        columns: dict[str, list[Any]] = {name: [] for name in RANKED.names}
        bad: list[Bad] = []
        model = self.load().name
        for given, ranking in self._ranked(iter(lists), bad):
            for item in self.settings.relevances_of(ranking, self.top_n):
                row = (given.query_id, given.documents[item.index], item.index, item.rank, item.score, item.qr_score)
                for name, value in zip(RANKED.names, (*row, item.truncated, model, given.line), strict=True):
                    columns[name].append(value)
        return Results(pa.Table.from_pydict(columns, schema=RANKED), {}, bad)

    def _ranked(self, lists: Iterator[GivenList], bad: list[Bad]) -> "Iterator[tuple[_Names, Ranking]]":
        while chunk := list(islice(lists, self.batch_size)):
            good = list(_good(chunk, bad))
            for (given, _), ranking in zip(good, self._rankings([found for _, found in good]), strict=True):
                if isinstance(ranking, Ranking):
                    yield given, ranking
                else:
                    bad.append(_bad(given.line, given.query_id, ranking))

    def _rankings(self, lists: list[JudgedList]) -> list[Ranking | QRError]:
        """Together; one by one where something is wrong with any."""
        reranker = self.settings.open()
        try:
            return list(reranker.rank_batch([some.query for some in lists], [some.documents for some in lists]))
        except QRError as error:
            if len(lists) == 1:
                return [error]
        return [found for some in lists for found in self._rankings([some])]


@dataclass(frozen=True, slots=True)
class DetectJob:
    """Score all heads on every list, as `HeadDetector` does.

    Attributes:
        settings: which model.
        options: of `HeadDetector`.
    """

    settings: ModelSettings
    options: Mapping[str, Any]
    _made: list[HeadDetector] = field(default_factory=list)

    def load(self) -> Backend:
        """The model."""
        return self._detector().backend

    def results(self, lists: Iterable[GivenList]) -> Results:
        """Sums over the lists of even and of odd number; the notes say how many there are of each."""
        detector, bad = self._detector(), list[Bad]()
        sums = np.zeros((len(OBJECTIVES), 2, len(detector.heads)))
        counts = [0, 0]
        for given in lists:
            for names, judged in _good([given], bad):
                try:
                    sums[:, given.number % 2] += detector.scores(given.number, judged)
                    counts[given.number % 2] += 1
                except QRError as error:
                    bad.append(_bad(names.line, names.query_id, error))
        layers, heads = np.array(detector.heads).T
        objectives, halves, places = (axis.ravel() for axis in np.indices(sums.shape))
        columns = [np.array(OBJECTIVES)[objectives], halves, layers[places], heads[places], sums.ravel()]
        table = pa.table([pa.array(values, kind) for values, kind in zip(columns, SUMS.types, strict=True)], SUMS)
        return Results(table, {"counts": counts, "detector": detector.identity()}, bad)

    def _detector(self) -> HeadDetector:
        if not self._made:
            self._made.append(HeadDetector(self.settings.open(), **self.options))
        return self._made[0]


@dataclass(frozen=True, slots=True)
class _Names:
    """What a list and its documents are called."""

    line: int
    query_id: str
    documents: tuple[str | None, ...]


class ShardWorker:
    """The actor.

    Args:
        job: what is done.
        source: where lists come from.
        folder: where results go.
        strict: a shard with a bad list is not written.
        identity: of the model that shards were finished with before; None if there are none.
    """

    def __init__(
        self, job: Job, source: Source, folder: BulkFolder, strict: bool, identity: Mapping[str, Any] | None
    ) -> None:
        self.job, self.source, self.folder, self.strict, self.identity = job, source, folder, strict, identity

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One shard, as a batch of one row; returns a `ShardReport` in the same form."""
        shard = Shard(**{name: int(batch[name][0]) for name in Shard.__slots__})
        return {name: np.array([value]) for name, value in asdict(self._report(shard)).items()}

    def _report(self, shard: Shard) -> ShardReport:
        where = f"the {shard.lists} lists from line {shard.line} on"
        try:
            if self.folder.begin(shard.number) > _MOST_DEATHS:
                why = (
                    "workers died with them, perhaps for lack of memory: pass fewer --replicas, or --max-context-tokens"
                )
                return ShardReport(shard.number, shard.lists, failed=f"{where}: {_MOST_DEATHS} {why}")
            try:
                identity = ModelIdentity.of(self.job.load())
                if self.identity:
                    identity.check(self.identity, f"what is in {str(self.folder.path)!r}")
            except QRError as error:
                return ShardReport(shard.number, shard.lists, refused=str(error))
            done = self.job.results(self.source.read(shard))
            if not (self.strict and done.bad):
                notes = {**done.notes, "lists": shard.lists, "bad": done.bad, "model": identity.as_dict()}
                self.folder.finish(shard.number, done.table, notes)
            first = done.bad[0]["error"] if done.bad else ""
            return ShardReport(shard.number, shard.lists, len(done.bad), first_bad=first)
        except Exception as error:  # the others shall go on; the driver tells
            return ShardReport(shard.number, shard.lists, failed=f"{where}: {type(error).__name__}: {error}")


def _good(lists: Iterable[GivenList], bad: list[Bad]) -> Iterator[tuple[_Names, JudgedList]]:
    """Those that could be read; the others go to `bad`."""
    for given in lists:
        if isinstance(given.found, InputError):
            bad.append(_bad(given.line, None, given.found))
        else:
            ids = tuple(document.id for document in given.found.documents)
            yield _Names(given.line, given.found.id, ids), given.found


def _bad(line: int, query: str | None, error: QRError) -> Bad:
    return {"line": line, "query_id": query, "error": str(error)}
