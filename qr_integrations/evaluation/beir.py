"""Folders in the layout of BEIR (Thakur et al. 2021): a corpus, queries, and what is relevant."""

from collections.abc import Collection, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qr_integrations.errors import InputError
from qr_integrations.evaluation.bm25 import Bm25, best_places, document_text
from qr_integrations.evaluation.reading import identifier, json_object, read_lines, text_field
from qr_integrations.evaluation.trec import Judgment, RunLine, qrels_lines, read_qrels, read_run, run_lines
from qr_integrations.types import Document, JudgedList

_LAYOUT = "a BEIR folder holds corpus.jsonl, queries.jsonl and qrels/test.tsv, each perhaps packed as .gz"
_SKIP = "pass skip_unknown=True, which leaves them out"

_Grades = Mapping[str, Mapping[str, int]]  # query -> document -> grade
_Candidates = Mapping[str, list[str]]  # query -> documents, best first


def read_beir(
    folder: str | Path,
    *,
    split: str = "test",
    run: str | Path | None = None,
    depth: int = 100,
    skip_unknown: bool = False,
) -> list[JudgedList]:
    """A list for every query that has a relevant document, in the order of ``queries.jsonl``.

    The documents of a list are the candidates that a first stage retrieved, best first. Relevant documents that it
    did not retrieve go to `JudgedList.missed`. A document with the id of the query itself is no candidate unless it
    is judged relevant: ArguAna takes its queries from the corpus, and BEIR's own evaluation leaves such documents out.

    Args:
        folder: ``corpus.jsonl``, ``queries.jsonl`` and ``qrels/{split}.tsv``, each perhaps packed as ``.gz``.
        split: which judgments.
        run: a TREC run with the candidates; only their texts are kept in memory. None asks `Bm25` over the whole
            corpus, which is then kept; documents that share no word with the query are not retrieved.
        depth: how many candidates a list has at most.
        skip_unknown: leave out the queries and documents of judgments and run that the folder does not hold, and the
            queries without candidates.

    Raises:
        InputError: names the file, the line where there is one, and the cure.
        MissingExtra: no run is given and bm25s is not installed.
    """
    if depth < 1:
        raise InputError(f"depth is {depth}: pass at least 1")
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"there is no folder {str(folder)!r}: {_LAYOUT}")
    splits = sorted({path.name.removesuffix(".gz").removesuffix(".tsv") for path in folder.glob("qrels/*.tsv*")})
    corpus, queries = _file(folder, "corpus.jsonl", _LAYOUT), _file(folder, "queries.jsonl", _LAYOUT)
    qrels = _file(folder, f"qrels/{split}.tsv", f"pass as split one of {', '.join(splits)}" if splits else _LAYOUT)
    return _Reader(corpus, queries, qrels, None if run is None else Path(run), depth, skip_unknown).lists()


@dataclass(frozen=True, slots=True)
class _Reader:
    """The files of a folder, and what is asked of them."""

    corpus: Path
    queries: Path
    qrels: Path
    run: Path | None
    depth: int
    skip_unknown: bool

    def lists(self) -> list[JudgedList]:
        """All lists, once everything that is referred to has been found."""
        relevant = self._relevant()
        texts = self._texts(relevant)
        asked = {query: text for query, text in texts.items() if query in relevant}
        candidates: _Candidates = {} if self.run is None else self._by_run(self.run, texts, relevant)
        retrieved = {name for names in candidates.values() for name in names}
        documents, ids = self._documents(None if self.run is None else retrieved)
        judged = {name for query in asked for name in relevant[query]}
        self._refuse(judged.difference(ids), "document", qrels_lines(self.qrels), self.qrels, self.corpus)
        if self.run is None:
            candidates = self._by_bm25(asked, documents, relevant)
        else:
            self._refuse(retrieved.difference(ids), "document", run_lines(self.run), self.run, self.corpus)
        lists = []
        for query, text in asked.items():
            found = [documents[name] for name in candidates[query] if name in documents]
            grades = {name: grade for name, grade in relevant[query].items() if name in ids}
            if grades:
                lists.append(_list(query, text, found, grades))
        return self._with_candidates(lists)

    def _relevant(self) -> _Grades:
        above = {
            query: {name: grade for name, grade in grades.items() if grade > 0}
            for query, grades in read_qrels(self.qrels).items()
        }
        return {query: grades for query, grades in above.items() if grades}

    def _texts(self, relevant: _Grades) -> dict[str, str]:
        """The texts of all queries; those that have a relevant document are not empty."""
        texts = {}
        for where, query, entry in _entries(self.queries, '{"_id": "...", "text": "..."}'):
            texts[query] = text_field(entry, "text", where)
            if query in relevant and not texts[query].strip():
                raise InputError(f"{where}: query {query!r} is empty: write what is asked as `text`")
        self._refuse(relevant.keys() - texts.keys(), "query", qrels_lines(self.qrels), self.qrels, self.queries)
        return texts

    def _by_bm25(self, asked: Mapping[str, str], documents: Mapping[str, Document], relevant: _Grades) -> _Candidates:
        names = list(documents)
        index = Bm25([document_text(document) for document in documents.values()])
        candidates = {}
        for query, text in asked.items():
            scores = index.scores(text)
            found = [names[place] for place in best_places(scores, self.depth + 1) if scores[place] > 0]
            candidates[query] = self._first(query, found, relevant[query])
        return candidates

    def _by_run(self, run: Path, texts: Mapping[str, str], relevant: _Grades) -> _Candidates:
        retrieved = read_run(run)
        self._refuse(retrieved.keys() - texts.keys(), "query", run_lines(run), run, self.queries)
        return {
            query: self._first(query, [name for name, _ in retrieved.get(query, [])], grades)
            for query, grades in relevant.items()
        }

    def _first(self, query: str, names: list[str], grades: Mapping[str, int]) -> list[str]:
        """The first `depth` candidates without the query itself."""
        return [name for name in names if name != query or name in grades][: self.depth]

    def _documents(self, wanted: Container[str] | None) -> tuple[dict[str, Document], set[str]]:
        """The wanted documents, None is all, and the ids of all."""
        documents, ids = {}, set()
        for where, name, entry in _entries(self.corpus, '{"_id": "...", "title": "...", "text": "..."}'):
            ids.add(name)
            title = text_field(entry, "title", where) if entry.get("title") is not None else ""
            text = text_field(entry, "text", where)
            if wanted is None or name in wanted:
                documents[name] = Document(text, title if title.strip() else None, name)
        return documents, ids

    def _refuse(
        self, unknown: Collection[str], kind: str, lines: Iterable[RunLine | Judgment], path: Path, holder: Path
    ) -> None:
        """Name the first line that refers to something unknown."""
        if self.skip_unknown or not unknown:
            return
        number, name = next((ln.number, getattr(ln, kind)) for ln in lines if getattr(ln, kind) in unknown)
        others = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise InputError(
            f"{path}, line {number}: {kind} {name!r}{others} is not in {holder}: correct one file, or {_SKIP}"
        )

    def _with_candidates(self, lists: list[JudgedList]) -> list[JudgedList]:
        """Those lists that have documents; that others have none is an error unless it is to be passed over."""
        empty = [judged.id for judged in lists if not judged.documents]
        if empty and not self.skip_unknown:
            why = "share no word with any document" if self.run is None else f"have no candidates in {self.run}"
            cure = "pass a run" if self.run is None else "retrieve for them too"
            raise InputError(
                f"{len(empty)} of {len(lists)} judged queries {why}, {empty[0]!r} first: {cure}, or {_SKIP}"
            )
        if len(empty) == len(lists):
            raise InputError(
                f"no query of {self.queries} has a relevant document in {self.qrels} and a candidate: pass another "
                "split or run"
            )
        return [judged for judged in lists if judged.documents]


def _list(query: str, text: str, documents: list[Document], grades: Mapping[str, int]) -> JudgedList:
    places = {str(document.id): place for place, document in enumerate(documents)}
    relevance = {places[name]: grade for name, grade in grades.items() if name in places}
    missed = sorted((grade for name, grade in grades.items() if name not in places), reverse=True)
    return JudgedList(text, tuple(documents), dict(sorted(relevance.items())), id=query, missed=tuple(missed))


def _entries(path: Path, shape: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """The objects of a file with their ids, and where they stand."""
    seen: set[str] = set()
    for number, line in read_lines(path, _LAYOUT):
        where = f"{path}, line {number}"
        entry = json_object(where, line, shape)
        name = identifier(entry, "_id", where)
        if name in seen:
            raise InputError(f"{where}: the id {name!r} stands there for the second time: keep one line of it")
        seen.add(name)
        yield where, name, entry
    if not seen:
        raise InputError(f"{str(path)!r} is empty: write lines of {shape}")


def _file(folder: Path, name: str, cure: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise InputError(f"{str(folder)!r} has no {name}: {cure}")
