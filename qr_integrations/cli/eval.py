"""`qr-integrations eval`: rerankers side by side on judged lists."""

import argparse
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from qr_integrations.backend import Backend
from qr_integrations.bundled import SAMPLE_SOURCE, read_detection_lists, read_sample
from qr_integrations.cli import model, screen
from qr_integrations.errors import InputError
from qr_integrations.evaluation.data import read_data
from qr_integrations.evaluation.lengths import LengthPoint, recall_by_length
from qr_integrations.evaluation.long_context import LongContext
from qr_integrations.evaluation.measuring import ORDERS, SHUFFLED, check_lists, check_metrics, quality, run_systems
from qr_integrations.evaluation.report import RESULTS, TABLES, check_folder, save_report
from qr_integrations.evaluation.statistics import Estimate, mean_ranks
from qr_integrations.evaluation.summary import Report, Summary, summarise
from qr_integrations.evaluation.sweeps import SweepPoint, sweep_heads
from qr_integrations.evaluation.systems import System, make_systems
from qr_integrations.retrieval import HeadDetector
from qr_integrations.retrieval.heads import Head, read_scores
from qr_integrations.types import JudgedList
from qr_integrations.version import __version__

_DETECT_FIRST = "detect"
_SHORT_NAME = 12  # characters of a baseline's name that fit above a column
_LONG_NAME = 24  # characters of a system's name, beyond which its settings stand in lines of their own


def run(args: argparse.Namespace) -> int:
    """Read, measure, write the report, print a table. What fails for its arguments does so before the long work."""
    _check(args)
    found, source = _lists(args)
    lists = found[: args.limit]
    check_lists(lists)
    backend = model.load(args)
    scores = read_scores(args.sweep) if args.sweep not in (None, _DETECT_FIRST) else {}
    backend.check_heads(list(scores))
    device = None if args.device == "auto" else args.device

    def systems(measured_on: Sequence[JudgedList]) -> list[System]:
        return make_systems(args.system, measured_on, backend=lambda: backend, device=device)

    made = systems(lists)
    lengths = _lengths(args, backend, systems, found, len(lists)) if args.lengths else []
    sweep = _sweep(args, backend, sorted(scores, key=lambda head: -scores[head]), lists) if args.sweep else []
    with screen.counting("Measuring", len(lists)) as advance:
        runs = run_systems(made, lists, seeds=range(args.seeds), progress=advance)
    measured = quality(runs, lists, args.metrics)
    baseline = args.baseline or args.system[0]
    summaries = summarise(runs, lists, measured, args.metrics, baseline)
    report = Report(_facts(args, lists, source, backend), args.metrics, baseline, summaries, sweep, lengths)
    save_report(report, runs, measured, lists, args.out)
    if args.json:
        screen.write_json((Path(args.out) / RESULTS).read_text(encoding="utf-8").replace("\n", ""))
    else:
        _show(screen.stdout(), report, args.out)
    return 0


def _check(args: argparse.Namespace) -> None:
    """What can be known before anything is loaded."""
    if args.limit is not None and args.limit < 1:
        raise InputError("--limit counts from 1: pass at least 1, or leave it out")
    if args.seeds < 1 or args.depth < 1 or args.recall_at < 1:
        raise InputError("--seeds, --depth and --recall-at count from 1: pass at least 1")
    for length in args.lengths or ():
        LongContext(length, evidence=args.evidence, count=args.count)
    if args.baseline and args.baseline not in args.system:
        raise InputError(f"--baseline {args.baseline} is not measured: pass one of --system {' '.join(args.system)}")
    check_metrics(args.metrics)
    mean_ranks()  # scipy is there
    check_folder(args.out)


def _lists(args: argparse.Namespace) -> tuple[list[JudgedList], str]:
    if args.data is None:
        return _sample_lists(), f"questions that ship with the package, {SAMPLE_SOURCE}"
    found = read_data(args.data, split=args.split, run=args.run, depth=args.depth, skip_unknown=args.skip_unknown)
    return found, str(args.data)


def _sample_lists() -> list[JudgedList]:
    """The demo's questions, with their passages in the order of BM25."""
    lists = []
    for number, sample in enumerate(read_sample()):
        order = np.argsort([-score for score in sample.bm25], kind="stable").tolist()
        documents = tuple(sample.documents[i] for i in order)
        lists.append(JudgedList(sample.question, documents, {order.index(sample.gold): 1}, id=f"sample-{number}"))
    return lists


def _facts(args: argparse.Namespace, lists: Sequence[JudgedList], source: str, backend: Backend) -> dict[str, Any]:
    """What was measured, on what, with what."""
    missed = sum(bool(judged.missed) for judged in lists)
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    facts: dict[str, Any] = {
        "data": source,
        "lists": _told(lists) + (f"; {missed} lack a relevant document" if missed else ""),
        "model": f"{backend.name}, {str(backend.model.dtype).removeprefix('torch.')} on {backend.device}",
        "orders": f"as retrieved, and shuffled with {args.seeds} seed{'s' * (args.seeds > 1)}, the mean per question",
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "versions": f"{packages}, qr-integrations {__version__}",
    }
    if args.lengths:
        joined = f", {args.evidence} questions in one" if args.evidence > 1 else ""
        facts["long inputs"] = f"{args.generate}s of {', '.join(f'{n:,}' for n in sorted(args.lengths))} tokens{joined}"
    return facts


def _told(lists: Sequence[JudgedList]) -> str:
    sizes = sorted({len(judged.documents) for judged in lists})
    of = f"{sizes[0]} to {sizes[-1]}" if len(sizes) > 1 else f"{sizes[0]}"
    return f"{len(lists)} list{'s' * (len(lists) > 1)} of {of} documents"


def _sweep(
    args: argparse.Namespace, backend: Backend, ranked: Sequence[Head], lists: Sequence[JudgedList]
) -> list[SweepPoint]:
    """With the heads of a file, or, without one, with those that the built-in lists find."""
    if not ranked:
        built_in = read_detection_lists()
        with screen.counting("Detecting heads", len(built_in)) as advance:
            detection = HeadDetector(backend, truncation="head").detect(
                built_in, progress=lambda done: advance(done, len(built_in))
            )
        ranked = detection.ranked()
    with screen.counting("Heads and layers", len(lists)) as advance:
        return sweep_heads(backend, ranked, lists, seeds=range(args.seeds), metric=args.metrics[0], progress=advance)


def _lengths(
    args: argparse.Namespace,
    backend: Backend,
    systems: Callable[[Sequence[JudgedList]], Sequence[System]],
    lists: Sequence[JudgedList],
    count: int,
) -> list[LengthPoint]:
    """As many long inputs as lists are measured, unless told otherwise; all lists whose answer was retrieved serve."""

    def count_tokens(text: str) -> int:
        return len(backend.tokenizer.encode(text, add_special_tokens=False, verbose=False))

    answered = [judged for judged in lists if any(grade > 0 for grade in judged.relevance.values())]
    count = args.count or min(count, len(answered)) or 1
    settings = [
        LongContext(length, evidence=args.evidence, count=count, count_tokens=count_tokens)
        for length in sorted(set(args.lengths))
    ]
    with screen.counting("Lengths", len(settings)) as advance:
        return recall_by_length(systems, answered, settings, kind=args.generate, at=args.recall_at, progress=advance)


def _show(console: Console, report: Report, out: str) -> None:
    for part in _parts(console, report):
        console.print(part)
    console.print(Padding(Text(f"Tables, pictures and every question: {Path(out) / TABLES}", style="dim"), (0, 1)))


def _parts(console: Console, report: Report) -> Iterator[RenderableType]:
    metric, wide = report.metrics[0], console.width >= screen.NARROW
    yield _title(f"{metric} on {report.facts['lists']}")
    yield _quality_table(report, wide)
    yield Padding(_fine_print(report, wide), (1, 1), style="dim")
    if report.lengths:
        several = any(point.recall_any != point.recall_all for point in report.lengths)
        yield _title(f"Evidence among the first {report.lengths[0].at}{': any / all of it' if several else ''}")
        yield _lengths_table(report, several)
        yield ""
    if report.sweep:
        yield _title("Heads and layers that none with fewer of them beat")
        yield _sweep_table(report)
        yield ""


def _title(text: str) -> RenderableType:
    return Padding(Text(text, style="bold"), (0, 1))


def _fine_print(report: Report, wide: bool) -> str:
    biases = (
        " Position and length: rank correlation with the scores of irrelevant documents; below 0, the first or the "
        "shorter are preferred."
    )
    return (
        f"Means ± half of their 95 % intervals. Against {report.baseline}, p{', position, length' * wide}: in shuffled "
        f"order.{biases * wide} ms: per list, the median."
    )


def _table(columns: Sequence[str]) -> Table:
    """A first column that may be broken, and numbers that may not; their names are broken at spaces."""
    table = Table(box=None, padding=(0, 1), collapse_padding=True)
    table.add_column(columns[0], overflow="fold", vertical="bottom")
    for name in columns[1:]:
        table.add_column(Text(name.replace(" ", "\n")), justify="right", vertical="bottom", no_wrap=True)
    return table


def _name(system: str) -> Text:
    return Text(system if len(system) <= _LONG_NAME else system.replace(",", ",\n"))


def _quality_table(report: Report, wide: bool) -> Table:
    orders = [ORDERS[order] for order in report.systems[0].quality]
    baseline = report.baseline if len(report.baseline) <= _SHORT_NAME else "baseline"
    biases = ("position", "length") if wide else ()
    table = _table(["system", *orders, f"against {baseline}", "p", *biases, "ms"])
    for system in report.systems:
        table.add_row(_name(system.name), *_cells(system, report.metrics[0], wide))
    return table


def _cells(system: Summary, metric: str, wide: bool) -> list[str]:
    against = system.against.get(SHUFFLED)
    biases = (system.position, system.length) if wide else ()
    return [
        *(_short(found[metric]) for found in system.quality.values()),
        *(("", "") if against is None else (f"{against.mean:+.3f}", f"{against.p:.3f}")),
        *("" if bias is None else f"{bias.correlation.mean:+.2f}" for bias in biases),
        f"{1000 * system.seconds:,.0f}" if system.seconds >= 0.01 else f"{1000 * system.seconds:.1f}",
    ]


def _lengths_table(report: Report, several: bool) -> Table:
    """A column for each length; where several pieces of evidence were hidden, all of them after the slash."""
    lengths = sorted({point.num_tokens for point in report.lengths})
    table = _table(["system", *(f"{length:,} tokens" for length in lengths)])
    for system in dict.fromkeys(point.system for point in report.lengths):
        points = [point for point in report.lengths if point.system == system]
        cells = [_short(point.recall_any) + (f" / {point.recall_all.mean:.3f}" * several) for point in points]
        table.add_row(_name(system), *cells)
    return table


def _sweep_table(report: Report) -> Table:
    table = _table(["heads", "last layer", f"{report.metrics[0]} shuffled", "ms", "of all layers"])
    for point in report.sweep:
        if point.best:
            time = (f"{1000 * point.seconds:,.0f}", f"{point.share:.0%}")
            table.add_row(f"{point.heads}", f"{point.top_layer}", _short(point.shuffled), *time)
    return table


def _short(estimate: Estimate) -> str:
    return f"{estimate.mean:.3f} ±{(estimate.high - estimate.low) / 2:.2f}"
