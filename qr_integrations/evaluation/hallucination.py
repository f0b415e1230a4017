"""What a model says is in a picture although it is not: in captions (CHAIR), and asked for it (POPE).

CHAIR (arXiv 1809.02156): of all mentions of objects, the share that are not there (instance), and the share of captions
with any (sentence). To be read beside recall and length: who says less invents less.
POPE (arXiv 2305.10355): yes or no, about objects that are there and as many that are not: any (random), those most
frequent in the data (popular), those that most often come with what is there (adversarial).
"""

import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np

from qr_integrations.backend import Backend
from qr_integrations.errors import InputError
from qr_integrations.evaluation.answers import yes_or_no
from qr_integrations.evaluation.decoders import Decoder
from qr_integrations.evaluation.measuring import Progress
from qr_integrations.evaluation.object_names import LabelledPicture, ObjectNames
from qr_integrations.evaluation.picture_questions import look
from qr_integrations.evaluation.ratios import Counts
from qr_integrations.types import Message

DESCRIBE = "Please describe this image in detail."
RANDOM, POPULAR, ADVERSARIAL = "random", "popular", "adversarial"
STRATEGIES = (RANDOM, POPULAR, ADVERSARIAL)
CHAIR_INSTANCE, CHAIR_SENTENCE, RECALL, WORDS = "CHAIR instance", "CHAIR sentence", "recall", "words"
CAPTION_METRICS = (CHAIR_INSTANCE, CHAIR_SENTENCE, RECALL)
POPE_METRICS = ("accuracy", "precision", "recall", "F1", "yes")


@dataclass(frozen=True, slots=True)
class ObjectQuestion:
    """Is an object in a picture?

    Attributes:
        picture: its number.
        name: of the object.
        there: the answer.
        strategy: how the objects that are not there were chosen.
    """

    picture: int
    name: str
    there: bool
    strategy: str

    @property
    def text(self) -> str:
        """As POPE asks."""
        return f"Is there {'an' if self.name[0].lower() in 'aeiou' else 'a'} {self.name} in the image?"


def ask_for_objects(
    pictures: Sequence[LabelledPicture], strategy: str, *, each: int = 3, seed: int = 0
) -> list[ObjectQuestion]:
    """Questions about objects, half of which are in the picture.

    Args:
        pictures: with all their objects.
        strategy: ``"random"``, ``"popular"`` or ``"adversarial"``.
        each: questions with yes for every picture, and as many with no; fewer where a picture has fewer objects, or
            lacks fewer.
        seed: of what is drawn.

    Raises:
        InputError: no such strategy, or no question can be asked.
    """
    if strategy not in STRATEGIES:
        raise InputError(f"unknown strategy {strategy!r}: pass {', '.join(STRATEGIES)}")
    frequent = Counter(name for picture in pictures for name in sorted(picture.objects))
    asked: list[ObjectQuestion] = []
    for number, picture in enumerate(pictures):
        draw = Random(f"{seed}-{number}")
        there = draw.sample(sorted(picture.objects), len(picture.objects))
        missing = draw.sample(sorted(set(frequent) - picture.objects), len(frequent) - len(picture.objects))
        if strategy != RANDOM:
            count = frequent if strategy == POPULAR else _companions_of(picture, pictures)
            missing.sort(key=count.__getitem__, reverse=True)
        few = min(each, len(there), len(missing))
        pairs = [*((name, True) for name in there[:few]), *((name, False) for name in missing[:few])]
        asked += [ObjectQuestion(number, name, answer, strategy) for name, answer in pairs]
    if not asked:
        raise InputError(
            "no picture has an object while it lacks another: pass pictures with different objects, at least two in all"
        )
    return asked


def _companions_of(picture: LabelledPicture, pictures: Sequence[LabelledPicture]) -> Counter[str]:
    """How often each object is in a picture with the objects of this one, counted once for each of them."""
    found: Counter[str] = Counter()
    for other in pictures:
        found.update(dict.fromkeys(other.objects, len(other.objects & picture.objects)))
    return found


@dataclass(frozen=True, slots=True)
class Caption:
    """One decoder's caption of one picture.

    Attributes:
        decoder: its name.
        picture: its number.
        text: the caption.
        named: the objects it names, once for each time.
        seconds: what it took.
    """

    decoder: str
    picture: int
    text: str
    named: tuple[str, ...]
    seconds: float

    @property
    def num_words(self) -> int:
        """Of the caption, without punctuation."""
        return len(re.findall(r"\w+", self.text))


@dataclass(frozen=True, slots=True)
class ObjectAnswer:
    """One decoder's answer to one question.

    Attributes:
        decoder: its name.
        question: what was asked.
        text: what was answered.
        yes: what that says; None if neither yes nor no, which counts as wrong.
    """

    decoder: str
    question: ObjectQuestion
    text: str
    yes: bool | None


def write_captions(
    backend: Backend,
    decoders: Sequence[Decoder],
    pictures: Sequence[LabelledPicture],
    names: ObjectNames,
    *,
    prompt: str = DESCRIBE,
    max_new_tokens: int = 512,
    progress: Progress | None = None,
) -> list[Caption]:
    """Every decoder's caption of every picture.

    Args:
        backend: a vision-language model.
        decoders: from `make_decoders`.
        pictures: with their objects.
        names: by which captions speak of objects.
        prompt: what captions are asked for with.
        max_new_tokens: of a caption; one that is cut is shorter than it would be.
        progress: called with the pictures done and all of them.

    Raises:
        InputError: no pictures, or objects that have no name in `names`.
    """
    check_pictures(pictures, names)
    captions = []
    for number, picture in enumerate(pictures):
        message = Message.user(look(picture.image), prompt)
        for decoder in decoders:
            start = time.perf_counter()
            answer = backend.answer([message], deco=decoder.corrector, max_new_tokens=max_new_tokens)
            seconds = time.perf_counter() - start
            named = tuple(names.named(answer.text))
            captions.append(Caption(decoder.name, number, answer.text, named, seconds))
        if progress:
            progress(number + 1, len(pictures))
    return captions


def check_pictures(pictures: Sequence[LabelledPicture], names: ObjectNames) -> None:
    """There are pictures, and every object has a name.

    Raises:
        InputError: says which has not.
    """
    if not pictures:
        raise InputError("no pictures to measure on: pass at least one LabelledPicture")
    for picture in pictures:
        if unknown := sorted(picture.objects - names.names.keys()):
            raise InputError(
                f"{unknown[0]!r}, in picture {picture.id!r}, is no object of the names: add it, with its synonyms"
            )


def answer_questions(
    backend: Backend,
    decoders: Sequence[Decoder],
    pictures: Sequence[LabelledPicture],
    questions: Sequence[ObjectQuestion],
    *,
    max_new_tokens: int = 8,
    progress: Progress | None = None,
) -> list[ObjectAnswer]:
    """Every decoder's answer to every question, decoded greedily; the same question of two strategies is asked once.

    Args:
        backend: a vision-language model.
        decoders: from `make_decoders`.
        pictures: that the questions are about.
        questions: from `ask_for_objects`; of several strategies together, if wanted.
        max_new_tokens: of an answer.
        progress: called with the pictures done and all of them.
    """
    by_picture: dict[int, list[ObjectQuestion]] = {}
    for question in questions:
        by_picture.setdefault(question.picture, []).append(question)
    answers = []
    for done, (number, some) in enumerate(by_picture.items(), start=1):
        image = look(pictures[number].image)
        said: dict[tuple[str, str], str] = {}
        for question in some:
            for decoder in decoders:
                key = (decoder.name, question.name)
                if key not in said:
                    message = Message.user(image, question.text)
                    told = backend.answer([message], deco=decoder.corrector, max_new_tokens=max_new_tokens)
                    said[key] = told.text
                answers.append(ObjectAnswer(decoder.name, question, said[key], yes_or_no(said[key])))
        if progress:
            progress(done, len(by_picture))
    return answers


def caption_counts(captions: Sequence[Caption], pictures: Sequence[LabelledPicture]) -> dict[str, Counts]:
    """What is counted in captions, one for each picture in its order, by metric; ``words`` is the mean length.

    Example:
        >>> picture = LabelledPicture("photo.jpg", frozenset({"dog", "ball"}))
        >>> said = Caption("greedy", 0, "a dog , a cat and a dog", ("dog", "cat", "dog"), 0.1)
        >>> [(name, int(part[0]), int(whole[0])) for name, (part, whole) in caption_counts([said], [picture]).items()]
        [('CHAIR instance', 1, 3), ('CHAIR sentence', 1, 1), ('recall', 1, 2), ('words', 7, 1)]
    """
    there = [pictures[caption.picture].objects for caption in captions]
    invented = [sum(name not in objects for name in c.named) for c, objects in zip(captions, there, strict=True)]
    found = [len(objects.intersection(c.named)) for c, objects in zip(captions, there, strict=True)]
    ones = np.ones(len(captions))
    return {
        CHAIR_INSTANCE: (np.array(invented, float), np.array([len(c.named) for c in captions], float)),
        CHAIR_SENTENCE: (np.array([count > 0 for count in invented], float), ones),
        RECALL: (np.array(found, float), np.array([len(objects) for objects in there], float)),
        WORDS: (np.array([c.num_words for c in captions], float), ones),
    }


def answer_counts(answers: Sequence[ObjectAnswer]) -> dict[str, Counts]:
    """What is counted in answers to questions about objects, summed for each picture, by metric.

    An answer that says neither yes nor no is wrong: for an object that is there it is a miss, otherwise a false alarm
    in accuracy only.

    Example:
        >>> asked = [ObjectQuestion(0, name, name == "dog", "random") for name in ("dog", "cat")]
        >>> said = [ObjectAnswer("greedy", question, "Yes.", True) for question in asked]
        >>> [(name, int(part[0]), int(whole[0])) for name, (part, whole) in answer_counts(said).items()]
        [('accuracy', 1, 2), ('precision', 1, 2), ('recall', 1, 1), ('F1', 2, 3), ('yes', 2, 2)]
    """
    numbers = np.unique([answer.question.picture for answer in answers], return_inverse=True)[1]

    def count(held: Sequence[bool]) -> np.ndarray:
        return np.bincount(numbers, np.array(held, float))

    said = [answer.yes is True for answer in answers]
    there = [answer.question.there for answer in answers]
    right = count([answer.yes is answer.question.there for answer in answers])
    hits = count([one and other for one, other in zip(said, there, strict=True)])
    said_yes, positive, total = count(said), count(there), count([True] * len(answers))
    return {
        "accuracy": (right, total),
        "precision": (hits, said_yes),
        "recall": (hits, positive),
        "F1": (2 * hits, said_yes + positive),
        "yes": (said_yes, total),
    }
