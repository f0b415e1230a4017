"""The drawn world as data to measure on: questions at several sizes, and pictures whose objects are known."""

from collections.abc import Sequence
from functools import partial

from qr_integrations.errors import InputError
from qr_integrations.evaluation.drawn_world.held_out import (
    SHARES,
    caption_scene,
    held_out_scene,
    questions_about_first,
)
from qr_integrations.evaluation.drawn_world.questions import Question
from qr_integrations.evaluation.drawn_world.render import render
from qr_integrations.evaluation.drawn_world.world import KINDS, PLURALS, Scene, resized
from qr_integrations.evaluation.object_names import LabelledPicture, ObjectNames
from qr_integrations.evaluation.picture_questions import PictureQuestion
from qr_integrations.types import Box


def drawn_questions(scenes: int = 20, shares: Sequence[float] = SHARES, *, first: int = 0) -> list[PictureQuestion]:
    """The same questions about the same held-out scenes, with the thing that is asked about at every size.

    Args:
        scenes: how many; each gives about six questions at every size.
        shares: sizes of the thing, as shares of the picture's longest side. The largest is what finds room in the
            picture, which may be less than asked for.
        first: the number of the first scene; who has chosen something on some scenes measures on others.

    Raises:
        InputError: no scenes, a number below 0, or a share that is none.
    """
    _check_scenes(scenes)
    if first < 0:
        raise InputError(f"there is no scene {first}: pass first=0 or more")
    if not shares or not all(0 < share <= 1 for share in shares):
        raise InputError(f"{tuple(shares)} are no sizes: pass shares of the longest side, above 0 and up to 1")
    found = []
    for number in range(first, first + scenes):
        scene = held_out_scene(number)
        for share in shares:
            drawn = resized(scene, 0, share)
            for place, question in enumerate(_one_of_each(questions_about_first(number, scene))):
                found.append(_as_picture_question(question, drawn, share, f"scene {number}", f"{share:.2f}-{place}"))
    return found


def _one_of_each(questions: Sequence[Question]) -> list[Question]:
    """The first question of every skill; of presence one with yes and one with no."""
    first: dict[tuple[str, bool], Question] = {}
    for question in questions:
        first.setdefault((question.skill, question.about is None), question)
    return list(first.values())


def _as_picture_question(question: Question, scene: Scene, share: float, group: str, name: str) -> PictureQuestion:
    box = None if question.about is None else Box(*scene.things[question.about].box)
    return PictureQuestion(
        partial(render, scene),
        question.text.replace(" ?", "?").capitalize(),
        (question.answer,),
        question.skill,
        None if box is None else share,
        box,
        group,
        f"{group}, {name}",
    )


def drawn_pictures(scenes: int = 100) -> list[LabelledPicture]:
    """Held-out scenes without the partner of their largest thing: pictures that invite to say what is not there.

    Raises:
        InputError: no scenes.
    """
    _check_scenes(scenes)
    drawn = [caption_scene(number) for number in range(scenes)]
    return [
        LabelledPicture(partial(render, scene), frozenset(thing.kind for thing in scene.things), f"scene {number}")
        for number, scene in enumerate(drawn)
    ]


def drawn_names() -> ObjectNames:
    """The kinds of the drawn world, by their names and plurals."""
    return ObjectNames({kind: (plural,) for kind, plural in zip(KINDS, PLURALS, strict=True)})


def _check_scenes(scenes: int) -> None:
    if scenes < 1:
        raise InputError(f"{scenes} scenes are none to measure on: pass at least 1")
