"""`qr-integrations eval-tokens`: what it costs to read pictures in fewer tokens."""

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from qr_integrations.backend import Backend
from qr_integrations.cli import measured, screen, seeing
from qr_integrations.cropping.asking import SHORT_ANSWER
from qr_integrations.errors import InputError, UnsupportedModelError
from qr_integrations.evaluation.drawn_world.data import drawn_questions
from qr_integrations.evaluation.picture_questions import PictureQuestion, read_picture_questions
from qr_integrations.evaluation.pictures import (
    ALL,
    NONE,
    SKILL,
    PictureRun,
    PictureSystem,
    ask_pictures,
    count_questions,
    make_picture_systems,
)
from qr_integrations.evaluation.report import check_folder
from qr_integrations.evaluation.statistics import mean_ranks
from qr_integrations.evaluation.token_accuracy import (
    AS_MANY,
    GUESS,
    KNOWN,
    compare_tokens,
    guess,
    known_skills,
    one_of_each_skill,
    slice_known,
)
from qr_integrations.evaluation.token_report import TokenReport, save_token_report
from qr_integrations.evaluation.token_systems import MQT, PRUNING_METHODS, RANDOM_TOKENS, pruning_specs

_TOKENS = (2, 4, 8, 16, 36, 64)
_KEEP = ("0.5", "0.33", "0.22", "0.11", "0.056")
_NO_MODEL, _MODEL, _MQT_MODEL = "none", "qr-mini-vl", "qr-mini-vl-mqt"
_SURE = 0.05


def run(args: argparse.Namespace) -> int:
    """Read, measure, write the report, print two tables. What fails for its arguments does so before the long work."""
    started = time.perf_counter()
    mean_ranks()  # scipy is there
    check_folder(args.out)
    keeps = args.keep or _KEEP
    methods = PRUNING_METHODS if args.methods is None else args.methods
    pruned = {method: pruning_specs(method, keeps) for method in methods}
    matryoshka = _matryoshka(args)
    systems = make_picture_systems(
        [NONE, *matryoshka, *(name for names in pruned.values() for name in names)], seed=args.seed
    )
    questions = _questions(args)
    backend = seeing.load_seeing(args)
    if matryoshka:
        theirs = seeing.load_seeing(argparse.Namespace(**{**vars(args), "model": args.mqt_model or _MQT_MODEL}))
        systems = [replace(one, backend=theirs) if one.name in matryoshka else one for one in systems]
    refused = _refused(args, backend, systems, questions[:1])
    _check_named(args, matryoshka, pruned, refused)
    systems = [one for one in systems if one.name not in refused]
    matryoshka = [name for name in matryoshka if name not in refused]
    pruned = {method: names for method, names in pruned.items() if not set(names) <= set(refused)}
    facts = measured.facts_about(backend, args.data, f"{len(questions)} questions, {len(systems)} systems")
    facts |= {"matryoshka model": measured.told_model(theirs)} if matryoshka else {}
    facts |= _tell_left_out(refused)
    runs = _runs(args, backend, systems, questions)
    facts["measured in"] = f"{(time.perf_counter() - started) / 60:.1f} minutes"
    report = _report(facts, runs, questions, matryoshka, pruned, keeps)
    save_token_report(report, runs, questions, args.out)
    if args.json:
        measured.write_results(args.out)
    else:
        _show(report)
        measured.show_folder(args.out, "Skills, sizes, tests, plots and every answer")
    return 0


def _matryoshka(args: argparse.Namespace) -> list[str]:
    if args.mqt_model == _NO_MODEL:
        return []
    if args.mqt_model is None and args.model != _MODEL:
        raise InputError(
            f"{_MQT_MODEL} belongs to {_MODEL}: name the matryoshka model that belongs to {args.model!r}, "
            f"--mqt-model MODEL, or pass --mqt-model {_NO_MODEL}"
        )
    return [f"{MQT}:tokens={count}" for count in sorted(set(args.tokens or _TOKENS), reverse=True)]


def _questions(args: argparse.Namespace) -> list[PictureQuestion]:
    if args.data is None:
        return one_of_each_skill(drawn_questions(args.scenes, first=args.first_scene))
    return list(read_picture_questions(args.data))


def _refused(
    args: argparse.Namespace, backend: Backend, systems: Sequence[PictureSystem], questions: Sequence[PictureQuestion]
) -> dict[str, InputError | UnsupportedModelError]:
    """Systems that cannot be on the model, and why, found by asking each."""
    refused: dict[str, InputError | UnsupportedModelError] = {}
    for system in systems:
        try:
            ask_pictures(backend, [system], questions, instruction=_instruction(args), max_new_tokens=1)
        except (InputError, UnsupportedModelError) as error:
            refused[system.name] = error
    return refused


def _check_named(
    args: argparse.Namespace,
    matryoshka: Sequence[str],
    pruned: Mapping[str, Sequence[str]],
    refused: Mapping[str, InputError | UnsupportedModelError],
) -> None:
    """What was named on the command line must be possible: with a default beside it, in one combination at least."""
    named: list[Sequence[str]] = [[NONE], *([[name] for name in matryoshka] if args.tokens else [matryoshka])]
    if args.methods and args.keep:
        named += [[name] for names in pruned.values() for name in names]
    elif args.methods:
        named += pruned.values()
    elif args.keep:
        named += zip(*pruned.values(), strict=True)
    for names in named:
        if names and set(names) <= set(refused):
            raise refused[names[0]]


def _tell_left_out(refused: Mapping[str, Exception]) -> dict[str, str]:
    """A note on what is not measured and why, and the same as a fact of the report."""
    reasons: dict[str, list[str]] = {}
    for name, error in refused.items():
        reasons.setdefault(str(error), []).append(name)
    told = [f"{', '.join(names)} ({reason})" for reason, names in reasons.items()]
    for line in told:
        screen.note(f"left out: {line}")
    return {"left out": "; ".join(told)} if told else {}


def _instruction(args: argparse.Namespace) -> str:
    return SHORT_ANSWER if args.prompt is None else str(args.prompt)


def _runs(
    args: argparse.Namespace, backend: Backend, systems: Sequence[PictureSystem], questions: Sequence[PictureQuestion]
) -> list[PictureRun]:
    with screen.counting("Asking", len(questions)) as advance:
        runs = ask_pictures(
            backend, systems, questions, contains=args.contains, instruction=_instruction(args), progress=advance
        )
    return [*guess(questions, contains=args.contains), *runs]


def _report(
    facts: Mapping[str, Any],
    runs: Sequence[PictureRun],
    questions: Sequence[PictureQuestion],
    matryoshka: Sequence[str],
    pruned: Mapping[str, Sequence[str]],
    keeps: Sequence[str],
) -> TokenReport:
    known = known_skills(runs, questions)
    slices = slice_known(questions, known)
    dropped = {name for names in pruned.values() for name in names} & {run.system for run in runs}
    baselines = {
        NONE: [GUESS],
        **{name: [NONE] for name in dropped},
        **{name: [NONE, *matryoshka[:1]] for name in matryoshka},
    }
    randoms = [*pruned.get(RANDOM_TOKENS, ()), NONE]
    systems = compare_tokens(runs, questions, slices, randoms=randoms, pruned=dropped, baselines=baselines)
    at_chance = [skill for skill in slices[SKILL] if skill not in known]
    told = {**facts, KNOWN: ", ".join(known) or "none for sure, so that all count"}
    return TokenReport(told, systems, matryoshka, pruned, keeps, at_chance, count_questions(questions, slices))


def _show(report: TokenReport) -> None:
    """Accuracy over the skills that the model has."""
    plain = report.system(NONE)
    rows = [
        [
            "all" if name == NONE else name.partition("=")[2],
            measured.with_spread(report.system(name).accuracy[ALL][KNOWN]),
            f"{1000 * report.system(name).first_token:.0f}",
        ]
        for name in (NONE, *report.matryoshka)
    ]
    if report.matryoshka:
        measured.show_table(["matryoshka tokens", KNOWN, "ms to first token"], rows, ("matryoshka tokens", KNOWN))
    rows = [["all tokens", *([measured.mean(plain.accuracy[ALL][KNOWN])] * len(report.budgets))]]
    for method, names in report.pruned.items():
        rows.append([method, *(_beside_random(report, name) for name in names)])
    if report.pruned:
        columns = ["dropped tokens", *(f"keep {keep}" for keep in report.budgets)]
        measured.show_table(columns, rows, ("dropped tokens", columns[-1]))
        if RANDOM_TOKENS in report.pruned:
            measured.show_line("* better, - worse than as many random tokens, p < 0.05")


def _beside_random(report: TokenReport, name: str) -> str:
    """A mean; a star where as many random tokens are worse with p below 0.05, a minus where they are better."""
    if not any(one.name == name for one in report.systems):
        return ""
    one = report.system(name)
    gain = one.against[AS_MANY][ALL][KNOWN] if AS_MANY in one.against else None
    if gain is None or gain.p is None or gain.p >= _SURE:
        return measured.mean(one.accuracy[ALL][KNOWN])
    return f"{measured.mean(one.accuracy[ALL][KNOWN])}{'*' if gain.mean > 0 else '-'}"
