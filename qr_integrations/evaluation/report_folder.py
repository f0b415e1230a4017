"""What reports about pictures share: a folder with a page, all numbers, every question, and a plot."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from qr_integrations.evaluation.report import PER_QUERY, RESULTS, TABLES, check_folder
from qr_integrations.files import whole_folder

PLOT = "quality.png"


def write_report(
    folder: str | Path,
    *,
    page: str,
    results: Mapping[str, Any],
    questions: Iterable[Mapping[str, Any]],
    plot: Callable[[Path], None],
    more_plots: Mapping[str, Callable[[Path], None]] = MappingProxyType({}),
) -> None:
    """Write ``report.md``, ``results.json``, ``per_query.jsonl``, ``quality.png``, and other plots by their names.

    An earlier report in `folder` is replaced; if anything fails, it stays, and nothing is half written.

    Args:
        folder: new, empty, or with an earlier report.
        page: Markdown; the plots are put below it.
        results: with ``facts``, ``metrics``, ``baseline`` and ``systems``, by which it is known as a report.
        questions: one entry for every question and system.
        plot: draws ``quality.png`` to a path.
        more_plots: files, by names that are known as a report's, and what draws them.

    Raises:
        InputError: as `check_folder`.
        MissingExtra: matplotlib is not installed.
    """
    check_folder(folder)
    with whole_folder(folder) as place:
        plots = {PLOT: plot, **more_plots}
        for name, draw in plots.items():
            draw(place / name)
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in questions)
        (place / PER_QUERY).write_text(lines, "utf-8")
        (place / RESULTS).write_text(json.dumps(results, ensure_ascii=False, indent=1) + "\n", "utf-8")
        shown = [f"![{Path(name).stem}]({name})" for name in plots]
        (place / TABLES).write_text("\n\n".join([page, *shown]) + "\n", "utf-8")
