"""BEIR folders, made from the questions that ship with the package."""

import gzip
import json
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest


def read(folder: Path, **options: Any) -> Any:
    from qr_integrations.evaluation.beir import read_beir

    return read_beir(folder, **options)


def refused(says: str) -> Any:
    from qr_integrations.errors import InputError

    return pytest.raises(InputError, match=says)


def jsonl(entries: Iterable[Any]) -> str:
    return "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)


@pytest.fixture
def questions() -> Any:
    from qr_integrations.bundled import read_sample

    return read_sample()


@pytest.fixture
def nq(tmp_path: Path, questions: Any) -> Path:
    """A folder of the 40 questions and all their passages; the grades of the gold ones are 1 and 2 by turns."""
    folder = tmp_path / "nq"
    (folder / "qrels").mkdir(parents=True)
    corpus = (
        {"_id": f"{number}-{place}", "title": document.title or "", "text": document.text}
        for number, question in enumerate(questions)
        for place, document in enumerate(question.documents)
    )
    asked = ({"_id": number, "text": question.question} for number, question in enumerate(questions))
    rows = [f"{number}\t{number}-{question.gold}\t{1 + number % 2}\n" for number, question in enumerate(questions)]
    (folder / "corpus.jsonl").write_text(jsonl(corpus))
    (folder / "queries.jsonl").write_text(jsonl(asked))
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(reversed(rows)))
    return folder


def test_bm25_finds_the_candidates(nq: Path, questions: Any) -> None:
    from qr_integrations.evaluation.bm25 import Bm25

    passages = {f"{n}-{p}": document for n, q in enumerate(questions) for p, document in enumerate(q.documents)}
    names = list(passages)
    index = Bm25([f"{d.title} {d.text}" if d.title else d.text for d in passages.values()])
    lists = read(nq, depth=3)
    assert [judged.query for judged in lists] == [question.question for question in questions]
    for number, judged in enumerate(lists):
        best = [names[place] for place in index.top(judged.query, 3)]
        gold, grade = f"{number}-{questions[number].gold}", 1 + number % 2
        assert (judged.id, ids(judged)) == (str(number), best)
        assert [(d.title, d.text) for d in judged.documents] == [(passages[n].title, passages[n].text) for n in best]
        assert judged.relevance == ({best.index(gold): grade} if gold in best else {})
        assert judged.missed == (() if gold in best else (grade,))
    assert any(judged.missed for judged in lists) and any(judged.relevance for judged in lists)


def test_a_run_gives_the_candidates_of_the_bundled_lists(nq: Path, questions: Any, tmp_path: Path) -> None:
    from qr_integrations.evaluation.trec import write_run

    run = {
        str(number): [(f"{number}-{place}", score) for place, score in enumerate(question.bm25)]
        for number, question in enumerate(questions)
    }
    write_run(tmp_path / "bm25.run", run, "bm25")
    whole, cut = read(nq, run=tmp_path / "bm25.run"), read(nq, run=str(tmp_path / "bm25.run"), depth=3)
    for number, question in enumerate(questions):
        order = sorted(range(20), key=lambda place: -question.bm25[place])
        assert [d.text for d in whole[number].documents] == [question.documents[place].text for place in order]
        assert whole[number].relevance == {order.index(question.gold): 1 + number % 2} and not whole[number].missed
        assert ids(cut[number]) == ids(whole[number])[:3]


def test_packed_files_read_the_same(nq: Path) -> None:
    lists = read(nq, depth=5)
    for path in [nq / "corpus.jsonl", nq / "queries.jsonl", nq / "qrels" / "test.tsv"]:
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert read(nq, depth=5) == lists


# A folder small enough to see what happens

CORPUS = [
    {"_id": "cats", "title": "Cats", "text": "Cats sleep most of the day."},
    {"_id": 2, "title": "", "text": "Dracula was written by Bram Stoker."},
    {"_id": "river", "text": "The Danube flows through Vienna.", "metadata": {"url": "x"}},
    {"_id": "vampire", "title": None, "text": "Dracula is a vampire."},
]
QUERIES = [
    {"_id": "train-1", "text": ""},
    {"_id": "q2", "text": "who wrote dracula"},
    {"_id": "q1", "text": "where does the danube flow"},
    {"_id": "q3", "text": "cats or dracula"},
]
QRELS = "q1\triver\t1\nq1\tcats\t0\nq2\t2\t1\nq2\tvampire\t3\nq2\triver\t-1\nq3\tcats\t0\n"
RUN = "q2 Q0 cats 1 3 x\nq2 Q0 2 2 2 x\nq2 Q0 river 3 1 x\nq1 Q0 river 1 1 x\nq3 Q0 cats 1 1 x\n"


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Path]:
    """Write a folder, with parts of it replaced; None leaves a file out."""

    def make(
        corpus: Any = CORPUS, queries: Any = QUERIES, qrels: str | None = QRELS, run: str = RUN, split: str = "test"
    ) -> Path:
        folder = tmp_path / "small"
        (folder / "qrels").mkdir(parents=True)
        for name, content in (("corpus.jsonl", corpus), ("queries.jsonl", queries), (f"qrels/{split}.tsv", qrels)):
            if content is not None:
                data = content if isinstance(content, bytes | str) else jsonl(content)
                (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())
        (tmp_path / "x.run").write_text(run)
        return folder

    return make


def ids(judged: Any) -> list[str]:
    return [document.id for document in judged.documents]


def test_grades_missed_documents_and_the_order_of_the_queries(made: Any, tmp_path: Path) -> None:
    second, first = read(made(), run=tmp_path / "x.run")  # q3 has no relevant document
    assert (second.id, ids(second), dict(second.relevance), second.missed) == (
        "q2",
        ["cats", "2", "river"],
        {1: 1},
        (3,),
    )
    assert (first.id, ids(first), dict(first.relevance), first.missed) == ("q1", ["river"], {0: 1}, ())
    assert [document.title for document in second.documents] == ["Cats", None, None]


def test_depth_cuts_by_score(made: Any, tmp_path: Path) -> None:
    (judged, _) = read(made(run=RUN + "q2 Q0 vampire 9 5 x\n"), run=tmp_path / "x.run", depth=2)
    assert (ids(judged), dict(judged.relevance), judged.missed) == (["vampire", "cats"], {0: 3}, (1,))


def test_missed_grades_stand_highest_first(made: Any, tmp_path: Path) -> None:
    folder = made(qrels="q1\tcats\t1\nq1\t2\t3\nq1\tvampire\t2\n")
    assert read(folder, run=tmp_path / "x.run")[0].missed == (3, 2, 1)


def test_bm25_retrieves_no_document_without_a_word_of_the_query(made: Any) -> None:
    second, first = read(made())
    assert ids(second) == ["vampire", "2"] and ids(first) == ["river"]  # "dracula" counts more in a shorter text


def test_a_query_is_no_candidate_of_its_own(made: Any, tmp_path: Path) -> None:
    asked = {"_id": "cats", "text": "Cats sleep most of the day."}
    run = "cats Q0 cats 1 9 x\ncats Q0 river 2 8 x\ncats Q0 2 3 7 x\n"
    folder = made(queries=[asked], qrels="cats\triver\t1\n", run=run)
    assert ids(read(folder, run=tmp_path / "x.run", depth=2)[0]) == ["river", "2"]
    (folder / "qrels" / "test.tsv").write_text("cats\triver\t1\ncats\tcats\t1\n")  # unless it is judged
    assert ids(read(folder, run=tmp_path / "x.run", depth=2)[0]) == ["cats", "river"]
    assert ids(read(folder)[0]) == ["cats"]


def test_without_the_query_itself_bm25_still_fills_the_list(made: Any) -> None:
    asked = {"_id": "vampire", "text": "Dracula is a vampire."}
    (judged,) = read(made(queries=[asked], qrels="vampire\t2\t1\n"), depth=1)
    assert ids(judged) == ["2"]


def test_with_a_run_the_rest_of_the_corpus_is_not_kept(made: Any, tmp_path: Path) -> None:
    folder = made()
    with (folder / "corpus.jsonl").open("a") as corpus:
        corpus.writelines(jsonl([{"_id": f"more-{number}", "text": "dracula " * 3000}]) for number in range(600))
    tracemalloc.start()
    try:
        read(folder, run=tmp_path / "x.run")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3e6 < (folder / "corpus.jsonl").stat().st_size / 4


def test_another_split(made: Any) -> None:
    folder = made(split="dev")
    (folder / "qrels" / "train.tsv.gz").write_bytes(gzip.compress(b"q3\tcats\t1\n"))
    assert [judged.id for judged in read(folder, split="dev")] == ["q2", "q1"]
    assert [judged.id for judged in read(folder, split="train")] == ["q3"]
    with refused(r"small' has no qrels/test\.tsv: pass as split one of dev, train"):
        read(folder)


def replaced(entries: list[Any], place: int, entry: Any) -> list[Any]:
    return [*entries[:place], entry, *entries[place + 1 :]]


DAMAGE = [
    ("{", r"line 2: not JSON \(.*\): write \{"),
    ("[]", r"line 2: no JSON object: write \{"),
    ('{"text": "a"}', r"line 2: no `_id`: write"),
    ('{"_id": null, "text": "a"}', r"line 2: `_id` is None: write a string or a number"),
    ('{"_id": true, "text": "a"}', r"line 2: `_id` is True: write a string or a number"),
    ('{"_id": ["a"], "text": "a"}', r"line 2: `_id` is \['a'\]: write a string or a number"),
    ('{"_id": "", "text": "a"}', r"line 2: `_id` is '': write"),
    ('{"_id": "q2"}', r"line 2: no `text`: write a string as `text`"),
    ('{"_id": "q2", "text": ["a"]}', r"line 2: `text` is \['a'\]: write a string as `text`"),
    ('{"_id": "q2", "text": "\\ud800"}', r"line 2: `text` holds half a character .*: write"),
    (b'{"_id": "q2", "text": "caf\xe9"}', r"line 2: not UTF-8 .*: convert"),
    ('{"_id": "first", "text": "a"}', r"line 2: the id 'first' stands there for the second time: keep"),
]


@pytest.mark.parametrize("file", ["corpus", "queries"])
@pytest.mark.parametrize(("line", "says"), DAMAGE)
@pytest.mark.parametrize("with_run", [False, True])
def test_a_bad_line_is_named(
    made: Any, tmp_path: Path, file: str, line: str | bytes, says: str, with_run: bool
) -> None:
    line = line.encode() if isinstance(line, str) else line
    rest = jsonl(CORPUS if file == "corpus" else QUERIES).encode()
    folder = made(**{file: b'{"_id": "first", "text": "a"}\n' + line + b"\n" + rest})
    with refused(rf"{file}\.jsonl, {says}"):
        read(folder, run=tmp_path / "x.run" if with_run else None)


def test_a_title_is_a_string(made: Any) -> None:
    with refused(r"corpus\.jsonl, line 1: `title` is 5: write a string"):
        read(made(corpus=replaced(CORPUS, 0, {"_id": "cats", "title": 5, "text": "a"})))


def test_a_judged_query_is_not_empty(made: Any) -> None:
    with refused(r"queries\.jsonl, line 2: query 'q2' is empty: write"):
        read(made(queries=replaced(QUERIES, 1, {"_id": "q2", "text": " "})))


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"corpus": ""}, r"corpus\.jsonl' is empty: write"),
        ({"queries": "\n\n"}, r"queries\.jsonl' is empty: write"),
        ({"qrels": ""}, r"test\.tsv' is empty: pass"),
        ({"corpus": None}, r"small' has no corpus\.jsonl: a BEIR folder holds corpus\.jsonl, queries\.jsonl and qrels"),
        ({"queries": None}, r"small' has no queries\.jsonl: a BEIR folder holds"),
        ({"qrels": None}, r"small' has no qrels/test\.tsv: a BEIR folder holds"),
        ({"qrels": "q1 river\n"}, r"test\.tsv, line 1: 2 columns"),
        (
            {"qrels": "q1\triver\t0\nq2\tcats\t-1\n"},
            r"no query of .*queries\.jsonl has a relevant document in .*: pass",
        ),
    ],
)
def test_what_is_missing_is_named(made: Any, parts: dict[str, Any], says: str) -> None:
    with refused(says):
        read(made(**parts))


def test_a_folder_and_a_depth_are_needed(made: Any, tmp_path: Path) -> None:
    folder = made()
    with refused(r"there is no folder '.*nowhere': a BEIR folder holds"):
        read(tmp_path / "nowhere")
    with refused(r"there is no folder '.*corpus\.jsonl': a BEIR folder holds"):
        read(folder / "corpus.jsonl")
    with refused(r"missing\.run' cannot be read \(No such file or directory\): pass a TREC run"):
        read(folder, run=tmp_path / "missing.run")
    with refused("depth is 0: pass at least 1"):
        read(folder, depth=0)


@pytest.mark.parametrize(
    ("parts", "says", "left"),
    [
        (
            {"qrels": QRELS + "gone\tcats\t1\nlost\tcats\t1\n"},
            r"test\.tsv, line 7: query 'gone' \(and 1 more\) is not in .*queries\.jsonl: correct .*skip_unknown=True",
            ["q2", "q1"],
        ),
        (
            {"qrels": QRELS + "q1\tgone\t1\nq3\tgone\t1\n"},
            r"test\.tsv, line 7: document 'gone' is not in .*corpus\.jsonl: correct .*skip_unknown=True",
            ["q2", "q1"],  # nothing relevant is left of q3
        ),
        (
            {"run": "gone Q0 cats 1 1 x\n" + RUN},
            r"x\.run, line 1: query 'gone' is not in .*queries\.jsonl: correct .*skip_unknown=True",
            ["q2", "q1"],
        ),
        (
            {"run": "q1 Q0 gone 1 9 x\n" + RUN},
            r"x\.run, line 1: document 'gone' is not in .*corpus\.jsonl: correct .*skip_unknown=True",
            ["q2", "q1"],
        ),
        (
            {"run": "q1 Q0 river 1 1 x\n"},
            r"1 of 2 judged queries have no candidates in .*x\.run, 'q2' first: retrieve .*skip_unknown=True",
            ["q1"],
        ),
    ],
)
def test_what_is_unknown_is_refused_or_left_out(
    made: Any, tmp_path: Path, parts: dict[str, Any], says: str, left: list[str]
) -> None:
    folder = made(**parts)
    with refused(says):
        read(folder, run=tmp_path / "x.run")
    lists = read(folder, run=tmp_path / "x.run", skip_unknown=True)
    assert [judged.id for judged in lists] == left
    usual = {"q2": ({1: 1}, (3,)), "q1": ({0: 1}, ())}  # what is unknown was never to be found: it is not missed
    assert {judged.id: (dict(judged.relevance), judged.missed) for judged in lists} == {q: usual[q] for q in left}


def test_unknown_documents_are_refused_before_bm25_too(made: Any) -> None:
    folder = made(qrels=QRELS + "q1\tgone\t1\n")
    with refused(r"test\.tsv, line 7: document 'gone'"):
        read(folder)
    assert [judged.missed for judged in read(folder, skip_unknown=True)] == [(), ()]


def test_what_nobody_asks_for_does_not_matter(made: Any, tmp_path: Path) -> None:
    """Unjudged queries of a run, what stands below the depth, and documents judged not relevant."""
    folder = made(qrels=QRELS + "q1\tgone\t0\n", run=RUN + "train-1 Q0 gone 1 1 x\nq2 Q0 gone 4 0 x\n")
    assert [judged.id for judged in read(folder, run=tmp_path / "x.run", depth=3)] == ["q2", "q1"]


def test_a_query_that_bm25_finds_nothing_for(made: Any) -> None:
    folder = made(queries=replaced(QUERIES, 1, {"_id": "q2", "text": "zeppelin"}))
    with refused(r"1 of 2 judged queries share no word with any document, 'q2' first: pass a run, or .*skip_unknown"):
        read(folder)
    assert [judged.id for judged in read(folder, skip_unknown=True)] == ["q1"]


def test_nothing_left_is_an_error(made: Any, tmp_path: Path) -> None:
    folder = made(run="q3 Q0 cats 1 1 x\n")
    with refused("no query of .* and a candidate: pass another split or run"):
        read(folder, run=tmp_path / "x.run", skip_unknown=True)
