"""The report on ways to read pictures: accuracy by size and by skill, and what every system gains over the others."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from qr_integrations.evaluation.picture_plots import plot_by_size
from qr_integrations.evaluation.picture_questions import PictureQuestion
from qr_integrations.evaluation.pictures import ALL, SIZE, SKILL, PictureRun, SystemAccuracy
from qr_integrations.evaluation.report_folder import write_report
from qr_integrations.evaluation.tables import facts_list, markdown_table, signed_with_p

_INTERVALS = (
    "Shares of right answers with bootstrap intervals at 95 %; scenes, or files, are drawn with all their questions: "
    "one scene alone has no spread. Size: longest side of what is asked about over that of the picture."
)
_DIFFERENCES = "Differences on the same questions; p of a paired randomization test, two-sided."


@dataclass(frozen=True, slots=True)
class PictureReport:
    """All that was measured.

    Attributes:
        facts: what, on what, with what: names and values in the order in which they are told.
        baseline: the system that the others are compared with first.
        systems: in the order in which they were asked for.
        asked: numbers of questions, and of the groups that they come from, of every slice.
        metrics: what is measured.
    """

    facts: Mapping[str, Any]
    baseline: str
    systems: Sequence[SystemAccuracy]
    asked: Mapping[str, Mapping[str, tuple[int, int]]]
    metrics: tuple[str, ...] = ("accuracy",)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def save_picture_report(
    report: PictureReport, runs: Sequence[PictureRun], questions: Sequence[PictureQuestion], folder: str | Path
) -> None:
    """Write ``report.md``, ``results.json``, ``per_query.jsonl``, and accuracy against size as ``quality.png``.

    Raises:
        InputError: `folder` holds something else than an earlier report.
        MissingExtra: matplotlib is not installed.
    """
    write_report(
        folder,
        page=picture_page(report),
        results=report.as_dict(),
        questions=(question_entry(run, questions[run.number]) for run in runs),
        plot=partial(plot_by_size, report.systems),
    )


def question_entry(run: PictureRun, question: PictureQuestion) -> dict[str, Any]:
    """A line of ``per_query.jsonl``."""
    return {
        "id": question.id,
        "query": question.question,
        "answers": list(question.answers),
        "skill": question.skill,
        "share": question.share,
        "system": run.system,
        "said": run.text,
        "right": run.right,
        "box": None if run.box is None else list(run.box.as_tuple()),
        "seconds": round(run.seconds, 4),
        "first_token": round(run.first_token, 4),
        "visual_tokens": run.visual_tokens,
    }


def picture_page(report: PictureReport) -> str:
    """The report as a page of tables."""
    return "\n\n".join(["# How well pictures are read", facts_list(report.facts), *_parts(report)])


def _parts(report: PictureReport) -> Iterator[str]:
    kinds = report.systems[0].accuracy
    for kind, title in ((SIZE, "By size"), (SKILL, "By skill")):
        if kind in kinds or kind == SIZE:
            places = [*((kind, name) for name in kinds.get(kind, ())), (ALL, ALL)]
            rows = [[one.name, *(one.accuracy[of][name] for of, name in places)] for one in report.systems]
            rows.append(["questions / scenes", *(" / ".join(map(str, report.asked[of][name])) for of, name in places)])
            yield f"## {title}"
            yield markdown_table(["system", *(name for _, name in places)], rows)
    yield _INTERVALS
    for baseline in (one.name for one in report.systems if any(one.name in other.against for other in report.systems)):
        yield f"## Against {baseline}"
        yield _differences(report, baseline)
    yield _DIFFERENCES
    yield "## Second looks, tokens and time"
    yield markdown_table(
        [
            *("system", "looked again", "at what is asked about", "visual tokens"),
            *("milliseconds to the first token", "milliseconds per question"),
        ],
        [
            [
                one.name,
                f"{one.looked_again:.0%}",
                None if one.found is None else f"{one.found:.0%}",
                None if one.visual_tokens is None else f"{one.visual_tokens:.1f}",
                f"{1000 * one.first_token:.0f}",
                f"{1000 * one.seconds:.0f}",
            ]
            for one in report.systems
        ],
    )
    yield (
        "Looked again: share of the questions for which a crop was cut. At what is asked about: share of those crops "
        "that hold its middle. Visual tokens: of all pictures, that a layer of the language model read, the mean. "
        "Time: the median; the first token is counted from behind the second look."
    )


def _differences(report: PictureReport, baseline: str) -> str:
    """A row for every size, every skill and all together, a column for every other system."""
    others = [system for system in report.systems if baseline in system.against]
    rows = [
        [
            name if kind != SIZE else f"size {name}",
            *(signed_with_p(one.against[baseline][kind].get(name)) for one in others),
        ]
        for kind in (SIZE, SKILL, ALL)
        for name in others[0].against[baseline].get(kind, ())
    ]
    return markdown_table(["", *(system.name for system in others)], rows)
