"""Runs and judgments in TREC's columns: what is read, what is refused, and that a run comes back as it was written."""

import gzip
import math
import random
import struct
from pathlib import Path
from typing import Any

import pytest


def trec() -> Any:
    from qr_integrations.evaluation import trec

    return trec


def refused(says: str) -> Any:
    from qr_integrations.errors import InputError

    return pytest.raises(InputError, match=says)


RUN = "q1 Q0 a 1 2.5 bm25\nq2 Q0 c 1 -1e-3 bm25\r\n\nq1\tQ0\tb\t2\t7 bm25\nq1 Q0 z 3 2.5 bm25\n"


@pytest.mark.parametrize("packed", [False, True])
def test_a_run_is_read_best_first_whatever_its_ranks_say(tmp_path: Path, packed: bool) -> None:
    path = tmp_path / "any.run"
    path.write_bytes(gzip.compress(RUN.encode()) if packed else RUN.encode())
    run = trec().read_run(path)
    assert run == {"q1": [("b", 7.0), ("a", 2.5), ("z", 2.5)], "q2": [("c", -0.001)]}
    assert list(run) == ["q1", "q2"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("q1 Q0 a 1 0.5\n", r"any\.run, line 3: 5 columns, not 6: pass"),
        ("q1 Q0 a 1 0.5 my tag\n", r"any\.run, line 3: 7 columns, not 6: pass"),
        ("q1 Q0 a 1 nan x\n", r"any\.run, line 3: the score is 'nan': write"),
        ("q1 Q0 a 1 -inf x\n", r"any\.run, line 3: the score is '-inf': write"),
        ("q1 Q0 a 1 1e999 x\n", r"any\.run, line 3: the score is '1e999': write"),
        ("q1 Q0 a 1 high x\n", r"any\.run, line 3: the score is 'high': write"),
        ("q0 Q0 d 2 0.5 x\n", r"any\.run, line 3: 'd' stands twice for query 'q0': keep"),
        (b"q1 Q0 caf\xe9 1 0.5 x\n", r"any\.run, line 3: not UTF-8 \(byte 10 of the line is 0xe9\): convert"),
    ],
)
def test_a_bad_line_of_a_run_is_named(tmp_path: Path, content: str | bytes, says: str) -> None:
    path = tmp_path / "any.run"
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(b"q0 Q0 d 1 0.5 x\n\n" + content)
    with refused(says):
        trec().read_run(path)


@pytest.mark.parametrize("content", ["", "\n \n"])
@pytest.mark.parametrize("reader", ["read_run", "read_qrels"])
def test_an_empty_file_is_refused(tmp_path: Path, reader: str, content: str) -> None:
    path = tmp_path / "any.txt"
    path.write_text(content)
    with refused(r"any\.txt' is empty: pass .*`query "):
        getattr(trec(), reader)(path)


@pytest.mark.parametrize("reader", ["read_run", "read_qrels"])
def test_a_file_that_is_not_there_a_folder_and_a_torn_one_are_refused(tmp_path: Path, reader: str) -> None:
    with refused(r"missing\.txt' cannot be read \(No such file or directory\): pass .*`query "):
        getattr(trec(), reader)(tmp_path / "missing.txt")
    with refused(r"cannot be read \(Is a directory\): pass"):
        getattr(trec(), reader)(tmp_path)
    columns = "q Q0 d{} 1 1 x\n" if reader == "read_run" else "q 0 d{} 1\n"
    packed = gzip.compress("".join(map(columns.format, range(500))).encode())
    for name, content in {"cut": packed[:-20], "noise": packed[:20] + b"noise" * 9, "head": packed[:5]}.items():
        (tmp_path / name).write_bytes(content)
        with refused(rf"{name}' is damaged \(.+\): pack it again"):
            getattr(trec(), reader)(tmp_path / name)


def test_utf_16_is_told_from_latin_1(tmp_path: Path) -> None:
    path = tmp_path / "any.run"
    path.write_bytes(RUN.encode("utf-16"))
    with refused("line 1: not UTF-8 .* iconv -f UTF-16 -t UTF-8"):
        trec().read_run(path)


@pytest.mark.parametrize(
    "content",
    [
        "q1 0 a 2\nq1 0 b 0\nq2 0 a -1\n",
        "q1\t0\ta\t2\nq1\t0\tb\t0\n\nq2\tQ0\ta\t-1",
        "query-id\tcorpus-id\tscore\nq1\ta\t2\nq1\tb\t0\nq2\ta\t-1\n",
        "\ufeffquery-id\tcorpus-id\tscore\r\nq1\ta\t2\r\nq1\tb\t0\r\nq2\ta\t-1\r\n",
        "q1\ta\t2\nq1\tb\t0\nq2\ta\t-1\nq1\ta\t2\n",  # the same judgment twice
    ],
)
def test_judgments_of_trec_and_of_beir(tmp_path: Path, content: str) -> None:
    for name, data in {"plain": content.encode(), "packed": gzip.compress(content.encode())}.items():
        (tmp_path / name).write_bytes(data)
        assert trec().read_qrels(tmp_path / name) == {"q1": {"a": 2, "b": 0}, "q2": {"a": -1}}


def test_between_tabs_ids_may_hold_spaces(tmp_path: Path) -> None:
    (tmp_path / "test.tsv").write_text("query 1\tthe document\t1\n")
    assert trec().read_qrels(tmp_path / "test.tsv") == {"query 1": {"the document": 1}}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("q1 a\n", r"test\.tsv, line 2: 2 columns, not 4 or 3: pass"),
        ("q1 Q0 a 1 0.5 x\n", r"test\.tsv, line 2: 6 columns, not 4 or 3: pass"),
        ("q1\ta\thigh\n", r"test\.tsv, line 2: the grade is 'high': write"),
        ("q1\ta\t0.5\n", r"test\.tsv, line 2: the grade is '0.5': write"),
        ("query-id\tcorpus-id\tscore\n", r"test\.tsv, line 2: the grade is 'score': write"),
        ("q0\td\t2\n", r"test\.tsv, line 2: 'd' has grade 2 for query 'q0', and 1 above: keep"),
        (b"q1\tcaf\xe9\t1\n", r"test\.tsv, line 2: not UTF-8 .*: convert"),
    ],
)
def test_a_bad_line_of_judgments_is_named(tmp_path: Path, content: str | bytes, says: str) -> None:
    path = tmp_path / "test.tsv"
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(b"q0\td\t1\n" + content)
    with refused(says):
        trec().read_qrels(path)


def test_a_header_alone_is_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "test.tsv").write_text("query-id\tcorpus-id\tscore\n")
    with refused("is empty"):
        trec().read_qrels(tmp_path / "test.tsv")


def test_scores_come_back_to_the_last_bit(tmp_path: Path) -> None:
    rng = random.Random(0)
    special = [0.0, -0.0, 1 / 3, 5e-324, -1.7976931348623157e308, 1e22, 0.1 + 0.2, 123456789.123456789]
    made = (struct.unpack("<d", rng.randbytes(8))[0] for _ in range(2000))
    scores = special + [score for score in made if math.isfinite(score)]
    rng.shuffle(scores)
    run = {}
    for query in range(20):
        pairs = [(f"dé-{place}", score) for place, score in enumerate(scores[query::20])]
        run[f"問-{query}"] = sorted(pairs, key=lambda pair: -pair[1])
    path = tmp_path / "out.run"
    trec().write_run(path, run, "qr")
    again = trec().read_run(path)
    assert again == run and list(again) == list(run)
    assert [str(score) for pairs in again.values() for _, score in pairs] == [
        str(score) for pairs in run.values() for _, score in pairs
    ]  # 0.0 == -0.0


def test_ranks_follow_the_scores_and_ties_the_order_given(tmp_path: Path) -> None:
    trec().write_run(tmp_path / "out.run", {"q": [("a", 1.0), ("b", 2.0), ("c", 2.0)], "none": []}, "tag")
    assert (tmp_path / "out.run").read_text() == "q Q0 b 1 2.0 tag\nq Q0 c 2 2.0 tag\nq Q0 a 3 1.0 tag\n"


@pytest.mark.parametrize(
    ("run", "tag", "says"),
    [
        ({}, "x", "no documents: pass"),
        ({"q": []}, "x", "no documents: pass"),
        ({"q": [("a", 1.0), ("a", 0.5)]}, "x", "'a' stands twice for query 'q': pass"),
        ({"q": [("a", math.nan)]}, "x", "query 'q', document 'a': the score is nan: write"),
        ({"q": [("a", math.inf)]}, "x", "the score is inf"),
        ({"q": [("a b", 1.0)]}, "x", "'a b' cannot stand in a TREC run.*: pass one word"),
        ({"": [("a", 1.0)]}, "x", "'' cannot stand"),
        ({"q": [("a", 1.0)]}, "my tag", "'my tag' cannot stand"),
    ],
)
def test_what_cannot_be_read_back_is_not_written(tmp_path: Path, run: Any, tag: str, says: str) -> None:
    path = tmp_path / "out.run"
    path.write_text("before")
    with refused(says):
        trec().write_run(path, run, tag)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_a_run_goes_into_a_folder_that_is_there(tmp_path: Path) -> None:
    with refused(r"out\.run' cannot be written \(No such file or directory\): pass"):
        trec().write_run(tmp_path / "nowhere" / "out.run", {"q": [("a", 1.0)]}, "x")
