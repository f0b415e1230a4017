"""The report on what is said to be in pictures: captions, and answers to questions about objects."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from qr_integrations.evaluation.hallucination import (
    CAPTION_METRICS,
    CHAIR_INSTANCE,
    CHAIR_SENTENCE,
    POPE_METRICS,
    WORDS,
    Caption,
    ObjectAnswer,
    answer_counts,
    caption_counts,
)
from qr_integrations.evaluation.object_names import LabelledPicture
from qr_integrations.evaluation.picture_plots import plot_estimates
from qr_integrations.evaluation.ratios import Counts, estimates, per_picture, ratio, ratio_difference
from qr_integrations.evaluation.report_folder import write_report
from qr_integrations.evaluation.statistics import Estimate, interval
from qr_integrations.evaluation.tables import facts_list, markdown_table, signed_with_p

CAPTIONS = "captions"
_NOTES = {
    CAPTIONS: "CHAIR instance: share of the named objects that are not there, every mention counted; sentence: share "
    "of captions with any; lower is better, at equal recall and length. Recall: share of the objects that are named.",
    "": "Half of the questions are about objects that are there. Random, popular, adversarial: how the other objects "
    "were chosen: any, the most frequent, those that most often come with what is there. F1 of yes; yes: how often it "
    "is said.",
}
_INTERVALS = "Bootstrap intervals at 95 % over pictures; p of a paired randomization test against {}, two-sided."


@dataclass(frozen=True, slots=True)
class DecoderSummary:
    """One decoder.

    Attributes:
        name: as it was asked for.
        measured: ``"captions"`` or a strategy of questions -> metric -> mean with its interval; metrics without a value
            (the precision of who never says yes) are left out.
        against: the same, how much larger than the baseline's; empty for the baseline.
        unclear: share of answers that say neither yes nor no.
        seconds: of one caption, the median.
    """

    name: str
    measured: Mapping[str, Mapping[str, Estimate]]
    against: Mapping[str, Mapping[str, Estimate]]
    unclear: float
    seconds: float


@dataclass(frozen=True, slots=True)
class HallucinationReport:
    """All that was measured.

    Attributes:
        facts: what, on what, with what: names and values in the order in which they are told.
        baseline: the decoder that the others are compared with.
        systems: decoders in the order in which they were asked for.
        metrics: of captions.
    """

    facts: Mapping[str, Any]
    baseline: str
    systems: Sequence[DecoderSummary]
    metrics: tuple[str, ...] = CAPTION_METRICS

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def summarise_decoders(
    captions: Sequence[Caption], answers: Sequence[ObjectAnswer], pictures: Sequence[LabelledPicture]
) -> list[DecoderSummary]:
    """Every decoder's figures with intervals, and paired differences from the first one's.

    Args:
        captions: from `write_captions`.
        answers: from `answer_questions`.
        pictures: the same ones.

    Raises:
        MissingExtra: scipy is not installed.
    """
    names = list(dict.fromkeys(caption.decoder for caption in captions))
    counts = {name: _counts(name, captions, answers, pictures) for name in names}
    summaries = []
    for name in names:
        own = [answer for answer in answers if answer.decoder == name]
        found = estimates(ratio, counts[name])
        summaries.append(
            DecoderSummary(
                name,
                {**found, CAPTIONS: {**found[CAPTIONS], WORDS: interval(per_picture(*counts[name][CAPTIONS][WORDS]))}},
                {} if name == names[0] else estimates(ratio_difference, counts[name], counts[names[0]]),
                sum(answer.yes is None for answer in own) / max(1, len(own)),
                median(caption.seconds for caption in captions if caption.decoder == name),
            )
        )
    return summaries


def _counts(
    name: str, captions: Sequence[Caption], answers: Sequence[ObjectAnswer], pictures: Sequence[LabelledPicture]
) -> dict[str, dict[str, Counts]]:
    own = [answer for answer in answers if answer.decoder == name]
    strategies = dict.fromkeys(answer.question.strategy for answer in own)
    found = {one: answer_counts([answer for answer in own if answer.question.strategy == one]) for one in strategies}
    return {CAPTIONS: caption_counts([caption for caption in captions if caption.decoder == name], pictures), **found}


def save_hallucination_report(
    report: HallucinationReport,
    captions: Sequence[Caption],
    answers: Sequence[ObjectAnswer],
    pictures: Sequence[LabelledPicture],
    folder: str | Path,
) -> None:
    """Write ``report.md``, ``results.json``, ``per_query.jsonl`` and ``quality.png``.

    Raises:
        InputError: `folder` holds something else than an earlier report.
        MissingExtra: matplotlib is not installed.
    """
    panels = {
        metric: {one.name: one.measured[CAPTIONS][metric] for one in report.systems if metric in one.measured[CAPTIONS]}
        for metric in report.metrics
    }
    write_report(
        folder,
        page=hallucination_page(report),
        results=report.as_dict(),
        questions=_entries(captions, answers, pictures),
        plot=partial(plot_estimates, panels),
    )


def _entries(
    captions: Sequence[Caption], answers: Sequence[ObjectAnswer], pictures: Sequence[LabelledPicture]
) -> Iterator[dict[str, Any]]:
    for caption in captions:
        there = pictures[caption.picture].objects
        yield {
            "id": pictures[caption.picture].id,
            "system": caption.decoder,
            "caption": caption.text,
            "named": list(caption.named),
            "invented": [name for name in caption.named if name not in there],
            "there": sorted(there),
        }
    for answer in answers:
        question = answer.question
        yield {
            "id": pictures[question.picture].id,
            "system": answer.decoder,
            "query": question.text,
            "strategy": question.strategy,
            "there": question.there,
            "said": answer.text,
            "yes": answer.yes,
        }


def hallucination_page(report: HallucinationReport) -> str:
    """The report as a page of tables."""
    return "\n\n".join(["# What is said to be in pictures", facts_list(report.facts), *_parts(report)])


def _parts(report: HallucinationReport) -> Iterator[str]:
    for kind in report.systems[0].measured:
        metrics = (CHAIR_INSTANCE, CHAIR_SENTENCE, "recall", WORDS) if kind == CAPTIONS else POPE_METRICS
        yield f"## {'Captions' if kind == CAPTIONS else f'Is it there? Objects that are not: {kind}'}"
        rows = [[one.name, *(_told(one.measured[kind].get(name), name) for name in metrics)] for one in report.systems]
        yield markdown_table(["decoder", *metrics], rows)
        others = [
            [one.name, *(signed_with_p(one.against[kind].get(name)) for name in metrics)]
            for one in report.systems
            if one.against
        ]
        if others:
            yield markdown_table([f"against {report.baseline}", *metrics], others)
        if kind == CAPTIONS:
            yield _NOTES[kind]
    yield _NOTES[""]
    yield _INTERVALS.format(report.baseline)
    yield "## Time"
    rows = [[one.name, f"{1000 * one.seconds:.0f}", f"{one.unclear:.1%}"] for one in report.systems]
    yield markdown_table(["decoder", "milliseconds per caption", "answers that say neither yes nor no"], rows)


def _told(estimate: Estimate | None, metric: str) -> str | None:
    if estimate is None:
        return None
    return f"{estimate.mean:.1f} [{estimate.low:.1f}, {estimate.high:.1f}]" if metric == WORDS else str(estimate)
