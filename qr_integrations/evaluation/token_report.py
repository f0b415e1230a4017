"""The report on fewer visual tokens: accuracy by skill and size, against random tokens and against all, and time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from qr_integrations.evaluation.picture_questions import PictureQuestion
from qr_integrations.evaluation.picture_report import question_entry
from qr_integrations.evaluation.pictures import ALL, NONE, SIZE, SKILL, PictureRun, SystemAccuracy
from qr_integrations.evaluation.report import SKILLS
from qr_integrations.evaluation.report_folder import write_report
from qr_integrations.evaluation.tables import facts_list, markdown_table, signed_with_p
from qr_integrations.evaluation.token_accuracy import AS_MANY, GUESS, KNOWN
from qr_integrations.evaluation.token_plots import plot_skills, plot_tokens

_ACCURACY = (
    "Shares of right answers with bootstrap intervals at 95 %; scenes, or files, are drawn with all their questions. "
    f"{GUESS.capitalize()}: without a look, the one that is right most often for the skill. A skill is at chance where "
    f"the model with all tokens is not surely better than that; it is left out of “{KNOWN}” and of the sizes. "
    "Tokens: of the picture, that a layer of the language model read, the mean over its layers."
)
_AS_MANY = (
    "What is gained over random tokens of the same number in the mean over the layers, between the two nearest numbers "
    f"that were measured; {KNOWN}. A method that drops tokens within the model has read more than its budget says. A "
    "cell is empty where fewer tokens were read than the fewest random ones."
)
_DIFFERENCES = (
    "Differences on the same questions, bootstrap intervals at 95 % over scenes; p of a paired randomization test, "
    "two-sided, one for each cell: of twenty tests of nothing one has p below 0.05."
)
_TIME = (
    "Medians over the questions, of systems that took turns: to the first token (the picture's preparation, the vision "
    "tower, the pruning and the reading of the prompt), and to the end of the answer."
)


@dataclass(frozen=True, slots=True)
class TokenReport:
    """All that was measured.

    Attributes:
        facts: what, on what, with what: names and values in the order in which they are told.
        systems: what was measured, `none` and the guess among them.
        matryoshka: systems of the matryoshka model, the most tokens first; none where there was no such model.
        pruned: method -> its systems, one for each budget, in the same order for each. Those that are not among
            `systems` cannot be on the model.
        budgets: as they were asked for.
        at_chance: skills that the model does not have with all tokens.
        asked: numbers of questions, and of the groups that they come from, of every slice.
        baseline: the system that reads all tokens.
        metrics: what is measured.
    """

    facts: Mapping[str, Any]
    systems: Sequence[SystemAccuracy]
    matryoshka: Sequence[str]
    pruned: Mapping[str, Sequence[str]]
    budgets: Sequence[str]
    at_chance: Sequence[str]
    asked: Mapping[str, Mapping[str, tuple[int, int]]]
    baseline: str = NONE
    metrics: tuple[str, ...] = ("accuracy",)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def system(self, name: str) -> SystemAccuracy:
        """The one of that name."""
        return next(one for one in self.systems if one.name == name)

    def measured(self) -> dict[str, list[str]]:
        """Of `pruned` what was measured."""
        found = {one.name for one in self.systems}
        return {method: [name for name in names if name in found] for method, names in self.pruned.items()}


def save_token_report(
    report: TokenReport, runs: Sequence[PictureRun], questions: Sequence[PictureQuestion], folder: str | Path
) -> None:
    """Write ``report.md``, ``results.json``, ``per_query.jsonl``, and accuracy against tokens as pictures.

    ``quality.png`` is over the skills that the model has, ``skills.png`` has a panel for each skill.

    Raises:
        InputError: `folder` holds something else than an earlier report.
        MissingExtra: matplotlib is not installed.
    """
    matryoshka = {"matryoshka": report.matryoshka} if report.matryoshka else {}
    methods = {**matryoshka, **report.measured()}
    skills = partial(plot_skills, report.systems, methods, report.at_chance)
    write_report(
        folder,
        page=token_page(report),
        results=report.as_dict(),
        questions=(question_entry(run, questions[run.number]) for run in runs),
        plot=partial(plot_tokens, report.systems, methods),
        more_plots={SKILLS: skills} if report.asked.get(SKILL) else {},
    )


def token_page(report: TokenReport) -> str:
    """The report as a page of tables."""
    return "\n\n".join(["# How well pictures are read in fewer tokens", facts_list(report.facts), *_parts(report)])


def _parts(report: TokenReport) -> Iterator[str]:
    plain = [GUESS, NONE]
    if report.matryoshka:
        yield "## Matryoshka tokens, by skill"
        yield _table(report, [*plain, *report.matryoshka], SKILL)
        yield "## Matryoshka tokens, by size"
        yield _table(report, [*plain, *report.matryoshka], SIZE)
        yield f"## Matryoshka tokens, against {NONE} and against the most"
        yield _against_each(report, [NONE, report.matryoshka[0]])
    dropped = [name for names in report.measured().values() for name in names]
    if dropped:
        yield "## Dropped tokens, by skill"
        yield _table(report, [*plain, *dropped], SKILL)
        yield "## Dropped tokens, by size"
        yield _table(report, [*plain, *dropped], SIZE)
    yield _ACCURACY
    if any(AS_MANY in one.against for one in report.systems):
        yield "## Against random tokens, as many"
        yield _by_budget(report, lambda one: signed_with_p(_difference(one, AS_MANY)))
        yield _AS_MANY
        if report.asked.get(SIZE):
            yield "## Against random tokens, as many, by size"
            yield _by_size(report)
    if dropped:
        yield "## Against all tokens"
        yield _by_budget(report, lambda one: signed_with_p(_difference(one, NONE)))
    yield _DIFFERENCES
    yield "## Tokens and time"
    yield markdown_table(
        ["system", "tokens", "milliseconds to the first token", "milliseconds per question"],
        [
            [one.name, _tokens(one), f"{1000 * one.first_token:.1f}", f"{1000 * one.seconds:.1f}"]
            for one in report.systems
            if one.name != GUESS
        ],
    )
    yield _TIME


def _table(report: TokenReport, names: Sequence[str], kind: str) -> str:
    places = [*((kind, name) for name in report.asked.get(kind, ())), (ALL, KNOWN)]
    head = [f"{name} (at chance)" if kind == SKILL and name in report.at_chance else name for _, name in places]
    rows = [
        [one.name, _tokens(one), *(one.accuracy[of][name] for of, name in places)] for one in map(report.system, names)
    ]
    counts = [" / ".join(map(str, report.asked[of][name])) for of, name in places]
    return markdown_table(["system", "tokens", *head], [*rows, ["questions / scenes", None, *counts]])


def _tokens(one: SystemAccuracy) -> str | None:
    return None if one.visual_tokens is None else f"{one.visual_tokens:.1f}"


def _difference(one: SystemAccuracy, baseline: str) -> Any:
    return one.against[baseline][ALL][KNOWN] if baseline in one.against else None


def _against_each(report: TokenReport, baselines: Sequence[str]) -> str:
    systems = [report.system(name) for name in report.matryoshka]
    rows = [[one.name, *(signed_with_p(_difference(one, baseline)) for baseline in baselines)] for one in systems]
    return markdown_table(["system", *(f"against {baseline}" for baseline in baselines)], rows)


def _by_size(report: TokenReport) -> str:
    """A row for each system that was compared, a column for each size."""
    sizes = list(report.asked[SIZE])
    compared = [one for one in report.systems if AS_MANY in one.against]
    rows = [[one.name, *(signed_with_p(one.against[AS_MANY][SIZE].get(size)) for size in sizes)] for one in compared]
    return markdown_table(["system", *sizes], rows)


def _by_budget(report: TokenReport, cell: Callable[[SystemAccuracy], str | None]) -> str:
    """A row for each method, a column for each budget."""
    found = {one.name: cell(one) for one in report.systems}
    rows = [[method, *(found.get(name) for name in names)] for method, names in report.pruned.items()]
    return markdown_table(["method", *(f"keep={keep}" for keep in report.budgets)], rows)
