"""What the commands that measure on pictures share: what was measured with what, and figures as tables."""

import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from qr_integrations.backend import Backend
from qr_integrations.cli import screen
from qr_integrations.evaluation.report import RESULTS, TABLES
from qr_integrations.evaluation.statistics import Estimate
from qr_integrations.version import __version__

_NAME = 16  # columns that a system's name gets on a narrow screen too


def facts_about(backend: Backend, data: str | None, measured: str) -> dict[str, Any]:
    """What was measured, on what, with what."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    return {
        "data": data or "the drawn world that ships with the package, scenes that no training drew",
        "measured on": measured,
        "model": told_model(backend),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "versions": f"{packages}, qr-integrations {__version__}",
    }


def told_model(backend: Backend) -> str:
    """A model, its precision and its device."""
    return f"{backend.name}, {str(backend.model.dtype).removeprefix('torch.')} on {backend.device}"


def write_results(folder: str) -> None:
    """The results in a report's folder to standard output, as one line."""
    screen.write_json((Path(folder) / RESULTS).read_text(encoding="utf-8").replace("\n", ""))


def show_table(columns: Sequence[str], rows: Sequence[Sequence[str]], needed: Sequence[str]) -> None:
    """A table on standard output; on a narrow screen the columns that it needs."""
    console = screen.stdout()
    shown = [place for place, name in enumerate(columns) if console.width >= screen.NARROW or name in needed]
    console.print(_table([columns[place] for place in shown], [[row[place] for place in shown] for row in rows]))


def show_folder(folder: str, what: str) -> None:
    """Where the report is."""
    show_line(f"{what}: {Path(folder) / TABLES}")


def show_line(text: str) -> None:
    """A remark below a table."""
    screen.stdout().print(Padding(Text(text, style="dim"), (1, 1, 0, 1)))


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=None, padding=(0, 1), collapse_padding=True)
    table.add_column(
        columns[0], overflow="fold", vertical="bottom", min_width=min(_NAME, max(len(row[0]) for row in rows))
    )
    for name in columns[1:]:
        table.add_column(Text(name.replace(" ", "\n")), justify="right", vertical="bottom", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def with_spread(estimate: Estimate | None) -> str:
    """A mean and half of its interval; nothing where there is none."""
    return "" if estimate is None else f"{estimate.mean:.2f} ±{(estimate.high - estimate.low) / 2:.2f}"


def mean(estimate: Estimate | None) -> str:
    """A mean; nothing where there is none."""
    return "" if estimate is None else f"{estimate.mean:.2f}"
