"""The command line, in-process and as the installed script."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from qr_integrations import __version__
from qr_integrations.bundled import read_sample
from qr_integrations.errors import LoadError

if TYPE_CHECKING:
    from qr_integrations.backend import Backend

QUERY = "who wrote dracula"
TEXTS = {
    "cats.txt": "Cats sleep most of the day.",
    "dracula.txt": "Dracula is a novel by the Irish author Bram Stoker, published in 1897.",
    "bread.md": "# Baking bread\n\nFlour, water, salt.\n",
}


def run(*argv: str) -> int:
    from qr_integrations.cli import main

    return main(argv)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with some files; the terminal is 100 columns wide."""
    for name, text in TEXTS.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def ranked(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    """The JSON of `rerank`; nothing else may be on standard output."""
    assert run("rerank", "--query", QUERY, "--json", *argv) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    parsed: dict[str, Any] = json.loads(out)
    return parsed


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The error of a command that must fail: one line on standard error, nothing on standard output."""
    assert run(*argv) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    return captured.err


# ---- the script


def test_the_installed_script_ranks(folder: Path) -> None:
    script = Path(sys.executable).with_name("qr-integrations")
    if script.is_file():
        command = [str(script)]
    else:  # the tree is under test, nothing is installed
        command = [sys.executable, "-c", "import sys; from qr_integrations.cli import main; sys.exit(main())"]
    import qr_integrations

    path = os.pathsep.join([str(Path(qr_integrations.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, "rerank", "-q", QUERY, *TEXTS],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"},
    )
    assert done.returncode == 0, done.stderr
    assert "dracula.txt" in done.stdout and "\x1b" not in done.stdout
    assert "Loading weights" not in done.stderr  # no progress bars in a log


def test_help_and_errors_of_usage_load_no_torch(in_fresh_python: Any) -> None:
    code = (
        "import sys\nfrom qr_integrations.cli import main\n"
        "for argv in (['--help'], ['rerank', '--help'], ['--version'], ['nonsense']):\n"
        "    try:\n        main(argv)\n    except SystemExit as stop:\n        print('exit', stop.code)\n"
        "print([m for m in ('torch', 'transformers', 'numpy', 'rich') if m in sys.modules])"
    )
    printed = in_fresh_python(code)
    assert [line for line in printed.splitlines() if line.startswith("exit")] == ["exit 0"] * 3 + ["exit 2"]
    assert printed.splitlines()[-1] == "[]" and __version__ in printed and "doctor" in printed


def test_without_a_command_it_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "rerank" in captured.err


# ---- rerank


def test_rerank_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = ranked(capsys, *TEXTS)
    assert (found["query"], found["model"]) == (QUERY, "qr-mini") and found["num_heads"] > 0
    first = found["items"][0]
    assert [item["rank"] for item in found["items"]] == [1, 2, 3]
    assert sorted(item["index"] for item in found["items"]) == [0, 1, 2]
    assert (first["id"], first["file"], first["title"]) == ("dracula.txt", "dracula.txt", "dracula.txt")
    assert {"rank", "index", "score", "id", "file", "title", "num_tokens", "num_tokens_cut", "window"} == set(first)
    assert "Baking bread" in [item["title"] for item in found["items"]]
    scores = [item["score"] for item in found["items"]]
    assert scores == sorted(scores, reverse=True)


def test_rerank_says_what_the_library_says(
    folder: Path, capsys: pytest.CaptureFixture[str], qr_mini: "Backend"
) -> None:
    from qr_integrations.retrieval import ICRReranker, QRHeadReranker
    from qr_integrations.types import Document

    documents = [Document(TEXTS["cats.txt"], "cats.txt"), Document(TEXTS["dracula.txt"], "dracula.txt")]
    for options, reranker in (
        ([], QRHeadReranker(qr_mini)),
        (["--heads", "1-0,2-2"], QRHeadReranker(qr_mini, heads=[(1, 0), (2, 2)])),
        (["--heads", "all"], QRHeadReranker(qr_mini, heads="all")),
        (["--icr"], ICRReranker(qr_mini)),
    ):
        found = ranked(capsys, "cats.txt", "dracula.txt", *options)
        assert found["num_heads"] == len(reranker.heads)
        expected = reranker.rank(QUERY, documents)
        assert [(i["index"], i["score"]) for i in found["items"]] == [
            (item.index, pytest.approx(item.score, abs=1e-5)) for item in expected
        ]


def test_heads_from_a_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from qr_integrations.retrieval import HeadSet

    HeadSet.of([(1, 0), (0, 1)]).save(folder / "mine.json")
    assert ranked(capsys, "cats.txt", "--heads", "mine.json")["num_heads"] == 2


def test_top_k_and_spans(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = ranked(capsys, *TEXTS, "--top-k", "1", "--explain")
    assert len(found["items"]) == 1
    spans = found["items"][0]["spans"]
    text = TEXTS["dracula.txt"]
    assert spans and all(text[s["start"] : s["end"]] == s["text"] for s in spans)


def test_the_table_in_a_pipe(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("rerank", "-q", QUERY, *TEXTS, "--explain", "--top-k", "2") == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert "dracula.txt" in lines[1] and "\x1b" not in captured.out
    assert captured.out.count("Most attended:") + captured.out.count("no more than any query would") == 2
    assert max(map(len, lines)) <= 100 and captured.err == ""


@pytest.mark.parametrize("columns", ["40", "60", "80", "120"])
def test_any_width_will_do(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    (folder / "odd.txt").write_text(
        "[bold]not markup[/] \x1b[31mnot red\x1b[0m \u4e2d\u6587 " + "x" * 300, encoding="utf-8"
    )
    assert run("rerank", "-q", QUERY, "odd.txt", "cats.txt", "--explain") == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= int(columns)
    assert "[bold]" in out and "\x1b" not in out  # markup is text, and a document cannot steer the terminal


def test_what_is_cut_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "long.txt").write_text("word " * 400, encoding="utf-8")
    assert run("rerank", "-q", QUERY, "--json", "long.txt", "cats.txt", "--max-doc-tokens", "50") == 0
    captured = capsys.readouterr()
    by_id = {item["id"]: item for item in json.loads(captured.out)["items"]}
    assert by_id["long.txt"]["num_tokens"] == 50 and by_id["long.txt"]["num_tokens_cut"] > 300
    assert captured.err.startswith("note: 1 of 2 documents were cut") and "long.txt" in captured.err
    assert by_id["cats.txt"]["num_tokens_cut"] == 0


def test_overflow(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from qr_integrations.backend import Backend

    monkeypatch.setattr(Backend, "max_tokens", 300)
    for number in range(8):
        (folder / f"{number}.txt").write_text(f"{number} " + "dracula sleeps " * 30, encoding="utf-8")
    files = [f"{number}.txt" for number in range(8)]
    assert "truncation" in refused(capsys, "rerank", "-q", QUERY, *files, "--truncation", "error")
    assert run("rerank", "-q", QUERY, *files, "--json") == 0
    captured = capsys.readouterr()
    assert "the model's window holds 300" in captured.err and len(json.loads(captured.out)["items"]) == 8
    assert run("rerank", "-q", QUERY, *files, "--json", "--truncation", "head", "--explain") == 0
    captured = capsys.readouterr()
    items = json.loads(captured.out)["items"]
    assert len({item["window"] for item in items}) > 1 and all(item["spans"] for item in items)
    assert "several prompts" in captured.err


# ---- what is read


def test_json_lines(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ['{"text": "Bram\u2028Stoker wrote Dracula.", "title": "D", "id": 7}', "", '{"text": "Cats sleep."}']
    (folder / "d.jsonl").write_text("\n".join(lines), encoding="utf-8")
    items = {item["index"]: item for item in ranked(capsys, "d.jsonl")["items"]}
    assert (items[0]["id"], items[0]["title"], items[0]["file"]) == ("7", "D", "d.jsonl")
    assert (items[1]["id"], items[1]["title"]) == ("d.jsonl#3", None)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"text": ', "not JSON"),
        ('"a string"', "no text"),
        ('{"title": "a"}', "no text"),
        ('{"text": 3}', "no text"),
        ('{"text": "a", "title": 3}', "title is 3"),
    ],
)
def test_bad_json_lines_name_file_and_line(
    folder: Path, capsys: pytest.CaptureFixture[str], line: str, told: str
) -> None:
    (folder / "bad.jsonl").write_text('{"text": "fine"}\n' + line, encoding="utf-8")
    error = refused(capsys, "rerank", "-q", QUERY, "bad.jsonl")
    assert "bad.jsonl, line 2" in error and told in error


@pytest.mark.parametrize(
    "text", ['\n{"text": "Cats sleep."}\n{"text": "Dracula, by Bram Stoker."}', "One text.\n\nNo JSON."]
)
def test_standard_input(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode()), encoding="latin-1"))
    items = ranked(capsys, "-")["items"]
    assert len(items) == (2 if "{" in text else 1) and items[0]["title"] is None


def test_paragraphs_of_a_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "two.txt").write_bytes(b"\xef\xbb\xbfCats sleep.\r\n \r\n\r\nDracula, by Bram\r\nStoker.\r\n")
    items = ranked(capsys, "two.txt", "--split", "paragraphs")["items"]
    assert sorted(item["id"] for item in items) == ["two.txt#1", "two.txt#2"]


def test_paragraphs_of_markdown() -> None:
    from qr_integrations.cli.reading import _markdown_paragraphs

    text = """before

# Guide #
intro

## Setup
first
still first

```sh
# no heading

ls
```

#hashtag, no heading
## Empty
# Last
"""
    assert list(_markdown_paragraphs(text)) == [
        (None, "before"),
        ("Guide", "intro"),
        ("Guide > Setup", "first\nstill first"),
        ("Guide > Setup", "```sh\n# no heading\n\nls\n```"),
        ("Guide > Setup", "#hashtag, no heading"),
        ("Guide > Empty", ""),
        ("Last", ""),
    ]


def test_an_empty_file_stays_in_the_ranking(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "empty.txt").write_text("")
    assert run("rerank", "-q", QUERY, "--json", "empty.txt", "dracula.txt", "--explain") == 0
    captured = capsys.readouterr()
    assert {item["id"] for item in json.loads(captured.out)["items"]} == {"empty.txt", "dracula.txt"}
    assert "without text" in captured.err and "empty.txt" in captured.err


@pytest.mark.parametrize(
    ("data", "told"),
    [(b"caf\xe9", ["byte 3 is 0xe9", "LATIN1"]), ("caf\u00e9".encode("utf-16"), ["byte 0", "UTF-16"])],
)
def test_a_file_that_is_not_utf8(
    folder: Path, capsys: pytest.CaptureFixture[str], data: bytes, told: list[str]
) -> None:
    (folder / "old.txt").write_bytes(data)
    error = refused(capsys, "rerank", "-q", QUERY, "old.txt")
    assert all(part in error for part in [*told, "iconv", "old.txt"])


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["nowhere.txt"], "no file 'nowhere.txt'"),
        (["."], "is a folder"),
        (["nothing.jsonl"], "no documents in nothing.jsonl"),
        (["cats.txt", "-q", "  "], "query is empty"),
        (["cats.txt", "--top-k", "0"], "--top-k 0"),
        (["cats.txt", "--max-doc-tokens", "0"], "max_doc_tokens"),
        (["cats.txt", "--heads", "9-9"], "has no head (9, 9)"),
        (["cats.txt", "--heads", "nowhere.json"], "1-3,2-5"),
        (["cats.txt", "--heads", "cats.txt"], "is not a head set"),
        (["cats.txt", "--heads", "all", "--icr"], "--icr"),
        (["cats.txt", "--model", "./nowhere"], "no model folder"),
        (["cats.txt", "--device", "tpu9"], "device"),
        (["cats.txt", "--dtype", "float7"], "dtype"),
    ],
)
def test_errors_of_rerank(folder: Path, capsys: pytest.CaptureFixture[str], argv: list[str], told: str) -> None:
    (folder / "nothing.jsonl").write_text("\n\n")
    assert told in refused(capsys, "rerank", "-q", QUERY, *argv)


def test_debug_shows_where(folder: Path) -> None:
    from qr_integrations.errors import InputError

    with pytest.raises(InputError, match="nowhere"):
        run("rerank", "-q", QUERY, "nowhere.txt", "--debug")


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (ZeroDivisionError("oh"), 2)])
def test_interrupts_and_surprises(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
) -> None:
    from qr_integrations.cli import rerank

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(rerank, "read_documents", fail)
    assert run("rerank", "-q", QUERY, "cats.txt") == code
    told = capsys.readouterr().err
    assert "Traceback" not in told and ("--debug" in told) == (code == 2)


# ---- demo


def test_the_sample_is_whole() -> None:
    sample = read_sample()
    assert len(sample) == 40
    for question in sample:
        assert question.question and len(question.documents) == len(question.bm25) == 20
        gold = question.documents[question.gold].text
        assert [document.text for document in question.documents].count(gold) == 1


@pytest.mark.parametrize("line", ["{", "[]", '{"question": "a", "documents": [{"text": "b"}], "gold": 1, "bm25": [1]}'])
def test_a_broken_sample_is_told(tmp_path: Path, line: str) -> None:
    with pytest.raises(LoadError, match="cannot be read"):
        read_sample(tmp_path / "nowhere.jsonl")
    (tmp_path / "sample.jsonl").write_text("\n" + line)
    with pytest.raises(LoadError, match="line 2"):
        read_sample(tmp_path / "sample.jsonl")


@pytest.mark.parametrize("columns", ["50", "100"])
def test_the_demo(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert run("demo", "--questions", "2", "--question", "3") == 0
    captured = capsys.readouterr()
    assert captured.err == "" and "\x1b" not in captured.out
    assert max(map(len, captured.out.splitlines())) <= int(columns)
    words = " ".join(captured.out.split())
    assert read_sample()[2].question in words and "Question 3 of 40" in words
    for part in ("BM25", "Most attended:", "random order", "0.227", "ICR", "Mean over 2 questions", "CC BY-SA 3.0"):
        assert part in words, part


def test_the_demo_measures_what_it_says(qr_mini: "Backend") -> None:
    from rich.console import Console

    from qr_integrations.cli.demo import _measure
    from qr_integrations.evaluation import ndcg_at_k
    from qr_integrations.retrieval import ICRReranker, QRHeadReranker

    question = read_sample()[5]
    qrhead, icr = QRHeadReranker(qr_mini), ICRReranker(qr_mini)
    found = _measure(qrhead, icr, [question], Console(file=io.StringIO()))
    expected = ndcg_at_k(qrhead.rank(question.question, question.documents).order, [question.gold])
    assert found["heads"] == pytest.approx(expected)
    better = sum(score > question.bm25[question.gold] for score in question.bm25)
    assert found["bm25"] == pytest.approx(ndcg_at_k(range(20), [better]))
    assert found["random"] == pytest.approx(0.2271779669)


@pytest.mark.parametrize("argv", [["--question", "0"], ["--question", "41"], ["--questions", "0"]])
def test_errors_of_the_demo(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    assert argv[1] in refused(capsys, "demo", *argv)


# ---- doctor


def test_doctor_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor", "--json", "--tokens", "320") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["model"], report["passed"]) == ("qr-mini", True)
    outcomes = {check["name"]: check["outcome"] for check in report["checks"]}
    assert len(outcomes) == 9 and outcomes.pop("official example") == "skipped"
    assert set(outcomes.values()) == {"passed"} and "known" in report["facts"]["query-focused heads"]


def test_doctor_fails_when_a_check_fails(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qr_integrations.backend.selfcheck import Check
    from qr_integrations.cli import doctor

    rows = [Check("memory", "failed", 4.0, 2.0, "a detail"), Check("other", "skipped", detail="a reason")]
    monkeypatch.setattr(doctor, "run_checks", lambda *_, **__: iter(rows))
    monkeypatch.setattr(doctor, "run_ranking_checks", lambda *_: iter([Check("ranking", "passed", 0.1)]))
    assert run("doctor") == 1
    out = capsys.readouterr().out
    assert all(part in out for part in ("memory", "4", "<= 2", "a detail", "a reason", "1 failed, 1 skipped"))
    assert run("doctor", "--json") == 1
    assert json.loads(capsys.readouterr().out)["passed"] is False


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--model", "./nowhere"], "no model folder"),
        (["--model", "nobody/has-this"], "cannot be loaded"),
        (["--tokens", "10"], "--tokens 10"),
    ],
)
def test_errors_of_doctor(capsys: pytest.CaptureFixture[str], argv: list[str], told: str) -> None:
    assert told in refused(capsys, "doctor", *argv)


@pytest.mark.weights
def test_doctor_on_published_weights(capsys: pytest.CaptureFixture[str], weights_name: str) -> None:
    code = run("doctor", "--model", weights_name, "--json")
    report = capsys.readouterr().out
    assert code == 0, report
