"""Questions about pictures with their answers, and how large in the picture that is what they ask about."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from qr_integrations.errors import InputError
from qr_integrations.evaluation.reading import json_object, read_lines, text_field
from qr_integrations.images import open_picture
from qr_integrations.types import Box

Picture = str | Path | Image.Image | Callable[[], Image.Image]
"""A file, a picture, or a function that makes one when it is looked at."""

_SHAPE = '{"image": "photo.jpg", "question": "...", "answers": ["..."], "box": [left, top, right, bottom]}'
_ORIENTATION = 0x0112  # of EXIF; from 5 on the picture lies on its side


@dataclass(frozen=True, slots=True)
class PictureQuestion:
    """A question about a picture.

    Attributes:
        image: the picture.
        question: what is asked.
        answers: any of them is right.
        skill: what answering needs, a word to group by.
        share: longest side of what is asked about, as a share of the picture's longest side; None: it has no place.
        box: where that is, in pixels of the upright picture.
        group: questions of the same group are about the same picture, or nearly; they are not independent. Empty: the
            question stands alone.
        id: names the question.
    """

    image: Picture
    question: str
    answers: tuple[str, ...]
    skill: str = ""
    share: float | None = None
    box: Box | None = None
    group: str = ""
    id: str = ""


def look(picture: Picture) -> Image.Image:
    """The picture itself, upright, in RGB.

    Raises:
        InputError: the file is not there, or holds no picture.
    """
    return open_picture(picture() if callable(picture) else picture)


def read_picture_questions(path: str | Path) -> Iterator[PictureQuestion]:
    """The questions of a file, one after the other; their pictures are opened when they are asked.

    A line is ``{"image": "photo.jpg", "question": ..., "answers": [...]}``: the file is looked for beside the file of
    questions; ``answer`` may stand for one of ``answers``. ``box``, in pixels, says what is asked about, ``skill`` is a
    word to group by, ``id`` names the question. Gzip is unpacked.

    Raises:
        InputError: names file and line, and what a line must look like.
    """
    for number, line in read_lines(path, "a JSONL file of questions about pictures"):
        where = f"{path}, line {number}"
        entry = json_object(where, line, _SHAPE)
        image = picture_file(entry, Path(path).parent, where)
        box = _box(entry.get("box"), where)
        yield PictureQuestion(
            image,
            text_field(entry, "question", where),
            _answers(entry, where),
            text_field(entry, "skill", where) if "skill" in entry else "",
            None if box is None else _share(box, image, where),
            box,
            str(image),
            str(entry.get("id", number)),
        )


def picture_file(entry: Mapping[str, Any], folder: Path, where: str) -> Path:
    """The file under ``image``, which must be there.

    Raises:
        InputError: it is not there, or nothing stands under ``image``.
    """
    path = folder / text_field(entry, "image", where)
    if not path.is_file():
        raise InputError(f"{where}: there is no picture {str(path)!r}: write its path as seen from this file")
    return path


def _answers(entry: Mapping[str, Any], where: str) -> tuple[str, ...]:
    given = entry.get("answers", entry.get("answer"))
    answers = [given] if isinstance(given, str) else given
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) and a.strip() for a in answers):
        raise InputError(f"{where}: no answers: write {_SHAPE}")
    return tuple(answers)


def _box(given: Any, where: str) -> Box | None:
    if given is None:
        return None
    if not isinstance(given, list) or len(given) != 4 or not all(type(side) is int for side in given):
        raise InputError(f"{where}: `box` is {given!r:.40}: write four whole numbers, [left, top, right, bottom]")
    try:
        return Box(*given)
    except ValueError as error:
        raise InputError(f"{where}: {error}: write [left, top, right, bottom]") from error


def _share(box: Box, path: Path, where: str) -> float:
    """Read from the file's header alone."""
    try:
        with Image.open(path) as picture:
            width, height = picture.size
            if picture.getexif().get(_ORIENTATION, 1) >= 5:
                width, height = height, width
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"{where}: {str(path)!r} holds no picture ({error}): pass another file") from error
    if box.left < 0 or box.top < 0 or box.right > width or box.bottom > height:
        raise InputError(
            f"{where}: the box {box.as_tuple()} reaches beyond the picture of {width} x {height} pixels: write pixels "
            "of the upright picture"
        )
    return max(box.width, box.height) / max(width, height)
