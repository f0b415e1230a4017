"""`qr-integrations eval`: from a folder of data to a folder with a report."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

DEPTH = 8
PASSAGES = [
    "Cats sleep most of the day.",
    {"text": "Bram Stoker wrote it.", "title": "Dracula"},
    "The Danube is a river.",
]


def evaluate(*args: str) -> int:
    from qr_integrations.cli import main

    return main(["eval", *args])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the command runs."""
    place = tmp_path / "work"
    place.mkdir()
    monkeypatch.chdir(place)
    return place


@pytest.fixture(scope="module")
def beir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four of the questions that ship, all their passages as the corpus."""
    from qr_integrations.bundled import read_sample

    place = tmp_path_factory.mktemp("beir")
    (place / "qrels").mkdir()
    sample = read_sample()[4:8]
    ids: dict[tuple[str | None, str], str] = {}
    for one in sample:
        for document in one.documents:
            ids.setdefault((document.title, document.text), f"d{len(ids)}")
    corpus = [{"_id": name, "title": title or "", "text": text} for (title, text), name in ids.items()]
    queries = [{"_id": f"q{i}", "text": one.question} for i, one in enumerate(sample)]
    gold = [one.documents[one.gold] for one in sample]
    lines = [f"q{i}\t{ids[document.title, document.text]}\t1" for i, document in enumerate(gold)]
    other = sample[0].documents[(sample[0].gold + 1) % 20]
    lines.append(f"q0\t{ids[other.title, other.text]}\t2")
    (place / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in corpus))
    (place / "queries.jsonl").write_text("".join(json.dumps(line) + "\n" for line in queries))
    (place / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "\n".join(lines) + "\n")
    return place


@pytest.fixture(scope="module")
def expected(beir: Path, qr_mini: Any) -> list[float]:
    """nDCG@10 of `QRHeadReranker` on what BM25 retrieves, computed with scikit-learn."""
    from sklearn.metrics import ndcg_score

    from qr_integrations import QRHeadReranker
    from qr_integrations.evaluation.data import read_data

    reranker, values = QRHeadReranker(qr_mini), []
    for one in read_data(beir, depth=DEPTH):
        order = reranker.rank(one.query, one.documents).order
        truth = [one.relevance.get(place, 0) for place in order] + [0] * 10 + list(one.missed)
        values.append(float(ndcg_score([truth], [[-rank for rank in range(len(truth))]], k=10)))
    assert len(values) == 4 and len(set(values)) > 1
    return values


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text("utf-8"))
    return found


def told(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of an error."""
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ") and "unexpected" not in shown.err and not shown.out
    return shown.err


def test_from_a_folder_to_the_figures_of_another_library(
    beir: Path, expected: list[float], folder: Path, capsys: pytest.CaptureFixture[str], qr_mini: Any
) -> None:
    from qr_integrations.evaluation.data import read_data
    from qr_integrations.evaluation.measuring import RETRIEVED, quality, run_systems
    from qr_integrations.evaluation.systems import make_systems

    lists = read_data(beir, depth=DEPTH)
    systems = make_systems(["qr"], lists, backend=lambda: qr_mini)
    found = quality(run_systems(systems, lists, seeds=()), lists, ["nDCG@10"])
    assert found[RETRIEVED]["qr"]["nDCG@10"] == pytest.approx(expected)

    args = ["--depth", f"{DEPTH}", "--system", "qr", "retrieved", "--seeds", "1", "--metrics", "nDCG@10", "All@5"]
    assert evaluate(str(beir), *args) == 0
    shown = capsys.readouterr()
    assert "nDCG@10 on 4 lists of 8 documents" in shown.out and "eval-report/report.md" in shown.out and not shown.err
    report = results(folder / "eval-report")
    mean = sum(expected) / len(expected)
    assert report["systems"][0]["name"] == "qr" == report["baseline"]
    assert report["systems"][0]["quality"]["retrieved"]["nDCG@10"]["mean"] == pytest.approx(mean)
    lines = [json.loads(line) for line in (folder / "eval-report" / "per_query.jsonl").read_text().splitlines()]
    own = [line for line in lines if (line["system"], line["order"]) == ("qr", "retrieved")]
    assert [line["id"] for line in own] == ["q0", "q1", "q2", "q3"]
    assert [line["nDCG@10"] for line in own] == pytest.approx(expected)
    assert {line["All@5"] for line in lines} <= {0.0, 1.0}
    assert report["facts"]["data"] == str(beir)


def test_a_run_gives_the_candidates(beir: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = [json.loads(line)["_id"] for line in (beir / "corpus.jsonl").read_text().splitlines()]
    lines = [f"q{q} Q0 {name} 0 {-place} any" for q in range(4) for place, name in enumerate(corpus[20 * q :][:5])]
    (folder / "any.run").write_text("\n".join(lines) + "\n")
    args = [
        "--run",
        "any.run",
        "--system",
        "retrieved",
        "random",
        "--seeds",
        "1",
        "--limit",
        "2",
        "--baseline",
        "random",
    ]
    assert evaluate(str(beir), *args) == 0
    assert "2 lists of 5 documents" in capsys.readouterr().out
    from qr_integrations.evaluation.trec import read_run

    found = read_run(folder / "eval-report" / "retrieved.trec")
    assert {query: [name for name, _ in ranked] for query, ranked in found.items()} == {
        "q0": corpus[:5],
        "q1": corpus[20:25],
    }
    report = results(folder / "eval-report")
    assert report["baseline"] == "random" and report["systems"][1]["against"] == {}


def test_without_data_the_questions_that_ship_are_measured(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("--limit", "2", "--seeds", "1") == 0
    shown = capsys.readouterr()
    assert "2 lists of 20 documents" in shown.out and not shown.err
    report = results(folder / "eval-report")
    assert [one["name"] for one in report["systems"]] == ["bm25", "qr", "icr", "random"]
    quality = {one["name"]: one["quality"]["shuffled"]["nDCG@10"]["mean"] for one in report["systems"]}
    assert quality["qr"] > quality["random"] and "ship with the package" in report["facts"]["data"]
    for name in ("bm25", "qr", "icr", "random"):
        assert f"| {name} |" in (folder / "eval-report" / "report.md").read_text("utf-8")
    assert [path.name for path in folder.iterdir()] == ["eval-report"]


def test_json_is_one_object_and_the_same_as_the_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("--limit", "3", "--seeds", "1", "--system", "bm25", "random", "--json", "--out", "made") == 0
    shown = capsys.readouterr()
    assert shown.out.count("\n") == 1 and not shown.err
    assert json.loads(shown.out) == results(folder / "made")


def test_the_questions_that_ship_come_in_the_order_of_bm25(folder: Path) -> None:
    from qr_integrations.bundled import read_sample

    assert evaluate("--limit", "12", "--seeds", "1", "--system", "retrieved", "--metrics", "RR") == 0
    lines = [json.loads(line) for line in (folder / "eval-report" / "per_query.jsonl").read_text().splitlines()]
    ranks = [1 + sum(score > one.bm25[one.gold] for score in one.bm25) for one in read_sample()[:12]]
    assert [line["RR"] for line in lines if line["order"] == "retrieved"] == pytest.approx([1 / rank for rank in ranks])
    assert max(ranks) > 1


def test_it_can_be_measured_again_into_the_same_folder(folder: Path) -> None:
    for system in ("bm25", "random"):
        assert evaluate("--limit", "2", "--seeds", "1", "--system", system) == 0
    assert [one["name"] for one in results(folder / "eval-report")["systems"]] == ["random"]
    assert not (folder / "eval-report" / "bm25.trec").exists()


@pytest.mark.parametrize("columns", ["40", "60", "80", "200"])
def test_any_terminal_will_do(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    long = "qr:instruction=Only-passages-about-films-and-novels-count,rare_words=1.0"
    assert evaluate("--limit", "1", "--seeds", "1", "--system", "bm25", long, "--lengths", "400", "--count", "1") == 0
    shown = capsys.readouterr().out
    assert all(len(line.rstrip()) <= int(columns) for line in shown.splitlines())
    if columns != "40":
        assert "±" in shown and "400" in shown
        assert "".join(shown.split()).count(long) == 2  # in both tables: long names are broken, not cut
    if int(columns) >= 80:
        assert "position" in shown and shown.count("0.") >= 2
        row = next(line for line in shown.splitlines() if line.startswith(" bm25"))
        assert row.count("±") == 2  # means and intervals stand in one line


def test_heads_and_layers_by_the_scores_of_a_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from qr_integrations.cli import main

    assert main(["detect", "--limit", "1", "--out", "heads.json"]) == 0
    args = ["--limit", "1", "--seeds", "1", "--system", "bm25", "--sweep", "heads.json"]
    assert evaluate(*args) == 0
    assert "Heads and layers" in capsys.readouterr().out
    sweep = results(folder / "eval-report")["sweep"]
    assert {point["top_layer"] for point in sweep} <= {0, 1, 2, 3} and any(point["best"] for point in sweep)
    scores = {(layer, head): score for layer, head, score in json.loads((folder / "heads.json").read_text())["scores"]}
    best_layer = max(scores, key=lambda head: scores[head])[0]
    assert (best_layer, 1) in {(point["top_layer"], point["heads"]) for point in sweep}
    assert (folder / "eval-report" / "heads_and_layers.png").is_file()


def test_heads_are_detected_where_no_file_is_given(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from qr_integrations.bundled import read_detection_lists
    from qr_integrations.cli import eval as command

    monkeypatch.setattr(command, "read_detection_lists", lambda: read_detection_lists()[:1])
    assert evaluate("--limit", "1", "--seeds", "1", "--system", "bm25", "--sweep") == 0
    assert results(folder / "eval-report")["sweep"] and "Heads and layers" in capsys.readouterr().out


def test_recall_in_long_inputs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--limit", "2", "--seeds", "1", "--system", "bm25", "random", "--lengths", "1400", "700", "--count", "3"]
    assert evaluate(*args, "--evidence", "2") == 0
    shown = capsys.readouterr().out
    assert "700" in shown and "1,400" in shown and " / " in shown
    report = results(folder / "eval-report")
    assert [(one["num_tokens"], one["system"]) for one in report["lengths"]] == [
        (length, name) for length in (700, 1400) for name in ("bm25", "random")
    ]
    assert "2 questions in one" in report["facts"]["long inputs"]
    assert (folder / "eval-report" / "lengths.png").is_file()


def test_a_file_of_lists_and_its_limits(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.dumps({"query": f"who wrote dracula {i}", "documents": PASSAGES, "gold": [1]}) for i in range(2)]
    (folder / "lists.jsonl").write_text("\n".join(lines))
    assert evaluate("lists.jsonl", "--system", "bm25", "qr:top=2", "--seeds", "1") == 0
    assert "2 lists of 3 documents" in capsys.readouterr().out
    (folder / "bad.jsonl").write_text(lines[0] + "\nnot json\n")
    assert evaluate("bad.jsonl", "--out", "other") == 2
    assert "bad.jsonl, line 2: no list" in told(capsys) and not (folder / "other").exists()
    nothing = json.dumps({"query": "who", "documents": PASSAGES, "gold": []})
    (folder / "nothing.jsonl").write_text(nothing)
    assert evaluate("nothing.jsonl", "--out", "other") == 2
    assert "none is known to be relevant: leave it out" in told(capsys) and not (folder / "other").exists()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["missing"], "there is no 'missing': pass a BEIR folder"),
        (["empty"], "has no corpus.jsonl"),
        (["heads.json"], "holds no array of questions"),
        (["notes.txt"], "cannot be seen from its name: pass"),
        (["--limit", "0"], "--limit counts from 1: pass"),
        (["--seeds", "0"], "--seeds, --depth and --recall-at count from 1: pass"),
        (["--recall-at", "0"], "--seeds, --depth and --recall-at count from 1: pass"),
        (["--depth", "0"], "--seeds, --depth and --recall-at count from 1: pass"),
        (["--system", "bm25", "--baseline", "qr"], "--baseline qr is not measured: pass one of --system bm25"),
        (["--system", "best"], "'best' is no system: write"),
        (["--system", "qr:colour=red"], "there is no setting 'colour': known are"),
        (["--system", "qr", "qr"], "'qr' stands twice"),
        (["--metrics", "nDCG@10", "hits"], "'hits' cannot be measured"),
        (["--metrics", "nDCG@0"], "the cutoff is below 1"),
        (["--sweep", "notes.txt"], "holds no scores of heads"),
        (["--sweep", "heads.json"], "holds no scores of heads"),
        (["--sweep", "other.json"], "has no head (77, 1)"),
        (["--sweep", "other.json", "--lengths", "400", "--count", "1"], "has no head"),
        (["--lengths", "0"], "num_tokens is 0: pass at least 1"),
        (["--lengths", "500", "--count", "0"], "count is 0: pass at least 1"),
        (["--lengths", "500", "--evidence", "0"], "evidence is 0: pass at least 1"),
        (["lists.jsonl", "--lengths", "60", "100000"], "are wanted: pass more lists"),
        (["--out", "nowhere/report"], "make that folder"),
        (["--out", "."], "name a folder in it"),
        (["--out", "empty/../mine"], "no earlier report and would be replaced"),
        (["--out", "notes.txt"], "no earlier report and would be replaced"),
        (["--system", "cross:empty"], "is no CrossEncoder that can be loaded"),
        (["--model", "./none"], "no model folder"),
    ],
)
def test_wrong_arguments_are_told_before_anything_is_measured(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, args: list[str], says: str
) -> None:
    from qr_integrations.cli import eval as command
    from qr_integrations.evaluation import lengths

    for module in (command, lengths):
        monkeypatch.setattr(module, "run_systems", lambda *_, **__: pytest.fail("measured"))
    (folder / "empty").mkdir()
    (folder / "mine").mkdir()
    (folder / "mine" / "notes.txt").write_text("mine")
    (folder / "notes.txt").write_text("mine")
    (folder / "heads.json").write_text('{"heads": [[0, 1]]}')
    (folder / "lists.jsonl").write_text(json.dumps({"query": "what sleeps", "documents": PASSAGES, "gold": 0}))
    (folder / "other.json").write_text('{"scores": [[0, 1, 0.5], [77, 1, 0.5]]}')
    before = sorted(folder.rglob("*"))
    assert evaluate(*args) == 2
    assert says in told(capsys)
    assert sorted(folder.rglob("*")) == before and list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize(
    ("module", "extra"),
    [
        ("ir_measures", "eval"),
        ("scipy", "eval"),
        ("bm25s", "eval"),
        ("sentence_transformers", "eval"),
        ("matplotlib.figure", "plots"),
    ],
)
def test_what_is_not_installed_is_told_before_anything_is_measured(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, module: str, extra: str
) -> None:
    import sys

    from qr_integrations.cli import eval as command

    monkeypatch.setattr(command, "run_systems", lambda *_, **__: pytest.fail("measured"))
    monkeypatch.setitem(sys.modules, module, None)
    assert evaluate("--system", "bm25", f"bi:{folder}", "--limit", "1") == 2
    assert f"pip install 'qr-integrations[{extra}]'" in told(capsys)
    assert not list(folder.iterdir())


def test_an_interruption_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from qr_integrations.evaluation import report

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "plot_quality", interrupted)
    assert evaluate("--limit", "1", "--seeds", "1", "--system", "bm25") == 130
    assert not list(folder.iterdir())


def test_the_command_and_its_modules_are_not_read_by_the_package(in_fresh_python: Callable[[str], str]) -> None:
    code = "import sys, qr_integrations; print([m for m in sys.modules if m.startswith(('scipy', 'matplotlib'))])"
    assert in_fresh_python(code) == "[]"
