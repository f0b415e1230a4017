"""`qr-integrations detect`: one command from a model to a file of heads that the rerankers read."""

import json
from pathlib import Path
from typing import Any

import pytest


def detect(*args: str) -> int:
    from qr_integrations.cli import main

    return main(["detect", *args])


def line(query: str = "who wrote dracula", **more: Any) -> str:
    documents = ["Cats sleep.", {"text": "Bram Stoker wrote it.", "title": "Dracula"}, "The Danube is a river."]
    return json.dumps({"query": query, "documents": documents, "gold": [1]} | more) + "\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_built_in_lists_give_a_file_that_rankers_read(
    folder: Path, capsys: pytest.CaptureFixture[str], qr_mini: Any
) -> None:
    from qr_integrations import QRHeadReranker

    assert detect("--limit", "6", "--top-k", "5", "--plot", "heads.png") == 0
    shown = capsys.readouterr()
    assert "5 of 16 heads of qr-mini" in shown.out and "Two halves of the 6 lists" in shown.out and not shown.err
    reranker = QRHeadReranker(qr_mini, heads="qr_heads.json")
    assert set(reranker.heads.heads) == set(QRHeadReranker(qr_mini).heads.heads)
    written = json.loads((folder / "qr_heads.json").read_text())
    assert written["model"] == "qr-mini" and written["lists"] == 6 and len(written["scores"]) == 16
    assert written["versions"].keys() == {"qr-integrations", "torch", "transformers"}
    assert (folder / "heads.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in folder.iterdir()) == ["heads.png", "qr_heads.json"]


def test_own_lists_a_cap_of_layers_and_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "lists.jsonl").write_text(line() + "\n" + line("which river", gold=2))
    assert detect("--data", "lists.jsonl", "--max-layer", "1", "--top-k", "2", "--objective", "ndcg", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert all(layer <= 1 for layer, _ in result["heads"]) and result["max_layer"] == 1
    assert (result["objective"], result["lists"], result["data"]) == ("ndcg", 2, "lists.jsonl")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("not json\n", "line 2: no list"),
        (line(query=" "), "line 2: no list"),
        (line(documents="one"), "line 2: no list"),
        (line(documents=[{"title": "no text"}]), "line 2: no list"),
        (line(gold=[3]), "line 2: no list"),
        (line(gold=[]), "pass lists with both"),
        (line(gold=[0, 1, 2]), "pass lists with both"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str], content: str, told: str
) -> None:
    (folder / "lists.jsonl").write_text(line() + content)
    assert detect("--data", "lists.jsonl") == 2
    error = capsys.readouterr().err
    assert told in error and "Traceback" not in error
    assert [path.name for path in folder.iterdir()] == ["lists.jsonl"]


@pytest.mark.parametrize(
    "args",
    [
        ("--data", "missing.jsonl"),
        ("--data", "empty.jsonl"),
        ("--top-k", "0"),
        ("--limit", "0"),
        ("--max-layer", "-1"),
        ("--out", "nowhere/heads.json"),
    ],
)
def test_wrong_arguments_are_errors_with_a_cure(
    folder: Path, capsys: pytest.CaptureFixture[str], args: tuple[str, ...]
) -> None:
    (folder / "empty.jsonl").write_text("\n")
    assert detect(*args) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and ("pass" in error or "make" in error)
    assert [path.name for path in folder.iterdir()] == ["empty.jsonl"]


def test_depth_costs_what_the_heads_above_would_have_brought(qr_mini: Any) -> None:
    from qr_integrations import HeadDetector
    from qr_integrations.bundled import read_detection_lists

    detection = HeadDetector(qr_mini).detect(read_detection_lists()[:4])
    by_depth = detection.by_depth(top_k=5)
    scores, best = detection.scores(), detection.ranked()[:5]
    assert list(by_depth) == [0, 1, 2, 3]
    assert by_depth[3] == pytest.approx(sum(scores[head] for head in best) / 5)
    assert by_depth[1] == pytest.approx(sum(scores[head] for head in detection.ranked(max_layer=1)[:5]) / 5)
    assert sorted(by_depth.values()) == list(by_depth.values())
