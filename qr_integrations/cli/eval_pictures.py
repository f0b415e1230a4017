"""`qr-integrations eval-pictures`: what second looks and other ways to decode change on pictures."""

import argparse
from collections.abc import Sequence
from itertools import islice

from qr_integrations.cli import measured, screen, seeing
from qr_integrations.cropping.asking import SHORT_ANSWER
from qr_integrations.errors import InputError
from qr_integrations.evaluation.decoders import DECODERS, make_decoders
from qr_integrations.evaluation.drawn_world.data import drawn_names, drawn_pictures, drawn_questions
from qr_integrations.evaluation.hallucination import (
    CHAIR_INSTANCE,
    CHAIR_SENTENCE,
    DESCRIBE,
    RECALL,
    STRATEGIES,
    WORDS,
    answer_questions,
    ask_for_objects,
    check_pictures,
    write_captions,
)
from qr_integrations.evaluation.hallucination_report import (
    CAPTIONS,
    HallucinationReport,
    save_hallucination_report,
    summarise_decoders,
)
from qr_integrations.evaluation.object_names import ObjectNames, read_labelled_pictures, read_object_names
from qr_integrations.evaluation.picture_questions import read_picture_questions
from qr_integrations.evaluation.picture_report import PictureReport, save_picture_report
from qr_integrations.evaluation.pictures import (
    ALL,
    SIZE,
    SYSTEMS,
    ask_pictures,
    count_questions,
    make_picture_systems,
    summarise_pictures,
)
from qr_integrations.evaluation.report import check_folder
from qr_integrations.evaluation.statistics import mean_ranks

_SCENES = {"crops": 20, "captions": 100}
_EACH, _EACH_OF_FEW = 3, 1  # objects asked for and as many not there; of few kinds, all strategies choose the same
Shown = tuple[Sequence[str], Sequence[Sequence[str]], Sequence[str]]
"""Columns, rows, and the columns that a narrow screen needs."""


def run(args: argparse.Namespace) -> int:
    """Read, measure, write the report, print a table. What fails for its arguments does so before the long work."""
    if args.limit is not None and args.limit < 1:
        raise InputError("--limit counts from 1: pass at least 1, or leave it out")
    mean_ranks()  # scipy is there
    check_folder(args.out)
    columns, rows, needed = _crops(args) if args.what == "crops" else _captions(args)
    if args.json:
        measured.write_results(args.out)
        return 0
    measured.show_table(columns, rows, needed)
    measured.show_folder(args.out, "Tables, a plot and every answer")
    return 0


def _crops(args: argparse.Namespace) -> Shown:
    if args.data is None:
        questions = drawn_questions(args.limit or _SCENES["crops"])
    else:
        questions = list(islice(read_picture_questions(args.data), args.limit))
    systems = make_picture_systems(args.system or SYSTEMS, seed=args.seed)
    backend = seeing.load_seeing(args)
    instruction = SHORT_ANSWER if args.prompt is None else args.prompt
    with screen.counting("Asking", len(questions)) as advance:
        runs = ask_pictures(
            backend, systems, questions, contains=args.contains, instruction=instruction, progress=advance
        )
    facts = {
        **measured.facts_about(backend, args.data, f"{len(questions)} questions"),
        "right": "an answer with the right words in it" if args.contains else "the right words and no others",
        "instruction": instruction or "none",
    }
    report = PictureReport(facts, systems[0].name, summarise_pictures(runs, questions), count_questions(questions))
    save_picture_report(report, runs, questions, args.out)
    sizes = list(report.systems[0].accuracy.get(SIZE, ()))
    rows = [
        [
            one.name,
            *(measured.mean(one.accuracy[SIZE][size]) for size in sizes),
            measured.with_spread(one.accuracy[ALL][ALL]),
        ]
        for one in report.systems
    ]
    return ["system", *sizes, ALL], rows, ("system", ALL)


def _captions(args: argparse.Namespace) -> Shown:
    if args.data is None:
        pictures, names, each = drawn_pictures(args.limit or _SCENES["captions"]), drawn_names(), _EACH_OF_FEW
    else:
        each = _EACH
        pictures = list(islice(read_labelled_pictures(args.data), args.limit))
        names = read_object_names(args.names) if args.names else ObjectNames.of(pictures)
    check_pictures(pictures, names)
    decoders = make_decoders(args.system or DECODERS)
    questions = [
        one for strategy in STRATEGIES for one in ask_for_objects(pictures, strategy, each=each, seed=args.seed)
    ]
    backend, prompt = seeing.load_seeing(args), args.prompt or DESCRIBE
    with screen.counting("Captions", len(pictures)) as advance:
        captions = write_captions(
            backend, decoders, pictures, names, prompt=prompt, max_new_tokens=args.max_new_tokens, progress=advance
        )
    with screen.counting("Questions", len(pictures)) as advance:
        answers = answer_questions(backend, decoders, pictures, questions, progress=advance)
    asked = f"{len(pictures)} pictures, {len(questions)} questions"
    facts = {**measured.facts_about(backend, args.data, asked), "prompt": prompt}
    report = HallucinationReport(facts, decoders[0].name, summarise_decoders(captions, answers, pictures))
    save_hallucination_report(report, captions, answers, pictures, args.out)
    rows = [
        [
            one.name,
            *(measured.with_spread(one.measured[CAPTIONS].get(metric)) for metric in (CHAIR_INSTANCE, CHAIR_SENTENCE)),
            *(measured.mean(one.measured[CAPTIONS].get(metric)) for metric in (RECALL, WORDS)),
            *(measured.mean(one.measured[strategy].get("F1")) for strategy in STRATEGIES),
        ]
        for one in report.systems
    ]
    columns = ["decoder", CHAIR_INSTANCE, CHAIR_SENTENCE, RECALL, WORDS, *(f"F1 {strategy}" for strategy in STRATEGIES)]
    return columns, rows, ("decoder", CHAIR_INSTANCE, RECALL)
