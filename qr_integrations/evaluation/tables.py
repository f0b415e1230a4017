"""What pages of reports are made of: tables, lists of facts, differences with their intervals; in Markdown."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qr_integrations.evaluation.statistics import Estimate


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table; None is an empty cell.

    Example:
        >>> print(markdown_table(["system", "right"], [["a|b", 0.5]]))
        | system | right |
        | --- | --- |
        | a\\|b | 0.5 |
    """
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(content: Any) -> str:
    return "" if content is None else " ".join(str(content).split()).replace("|", "\\|")


def facts_list(facts: Mapping[str, Any]) -> str:
    """Names and values, a line each."""
    return "\n".join(f"- {name}: {value}" for name, value in facts.items())


def signed(estimate: Estimate | None) -> str | None:
    """A difference with its interval."""
    return None if estimate is None else f"{estimate.mean:+.3f} [{estimate.low:+.3f}, {estimate.high:+.3f}]"


def signed_with_p(estimate: Estimate | None) -> str | None:
    """A difference with its interval, and p where there is one."""
    return signed(estimate) if estimate is None or estimate.p is None else f"{signed(estimate)} p={estimate.p:.3f}"
