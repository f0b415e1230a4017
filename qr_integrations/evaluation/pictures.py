"""Questions about pictures, answered plainly and with a second look, by the size of what is asked about.

A system is asked for by a line: ``none`` (no second look), ``relative``, ``gradient``, ``input_gradient`` (ViCrop),
``random`` (a place that means nothing, as large as ViCrop's crop), ``oracle`` (around what is asked about).
ViCrop's may have settings: ``relative:layers=4-6,min_lift=1.5``; layers count from 0.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from statistics import median
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from qr_integrations.backend import Backend
from qr_integrations.backend.answering import Cropped, Cropper
from qr_integrations.cropping import ViCrop, crop_side
from qr_integrations.cropping.asking import SHORT_ANSWER
from qr_integrations.cropping.boxes import RATIOS
from qr_integrations.cropping.vicrop import Method
from qr_integrations.errors import InputError
from qr_integrations.evaluation.answers import is_right
from qr_integrations.evaluation.drawn_world.held_out import SHARES
from qr_integrations.evaluation.measuring import Progress
from qr_integrations.evaluation.picture_questions import PictureQuestion, look
from qr_integrations.evaluation.ratios import Counts, estimates, ratio, ratio_difference
from qr_integrations.evaluation.specs import check_distinct, read_layers_or, read_spec
from qr_integrations.evaluation.statistics import Estimate
from qr_integrations.types import Box, Message


def _pixels_or_share(text: str) -> int | float:
    return float(text) if "." in text else int(text)


NONE, RANDOM, ORACLE = "none", "random", "oracle"
VICROP: tuple[Method, ...] = ("relative", "gradient", "input_gradient")
SYSTEMS = (NONE, *VICROP, RANDOM, ORACLE)
ALL, SIZE, SKILL = "all", "size", "skill"
_ANY: Mapping[str, Callable[[str], Any]] = {"base": _pixels_or_share, "min_lift": float}
_SETTINGS: Mapping[str, Mapping[str, Callable[[str], Any]]] = {
    NONE: {},
    **{method: {"layers": read_layers_or("all"), **_ANY} for method in ("relative", "gradient")},
    "input_gradient": _ANY,
    RANDOM: {},
    ORACLE: {},
}


@dataclass(frozen=True, slots=True)
class KnownBox:
    """A second look at a place that is known beforehand; None: no second look. Passed as ``crop=``."""

    box: Box | None

    def crop(self, backend: Any, messages: tuple[Message, ...]) -> Cropped:
        """Every picture is followed by its part in the box."""
        if self.box is None:
            return Cropped(messages, (self,))
        return Cropped(tuple(Message(one.role, self._looked_at_again(one)) for one in messages), (self,))

    def _looked_at_again(self, message: Message) -> tuple[str | Image.Image, ...]:
        parts: list[str | Image.Image] = []
        for part in message.content:
            parts.append(part)
            if self.box is not None and not isinstance(part, str):
                parts.append(part.crop(self.box.as_tuple()))
        return tuple(parts)


def crop_sides(base: int) -> tuple[int, ...]:
    """The sides in pixels that ViCrop's crops can have, smallest first.

    Example:
        >>> crop_sides(336)
        (336, 402, 470, 536, 604, 672)
    """
    return tuple(2 * int(base * ratio // 2) for ratio in RATIOS)


def oracle_box(size: tuple[int, int], box: Box | None, base: int) -> Box | None:
    """The smallest of ViCrop's crops that holds a box, around its centre.

    None where no second look helps: nothing to look at, a picture that ViCrop would not crop either, or a box that none
    of the sizes holds.
    """
    if box is None or max(size) <= base:
        return None
    fitting = [side for side in crop_sides(base) if side >= max(box.width, box.height)]
    if not fitting:
        return None
    return _square(size, fitting[0], (box.left + box.right) // 2, (box.top + box.bottom) // 2)


def random_box(size: tuple[int, int], box: Box, draw: Random) -> Box:
    """A box as large as another one, anywhere in the picture."""
    left, top = draw.randint(0, size[0] - box.width), draw.randint(0, size[1] - box.height)
    return Box(left, top, left + box.width, top + box.height)


@dataclass(frozen=True, slots=True)
class RandomPlace:
    """A second look at a place that means nothing, as large as what ViCrop would look at. Passed as ``crop=``."""

    seed: str

    def crop(self, backend: Any, messages: tuple[Message, ...]) -> Cropped:
        """The conversation with a crop of its one picture; none where ViCrop would not crop."""
        (look,) = ViCrop().crop(backend, messages).record
        draw = Random(self.seed)
        return KnownBox(look.box and random_box(look.importance.image_size, look.box, draw)).crop(backend, messages)


def _square(size: tuple[int, int], side: int, x: int, y: int) -> Box:
    """Around (x, y), moved into the picture and cut where that is smaller."""
    width, height = min(side, size[0]), min(side, size[1])
    left = min(max(0, x - width // 2), size[0] - width)
    top = min(max(0, y - height // 2), size[1] - height)
    return Box(left, top, left + width, top + height)


@dataclass(frozen=True, slots=True)
class PictureSystem:
    """A way to answer.

    Attributes:
        name: as it stands in tables.
        look_again: gives what is passed as ``crop=``, for a model, a question and the size of its picture.
    """

    name: str
    look_again: Callable[[Backend, PictureQuestion, tuple[int, int]], Cropper | None]


def make_picture_systems(specs: Sequence[str], *, seed: int = 0) -> list[PictureSystem]:
    """The systems that `specs` ask for, see the top of this file.

    Args:
        specs: one line each, no two the same.
        seed: of ``random``; the same question always gets the same crop.

    Raises:
        InputError: a line that is no system, has a setting that there is not, or stands twice.
    """
    check_distinct(specs)
    return [PictureSystem(spec, _second_look(spec, seed)) for spec in specs]


def _second_look(spec: str, seed: int) -> Callable[[Backend, PictureQuestion, tuple[int, int]], Cropper | None]:
    def at_random(backend: Backend, question: PictureQuestion, size: tuple[int, int]) -> Cropper:
        return RandomPlace(f"{seed}-{question.id}-{question.question}")

    def around(backend: Backend, question: PictureQuestion, size: tuple[int, int]) -> Cropper:
        return KnownBox(oracle_box(size, question.box, crop_side(backend, size)))

    name, settings = read_spec(spec, _SETTINGS)
    vicrop = next((ViCrop(method, **settings) for method in VICROP if method == name), None)
    return {RANDOM: at_random, ORACLE: around}.get(name, lambda backend, question, size: vicrop)


@dataclass(frozen=True, slots=True)
class PictureRun:
    """One system on one question.

    Attributes:
        system: its name.
        number: of the question.
        text: what was answered.
        right: whether that is an answer.
        box: where it looked again; None if nowhere.
        seconds: what answering took, the second look included.
    """

    system: str
    number: int
    text: str
    right: bool
    box: Box | None
    seconds: float


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
    for number, question in enumerate(questions):
        picture = look(question.image)
        message = Message.user(picture, f"{question.question} {instruction}".strip())
        for system in systems:
            start = time.perf_counter()
            again = system.look_again(backend, question, picture.size)
            if isinstance(again, ViCrop):  # the same template for both questions
                again = replace(again, generic=f"{again.generic} {instruction}".strip())
            answer = backend.answer([message], crop=again, max_new_tokens=max_new_tokens)
            seconds = time.perf_counter() - start
            box = next((one.box for one in answer.steps.get("crop", ()) if one.box is not None), None)
            right = is_right(answer.text, question.answers, contains=contains)
            runs.append(PictureRun(system.name, number, answer.text, right, box, seconds))
        if progress:
            progress(number + 1, len(questions))
    return runs


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
    """

    name: str
    accuracy: Mapping[str, Mapping[str, Estimate]]
    against: Mapping[str, Mapping[str, Mapping[str, Estimate]]] = field(default_factory=dict)
    looked_again: float = 0.0
    found: float | None = None
    seconds: float = 0.0


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


def summarise_pictures(
    runs: Sequence[PictureRun], questions: Sequence[PictureQuestion], baselines: Sequence[str] = (NONE, RANDOM)
) -> list[SystemAccuracy]:
    """Accuracy of every system with intervals, and paired differences from the baselines that were measured.

    Questions of the same group are not independent: intervals and tests draw groups.

    Raises:
        MissingExtra: scipy is not installed.
    """
    own = {name: [run for run in runs if run.system == name] for name in dict.fromkeys(run.system for run in runs)}
    counts = {name: _count(some, questions) for name, some in own.items()}
    return [
        SystemAccuracy(
            name,
            estimates(ratio, found),
            {
                baseline: estimates(ratio_difference, found, counts[baseline])
                for baseline in baselines
                if baseline in own and baseline != name
            },
            sum(run.box is not None for run in own[name]) / len(own[name]),
            _found(own[name], questions),
            median(run.seconds for run in own[name]),
        )
        for name, found in counts.items()
    ]


def _found(runs: Sequence[PictureRun], questions: Sequence[PictureQuestion]) -> float | None:
    pairs = [(run.box, questions[run.number].box) for run in runs]
    held = [_holds_middle(crop, asked) for crop, asked in pairs if crop is not None and asked is not None]
    return sum(held) / len(held) if held else None


def _holds_middle(crop: Box, box: Box) -> bool:
    x, y = (box.left + box.right) / 2, (box.top + box.bottom) / 2
    return crop.left <= x < crop.right and crop.top <= y < crop.bottom


def count_questions(questions: Sequence[PictureQuestion]) -> dict[str, dict[str, tuple[int, int]]]:
    """How many questions of how many groups every slice holds."""
    groups = _groups(questions)
    return {
        kind: {name: (len(some), len({groups[number] for number in some})) for name, some in named.items()}
        for kind, named in slice_questions(questions).items()
    }


def _groups(questions: Sequence[PictureQuestion]) -> list[str]:
    return [question.group or f"question {number}" for number, question in enumerate(questions)]


def _count(runs: Sequence[PictureRun], questions: Sequence[PictureQuestion]) -> dict[str, dict[str, Counts]]:
    """Right answers and questions of every group, for every slice."""
    groups = _groups(questions)
    right = np.array([float(run.right) for run in sorted(runs, key=lambda run: run.number)])
    return {
        kind: {name: _by_group(right, groups, some) for name, some in named.items()}
        for kind, named in slice_questions(questions).items()
    }


def _by_group(right: Float[np.ndarray, "questions"], groups: Sequence[str], some: Sequence[int]) -> Counts:
    numbers = np.unique([groups[number] for number in some], return_inverse=True)[1]
    return np.bincount(numbers, right[list(some)]), np.bincount(numbers).astype(float)
