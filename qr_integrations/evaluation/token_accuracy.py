"""What fewer visual tokens cost: which skills say something, accuracy against chance and against random tokens."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import isclose

import numpy as np

from qr_integrations.evaluation.answers import is_right, normalised
from qr_integrations.evaluation.picture_questions import PictureQuestion
from qr_integrations.evaluation.pictures import (
    ALL,
    NONE,
    SIZE,
    SKILL,
    PictureRun,
    Slices,
    SystemAccuracy,
    count_right,
    slice_questions,
    summarise_pictures,
)
from qr_integrations.evaluation.ratios import Counts, estimates, ratio_difference

GUESS, KNOWN, AS_MANY = "most common answer", "skills it has", "random tokens, as many"


def one_of_each_skill(questions: Sequence[PictureQuestion]) -> list[PictureQuestion]:
    """Of every group one question of each skill; the sizes of what is asked about take turns, for each skill."""
    groups: dict[str, dict[str, list[PictureQuestion]]] = {}
    for question in questions:
        groups.setdefault(question.group, {}).setdefault(question.skill, []).append(question)
    turns, chosen = Counter[str](), []
    for skills in groups.values():
        for skill, some in skills.items():
            chosen.append(some[turns[skill] % len(some)])
            turns[skill] += 1
    return chosen


def guess(questions: Sequence[PictureQuestion], *, contains: bool = False) -> list[PictureRun]:
    """Answers without a look: to every question the answer that is right most often for its skill.

    Of few questions with many answers a guess is flattered: it is the best answer to these very ones.

    Args:
        questions: each with its answers, any of which may be the guess.
        contains: an answer need only hold the right words, see `is_right`.
    """
    skills: dict[str, list[PictureQuestion]] = {}
    for question in questions:
        skills.setdefault(question.skill, []).append(question)
    common = {skill: _right_most_often(some, contains) for skill, some in skills.items()}
    said = [common[question.skill] for question in questions]
    rights = [is_right(text, one.answers, contains=contains) for text, one in zip(said, questions, strict=True)]
    return [
        PictureRun(GUESS, number, text, right, None, 0.0)
        for number, (text, right) in enumerate(zip(said, rights, strict=True))
    ]


def _right_most_often(questions: Sequence[PictureQuestion], contains: bool) -> str:
    """The answer that `is_right` accepts for most of the questions, of several the first; linear in the answers."""
    asked: dict[tuple[str, ...], set[int]] = {}
    for number, question in enumerate(questions):
        for answer in question.answers:
            asked.setdefault(_as_compared(answer), set()).add(number)

    signs = [words for words in asked if not normalised(words[0])]

    def times_right(answer: str) -> int:
        accepted = [_as_compared(answer)]
        if contains:
            accepted += _held(normalised(answer)) + [sign for sign in signs if sign[0] and sign[0] in answer]
        return len(set[int]().union(*(asked.get(words, ()) for words in accepted)))

    return max(dict.fromkeys(answer for question in questions for answer in question.answers), key=times_right)


def _as_compared(answer: str) -> tuple[str, ...]:
    """Its words; signs without words as one."""
    return normalised(answer) or (answer.strip(),)


def _held(words: tuple[str, ...]) -> list[tuple[str, ...]]:
    """All words that stand one after the other."""
    return [words[start:stop] for start in range(len(words)) for stop in range(start + 1, len(words) + 1)]


def known_skills(runs: Sequence[PictureRun], questions: Sequence[PictureQuestion]) -> tuple[str, ...]:
    """Skills in which `none` beats `guess` for sure: the interval of the difference lies above 0.

    Raises:
        MissingExtra: scipy is not installed.
    """
    slices = {SKILL: slice_questions(questions).get(SKILL, {})}
    two = [run for run in runs if run.system in (NONE, GUESS)]
    found = {one.name: one for one in summarise_pictures(two, questions, {NONE: (GUESS,)}, slices)}
    return tuple(skill for skill, gain in found[NONE].against[GUESS][SKILL].items() if gain.low > 0)


def slice_known(questions: Sequence[PictureQuestion], known: Iterable[str]) -> Slices:
    """All questions by skill; those of known skills together, and by size. Where no skill is known, all count."""
    every = slice_questions(questions)
    wanted = {number for skill in known for number in every[SKILL][skill]} or set(every[ALL][ALL])
    sizes = {name: [one for one in some if one in wanted] for name, some in every.get(SIZE, {}).items()}
    return {
        ALL: {KNOWN: sorted(wanted), **every[ALL]},
        SIZE: {name: some for name, some in sizes.items() if some},
        SKILL: every.get(SKILL, {}),
    }


def compare_tokens(
    runs: Sequence[PictureRun],
    questions: Sequence[PictureQuestion],
    slices: Slices,
    *,
    randoms: Sequence[str],
    pruned: Iterable[str],
    baselines: Mapping[str, Sequence[str]],
) -> list[SystemAccuracy]:
    """Accuracy of every system, and what pruners gain over as many tokens drawn at random.

    Methods that drop tokens within the language model have read more than those before it. So each is compared with
    random tokens of the same number in the mean over the layers, between the two nearest that were measured. A method
    that reads fewer than the fewest random ones is not compared, and none is where no random tokens were measured.

    Args:
        runs: of all systems on all questions.
        questions: that were asked.
        slices: from `slice_known`.
        randoms: systems that drop tokens at random, and the one that drops none.
        pruned: what is compared with them.
        baselines: by the name of a system, what else it is compared with.

    Raises:
        MissingExtra: scipy is not installed.
    """
    found = summarise_pictures(runs, questions, baselines, slices)
    counts = {
        one.name: count_right([run for run in runs if run.system == one.name], questions, slices) for one in found
    }
    read = {one.name: one.visual_tokens for one in found if one.visual_tokens is not None}
    measured = {name: read[name] for name in randoms if name in read}
    compared = set(pruned) & set(read) - set(randoms) if set(measured) - {NONE} else set()
    shares = {name: between(measured, read[name]) for name in compared}
    gains = {
        name: estimates(ratio_difference, counts[name], _mixed(counts, some)) for name, some in shares.items() if some
    }
    return [
        replace(one, against={**one.against, AS_MANY: gains[one.name]}) if one.name in gains else one for one in found
    ]


def between(measured: Mapping[str, float], wanted: float) -> dict[str, float]:
    """How much each of two neighbours counts so that their mean is `wanted`; empty beyond the first and the last.

    Example:
        >>> between({"ten": 10.0, "twenty": 20.0, "fifty": 50.0}, 42.5)
        {'twenty': 0.25, 'fifty': 0.75}
        >>> between({"ten": 10.0, "twenty": 20.0}, 9.0)
        {}
    """
    ordered = sorted(measured, key=lambda name: measured[name])
    equal = [name for name in ordered if isclose(measured[name], wanted)]
    if equal:
        return {equal[0]: 1.0}
    below = [name for name in ordered if measured[name] < wanted]
    above = [name for name in ordered if measured[name] > wanted]
    if not below or not above:
        return {}
    low, high = measured[below[-1]], measured[above[0]]
    share = (wanted - low) / (high - low)
    return {below[-1]: 1 - share, above[0]: share}


def _mixed(
    counts: Mapping[str, Mapping[str, Mapping[str, Counts]]], shares: Mapping[str, float]
) -> dict[str, dict[str, Counts]]:
    """Right answers of several systems, each counting for a share; all were asked the same."""
    first = counts[next(iter(shares))]
    return {
        kind: {
            name: (np.sum([share * counts[system][kind][name][0] for system, share in shares.items()], 0), wholes)
            for name, (_, wholes) in named.items()
        }
        for kind, named in first.items()
    }
