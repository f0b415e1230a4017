"""Everything the card states, measured on the weights as exported, on what nothing was trained or chosen on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from transformers import LlamaForCausalLM

from ..data import VALID_LINES, load_nq, load_xquad
from ..evaluate import Heads, Measured
from ..export import folder_size
from ..report import Rows, hard_lists
from ..tokenizer import PromptPieces
from .evaluate import SIZES, any_match, exact_match, fact_lessons, kept_only, ranking_of_facts, real_lessons
from .facts import FactWriter
from .passages import real_questions
from .prompts import AnswerPrompts
from .vocabulary import Vocabulary

TEMPLATE = Path(__file__).parent / "card.template.md"
_KEEP = 3


@dataclass(frozen=True)
class Setup:
    """The model before and after, with the heads of each, and where lists come from."""

    model: LlamaForCausalLM
    heads: Heads
    before: LlamaForCausalLM
    before_heads: Heads
    prompts: AnswerPrompts
    pieces: PromptPieces
    data: Path
    lessons: int = 75


def report(setup: Setup) -> dict[str, dict[str, Rows]]:
    """Tables by name: a row each, its columns by name."""
    return {
        "answers about facts": _facts(setup),
        "answers to real questions": _real(setup),
        "ranking": _ranking(setup),
    }


def _facts(setup: Setup) -> dict[str, Rows]:
    writers = {
        "names and values never seen": FactWriter(Vocabulary(held_out=True)),
        "wordings never seen either": FactWriter(Vocabulary(held_out=True), new_wordings=True),
    }
    rows: dict[str, Rows] = {}
    for name, writer in writers.items():
        columns = {size: fact_lessons(writer, size, setup.lessons) for size in SIZES}
        for layout, block in (("joint", False), ("block", True)):
            rows[f"{name}, {layout}"] = {
                f"{size} documents": exact_match(setup.model, setup.prompts, lessons, block)
                for size, lessons in columns.items()
            }
        best = {
            size: kept_only(setup.model, setup.pieces, lessons, setup.heads, _KEEP)
            for size, lessons in columns.items()
            if size > _KEEP
        }
        rows[f"{name}, block, only the {_KEEP} that rank first"] = {
            f"{size} documents": exact_match(setup.model, setup.prompts, lessons, True)
            for size, lessons in best.items()
        }
    return rows


def _real(setup: Setup) -> dict[str, Rows]:
    questions = real_questions(setup.data, "test")
    lessons = {size: real_lessons(questions, size) for size in (1, 5)}
    return {
        f"NQ test questions with a short answer in the passage ({len(questions)}), {layout}": {
            "the passage alone" if size == 1 else f"{size} documents": any_match(
                setup.model, setup.prompts, given, block
            )
            for size, given in lessons.items()
        }
        for layout, block in (("joint", False), ("block", True))
    }


def _ranking(setup: Setup) -> dict[str, Rows]:
    nq = load_nq(setup.data)
    lists = hard_lists(nq, nq.questions[VALID_LINES:], 20)
    xquad = load_xquad(setup.data, "en", test=True)
    english = hard_lists(xquad, xquad.questions[::4], 20)
    facts = fact_lessons(FactWriter(Vocabulary(held_out=True)), 20, setup.lessons)
    rows: dict[str, Rows] = {}
    for name, passages, given in (
        (f"{len(lists)} NQ test questions", nq.passages, lists),
        (f"{len(english)} XQuAD questions", xquad.passages, english),
    ):
        measured = Measured(setup.pieces, passages, given)
        before = measured.measure(setup.before).ndcg(setup.before_heads)
        rows[name] = {"qr-mini": before, "this model": measured.measure(setup.model).ndcg(setup.heads)}
    both = ((setup.before, setup.before_heads), (setup.model, setup.heads))
    found = [ranking_of_facts(model, setup.pieces, facts, heads) for model, heads in both]
    return rows | {"facts, names and values never seen": dict(zip(("qr-mini", "this model"), found, strict=True))}


def write_card(folder: Path, tables: dict[str, dict[str, Rows]], heads: Heads, facts: dict[str, float]) -> None:
    """Writes README.md beside the weights, and the numbers alone beside the folder."""
    (folder.parent / "report.json").write_text(json.dumps({"tables": tables, "facts": facts}, indent=1))
    text = TEMPLATE.read_text(encoding="utf-8").format(
        megabytes=folder_size(folder) / 1e6,
        heads=", ".join(f"({layer}, {head})" for layer, head in heads),
        **{name.replace(" ", "_"): _table(rows) for name, rows in tables.items()},
        **facts,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _table(rows: dict[str, Rows]) -> str:
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for name, row in rows.items():
        cells = (f"{row[column]:.3f}" if column in row else "" for column in columns)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
