"""TREC's text files: runs (what was retrieved) and qrels (what is relevant)."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from qr_integrations.errors import InputError
from qr_integrations.evaluation.reading import read_lines
from qr_integrations.files import write_whole

_RUN = "a TREC run: lines of `query Q0 document rank score tag`"
_QRELS = "judgments: lines of `query 0 document grade` (TREC), or query, document, grade between tabs (BEIR)"
_BEIR_HEADER = ["query-id", "corpus-id", "score"]

Retrieved = Sequence[tuple[str, float]]  # documents with their scores


class RunLine(NamedTuple):
    """A line of a run: a document that was retrieved for a query."""

    number: int
    query: str
    document: str
    score: float


class Judgment(NamedTuple):
    """A line of qrels: how relevant a document is for a query."""

    number: int
    query: str
    document: str
    grade: int


def read_run(path: str | Path) -> dict[str, list[tuple[str, float]]]:
    """The documents of every query with their scores, best first; equal scores keep the order of the file.

    The ranks in the file do not count, as for trec_eval. Gzip is unpacked.

    Raises:
        InputError: names file and line: not six columns, no finite score, a document twice for a query, no lines.
    """
    run: dict[str, dict[str, float]] = {}
    for line in run_lines(path):
        scores = run.setdefault(line.query, {})
        if line.document in scores:
            raise InputError(
                f"{path}, line {line.number}: {line.document!r} stands twice for query {line.query!r}: keep one line"
            )
        scores[line.document] = line.score
    return {query: sorted(scores.items(), key=lambda pair: -pair[1]) for query, scores in run.items()}


def run_lines(path: str | Path) -> Iterator[RunLine]:
    """The lines of a run as they stand in the file; raises as `read_run` does, but for documents that stand twice."""
    number = 0
    for number, line in read_lines(path, _RUN):
        yield run_line(number, line, f"{path}, line {number}")
    if not number:
        raise InputError(f"{str(path)!r} is empty: pass {_RUN}")


def run_line(number: int, line: str, where: str) -> RunLine:
    """What a line says; `where` it stands.

    Raises:
        InputError: not six columns, or no finite score.
    """
    columns = line.split()
    if len(columns) != 6:
        raise InputError(f"{where}: {len(columns)} columns, not 6: pass {_RUN}")
    query, _, document, _, score, _ = columns
    return RunLine(number, query, document, _finite(where, score))


def read_qrels(path: str | Path) -> dict[str, dict[str, int]]:
    """The grades of the judged documents of every query, in the order of the file; above 0 is relevant.

    TREC's four columns or BEIR's three, with or without BEIR's header. Gzip is unpacked.

    Raises:
        InputError: names file and line: other columns, a grade that is no whole number, two grades for the same
            document and query, no lines.
    """
    qrels: dict[str, dict[str, int]] = {}
    for line in qrels_lines(path):
        grade = qrels.setdefault(line.query, {}).setdefault(line.document, line.grade)
        if grade != line.grade:
            raise InputError(
                f"{path}, line {line.number}: {line.document!r} has grade {line.grade} for query {line.query!r}, and "
                f"{grade} above: keep one of the lines"
            )
    return qrels


def qrels_lines(path: str | Path) -> Iterator[Judgment]:
    """The lines of qrels as they stand in the file; raises as `read_qrels` does, but for documents with two grades."""
    header, empty = True, True
    for number, line in read_lines(path, _QRELS):
        columns = _columns(line)
        if header and columns == _BEIR_HEADER:
            header = False
            continue
        header = empty = False
        if len(columns) not in (3, 4):
            raise InputError(f"{path}, line {number}: {len(columns)} columns, not 4 or 3: pass {_QRELS}")
        try:
            yield Judgment(number, columns[0], columns[-2], int(columns[-1]))
        except ValueError as error:
            raise InputError(f"{path}, line {number}: the grade is {columns[-1]!r}: write a whole number") from error
    if empty:
        raise InputError(f"{str(path)!r} is empty: pass {_QRELS}")


def write_run(path: str | Path, run: Mapping[str, Retrieved] | Iterable[tuple[str, Retrieved]], tag: str) -> None:
    """Write a run that `read_run` gives back with the very same scores; the file is whole or not there.

    Args:
        path: a file in a folder that is there; plain text.
        run: query -> documents with scores; written best first, equal scores in the order given. Of pairs, one is
            in memory at a time.
        tag: names the run, one word.

    Raises:
        InputError: nothing to write, a name that is no word, a document twice, a score that is not finite.
    """
    try:
        write_whole(path, _lines(run.items() if isinstance(run, Mapping) else run, _word(tag)))
    except OSError as error:
        raise InputError(
            f"{str(path)!r} cannot be written ({error.strerror}): pass a path in a folder of yours"
        ) from error


def _lines(run: Iterable[tuple[str, Retrieved]], tag: str) -> Iterator[str]:
    seen: set[str] = set()
    empty = True
    for query, documents in run:
        if query in seen:
            raise InputError(f"query {query!r} stands there twice: give every query an id of its own")
        seen.add(query)
        for line in _written(query, documents, tag):
            empty = False
            yield line
    if empty:
        raise InputError("the run has no documents: pass at least one query with documents")


def _written(query: str, documents: Retrieved, tag: str) -> Iterator[str]:
    seen: set[str] = set()
    for rank, (document, score) in enumerate(sorted(documents, key=lambda pair: -pair[1]), start=1):
        if document in seen:
            raise InputError(f"{document!r} stands twice for query {query!r}: pass each document once")
        seen.add(document)
        score = _finite(f"query {query!r}, document {document!r}", score)
        yield f"{_word(query)} Q0 {_word(document)} {rank} {score!r} {tag}\n"


def _columns(line: str) -> list[str]:
    """BEIR's ids may hold spaces, so tabs count first."""
    columns = [column.strip() for column in line.split("\t")]
    return columns if len(columns) in (3, 4) and all(columns) else line.split()


def _finite(where: str, written: str | float) -> float:
    try:
        score = float(written)
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        raise InputError(f"{where}: the score is {written!r}: write a finite number")
    return score


def _word(name: str) -> str:
    if len(name.split()) != 1:
        raise InputError(f"{name!r} cannot stand in a TREC run, whose columns end at spaces: pass one word")
    return name
