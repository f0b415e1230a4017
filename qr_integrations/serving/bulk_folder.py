"""The folder of a bulk job: one Parquet file for every finished shard, and what the job was asked for.

Its files, besides ``part-000000.parquet`` and so on, begin with ``_``, so that ``read_parquet(folder)`` of pandas,
DuckDB and Ray reads the parts alone.

Ray Data can resume by itself (``ray.data.checkpoint``, read in Ray 2.60), in two phases that survive a kill between
data and checkpoint, but not as it is needed here: it notes the ids of the rows in each written file, so a list whose
rows are torn apart by the end of a block counts as done when one half is, and a list without rows, such as a bad one,
is never done; it keeps all ids in the memory of every worker that filters; and it does not notice other arguments or
another input. So a shard is one file here, written beside its place and renamed: it is there and whole, or not there.
What went wrong in it stands in the same file's footer, so that nothing can be killed between the two.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from qr_integrations.errors import InputError
from qr_integrations.files import locked_folder, sync_folder, write_whole

_NOTES = b"qr_integrations"
_MANIFEST, _ERRORS = "_manifest.json", "_errors.jsonl"


@dataclass(frozen=True, slots=True)
class BulkFolder:
    """The folder of one job; every worker must find it at the same path.

    Attributes:
        path: may not be there yet, but the folder that holds it is.
    """

    path: Path

    @contextmanager
    def claimed(self, asked: Mapping[str, Any]) -> Iterator[None]:
        """Make the folder for a job, or go on in it; no other process does until the block ends.

        Args:
            asked: what its results depend on; JSON can hold it.

        Raises:
            InputError: it is another job's, another process works on it, or it holds something else than a job.
        """
        where = str(self.path)
        with ExitStack() as held:
            try:
                self.path.mkdir(exist_ok=True)
                held.enter_context(locked_folder(self.path, wait=False))
            except BlockingIOError as error:
                raise InputError(f"another process works on {where!r}: wait for it, or pass a new folder") from error
            except OSError as error:
                raise InputError(f"{where!r} cannot be used ({error}): pass a folder of yours") from error
            self._check(asked)
            for left in [*self.path.glob("part-*.parquet?*"), *self.path.glob("_begun-*")]:  # of a job that was killed
                left.unlink(missing_ok=True)
            yield

    def _check(self, asked: Mapping[str, Any]) -> None:
        manifest = self.path / _MANIFEST
        if not manifest.exists():
            if any(not path.name.startswith(_MANIFEST) for path in self.path.iterdir()):
                raise InputError(f"{str(self.path)!r} holds something else: pass a new folder")
            write_whole(manifest, json.dumps(asked, indent=1, ensure_ascii=False), durable=True)
        try:
            before = dict(json.loads(manifest.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise InputError(f"{str(manifest)!r} cannot be read ({error}): pass a new folder") from error
        other = [name for name in {**before, **asked} if before.get(name) != json.loads(json.dumps(asked.get(name)))]
        if other:
            raise InputError(
                f"{str(self.path)!r} was made with another {', '.join(other)}: pass a new folder, or run as before"
            )

    def part(self, number: int) -> Path:
        """The file of a shard, once it is finished."""
        return self.path / f"part-{number:06d}.parquet"

    def finished(self) -> set[int]:
        """The numbers of all shards that are."""
        return {int(path.stem.removeprefix("part-")) for path in self.path.glob("part-*.parquet")}

    def begin(self, number: int) -> int:
        """Note that a worker begins a shard; returns how many have, since the job was last started."""
        with (self.path / f"_begun-{number:06d}").open("ab") as handle:
            handle.write(b".")
            return handle.tell()

    def finish(self, number: int, table: pa.Table, notes: Mapping[str, Any]) -> None:
        """Write the results of a shard, and `notes`, which JSON can hold."""
        file = BytesIO()
        metadata = {_NOTES: json.dumps(notes, ensure_ascii=False).encode()}
        pq.write_table(table.replace_schema_metadata(metadata), file, compression="zstd")
        write_whole(self.part(number), file.getvalue(), durable=True)
        (self.path / f"_begun-{number:06d}").unlink(missing_ok=True)

    def notes(self, number: int) -> dict[str, Any]:
        """The notes of a finished shard."""
        found: dict[str, Any] = json.loads(pq.read_metadata(self.part(number)).metadata[_NOTES])
        return found

    def tables(self) -> Iterator[pa.Table]:
        """The results of the finished shards, in their order."""
        return (pq.read_table(self.part(number), partitioning=None) for number in sorted(self.finished()))

    def close(self, bad: list[dict[str, Any]]) -> None:
        """All shards are finished: write down the `bad` lists, or that there are none by writing nothing."""
        if bad:
            write_whole(self.errors, (json.dumps(entry, ensure_ascii=False) + "\n" for entry in bad))
        else:
            with suppress(FileNotFoundError):
                self.errors.unlink()
        sync_folder(self.path)

    @property
    def errors(self) -> Path:
        """The file with the bad lists."""
        return self.path / _ERRORS
