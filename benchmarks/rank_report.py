"""Tables and goals out of measured numbers. Ratios are of minima; medians stand beside them."""

from collections.abc import Sequence
from typing import Any

_FLOOR = {
    "ours_cold_half": "floor_cold_half",
    "ours_cold_last": "floor_cold_last",
    "ours_icr": "floor_cold_last",
    "ours_warm": "floor_warm",
    "floor_cold_half_cached": "floor_cold_half",
    "published": "floor_cold_half",
    "eager_attentions": "floor_cold_half",
}
_LONG = 6000  # tokens from which documents known beforehand must pay 20-fold


def text(machine: dict[str, Any], results: Sequence[dict[str, Any]], *, markdown: bool) -> str:
    """Everything to print about these results."""
    lines = [_machine(machine)]
    for result in results:
        lines += ["", _heading(result), *_table(_rows(result), markdown), *_goals(result)]
    return "\n".join(lines)


def _machine(m: dict[str, Any]) -> str:
    where = m["gpu"] or f"{m['processor']}, {m['cores']} cores"
    software = f"torch {m['torch']}, transformers {m['transformers']}, Python {m['python']}, {m['system']}"
    return f"{where}, {m['threads']} threads, {m['cpu_capability']}, {software}"


def _heading(r: dict[str, Any]) -> str:
    same = r["same_scores"]
    shape = f"{r['parameters'] / 1e6:.0f} M parameters, {r['dtype']}, {r['layers']} layers of {r['heads']} heads"
    prompt = f"{r['tokens']} tokens, {r['documents']} documents, {r['query_tokens']} tokens of query"
    heads = f"{r['heads_read']} heads read, top layer {r['top_layer_half']} (half) or {r['top_layer_last']} (last)"
    order = "same" if same["same_order"] else "another"
    equal = f"published scores equal within {same['largest_difference']:.1e} of the largest, {order} order"
    return f"{r['model']}: {shape}; {prompt}; {heads}; {equal}."


_HEAD = [
    "job",
    "min",
    "median",
    "cpu min",
    "x floor",
    "x floor, median",
    "x floor, cpu",
    "peak extra",
    "total",
    "largest",
]


def _rows(result: dict[str, Any]) -> list[list[str]]:
    rows = [_HEAD]
    for name, job in result["jobs"].items():
        if "skipped" in job:
            rows.append([name, "skipped:", job["skipped"], *[""] * (len(_HEAD) - 3)])
            continue
        memory, floor = job.get("memory"), _FLOOR.get(name)
        rows.append(
            [
                name,
                *[_seconds(job[field]) for field in ("min_s", "median_s", "cpu_min_s")],
                *[_times(_ratio(result, name, floor, field)) for field in ("min_s", "median_s", "cpu_min_s")],
                _mib(memory["extra_bytes"]) if memory else "-",
                _times(memory_ratio(result, name), 3),
                f"{_mib(memory['largest_bytes'])} {tuple(memory['largest_shape'])}" if memory else "-",
            ]
        )
    return rows


def _table(rows: list[list[str]], markdown: bool) -> list[str]:
    if markdown:
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        return ["", lines[0], "|" + "---|" * len(rows[0]), *lines[1:], ""]
    widths = [max(len(row[i]) for row in rows if "skipped:" not in row) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _ratio(result: dict[str, Any], name: str, other: str | None, field: str = "min_s") -> float | None:
    jobs = result["jobs"]
    if other is None or field not in jobs.get(name, {}) or field not in jobs.get(other, {}):
        return None
    return float(jobs[name][field] / jobs[other][field])


def memory_ratio(result: dict[str, Any], name: str) -> float | None:
    """(model + peak of the job) / (model + peak of its floor)."""
    jobs, floor = result["jobs"], _FLOOR.get(name)
    if floor is None or "memory" not in jobs.get(name, {}) or "memory" not in jobs.get(floor, {}):
        return None
    model = result["model_bytes"]
    return float((model + jobs[name]["memory"]["extra_bytes"]) / (model + jobs[floor]["memory"]["extra_bytes"]))


def _goals(result: dict[str, Any]) -> list[str]:
    long = result["tokens"] >= 0.97 * _LONG
    lines = [
        _goal("cold, half depth <= 1.10 x floor", _ratio(result, "ours_cold_half", "floor_cold_half"), most=1.10),
        _goal("cold, last layer <= 1.10 x floor", _ratio(result, "ours_cold_last", "floor_cold_last"), most=1.10),
        _goal("all heads (ICR) <= 1.10 x floor", _ratio(result, "ours_icr", "floor_cold_last"), most=1.10),
        _goal("published >= 1.7 x ours, half depth", _ratio(result, "published", "ours_cold_half"), least=1.7),
        _goal("warm <= 1.25 x floor", _ratio(result, "ours_warm", "floor_warm"), most=1.25),
        _goal("memory, half depth <= 1.05 x floor", memory_ratio(result, "ours_cold_half"), most=1.05),
        _goal("memory, last layer <= 1.05 x floor", memory_ratio(result, "ours_cold_last"), most=1.05),
        _goal("memory, warm <= 1.05 x floor", memory_ratio(result, "ours_warm"), most=1.05),
        *_largest(result),
    ]
    if long:
        lines.append(_goal("cold >= 20 x warm", _ratio(result, "ours_cold_half", "ours_warm"), least=20))
    return [line for line in lines if line]


def _goal(what: str, value: float | None, *, most: float | None = None, least: float | None = None) -> str:
    if value is None:
        return ""
    good = value <= most if most is not None else value >= (least or 0)
    return f"{'PASS' if good else 'FAIL'}  {what}: {value:.3f}"


def _largest(result: dict[str, Any]) -> list[str]:
    """No tensor of ours is larger than the floor's largest (a product of the MLP), let alone heads x T x T."""
    lines, matrix = [], result["heads"] * result["tokens"] ** 2
    for name in ("ours_cold_half", "ours_cold_last", "ours_icr"):
        ours = result["jobs"].get(name, {}).get("memory")
        floor = result["jobs"].get(_FLOOR[name], {}).get("memory")
        if ours and floor:
            share = ours["largest_bytes"] / (4 * matrix)
            good = ours["largest_bytes"] <= floor["largest_bytes"]
            lines.append(
                f"{'PASS' if good else 'FAIL'}  {name}: largest tensor {_mib(ours['largest_bytes'])}, the floor's "
                f"{_mib(floor['largest_bytes'])}; heads x T x T would be {_mib(4 * matrix)}, {1 / share:.0f} x that"
            )
    return lines


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"


def _mib(value: float) -> str:
    return f"{value / 2**20:.0f} MiB" if value >= 2**20 else f"{value / 2**20:.2f} MiB"


def _times(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
