"""A report: what its page says, its pictures and runs, and that it never destroys or half replaces a folder."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest


class By:
    """Scores by a function of the document's number."""

    reads_order = False

    def __init__(self, name: str, score_of: Callable[[int], float]) -> None:
        self.name, self.score_of = name, score_of

    def score(self, query: str, documents: Sequence[Any]) -> list[float]:
        return [self.score_of(int(document.text.split()[-1])) for document in documents]


def judged(name: str, ids: Sequence[str | None]) -> Any:
    from qr_integrations import Document, JudgedList

    documents = tuple(Document(f"{'word ' * i}{i}", id=one) for i, one in enumerate(ids))
    return JudgedList(f"question {name}", documents, {1: 1}, id=name)


@pytest.fixture(scope="module")
def lists() -> list[Any]:
    ids = [f"d{i}" for i in range(12)]
    return [judged("q1", ids), judged("q2", ids[::-1]), judged("q3", ids)]


@pytest.fixture(scope="module")
def systems() -> list[By]:
    return [By("good", lambda n: -abs(n - 1)), By("odd|even", lambda n: float(n % 2 == 0)), By("bi:/some/model", float)]


@pytest.fixture(scope="module")
def made(lists: list[Any], systems: list[By]) -> dict[str, Any]:
    """All that a report is written from, with a sweep and lengths."""
    from qr_integrations.evaluation.lengths import LengthPoint
    from qr_integrations.evaluation.measuring import METRICS, quality, run_systems
    from qr_integrations.evaluation.statistics import Estimate
    from qr_integrations.evaluation.summary import Report, summarise
    from qr_integrations.evaluation.sweeps import SweepPoint

    runs = run_systems(systems, lists, seeds=(0, 1))
    measured = quality(runs, lists)
    some = Estimate(0.5, 0.25, 0.625)
    report = Report(
        {"data": "made up", "lists": "3 lists of 12 documents"},
        METRICS,
        "good",
        summarise(runs, lists, measured, METRICS, "good"),
        [SweepPoint(1, 2, some, some, 0.25, 0.5, True), SweepPoint(3, 2, some, some, 0.5, 1.0)],
        [LengthPoint("good", length, 9.6, 5, some, some) for length in (1000, 2000)],
    )
    return {"report": report, "runs": runs, "measured": measured, "lists": lists}


def save(made: dict[str, Any], folder: Path, **changes: Any) -> None:
    from qr_integrations.evaluation.report import save_report

    given = {**made, **changes}
    save_report(given["report"], given["runs"], given["measured"], given["lists"], folder)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def tables(page: str) -> list[list[list[str]]]:
    """As a Markdown reader splits them: a bar after a backslash is no border."""
    blocks = [block.split("\n") for block in page.strip().split("\n\n") if block.startswith("|")]
    return [[[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in block] for block in blocks]


def refused(says: str, error: str = "InputError") -> Any:
    from qr_integrations import errors

    return pytest.raises(getattr(errors, error), match=says)


PICTURES = {"quality.png", "biases.png", "heads_and_layers.png", "lengths.png"}
PAGES = {"report.md", "results.json", "per_query.jsonl"}
RUNS = {"good.trec", "odd-even.trec", "bi-some-model.trec"}


def test_everything_is_there(made: dict[str, Any], tmp_path: Path) -> None:
    save(made, tmp_path / "report")
    assert names(tmp_path) == {"report"} and names(tmp_path / "report") == PICTURES | PAGES | RUNS
    for picture in PICTURES:
        data = (tmp_path / "report" / picture).read_bytes()
        assert data.startswith(b"\x89PNG") and len(data) > 5_000
    page = (tmp_path / "report" / "report.md").read_text("utf-8")
    assert {match[1] for match in re.finditer(r"!\[.+?\]\((.+?)\)", page)} == PICTURES


def test_tables_are_whole_and_hold_the_figures(made: dict[str, Any]) -> None:
    from qr_integrations.evaluation.report import markdown

    page = markdown(made["report"])
    found = tables(page)
    assert len(found) == 6 and all(len(row) == len(table[0]) for table in found for row in table)
    assert all(set(table[1]) == {"---"} for table in found)
    assert "## Documents as retrieved" in page and "## Documents shuffled" in page and "- data: made up" in page
    for table, order in zip(found[:2], ("retrieved", "shuffled"), strict=True):
        assert table[0] == ["system", "nDCG@10", "R@5", "RR", "nDCG@10 against good", "p"]
        assert [row[0] for row in table[2:]] == ["good", r"odd\|even", "bi:/some/model"]
        good, odd, last = made["report"].systems
        assert [row[1] for row in table[2:]] == [str(one.quality[order]["nDCG@10"]) for one in (good, odd, last)]
        assert table[2][1:] == ["1.000 [1.000, 1.000]"] * 3 + ["", ""]
        assert table[3][4].startswith("-") and table[3][5] == f"{odd.against[order].p:.4f}"
    assert [row[0] for row in found[3][2:]] == ["good", r"odd\|even", "bi:/some/model"]  # biases
    assert found[3][4][2].startswith("+1.000")  # the longer, the higher
    assert found[4][2] == ["1", "2", "0.500 [0.250, 0.625]", "0.500 [0.250, 0.625]", "250.0", "50%", "yes"]
    assert found[5][3][:4] == ["2,000", "10", "good", "0.500 [0.250, 0.625]"]


def test_a_name_with_a_line_end_breaks_no_table(lists: list[Any], tmp_path: Path) -> None:
    from qr_integrations.evaluation.measuring import quality, run_systems
    from qr_integrations.evaluation.report import markdown
    from qr_integrations.evaluation.summary import Report, summarise

    runs = run_systems([By("two\nlines", float), By(r"$\nope$ {a}", float)], lists, seeds=(0,))
    measured = quality(runs, lists, ["RR"])
    report = Report({}, ["RR"], "two\nlines", summarise(runs, lists, measured, ["RR"], "two\nlines"))
    assert tables(markdown(report))[0][2][0] == "two lines"
    save({"report": report, "runs": runs, "measured": measured, "lists": lists}, tmp_path / "report")
    assert {"two-lines.trec", "-nope-a-.trec"} <= names(tmp_path / "report")


def test_results_and_questions_come_back(made: dict[str, Any], tmp_path: Path) -> None:
    save(made, tmp_path / "report")
    results = json.loads((tmp_path / "report" / "results.json").read_text("utf-8"))
    assert [one["name"] for one in results["systems"]] == ["good", "odd|even", "bi:/some/model"]
    assert results["baseline"] == "good" and results["metrics"] == ["nDCG@10", "R@5", "RR"]
    assert results["systems"][0]["against"] == {} and set(results["systems"][1]["against"]) == {"retrieved", "shuffled"}
    lines = [json.loads(line) for line in (tmp_path / "report" / "per_query.jsonl").read_text("utf-8").splitlines()]
    assert len(lines) == 3 * 2 * 3
    for one in results["systems"]:
        for order in ("retrieved", "shuffled"):
            own = [line for line in lines if (line["system"], line["order"]) == (one["name"], order)]
            assert [line["id"] for line in own] == ["q1", "q2", "q3"] and own[0]["query"] == "question q1"
            for metric in results["metrics"]:
                mean = sum(line[metric] for line in own) / 3
                assert one["quality"][order][metric]["mean"] == pytest.approx(mean)


def test_runs_rank_as_the_systems_did(made: dict[str, Any], tmp_path: Path) -> None:
    from qr_integrations.evaluation.trec import read_run

    save(made, tmp_path / "report")
    for system, file in {"good": "good", "odd|even": "odd-even", "bi:/some/model": "bi-some-model"}.items():
        found = read_run(tmp_path / "report" / f"{file}.trec")
        assert list(found) == ["q1", "q2", "q3"]
        for run in made["runs"]:
            if run.system == system and run.seed is None:
                one = made["lists"][run.number]
                expected = [(one.documents[place].id, run.scores[place]) for place in run.ranking]
                assert found[one.id] == expected


@pytest.mark.parametrize(
    ("list_ids", "document_ids", "expected"),
    [
        (["q1", "q2"], ["a", "b", "c"], {"q1": ["c", "b", "a"], "q2": ["c", "b", "a"]}),
        (["q1", "q2"], [None, None, None], {"q1": ["2", "1", "0"], "q2": ["2", "1", "0"]}),
        (["q1", "q2"], ["2", None, "0"], {"q1": ["2", "1", "0"], "q2": ["2", "1", "0"]}),
        (["q1", "q2"], ["my document", "b", "c"], {"q1": ["2", "1", "0"], "q2": ["2", "1", "0"]}),
        (["q1", "q2"], ["same", "same", "c"], {"q1": ["2", "1", "0"], "q2": ["2", "1", "0"]}),
        (["", ""], ["a", "b", "c"], {"0": ["c", "b", "a"], "1": ["c", "b", "a"]}),
        (["same", "same"], ["a", "b", "c"], {"0": ["c", "b", "a"], "1": ["c", "b", "a"]}),
        (["two words", "q"], ["a", "b", "c"], {"0": ["c", "b", "a"], "1": ["c", "b", "a"]}),
    ],
)
def test_what_has_no_name_of_its_own_is_named_by_its_place(
    tmp_path: Path, list_ids: list[str], document_ids: list[str | None], expected: dict[str, list[str]]
) -> None:
    from qr_integrations.evaluation.measuring import quality, run_systems
    from qr_integrations.evaluation.summary import Report, summarise
    from qr_integrations.evaluation.trec import read_run

    lists = [judged(name, document_ids) for name in list_ids]
    runs = run_systems([By("last", float)], lists, seeds=())
    measured = quality(runs, lists, ["RR"])
    report = Report({}, ["RR"], "last", summarise(runs, lists, measured, ["RR"], "last"))
    save({"report": report, "runs": runs, "measured": measured, "lists": lists}, tmp_path / "report")
    found = read_run(tmp_path / "report" / "last.trec")
    assert {query: [name for name, _ in ranked] for query, ranked in found.items()} == expected


def test_systems_with_names_alike_or_long_keep_a_run_each(lists: list[Any], tmp_path: Path) -> None:
    from qr_integrations.evaluation.measuring import quality, run_systems
    from qr_integrations.evaluation.summary import Report, summarise
    from qr_integrations.evaluation.trec import read_run

    systems = [By("a/b", float), By("a:b", lambda n: -n), By("cross:/" + "deep/" * 100, float)]
    runs = run_systems(systems, lists, seeds=())
    measured = quality(runs, lists, ["RR"])
    report = Report({}, ["RR"], "a/b", summarise(runs, lists, measured, ["RR"], "a/b"))
    save({"report": report, "runs": runs, "measured": measured, "lists": lists}, tmp_path / "report")
    written = sorted(name for name in names(tmp_path / "report") if name.endswith(".trec"))
    assert len(written) == 3 and written[:2] == ["a-b-1.trec", "a-b.trec"]
    best = [read_run(tmp_path / "report" / name)["q1"][0][0] for name in ("a-b.trec", "a-b-1.trec")]
    assert best == ["d11", "d0"]


def test_an_earlier_report_is_replaced(made: dict[str, Any], tmp_path: Path) -> None:
    from dataclasses import replace

    save(made, tmp_path / "report")
    (tmp_path / "report" / "gone.trec").write_text("of a system that is not measured any more")
    shorter = replace(made["report"], sweep=(), lengths=())
    save(made, tmp_path / "report", report=shorter)
    assert names(tmp_path) == {"report"}
    assert names(tmp_path / "report") == {"quality.png", "biases.png"} | PAGES | RUNS
    (tmp_path / "empty").mkdir()
    save(made, tmp_path / "empty")
    assert "report.md" in names(tmp_path / "empty")


@pytest.mark.parametrize(
    "holds",
    [
        {"notes.txt": "mine"},
        {"results.json": "{}"},
        {"results.json": '{"systems": []}'},
        {"results.json": "[1]"},
        {"results.json": "\udcff"},
        {"report.md": "# mine"},
        {"results.json": '{"facts": 0, "metrics": 0, "baseline": 0, "systems": 0}', "notes.txt": "mine"},
    ],
)
def test_a_folder_of_other_things_is_refused_and_untouched(
    made: dict[str, Any], tmp_path: Path, holds: dict[str, str]
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    for name, content in holds.items():
        (folder / name).write_text(content, "utf-8", errors="surrogateescape")
    with refused("mine' is no earlier report and would be replaced: write the report elsewhere"):
        save(made, folder)
    assert names(tmp_path) == {"mine"} and names(folder) == set(holds)
    for name, content in holds.items():
        assert (folder / name).read_text("utf-8", errors="surrogateescape") == content


def test_places_where_no_folder_can_be_made_are_refused(
    made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "work" / "deeper").mkdir(parents=True)
    with refused("no earlier report"):
        save(made, tmp_path / "file")
    with refused("nowhere': make that folder, or write elsewhere"):
        save(made, tmp_path / "nowhere" / "report")
    monkeypatch.chdir(tmp_path / "work" / "deeper")
    for place in (".", "..", tmp_path / "work"):
        with refused("is worked in, and would be replaced: name a folder in it"):
            save(made, Path(place))
    assert names(tmp_path) == {"file", "work"} and not names(tmp_path / "work" / "deeper")


@pytest.mark.parametrize("fails", ["plot_quality", "plot_lengths", "write_run", "markdown"])
@pytest.mark.parametrize("exists", [True, False])
def test_a_failure_in_the_middle_leaves_the_old_report_whole(
    made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str, exists: bool
) -> None:
    from qr_integrations.evaluation import report

    if exists:
        save(made, tmp_path / "report")
    before = {path.name: path.read_bytes() for path in tmp_path.glob("report/*")}

    def broken(*_: Any) -> None:
        raise RuntimeError("no ink")

    monkeypatch.setattr(report, fails, broken)
    with pytest.raises(RuntimeError, match="no ink"):
        save(made, tmp_path / "report")
    assert names(tmp_path) == ({"report"} if exists else set())
    assert {path.name: path.read_bytes() for path in tmp_path.glob("report/*")} == before


def test_without_shuffled_orders_there_are_no_biases(lists: list[Any], systems: list[By], tmp_path: Path) -> None:
    from qr_integrations.evaluation.measuring import quality, run_systems
    from qr_integrations.evaluation.summary import Report, summarise

    runs = run_systems(systems, lists, seeds=())
    measured = quality(runs, lists, ["RR"])
    report = Report({"data": "made up"}, ["RR"], "good", summarise(runs, lists, measured, ["RR"], "good"))
    save({"report": report, "runs": runs, "measured": measured, "lists": lists}, tmp_path / "report")
    page = (tmp_path / "report" / "report.md").read_text("utf-8")
    assert "shuffled" not in page and "What else" not in page and "biases.png" not in names(tmp_path / "report")


def test_a_baseline_that_is_not_measured_is_refused(made: dict[str, Any]) -> None:
    from qr_integrations.evaluation.summary import summarise

    with refused(r"the baseline 'best' is not measured: pass one of good, odd\|even, bi:/some/model"):
        summarise(made["runs"], made["lists"], made["measured"], ["RR"], "best")


def test_a_fifth_without_documents_and_equal_quality_can_be_drawn(tmp_path: Path) -> None:
    from qr_integrations.evaluation.measuring import quality, run_systems
    from qr_integrations.evaluation.summary import Report, summarise

    lists = [judged("q", [None] * 5)]  # four irrelevant documents for five fifths
    runs = run_systems([By("a", float)], lists, seeds=(0,))
    measured = quality(runs, lists, ["RR"])
    report = Report({}, ["RR"], "a", summarise(runs, lists, measured, ["RR"], "a"))
    assert None in report.systems[0].length.curve  # type: ignore[union-attr]
    save({"report": report, "runs": runs, "measured": measured, "lists": lists}, tmp_path / "report")
    assert "NaN" not in (tmp_path / "report" / "results.json").read_text()


def test_a_mean_that_rounding_puts_outside_its_interval_can_be_drawn(made: dict[str, Any], tmp_path: Path) -> None:
    from dataclasses import replace

    from qr_integrations.evaluation.plots import plot_quality
    from qr_integrations.evaluation.statistics import Estimate

    rounded = {"retrieved": {"nDCG@10": Estimate(0.3, 0.30000000000000004, 0.3)}}
    plot_quality(
        replace(made["report"], systems=[replace(made["report"].systems[0], quality=rounded)]), tmp_path / "quality.png"
    )
    assert (tmp_path / "quality.png").stat().st_size > 5_000


def test_without_matplotlib_the_extra_is_named_before_anything_is_written(
    made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    from qr_integrations.evaluation.report import check_folder

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for call in (lambda: save(made, tmp_path / "report"), lambda: check_folder(tmp_path / "report")):
        with refused(r"a plot needs .* pip install 'qr-integrations\[plots\]'", "MissingExtra"):
            call()
    assert not names(tmp_path)
