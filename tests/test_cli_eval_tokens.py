"""`qr-integrations eval-tokens`: from drawn pictures to a folder with a report, by the bundled model."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from qr_integrations.backend import Backend


def command(*args: str) -> int:
    from qr_integrations.cli import main

    return main([*args])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the command runs."""
    place = tmp_path / "work"
    place.mkdir()
    monkeypatch.chdir(place)
    return place


def results_of(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    lines = (folder / "per_query.jsonl").read_text("utf-8").splitlines()
    return json.loads((folder / "results.json").read_text("utf-8")), [json.loads(line) for line in lines]


FEW = ["--mqt-model", "none", "--scenes", "2", "--keep", "0.2", "--methods", "cdpruner", "random_tokens"]


@pytest.mark.parametrize("columns", ["40", "100"])
def test_dropped_tokens_of_the_drawn_world(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    qr_mini_vl: "Backend",
    columns: str,
) -> None:
    from qr_integrations.evaluation.drawn_world.data import drawn_questions
    from qr_integrations.evaluation.picture_questions import look
    from qr_integrations.evaluation.token_accuracy import one_of_each_skill
    from qr_integrations.pruning import CDPruner
    from qr_integrations.types import Message

    monkeypatch.setenv("COLUMNS", columns)
    assert command("eval-tokens", *FEW) == 0
    shown = capsys.readouterr()
    assert not shown.err and all(len(line.rstrip()) <= int(columns) for line in shown.out.splitlines())
    assert "cdpruner" in shown.out and "tokens-report/report.md" in shown.out.replace("\n", "")
    results, lines = results_of(folder / "tokens-report")
    assert results["pruned"]["cdpruner"] == ["cdpruner:keep=0.2"] and results["matryoshka"] == []
    tokens = {one["name"]: one["visual_tokens"] for one in results["systems"]}
    assert tokens["none"] == 100 and tokens["cdpruner:keep=0.2"] == tokens["random_tokens:keep=0.2"] == 20

    asked = one_of_each_skill(drawn_questions(2))[1]
    text = f"{asked.question} Answer the question using a single word or phrase."
    message = Message.user(look(asked.image), text)
    said = {line["system"]: line["said"] for line in lines if line["id"] == asked.id}
    assert said["none"] == qr_mini_vl.answer([message], max_new_tokens=20).text
    assert said["cdpruner:keep=0.2"] == qr_mini_vl.answer([message], prune=CDPruner(0.2), max_new_tokens=20).text


def test_matryoshka_tokens_are_measured_beside_the_plain_model(
    folder: Path, capsys: pytest.CaptureFixture[str], qr_mini_vl: "Backend"
) -> None:
    from qr_integrations import Backend
    from qr_integrations.evaluation.drawn_world.data import drawn_questions
    from qr_integrations.evaluation.picture_questions import look
    from qr_integrations.evaluation.token_accuracy import one_of_each_skill
    from qr_integrations.types import Message

    assert command("eval-tokens", "--scenes", "1", "--tokens", "2", "16", "--methods", "--prompt", "", "--json") == 0
    results, lines = results_of(folder / "tokens-report")
    assert json.loads(capsys.readouterr().out) == results
    assert results["matryoshka"] == ["mqt:tokens=16", "mqt:tokens=2"] and results["pruned"] == {}
    tokens = {one["name"]: one["visual_tokens"] for one in results["systems"]}
    assert (tokens["none"], tokens["mqt:tokens=16"], tokens["mqt:tokens=2"]) == (100, 16, 2)
    theirs = Backend.load("qr-mini-vl-mqt")
    for asked in one_of_each_skill(drawn_questions(1))[:2]:
        message = Message.user(look(asked.image), asked.question)
        said = {line["system"]: line["said"] for line in lines if line["id"] == asked.id}
        assert said["none"] == qr_mini_vl.answer([message], max_new_tokens=20).text
        assert said["mqt:tokens=2"] == theirs.answer([message], num_visual_tokens=2, max_new_tokens=20).text


def test_second_looks_and_dropped_tokens_are_measured_side_by_side(folder: Path) -> None:
    specs = ["none", "uniform_grid:keep=25", "sparsevlm:keep=0.5,version=2.0"]
    assert command("eval-pictures", "crops", "--limit", "1", "--system", *specs) == 0
    results, _ = results_of(folder / "pictures-report")
    assert [one["name"] for one in results["systems"]] == specs
    assert [one["visual_tokens"] for one in results["systems"]][:2] == [100, 25]


def test_default_methods_that_cannot_be_on_the_model_are_left_out_and_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = ["--model", "qr-mini-vl-mqt", "--mqt-model", "none", "--scenes", "1", "--keep", "0.25"]
    assert command("eval-tokens", *one) == 0
    shown = capsys.readouterr()
    results, lines = results_of(folder / "tokens-report")
    assert "left out: class_attention:keep=0.25 (visual tokens of" in shown.err and "class_attention" not in shown.out
    assert "class_attention:keep=0.25 (visual tokens of" in results["facts"]["left out"]
    assert "class_attention" not in results["pruned"] and "uniform_grid" in results["pruned"]
    assert results["facts"]["measured on"].endswith(f" {len({line['system'] for line in lines}) - 1} systems")
    assert "class_attention:keep=0.25" not in {line["system"] for line in lines}


def test_default_budgets_that_a_method_cannot_keep_leave_their_cells_empty(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = ["sparsevlm:layers=1+2", "random_tokens"]
    assert command("eval-tokens", "--mqt-model", "none", "--scenes", "1", "--methods", *methods) == 0
    shown = capsys.readouterr()
    results, lines = results_of(folder / "tokens-report")
    left_out = [f"sparsevlm:layers=1+2,keep={keep}" for keep in ("0.11", "0.056")]
    assert all(f"{name} (keep=" in results["facts"]["left out"] and name in shown.err for name in left_out)
    assert not {line["system"] for line in lines} & set(left_out)
    page = (folder / "tokens-report" / "report.md").read_text("utf-8").split("## Against all tokens")[1]
    row = next(line for line in page.splitlines() if line.startswith("| sparsevlm:layers=1+2 |"))
    assert [bool(cell.strip()) for cell in row.split("|")[2:-1]] == [True, True, True, False, False]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "qr-mini-vl-mqt", "--methods", "class_attention", "--keep", "0.5"], "a class token"),
        (["--model", "qr-mini-vl-mqt", "--methods", "class_attention", "uniform_grid"], "a class token"),
        (["--methods", "sparsevlm:layers=1+2", "--keep", "0.5", "0.11"], "tokens in the mean cannot be"),
        (["--methods", "sparsevlm:layers=5+6"], "tokens in the mean cannot be"),
        (["--mqt-model", "qr-mini-vl-mqt", "--tokens", "16", "1000", "--methods"], "1000"),
    ],
)
def test_what_was_named_and_cannot_be_on_the_model_is_said(
    folder: Path, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    assert command("eval-tokens", "--mqt-model", "none", "--scenes", "1", *args) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ") and message in shown.err and not shown.out
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--scenes", "0"], "pass at least 1"),
        (["--methods", "sideways"], "'sideways' is no system: write cdpruner"),
        (["--keep", "half"], "keep cannot be 'half'"),
        (["--data", "gone.jsonl"], "pass a JSONL file of questions about pictures"),
        (["--model", "qr-mini", "--mqt-model", "none"], "reads text only: pass a vision-language model"),
        (["--model", "qr-mini-vl-mqt"], "belongs to qr-mini-vl: name the matryoshka model"),
        (["--mqt-model", "qr-mini-vl", "--scenes", "1"], "a fixed number of tokens of a picture: load a matryoshka"),
        (["--out", "gone/report"], "make that folder"),
    ],
)
def test_what_cannot_be_measured_is_said(
    folder: Path, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    assert command("eval-tokens", *args) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ") and message in shown.err and not shown.out
    assert not list(folder.iterdir())
