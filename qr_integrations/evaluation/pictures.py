"""Questions about pictures, answered plainly, with a second look or with fewer tokens, by what is asked about.

A system is asked for by a line: ``none`` (nothing is changed), ``relative``, ``gradient``, ``input_gradient`` (ViCrop),
``random`` (a place that means nothing, as large as ViCrop's crop), ``oracle`` (around what is asked about), or one of
`token_systems`. Some may have settings: ``relative:layers=4-6,min_lift=1.5``; layers count from 0.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import numpy as np
from jaxtyping import Float

from qr_integrations.backend import Backend
from qr_integrations.cropping import ViCrop, crop_side
from qr_integrations.cropping.asking import SHORT_ANSWER
from qr_integrations.cropping.vicrop import Method
from qr_integrations.errors import InputError
from qr_integrations.evaluation.answers import is_right
from qr_integrations.evaluation.drawn_world.held_out import SHARES
from qr_integrations.evaluation.known_crops import KnownBox, RandomPlace, oracle_box
from qr_integrations.evaluation.measuring import Progress
from qr_integrations.evaluation.picture_questions import PictureQuestion, look
from qr_integrations.evaluation.ratios import Counts, estimates, ratio, ratio_difference
from qr_integrations.evaluation.specs import check_distinct, read_count_or_share, read_layers_or, read_spec
from qr_integrations.evaluation.statistics import Estimate
from qr_integrations.evaluation.token_systems import (
    TOKEN_SETTINGS,
    StepsFor,
    mean_visual_tokens,
    num_words,
    token_steps,
)
from qr_integrations.types import Answer, Box, Message

NONE, RANDOM, ORACLE = "none", "random", "oracle"
VICROP: tuple[Method, ...] = ("relative", "gradient", "input_gradient")
SYSTEMS = (NONE, *VICROP, RANDOM, ORACLE)
ALL, SIZE, SKILL = "all", "size", "skill"
_ANY: Mapping[str, Callable[[str], Any]] = {"base": read_count_or_share, "min_lift": float}
_SETTINGS: Mapping[str, Mapping[str, Callable[[str], Any]]] = {
    NONE: {},
    **{method: {"layers": read_layers_or("all"), **_ANY} for method in ("relative", "gradient")},
    "input_gradient": _ANY,
    RANDOM: {},
    ORACLE: {},
    **TOKEN_SETTINGS,
}


@dataclass(frozen=True, slots=True)
class PictureSystem:
    """A way to answer.

    Attributes:
        name: as it stands in tables.
        steps: gives what is passed: ``crop``, ``num_visual_tokens``, ``prune`` or ``deco``.
        backend: the model that answers; None: the one that all systems share.
    """

    name: str
    steps: StepsFor
    backend: Backend | None = None


def make_picture_systems(specs: Sequence[str], *, seed: int = 0) -> list[PictureSystem]:
    """The systems that `specs` ask for, see the top of this file.

    Args:
        specs: one line each, no two the same.
        seed: of ``random`` and ``random_tokens``; the same question always gets the same crop, and the same tokens.

    Raises:
        InputError: a line that is no system, has a setting that there is not or that cannot be, or stands twice.
    """
    check_distinct(specs)
    return [PictureSystem(spec, _steps(spec, seed)) for spec in specs]


def _steps(spec: str, seed: int) -> StepsFor:
    def at_random(backend: Backend, question: PictureQuestion, size: tuple[int, int]) -> dict[str, Any]:
        return {"crop": RandomPlace(f"{seed}-{question.id}-{question.question}")}

    def around(backend: Backend, question: PictureQuestion, size: tuple[int, int]) -> dict[str, Any]:
        return {"crop": KnownBox(oracle_box(size, question.box, crop_side(backend, size)))}

    name, settings = read_spec(spec, _SETTINGS)
    if name in TOKEN_SETTINGS:
        return token_steps(name, settings, seed)
    vicrop = next((ViCrop(method, **settings) for method in VICROP if method == name), None)
    return {RANDOM: at_random, ORACLE: around}.get(name, lambda backend, question, size: {"crop": vicrop})


@dataclass(frozen=True, slots=True)
class PictureRun:
    """One system on one question.

    Attributes:
        system: its name.
        number: of the question.
        text: what was answered.
        right: whether that is an answer.
        box: where it looked again; None if nowhere.
        seconds: what answering took, everything included.
        first_token: seconds until the first token of the answer, a second look left out.
        visual_tokens: tokens of pictures that a layer of the language model read, the mean over its layers; None where
            the model does not say which these are.
    """

    system: str
    number: int
    text: str
    right: bool
    box: Box | None
    seconds: float
    first_token: float = 0.0
    visual_tokens: float | None = None


def ask_pictures(
    backend: Backend,
    systems: Sequence[PictureSystem],
    questions: Sequence[PictureQuestion],
    *,
    contains: bool = False,
    instruction: str = SHORT_ANSWER,
    max_new_tokens: int = 20,
    progress: Progress | None = None,
) -> list[PictureRun]:
    """Every system on every question, decoded greedily.

    Args:
        backend: a vision-language model.
        systems: from `make_picture_systems`.
        questions: as many as fit into memory as texts; pictures are held one at a time.
        contains: an answer need only hold the right words, see `is_right`.
        instruction: stands behind every question.
        max_new_tokens: of an answer.
        progress: called with the questions done and all of them.

    Raises:
        InputError: no questions, or a picture that cannot be read.
    """
    if not questions:
        raise InputError("no questions to measure on: pass at least one PictureQuestion")
    runs: list[PictureRun] = []
    models = {id(model): model for model in (system.backend or backend for system in systems)}
    for number, question in enumerate(questions):
        picture = look(question.image)
        message = Message.user(picture, f"{question.question} {instruction}".strip())
        words = {key: num_words(model, message) for key, model in models.items()}
        for system in systems:
            model = system.backend or backend
            start = time.perf_counter()
            steps = _phrased(system.steps(model, question, picture.size), instruction)
            answer = model.answer([message], **steps, max_new_tokens=max_new_tokens)
            seconds = time.perf_counter() - start
            right = is_right(answer.text, question.answers, contains=contains)
            first, layers = answer.seconds.get("first_token", seconds), model.config.num_hidden_layers
            visual = mean_visual_tokens(answer, words[id(model)], layers)
            runs.append(PictureRun(system.name, number, answer.text, right, _box(answer), seconds, first, visual))
        if progress:
            progress(number + 1, len(questions))
    return runs


def _phrased(steps: Mapping[str, Any], instruction: str) -> Mapping[str, Any]:
    """With the same template for both of ViCrop's questions."""
    again = steps.get("crop")
    if not isinstance(again, ViCrop):
        return steps
    return {**steps, "crop": replace(again, generic=f"{again.generic} {instruction}".strip())}


def _box(answer: Answer) -> Box | None:
    return next((one.box for one in answer.steps.get("crop", ()) if one.box is not None), None)


@dataclass(frozen=True, slots=True)
class SystemAccuracy:
    """One system.

    Attributes:
        name: as it was asked for.
        accuracy: share of right answers, of all, of every size and of every skill.
        against: baseline -> how much better than that on the same questions; empty for the baseline itself.
        looked_again: share of the questions for which a crop was cut.
        found: share of those crops in which the middle of what is asked about lies; None where nothing is known of it.
        seconds: of one question, the median.
        first_token: seconds until an answer's first token, the median.
        visual_tokens: that a layer read, the mean; None where nothing is known of them.
    """

    name: str
    accuracy: Mapping[str, Mapping[str, Estimate]]
    against: Mapping[str, Mapping[str, Mapping[str, Estimate]]] = field(default_factory=dict)
    looked_again: float = 0.0
    found: float | None = None
    seconds: float = 0.0
    first_token: float = 0.0
    visual_tokens: float | None = None


def size_name(share: float) -> str:
    """The nearest of the sizes that results are told for, by ratio.

    Example:
        >>> size_name(0.05), size_name(0.27)
        ('0.05', '0.20')
    """
    return f"{min(SHARES, key=lambda known: abs(math.log(known / share))):.2f}"


def slice_questions(questions: Sequence[PictureQuestion]) -> dict[str, dict[str, list[int]]]:
    """Numbers of questions: all, by size from the largest, by skill in alphabetical order."""
    sizes: dict[str, list[int]] = {}
    skills: dict[str, list[int]] = {}
    for number, question in enumerate(questions):
        if question.share is not None:
            sizes.setdefault(size_name(question.share), []).append(number)
        if question.skill:
            skills.setdefault(question.skill, []).append(number)
    found = {SIZE: dict(sorted(sizes.items(), reverse=True)), SKILL: dict(sorted(skills.items()))}
    return {ALL: {ALL: list(range(len(questions)))}, **{kind: named for kind, named in found.items() if named}}


Slices = Mapping[str, Mapping[str, Sequence[int]]]
"""Numbers of questions, by what they are grouped by and by name."""


def summarise_pictures(
    runs: Sequence[PictureRun],
    questions: Sequence[PictureQuestion],
    baselines: Sequence[str] | Mapping[str, Sequence[str]] = (NONE, RANDOM),
    slices: Slices | None = None,
) -> list[SystemAccuracy]:
    """Accuracy of every system with intervals, and paired differences from the baselines that were measured.

    Questions of the same group are not independent: intervals and tests draw groups.

    Args:
        runs: from `ask_pictures`.
        questions: that were asked.
        baselines: of all systems, or by the name of a system.
        slices: what figures are told for; None: `slice_questions`.

    Raises:
        MissingExtra: scipy is not installed.
    """
    own = {name: [run for run in runs if run.system == name] for name in dict.fromkeys(run.system for run in runs)}
    sliced = slice_questions(questions) if slices is None else slices
    counts = {name: count_right(some, questions, sliced) for name, some in own.items()}
    of = baselines if isinstance(baselines, Mapping) else dict.fromkeys(own, baselines)
    return [
        SystemAccuracy(
            name,
            estimates(ratio, found),
            {
                baseline: estimates(ratio_difference, found, counts[baseline])
                for baseline in of.get(name, ())
                if baseline in own and baseline != name
            },
            sum(run.box is not None for run in own[name]) / len(own[name]),
            _found(own[name], questions),
            median(run.seconds for run in own[name]),
            median(run.first_token for run in own[name]),
            _mean(run.visual_tokens for run in own[name]),
        )
        for name, found in counts.items()
    ]


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _found(runs: Sequence[PictureRun], questions: Sequence[PictureQuestion]) -> float | None:
    pairs = [(run.box, questions[run.number].box) for run in runs]
    held = [_holds_middle(crop, asked) for crop, asked in pairs if crop is not None and asked is not None]
    return sum(held) / len(held) if held else None


def _holds_middle(crop: Box, box: Box) -> bool:
    x, y = (box.left + box.right) / 2, (box.top + box.bottom) / 2
    return crop.left <= x < crop.right and crop.top <= y < crop.bottom


def count_questions(
    questions: Sequence[PictureQuestion], slices: Slices | None = None
) -> dict[str, dict[str, tuple[int, int]]]:
    """How many questions of how many groups every slice holds."""
    groups, sliced = _groups(questions), slice_questions(questions) if slices is None else slices
    return {
        kind: {name: (len(some), len({groups[number] for number in some})) for name, some in named.items()}
        for kind, named in sliced.items()
    }


def _groups(questions: Sequence[PictureQuestion]) -> list[str]:
    return [question.group or f"question {number}" for number, question in enumerate(questions)]


def count_right(
    runs: Sequence[PictureRun], questions: Sequence[PictureQuestion], slices: Slices
) -> dict[str, dict[str, Counts]]:
    """Right answers and questions of every group, for every slice, from one system's runs on all questions."""
    groups = _groups(questions)
    right = np.array([float(run.right) for run in sorted(runs, key=lambda run: run.number)])
    return {
        kind: {name: _by_group(right, groups, some) for name, some in named.items()} for kind, named in slices.items()
    }


def _by_group(right: Float[np.ndarray, "questions"], groups: Sequence[str], some: Sequence[int]) -> Counts:
    numbers = np.unique([groups[number] for number in some], return_inverse=True)[1]
    return np.bincount(numbers, right[list(some)]), np.bincount(numbers).astype(float)
