"""Large inputs, cut into shards by where their bytes stand; each worker reads its own, nothing is kept in memory.

A shard is the same stretch of the file whenever the same file is cut by the same size.
"""

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from itertools import groupby, pairwise
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from qr_integrations.errors import InputError
from qr_integrations.evaluation.lists import list_of_line
from qr_integrations.evaluation.trec import run_line
from qr_integrations.serving.bulk_texts import TextIndex
from qr_integrations.types import JudgedList

_GZIP = b"\x1f\x8b"
_MARK = b"\xef\xbb\xbf"  # what some editors put in front of UTF-8


@dataclass(frozen=True, slots=True)
class Shard:
    """A stretch of a file that holds whole lists.

    Attributes:
        number: from 0.
        start, stop: bytes, half-open.
        line: the number of its first line, from 1.
        first: how many lists stand before it.
        lists: how many it holds.
    """

    number: int
    start: int
    stop: int
    line: int
    first: int
    lists: int


class GivenList(NamedTuple):
    """A list as it stands in the input.

    Attributes:
        number: from 0, in the whole file.
        line: where it begins, from 1.
        found: the list, or what is wrong with it.
    """

    number: int
    line: int
    found: JudgedList | InputError


@runtime_checkable
class Source(Protocol):
    """Where lists come from; goes to the workers."""

    def files(self) -> dict[str, Path]:
        """What is read, by what it is called in messages. The first one is cut."""

    def cut(self, size: int) -> "tuple[list[Shard], str]":
        """Shards of `size` lists and the SHA-256 of the file that was cut."""

    def read(self, shard: Shard) -> Iterator[GivenList]:
        """The lists of one."""


@dataclass(frozen=True, slots=True)
class ListsFile:
    """A JSONL file as `read_lists` reads it, one list a line.

    Attributes:
        path: the file, not packed; every worker must find it there.
        judged: what is relevant must stand in it; else it may.
    """

    path: Path
    judged: bool = False

    def files(self) -> dict[str, Path]:
        """That one."""
        return {"file of lists": self.path}

    def cut(self, size: int) -> tuple[list[Shard], str]:
        """After every `size` lines that are not blank."""
        return _cut(self.path, size, lambda number, line: number)

    def read(self, shard: Shard) -> Iterator[GivenList]:
        """A list that is wrong comes as what is wrong with it."""
        for place, (number, line) in enumerate(_lines(self.path, shard)):
            yield GivenList(shard.first + place, number, self._list(number, line))

    def _list(self, number: int, line: bytes) -> JudgedList | InputError:
        try:
            where = f"{self.path}, line {number}"
            found = list_of_line(where, _text(where, line), number, judged=self.judged)
            return found if found.documents else InputError(f"{where}: no documents: write at least one")
        except InputError as error:
            return error


@dataclass(frozen=True, slots=True)
class RunFile:
    """A TREC run, whose texts stand in a corpus and among queries in BEIR's layout.

    Attributes:
        path: the run, not packed; the lines of a query stand together.
        corpus, queries: JSONL files, not packed.
        depth: the best so many documents of a query; None takes all.
        texts: where `TextIndex.write` noted what stands where in them; `rerank_in_bulk` sees to it.
    """

    path: Path
    corpus: Path
    queries: Path
    depth: int | None = None
    texts: Path | None = None

    def files(self) -> dict[str, Path]:
        """All three."""
        return {"run": self.path, "corpus": self.corpus, "file of queries": self.queries}

    def cut(self, size: int) -> tuple[list[Shard], str]:
        """After every `size` queries.

        Raises:
            InputError: a query stands in two places.
        """
        seen: set[bytes] = set()
        last = b""

        def query(number: int, line: bytes) -> bytes:
            nonlocal last
            name = line.removeprefix(_MARK).split(maxsplit=1)[0]
            if name != last and name in seen:
                raise InputError(
                    f"{self.path}, line {number}: query {name.decode(errors='replace')!r} stands there again, apart "
                    "from its other lines: sort the run by query, for instance with sort -s -k1,1"
                )
            seen.add(last := name)
            return name

        return _cut(self.path, size, query)

    def read(self, shard: Shard) -> Iterator[GivenList]:
        """The documents of each query, best first; equal scores keep the order of the file."""
        assert self.texts is not None
        with TextIndex(self.texts, self.corpus, self.queries) as texts:
            by_query = groupby(_lines(self.path, shard), key=lambda pair: pair[1].removeprefix(_MARK).split()[0])
            for place, (_, lines) in enumerate(by_query):
                of_query = list(lines)
                yield GivenList(shard.first + place, of_query[0][0], self._list(of_query, texts))

    def _list(self, lines: list[tuple[int, bytes]], texts: TextIndex) -> JudgedList | InputError:
        try:
            scores: dict[str, float] = {}
            for number, line in lines:
                where = f"{self.path}, line {number}"
                read = run_line(number, _text(where, line), where)
                if read.document in scores:
                    raise InputError(f"{where}: {read.document!r} stands there twice: keep one line")
                scores[read.document] = read.score
            names = sorted(scores, key=lambda name: -scores[name])[: self.depth]
            where = f"{self.path}, line {lines[0][0]}"
            documents = tuple(texts.document(name, where) for name in names)
            return JudgedList(texts.query(read.query, where), documents, {}, id=read.query)
        except InputError as error:
            return error


def _cut(path: Path, size: int, key: Callable[[int, bytes], Hashable]) -> tuple[list[Shard], str]:
    """Lines with the same key, one after the other, make a list."""
    digest = sha256()
    starts: list[tuple[int, int, int]] = []  # byte, line, lists before
    byte = lists = 0
    last: Hashable = None
    try:
        with path.open("rb") as handle:
            if handle.peek(len(_GZIP))[: len(_GZIP)] == _GZIP:
                raise InputError(f"{str(path)!r} is packed, but workers begin in the middle: unpack it with gunzip")
            for number, line in enumerate(handle, start=1):
                digest.update(line)
                if line.strip() and (found := key(number, line)) != last:
                    last = found
                    if lists % size == 0:
                        starts.append((byte, number, lists))
                    lists += 1
                byte += len(line)
    except OSError as error:
        raise InputError(
            f"{str(path)!r} cannot be read ({error.strerror}): pass a file with one list a line"
        ) from error
    if not starts:
        raise InputError(f"{str(path)!r} is empty: pass a file with at least one list")
    ends = pairwise([*starts, (byte, 0, lists)])
    shards = [Shard(i, s[0], e[0], s[1], s[2], e[2] - s[2]) for i, (s, e) in enumerate(ends)]
    return shards, digest.hexdigest()


def _lines(path: Path, shard: Shard) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, with their numbers."""
    with path.open("rb") as handle:
        handle.seek(shard.start)
        number = shard.line
        while handle.tell() < shard.stop and (line := handle.readline()):
            if line.strip():
                yield number, line
            number += 1


def _text(where: str, line: bytes) -> str:
    try:
        return line.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 (byte {error.start + 1} of the line): convert the file") from error
