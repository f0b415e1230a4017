"""The model card and the demo lists: only numbers that were measured in the same run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from .data import VALID_LINES, RankList, load_nq
from .evaluate import Heads
from .export import folder_size
from .report import Rows, hard_lists

HERE = Path(__file__).parent


def _table(name: str, rows: Rows) -> str:
    lines = [f"**{name}**", "", "| | |", "|---|---|"]
    for key, value in rows.items():
        shown = f"{value:.3f}" if isinstance(value, float) else f"{value:,}"
        lines.append(f"| {key} | {shown} |")
    return "\n".join(lines)


def tables(report: dict[str, Rows]) -> str:
    """All tables in markdown, one after the other."""
    return "\n\n".join(_table(name, rows) for name, rows in report.items())


def _grid(qrscores: Tensor) -> str:
    head = "| layer | " + " | ".join(f"head {i}" for i in range(qrscores.shape[1])) + " |"
    rule = "|" + "---|" * (qrscores.shape[1] + 1)
    rows = [f"| {n} | " + " | ".join(f"{v:.4f}" for v in row.tolist()) + " |" for n, row in enumerate(qrscores)]
    return "\n".join([head, rule, *rows])


def write_card(
    folder: Path, report: dict[str, Rows], heads: Heads, qrscores: Tensor, counts: Rows, facts: dict[str, float]
) -> str:
    """Writes README.md beside the weights and returns it."""
    text = (
        (HERE / "card.template.md")
        .read_text(encoding="utf-8")
        .format(
            millions=facts["parameters"] / 1e6,
            megabytes=folder_size(folder) / 1e6,
            tables=tables(report),
            counts=", ".join(f"{name} {value:.3f}" for name, value in counts.items()),
            qrscores=_grid(qrscores),
            heads=", ".join(f"({layer}, {head})" for layer, head in heads),
            depth=max(layer for layer, _ in heads) + 1,
            language=facts["language"],
            uniform=facts["uniform"],
            steps=f"{int(facts['steps']):,}",
        )
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
    return text


def write_sample(folder: Path, data: Path) -> Sequence[RankList]:
    """Writes the first 40 test lists as the package ships them, with their source and licence."""
    nq = load_nq(data)
    lists = hard_lists(nq, nq.questions[VALID_LINES : VALID_LINES + 40], 20)
    with (folder / "sample.jsonl").open("w", encoding="utf-8") as handle:
        for ranked in lists:
            documents = [{"title": nq.passages[d].title, "text": nq.passages[d].text} for d in ranked.docs]
            row = {"question": ranked.question, "gold": ranked.gold, "documents": documents}
            row["bm25"] = [round(score, 4) for score in ranked.bm25]
            handle.write(json.dumps(row) + "\n")
    shutil.copyfile(HERE / "sample.template.md", folder / "sample.README.md")
    return lists
