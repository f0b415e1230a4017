"""A report as Markdown, JSON and pictures, in a folder of its own."""

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path

from qr_integrations.errors import InputError
from qr_integrations.evaluation.biases import Bias
from qr_integrations.evaluation.measuring import ORDERS, Quality, Run
from qr_integrations.evaluation.plots import plot_biases, plot_lengths, plot_pareto, plot_quality, require_matplotlib
from qr_integrations.evaluation.summary import Report
from qr_integrations.evaluation.tables import facts_list, markdown_table, signed
from qr_integrations.evaluation.trec import write_run
from qr_integrations.files import whole_folder
from qr_integrations.types import JudgedList

RESULTS, PER_QUERY, TABLES = "results.json", "per_query.jsonl", "report.md"
SKILLS = "skills.png"
_QUALITY, _BIASES, _SWEEP, _LENGTHS = "quality.png", "biases.png", "heads_and_layers.png", "lengths.png"
_FILES = {RESULTS, PER_QUERY, TABLES, SKILLS, _QUALITY, _BIASES, _SWEEP, _LENGTHS}
_RUN_SUFFIX = ".trec"
_LONGEST_NAME = 100  # characters of a system's name in a file's name


def save_report(
    report: Report, runs: Sequence[Run], measured: Quality, lists: Sequence[JudgedList], folder: str | Path
) -> None:
    """Write ``report.md``, ``results.json``, ``per_query.jsonl``, a TREC run per system, and the pictures.

    A run names questions and documents by their ids, or, where these are no single words or not distinct, by their
    places, from 0. An earlier report in `folder` is replaced; if anything fails, it stays, and nothing is half written.

    Raises:
        InputError: as `check_folder`.
        MissingExtra: matplotlib is not installed.
    """
    check_folder(folder)
    pictures = _pictures(report)
    with whole_folder(folder) as place:
        for name, plot in pictures.items():
            plot(report, place / name)
        (place / RESULTS).write_text(json.dumps(report.as_dict(), ensure_ascii=False, indent=1) + "\n", "utf-8")
        (place / PER_QUERY).write_text("".join(_per_query(measured, lists)), "utf-8")
        (place / TABLES).write_text(markdown(report, list(pictures)), "utf-8")
        for system, run in _trec_runs(runs, lists).items():
            path = _new_file(place, re.sub(r"[^A-Za-z0-9.=_-]+", "-", system)[-_LONGEST_NAME:])
            write_run(path, run, "qr-integrations")


def check_folder(folder: str | Path) -> None:
    """A report can be written to `folder`: it is new, empty, or holds an earlier report and nothing else.

    Raises:
        InputError: it is something else, or the folder around it is not there.
        MissingExtra: matplotlib, which draws the pictures, is not installed.
    """
    require_matplotlib()
    folder = Path(folder).resolve()
    if not folder.parent.is_dir() or not os.access(folder.parent, os.W_OK):
        raise InputError(f"nothing can be written to {str(folder.parent)!r}: make that folder, or write elsewhere")
    if Path.cwd().is_relative_to(folder):
        raise InputError(f"{str(folder)!r} is worked in, and would be replaced: name a folder in it for the report")
    if folder.exists() and not _may_be_replaced(folder):
        raise InputError(f"{str(folder)!r} is no earlier report and would be replaced: write the report elsewhere")


def _may_be_replaced(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()}
    if not names:
        return True
    if any(name not in _FILES and not name.endswith(_RUN_SUFFIX) for name in names):
        return False
    try:
        results = json.loads((folder / RESULTS).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(results, dict) and {"facts", "metrics", "baseline", "systems"} <= results.keys()


def _pictures(report: Report) -> dict[str, Callable[[Report, Path], None]]:
    """File names, and what draws them."""
    pictures: dict[str, Callable[[Report, Path], None]] = {_QUALITY: plot_quality}
    if any(system.position or system.length for system in report.systems):
        pictures[_BIASES] = plot_biases
    if report.sweep:
        pictures[_SWEEP] = plot_pareto
    if report.lengths:
        pictures[_LENGTHS] = plot_lengths
    return pictures


def _new_file(place: Path, name: str) -> Path:
    """For a run; systems whose names differ by a sign that a file's name cannot have get a number."""
    names = (name if not number else f"{name}-{number}" for number in count())
    return next(path for name in names if not (path := place / f"{name}{_RUN_SUFFIX}").exists())


def _per_query(measured: Quality, lists: Sequence[JudgedList]) -> Iterator[str]:
    for number, judged in enumerate(lists):
        for order, systems in measured.items():
            for system, metrics in systems.items():
                values = {metric: float(found[number]) for metric, found in metrics.items()}
                entry = {"id": judged.id, "query": judged.query, "system": system, "order": order, **values}
                yield json.dumps(entry, ensure_ascii=False) + "\n"


def _trec_runs(runs: Sequence[Run], lists: Sequence[JudgedList]) -> dict[str, dict[str, list[tuple[str, float]]]]:
    """system -> query -> documents and scores, of the order retrieved."""
    named: dict[str, dict[str, list[tuple[str, float]]]] = {}
    queries = _words([judged.id for judged in lists])
    for run in runs:
        if run.seed is None:
            documents = _words([document.id for document in lists[run.number].documents])
            ranked = [(documents[document], run.scores[document]) for document in run.ranking]
            named.setdefault(run.system, {})[queries[run.number]] = ranked
    return named


def _words(names: Sequence[str | None]) -> list[str]:
    """The names, if all are single words and no two are the same; else their places."""
    words = [name for name in names if name is not None and name.split() == [name]]
    return words if len(set(words)) == len(names) else [str(place) for place in range(len(names))]


def markdown(report: Report, pictures: Sequence[str] = ()) -> str:
    """The report as a page of tables."""
    parts = [
        "# How well documents are ranked",
        facts_list(report.facts),
        *_quality_part(report),
        *_bias_part(report),
        *_sweep_part(report),
        *_lengths_part(report),
        *(f"![{Path(name).stem.replace('_', ' ')}]({name})" for name in pictures),
    ]
    return "\n\n".join(parts) + "\n"


def _quality_part(report: Report) -> Iterator[str]:
    orders = list(report.systems[0].quality)
    for order in orders:
        yield f"## Documents {ORDERS[order]}"
        head = ["system", *report.metrics, f"{report.metrics[0]} against {report.baseline}", "p"]
        rows = []
        for system in report.systems:
            against = system.against.get(order)
            rows.append(
                [
                    system.name,
                    *(str(system.quality[order][metric]) for metric in report.metrics),
                    signed(against),
                    None if against is None or against.p is None else f"{against.p:.4f}",
                ]
            )
        yield markdown_table(head, rows)
    yield "Means over the questions with bootstrap intervals at 95 %; p of a paired randomization test, two-sided."
    yield "## Time"
    yield markdown_table(
        ["system", "milliseconds per list"],
        [[system.name, f"{1000 * system.seconds:.1f}"] for system in report.systems],
    )
    yield "The median; every list is read as a new one."


def _bias_part(report: Report) -> Iterator[str]:
    if not any(system.position or system.length for system in report.systems):
        return
    yield "## What else moves a score"
    rows = [[system.name, _told(system.position), _told(system.length)] for system in report.systems]
    yield markdown_table(["system", "position", "length"], rows)
    yield (
        "Rank correlation, within a list of shuffled order, of the scores of irrelevant documents with their place "
        "(position) and with their number of characters (length); 0 is no bias, below 0 the first places or the "
        "shorter documents are preferred."
    )


def _sweep_part(report: Report) -> Iterator[str]:
    if not report.sweep:
        return
    yield "## How many heads, and how deep"
    rows = [
        [
            f"{point.top_layer}",
            f"{point.heads}",
            str(point.retrieved),
            str(point.shuffled),
            f"{1000 * point.seconds:.1f}",
            f"{point.share:.0%}",
            "yes" if point.best else "",
        ]
        for point in report.sweep
    ]
    metric = report.metrics[0]
    head = ["last layer", "heads", f"{metric} as retrieved", f"{metric} shuffled", "milliseconds", "of all layers"]
    yield markdown_table([*head, "not beaten"], rows)
    yield (
        "The best heads up to a layer, above which nothing runs; milliseconds to rank a new list, the median of five. "
        "Not beaten: no other line is as good shuffled, with no more layers, and better, with fewer layers, or with "
        "fewer heads."
    )


def _lengths_part(report: Report) -> Iterator[str]:
    if not report.lengths:
        return
    yield "## Recall against length"
    rows = [
        [f"{p.num_tokens:,}", f"{p.documents:.0f}", p.system, str(p.recall_any), str(p.recall_all)]
        for p in report.lengths
    ]
    yield markdown_table(
        ["tokens", "documents", "system", f"any evidence in the first {report.lengths[0].at}", "all of it"], rows
    )


def _told(bias: Bias | None) -> str | None:
    return None if bias is None else signed(bias.correlation)
