"""The files of the QRHead authors' scripts."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

ENTRIES: list[dict[str, Any]] = [
    {
        "idx": "lme-1",
        "question": "who wrote dracula",
        "paragraphs": [
            {"idx": 7, "title": "Cats", "paragraph_text": "  Cats sleep.\n"},
            {"idx": "8", "title": "", "paragraph_text": "Bram Stoker wrote it."},
            {"idx": "9", "paragraph_text": "The Danube is a river."},
        ],
        "gt_docs": [8, "7"],
        "answer": "Bram Stoker",
    },
    {"idx": 2, "question": "which car", "paragraphs": [{"idx": "a", "paragraph_text": "No car."}], "gt_docs": []},
    {"idx": 3, "question": "what cats do", "paragraphs": [{"idx": "a", "paragraph_text": "Sleep."}], "gt_docs": ["a"]},
]


def read(path: Path, **options: Any) -> Any:
    from qr_integrations.evaluation.official import read_official

    return read_official(path, **options)


def refused(says: str) -> Any:
    from qr_integrations.errors import InputError

    return pytest.raises(InputError, match=says)


def entry(**more: Any) -> dict[str, Any]:
    """The last entry, changed; None leaves a key out."""
    return {key: value for key, value in (ENTRIES[2] | more).items() if value is not None}


@pytest.mark.parametrize("packed", [False, True])
def test_questions_come_as_the_scripts_read_them(tmp_path: Path, packed: bool) -> None:
    path = tmp_path / "lme.json"
    data = json.dumps(ENTRIES, indent=1).encode()
    path.write_bytes(gzip.compress(data) if packed else data)
    first, last = read(path)
    assert (first.id, first.query) == ("lme-1", "who wrote dracula") and (last.id, last.query) == ("3", "what cats do")
    assert [(d.id, d.title, d.text) for d in first.documents] == [
        ("7", "Cats", "Cats sleep."),
        ("8", "", "Bram Stoker wrote it."),
        ("9", None, "The Danube is a river."),
    ]
    assert dict(first.relevance) == {0: 1, 1: 1} and not first.missed


def test_questions_without_gold_come_on_demand(tmp_path: Path) -> None:
    path = tmp_path / "lme.json"
    path.write_text(json.dumps(ENTRIES))
    lists = read(path, keep_unanswerable=True)
    assert [(judged.id, len(judged.relevance)) for judged in lists] == [("lme-1", 2), ("2", 0), ("3", 1)]
    path.write_text(json.dumps([ENTRIES[1]]))
    assert len(read(path, keep_unanswerable=True)) == 1
    with refused(r"no question in '.*lme\.json' has gold paragraphs: name them"):
        read(path)


PARAGRAPH = {"idx": "a", "paragraph_text": "Sleep."}


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("question", r"entry 2: no JSON object: write"),
        (entry(idx=None), r"entry 2: no `idx`: write"),
        (entry(idx=[1]), r"entry 2: `idx` is \[1\]: write"),
        (entry(question=None), r"entry 2: no `question`: write"),
        (entry(question=" "), r"entry 2: the question is empty: write"),
        (entry(paragraphs=None), r"entry 2: no `paragraphs`: write an array"),
        (entry(paragraphs={"a": "Sleep."}), r"entry 2: `paragraphs` is \{'a': 'Sleep.'\}: write an array"),
        (entry(gt_docs=None), r"entry 2: no `gt_docs`: write an array"),
        (entry(gt_docs="a"), r"entry 2: `gt_docs` is 'a': write an array"),
        (entry(gt_docs=[None]), r"entry 2: `gt_docs` is None: write a string or a number"),
        (entry(gt_docs=["a", "b"]), r"entry 2: `gt_docs` names 'b': name paragraphs"),
        (entry(paragraphs=[PARAGRAPH, "Sleep."]), r"entry 2, paragraph 2: no JSON object: write"),
        (entry(paragraphs=[{"idx": "a"}]), r"entry 2, paragraph 1: no `paragraph_text`: write"),
        (entry(paragraphs=[{"paragraph_text": "Sleep."}]), r"entry 2, paragraph 1: no `idx`: write"),
        (entry(paragraphs=[PARAGRAPH | {"title": 1}]), r"entry 2, paragraph 1: `title` is 1: write"),
        (entry(paragraphs=[PARAGRAPH, PARAGRAPH]), r"entry 2: paragraph 'a' stands twice: give"),
        (
            entry(paragraphs=[{**PARAGRAPH, "idx": 1}, {**PARAGRAPH, "idx": "1"}]),
            r"entry 2: paragraph '1' stands twice",
        ),
    ],
)
def test_a_bad_entry_is_named(tmp_path: Path, bad: Any, says: str) -> None:
    path = tmp_path / "lme.json"
    path.write_text(json.dumps([ENTRIES[0], bad, ENTRIES[2]]))
    with refused(rf"lme\.json, {says}"):
        read(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", r"lme\.json, line 1: not JSON \(.*\): write \["),
        (b'[\n{"idx": 1,\n"question"}]', r"lme\.json, line 3: not JSON \(.*\): write \["),
        (b'{"idx": 1}\n{"idx": 2}\n', r"lme\.json, line 2: not JSON \(Extra data\): write \["),
        (b'{"idx": 1}', r"lme\.json' holds no array of questions: write \["),
        (b"[]", r"lme\.json' holds no array of questions: write \["),
        (b'[\n"caf\xe9"]', r"lme\.json, line 2: not UTF-8 .*: convert"),
    ],
)
def test_a_file_that_is_no_such_array(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "lme.json"
    path.write_bytes(content)
    with refused(says):
        read(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with refused(r"lme\.json' cannot be read \(No such file or directory\): pass a JSON file of \["):
        read(tmp_path / "lme.json")
