"""`qr-integrations eval-pictures`: from pictures to a folder with a report, by real files and the bundled model."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

MODEL = "qr-mini-vl"


def evaluate(*args: str) -> int:
    from qr_integrations.cli import main

    return main(["eval-pictures", *args])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the command runs."""
    place = tmp_path / "work"
    place.mkdir()
    monkeypatch.chdir(place)
    return place


@pytest.fixture(scope="module")
def backend() -> Any:
    from qr_integrations import Backend

    return Backend.load(MODEL)


def report(folder: Path, name: str = "pictures-report") -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The figures, and a line for every question and system."""
    results = json.loads((folder / name / "results.json").read_text("utf-8"))
    lines = (folder / name / "per_query.jsonl").read_text("utf-8").splitlines()
    return results, [json.loads(line) for line in lines]


def told(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of an error."""
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ") and "unexpected" not in shown.err and not shown.out
    return shown.err


def of(lines: Sequence[dict[str, Any]], system: str) -> list[dict[str, Any]]:
    return [line for line in lines if line["system"] == system]


def test_crops_of_the_drawn_world(folder: Path, capsys: pytest.CaptureFixture[str], backend: Any) -> None:
    from qr_integrations.evaluation.drawn_world.data import drawn_questions
    from qr_integrations.evaluation.picture_questions import look
    from qr_integrations.types import Message

    assert evaluate("crops", "--limit", "1", "--system", "none", "relative", "random", "oracle") == 0
    shown = capsys.readouterr()
    assert "pictures-report/report.md" in shown.out and "0.05" in shown.out and not shown.err
    results, lines = report(folder)
    questions = drawn_questions(1)
    assert [one["name"] for one in results["systems"]] == ["none", "relative", "random", "oracle"]
    assert results["facts"]["model"].startswith(MODEL) and results["baseline"] == "none"
    assert [line["id"] for line in of(lines, "none")] == [one.id for one in questions]

    asked = questions[-2], of(lines, "oracle")[-2], of(lines, "none")[-2]
    question, with_crop, plain = asked
    picture = look(question.image)
    text = f"{question.question} Answer the question using a single word or phrase."
    assert (
        plain["said"] == backend.answer([Message.user(picture, text)], max_new_tokens=20).text and plain["box"] is None
    )
    crops = [picture.crop(tuple(with_crop["box"]))] if with_crop["box"] else []
    assert with_crop["said"] == backend.answer([Message.user(picture, *crops, text)], max_new_tokens=20).text

    for one, line in zip(questions, of(lines, "oracle"), strict=True):
        if line["box"]:
            left, top, right, bottom = line["box"]
            assert left <= one.box.left and top <= one.box.top and right >= one.box.right and bottom >= one.box.bottom
    assert sum(line["box"] is not None for line in of(lines, "oracle")) >= 3
    page = (folder / "pictures-report" / "report.md").read_text("utf-8")
    assert "## By size" in page and "## Against random" in page and page.index("Against none") < page.index("Against r")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn pictures as files, with questions and with objects."""
    from qr_integrations.evaluation.drawn_world.data import drawn_pictures, drawn_questions
    from qr_integrations.evaluation.picture_questions import look

    place = tmp_path_factory.mktemp("files")
    (place / "pictures").mkdir()
    questions, objects = [], []
    for number, one in enumerate(drawn_questions(1, shares=(0.3,))):
        name = f"pictures/q{number}.png"
        look(one.image).save(place / name)
        box = None if one.box is None else list(one.box.as_tuple())
        entry = {"image": name, "question": one.question, "answers": list(one.answers), "skill": one.skill, "box": box}
        questions.append({"id": one.id, **entry})
    for number, picture in enumerate(drawn_pictures(3)):
        name = f"pictures/p{number}.png"
        look(picture.image).save(place / name)
        objects.append({"image": name, "objects": sorted(picture.objects), "id": picture.id})
    for name, entries in (("questions.jsonl", questions), ("objects.jsonl", objects)):
        (place / name).write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return place


def test_crops_of_files_are_answered_as_the_same_pictures_in_memory(files: Path, folder: Path, backend: Any) -> None:
    from qr_integrations.evaluation.drawn_world.data import drawn_questions
    from qr_integrations.evaluation.pictures import ask_pictures, make_picture_systems

    specs = ["none", "oracle"]
    assert evaluate("crops", "--data", str(files / "questions.jsonl"), "--system", *specs, "--prompt", "") == 0
    results, lines = report(folder)
    questions = drawn_questions(1, shares=(0.3,))
    runs = ask_pictures(backend, make_picture_systems(specs), questions, instruction="")
    assert [(line["system"], line["said"], line["right"]) for line in lines] == [
        (run.system, run.text, run.right) for run in runs
    ]
    assert results["facts"]["instruction"] == "none"
    assert results["facts"]["data"] == str(files / "questions.jsonl")


def test_captions_of_the_drawn_world(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--limit", "3", "--system", "greedy", "deco:alpha=0.3", "dola", "--max-new-tokens", "30"]
    assert evaluate("captions", *args) == 0
    shown = capsys.readouterr()
    assert "deco:alpha=0.3" in shown.out and "CHAIR" in shown.out and not shown.err
    results, lines = report(folder)
    assert [one["name"] for one in results["systems"]] == ["greedy", "deco:alpha=0.3", "dola"]
    assert results["baseline"] == "greedy"
    captions, answers = [one for one in lines if "caption" in one], [one for one in lines if "strategy" in one]
    assert len(captions) == 9 and {one["strategy"] for one in answers} == {"random", "popular", "adversarial"}
    assert len({one["id"] for one in answers}) == 3
    assert all(set(one["invented"]).isdisjoint(one["there"]) for one in captions)


def test_captions_of_files_with_names_of_their_own(files: Path, folder: Path) -> None:
    from qr_integrations.evaluation.drawn_world.world import KINDS

    (folder / "names.json").write_text(json.dumps({kind: ["picture"] if kind == "ball" else [] for kind in KINDS}))
    args = ["--data", str(files / "objects.jsonl"), "--system", "greedy", "--max-new-tokens", "30"]
    assert evaluate("captions", *args, "--limit", "2") == 0
    plain = [line for line in report(folder)[1] if "caption" in line]
    assert evaluate("captions", *args, "--limit", "2", "--names", "names.json") == 0
    named = [line for line in report(folder)[1] if "caption" in line]
    assert [one["caption"] for one in plain] == [one["caption"] for one in named]
    for before, after in zip(plain, named, strict=True):
        assert after["named"].count("ball") - before["named"].count("ball") == before["caption"].count("picture")


def test_json_is_one_object_and_the_same_as_the_file(
    files: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(files / "questions.jsonl")
    assert evaluate("crops", "--data", data, "--limit", "2", "--system", "none", "--json", "--out", "made") == 0
    shown = capsys.readouterr()
    assert shown.out.count("\n") == 1 and not shown.err
    assert json.loads(shown.out) == report(folder, "made")[0]


@pytest.mark.parametrize("columns", ["40", "80"])
def test_any_terminal_will_do(
    files: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    data = str(files / "questions.jsonl")
    assert evaluate("crops", "--data", data, "--system", "none", "oracle", "--limit", "2") == 0
    data, long = str(files / "objects.jsonl"), "deco:alpha=0.25,top_k=5"
    args = ["--data", data, "--system", "greedy", long, "--limit", "2", "--max-new-tokens", "8"]
    assert evaluate("captions", *args) == 0
    shown = capsys.readouterr().out
    assert all(len(line.rstrip()) <= int(columns) for line in shown.splitlines())
    assert long in "".join(shown.split()) and "oracle" in shown and shown.count("±") >= 2


def test_a_crop_around_it_shows_what_is_written_on_a_small_thing(backend: Any) -> None:
    from qr_integrations.evaluation.drawn_world.data import drawn_questions
    from qr_integrations.evaluation.pictures import ask_pictures, make_picture_systems, summarise_pictures

    questions = [one for one in drawn_questions(24, shares=(0.5, 0.06)) if one.skill in ("letter", "number", "word")]
    runs = ask_pictures(backend, make_picture_systems(["none", "oracle"]), questions)
    plain, oracle = summarise_pictures(runs, questions)
    assert plain.accuracy["size"]["0.60"].mean > 0.6
    assert plain.accuracy["size"]["0.05"].mean < 0.4
    assert oracle.against["none"]["size"]["0.05"].low > 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["crops", "--limit", "0"], "--limit counts from 1"),
        (["crops", "--system", "sideways"], "'sideways' is no system: write none"),
        (["captions", "--system", "deco:alpha=lots"], "alpha cannot be 'lots'"),
        (["crops", "--data", "gone.jsonl"], "pass a JSONL file of questions about pictures"),
        (["captions", "--data", "gone.jsonl"], "pass a JSONL file of pictures and their objects"),
        (["crops", "--out", "gone/report"], "make that folder"),
        (["crops", "--model", "qr-mini", "--limit", "1"], "reads text only: pass a vision-language model"),
    ],
)
def test_what_cannot_be_measured_is_said(
    folder: Path, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    assert evaluate(*args) == 2
    assert message in told(capsys)
    assert not list(folder.iterdir())


def test_what_is_no_report_is_not_replaced(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "pictures-report").mkdir()
    (folder / "pictures-report" / "mine.txt").write_text("keep")
    assert evaluate("crops", "--limit", "1") == 2
    assert "no earlier report" in told(capsys)
    assert (folder / "pictures-report" / "mine.txt").read_text() == "keep"
