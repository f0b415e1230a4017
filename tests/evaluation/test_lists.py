"""Judged lists, one a line, and the door that tells kinds of data apart by their names."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

DOCUMENTS = [
    "Cats sleep.",
    {"text": "Bram Stoker wrote it.", "title": "Dracula", "id": 7},
    {"text": "A river", "title": ""},
]


def read(path: Path) -> Any:
    from qr_integrations.evaluation.lists import read_lists

    return list(read_lists(path))


def data(path: Path, **options: Any) -> Any:
    from qr_integrations.evaluation.data import read_data

    return read_data(path, **options)


def refused(says: str) -> Any:
    from qr_integrations.errors import InputError

    return pytest.raises(InputError, match=says)


def line(**more: Any) -> str:
    """A line; None leaves a key out."""
    entry = {"query": "who wrote dracula", "documents": DOCUMENTS, "gold": [1]} | more
    return json.dumps({key: value for key, value in entry.items() if value is not None}) + "\n"


@pytest.mark.parametrize("packed", [False, True])
def test_a_line_is_a_list(tmp_path: Path, packed: bool) -> None:
    path = tmp_path / ("lists.jsonl.gz" if packed else "lists.jsonl")
    content = (line() + "\n" + line(query=None, question="which river", gold=2, id=31)).encode()
    path.write_bytes(gzip.compress(content) if packed else content)
    first, second = read(path)
    assert [(d.text, d.title, d.id) for d in first.documents] == [
        ("Cats sleep.", None, None),
        ("Bram Stoker wrote it.", "Dracula", "7"),
        ("A river", None, None),
    ]
    assert (first.query, dict(first.relevance), first.id) == ("who wrote dracula", {1: 1}, "1")
    assert (second.query, dict(second.relevance), second.id) == ("which river", {2: 1}, "31")


@pytest.mark.parametrize(
    ("relevance", "expected"),
    [({"0": 2, "2": 1}, {0: 2, 2: 1}), ({"1": 3, "0": 0, "2": -1}, {1: 3}), ({}, {})],
)
def test_grades(tmp_path: Path, relevance: dict[str, int], expected: dict[int, int]) -> None:
    (tmp_path / "lists.jsonl").write_text(line(gold=None, relevance=relevance))
    assert dict(read(tmp_path / "lists.jsonl")[0].relevance) == expected


def test_lists_are_read_one_by_one(tmp_path: Path) -> None:
    from qr_integrations.evaluation.lists import read_lists

    (tmp_path / "lists.jsonl").write_text(line() + "not json\n")
    lists = read_lists(tmp_path / "lists.jsonl")
    assert next(lists).query == "who wrote dracula"
    with refused("line 2: no list"):
        next(lists)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("{", "no list"),
        ("[]", "no list"),
        (line(query=None), "no list .no query"),
        (line(query=" "), "no list .no query"),
        (line(query=5), "no list .no query"),
        (line(documents=None), "no list .'documents'"),
        (line(documents="one"), "no list .documents is a single document"),
        (line(documents=[{"title": "a"}]), "no list .document #0 has no text"),
        (line(documents=[{"text": "a", "id": "x"}, "b", {"text": "c", "id": "x"}]), "two documents have the id 'x'"),
        (line(documents=[{"text": "a", "id": 1}, {"text": "c", "id": "1"}]), "two documents have the id '1'"),
        (line(documents=["a", {"text": "a", "id": [1]}]), r"document #1: `id` is \[1\]: write"),
        (line(gold=None), "no list .'gold'"),
        (line(gold=["1"]), "`gold` holds something else than numbers"),
        (line(gold=True), "`gold` holds something else than numbers"),
        (line(gold=[3]), "there is no document #3 among 3"),
        (line(gold=[-1]), "there is no document #-1"),
        (line(relevance={"0": 1}), "both `gold` and `relevance`"),
        (line(gold=None, relevance={"3": 1}), "there is no document #3"),
        (line(gold=None, relevance={"first": 1}), "no list .*'first'"),
        (line(gold=None, relevance={"0": "high"}), "a grade that is no whole number"),
        (line(gold=None, relevance={"0": 0.5}), "a grade that is no whole number"),
        (line(gold=None, relevance={"0": True}), "a grade that is no whole number"),
        (line(gold=None, relevance=[1]), "no list"),
        (b'{"query": "caf\xe9"}', "not UTF-8"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, bad: str | bytes, says: str) -> None:
    content = bad.encode() if isinstance(bad, str) else bad
    (tmp_path / "lists.jsonl").write_bytes(line().encode() + b"\n" + content)
    with refused(rf"lists\.jsonl, line 3: .*{says}.*: (write \{{|convert)"):
        read(tmp_path / "lists.jsonl")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with refused(r"lists\.jsonl' cannot be read \(No such file or directory\): pass a JSONL file of lists"):
        read(tmp_path / "lists.jsonl")


# One door


OFFICIAL = [
    {"idx": 1, "question": "what cats do", "paragraphs": [{"idx": "a", "paragraph_text": "Sleep."}], "gt_docs": ["a"]}
]


def test_each_kind_of_data_is_known_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "qrels").mkdir()
    (tmp_path / "corpus.jsonl").write_text('{"_id": "a", "text": "Sleep."}\n{"_id": "b", "text": "Cats sleep."}\n')
    (tmp_path / "queries.jsonl").write_text('{"_id": "q", "text": "what cats do in their sleep"}\n')
    (tmp_path / "qrels" / "dev.tsv").write_text("q\tb\t2\n")
    (tmp_path / "x.run").write_text("q Q0 b 1 2 x\nq Q0 a 2 1 x\nq Q0 c 3 0.5 x\n")
    assert [d.id for d in data(tmp_path, split="dev")[0].documents] == ["b", "a"]
    (judged,) = data(tmp_path, split="dev", run=tmp_path / "x.run", depth=3, skip_unknown=True)
    assert [d.id for d in judged.documents] == ["b", "a"] and dict(judged.relevance) == {0: 2}
    (judged,) = data(tmp_path, split="dev", run=tmp_path / "x.run", depth=1)
    assert [d.id for d in judged.documents] == ["b"]
    for name in ("lists.jsonl", "lists.jsonl.gz", "lists.ndjson"):
        content = line().encode()
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        assert [judged.query for judged in data(tmp_path / name)] == ["who wrote dracula"]
    for name in ("lme.json", "lme.json.gz"):
        content = json.dumps(OFFICIAL).encode()
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        assert [judged.query for judged in data(tmp_path / name)] == ["what cats do"]


def test_other_data_is_refused(tmp_path: Path) -> None:
    with refused(r"there is no '.*nowhere': pass a BEIR folder, a \.jsonl"):
        data(tmp_path / "nowhere")
    (tmp_path / "lists.csv").write_text("a")
    with refused(r"lists\.csv' holds cannot be seen from its name: pass a BEIR folder"):
        data(tmp_path / "lists.csv")
    (tmp_path / "lists.jsonl").write_text("\n")
    with refused(r"lists\.jsonl' is empty: pass"):
        data(tmp_path / "lists.jsonl")
    with refused(r"lists\.jsonl' brings its own candidates: pass a run with a BEIR folder only"):
        data(tmp_path / "lists.jsonl", run=tmp_path / "x.run")
