"""`qr-integrations doctor`: is this model's attention read right?"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain

from rich.console import Console, Group, JustifyMethod, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from qr_integrations.backend.selfcheck import LEAST_TOKENS, Check, describe, run_checks
from qr_integrations.cli import EXIT_FAILED_CHECK, model, screen
from qr_integrations.errors import InputError
from qr_integrations.retrieval.selfcheck import known_heads, run_ranking_checks

_WIDE = 120  # columns from which on the details stand beside the numbers
_JUSTIFIED: tuple[JustifyMethod, ...] = ("left", "left", "right", "left")
_LOOKS = {"passed": ("✓", "+", "green"), "failed": ("✗", "x", "bold red"), "skipped": ("-", "-", "dim")}


def run(args: argparse.Namespace) -> int:
    """Describe, check, and say whether all is well."""
    if args.tokens < LEAST_TOKENS:
        raise InputError(f"--tokens {args.tokens} is too short for the memory check: pass at least {LEAST_TOKENS}")
    backend = model.load(
        args,
        revision=args.revision,
        quantization=args.quantization,
        attn_implementation=args.attn_implementation,
    )
    facts = describe(backend) | {"query-focused heads": known_heads(backend)}
    checks = chain(run_checks(backend, num_tokens=args.tokens), run_ranking_checks(backend))
    done = list(checks) if args.json else _printed(screen.stdout(), backend.name, facts, checks)
    failed = [check.name for check in done if check.outcome == "failed"]
    if args.json:
        report = {"model": backend.name, "passed": not failed, "facts": facts, "checks": [asdict(c) for c in done]}
        screen.write_json(json.dumps(report, ensure_ascii=False))
    return EXIT_FAILED_CHECK if failed else 0


def _printed(console: Console, name: str, facts: dict[str, str], checks: Iterator[Check]) -> list[Check]:
    """Each line as soon as it is known: a large model takes its time."""
    table = Table.grid(padding=(0, 2))
    for fact, value in facts.items():
        table.add_row(Text(fact, style="dim"), Text(screen.one_line(value)))
    console.print(Text(name, style="bold"))
    console.print(table)
    console.print()
    done = []
    for check in checks:
        console.print(_line(check, console))
        done.append(check)
    failed = sum(check.outcome == "failed" for check in done)
    skipped = sum(check.outcome == "skipped" for check in done)
    told = f"{len(done) - failed - skipped} checks passed, {failed} failed, {skipped} skipped"
    console.print()
    console.print(Text(told, style="bold red" if failed else "bold green"))
    return done


def _line(check: Check, console: Console) -> RenderableType:
    """Mark, name, number and limit; the details beside them where there is room, else below."""
    mark, plain, style = _LOOKS[check.outcome]
    number = "" if check.value is None else f"{check.value:.3g}"
    limit = "" if check.limit is None else f"<= {check.limit:.3g}"
    line = Table.grid(padding=(0, 2))
    for width, justify in zip((1, 29, 9, 11), _JUSTIFIED, strict=True):
        line.add_column(width=width, justify=justify)
    shown = Text(plain if console.options.ascii_only else mark, style=style)
    detail = Text(screen.one_line(check.detail), style="dim")
    cells = [shown, Text(check.name), Text(number), Text(limit, style="dim")]
    if console.width < _WIDE:
        line.add_row(*cells)
        return Group(line, Padding(detail, (0, 0, 0, 3)))
    line.add_column()
    line.add_row(*cells, detail)
    return line
