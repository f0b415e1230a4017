"""Pictures whose objects are known, and the names by which a text speaks of objects."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from qr_integrations.errors import InputError
from qr_integrations.evaluation.picture_questions import Picture, picture_file
from qr_integrations.evaluation.reading import json_object, read_lines, read_text

_SHAPE = '{"image": "photo.jpg", "objects": ["dog", "traffic light"]}'
_NAMES_SHAPE = '{"dog": ["puppy", "hound"], "traffic light": []}'


@dataclass(frozen=True, slots=True)
class LabelledPicture:
    """A picture and all objects that are in it, by their names.

    Attributes:
        image: the picture.
        objects: each once.
        id: names the picture.
    """

    image: Picture
    objects: frozenset[str]
    id: str = ""


@dataclass(frozen=True)
class ObjectNames:
    """Which words name which object.

    Attributes:
        names: object -> its synonyms; the object's own name and regular plurals count too.

    Example:
        >>> names = ObjectNames({"dog": ("puppy",), "hot dog": (), "bus": ()})
        >>> names.named("Two puppies and a hot dog near buses.")
        ['dog', 'hot dog', 'bus']
    """

    names: Mapping[str, tuple[str, ...]]

    def __post_init__(self) -> None:
        if not self.names or not all(_words(name) for name in self._forms()):
            raise InputError("an object without a name cannot be found in a text: name each with a word")

    @classmethod
    def of(cls, pictures: Iterable[LabelledPicture]) -> "ObjectNames":
        """All objects of some pictures, by their own names."""
        return cls({name: () for name in sorted({name for picture in pictures for name in picture.objects})})

    def named(self, text: str) -> list[str]:
        """The objects that a text names, one for each time, in its order; of overlapping names the longest counts."""
        words, place, found = _words(text), 0, []
        while place < len(words):
            lengths = range(min(self._longest, len(words) - place), 0, -1)
            length = next((n for n in lengths if tuple(words[place : place + n]) in self._objects), 0)
            if length:
                found.append(self._objects[tuple(words[place : place + length])])
            place += max(1, length)
        return found

    def _forms(self) -> Iterator[str]:
        for name, synonyms in self.names.items():
            yield from (name, *synonyms)

    @cached_property
    def _objects(self) -> dict[tuple[str, ...], str]:
        """Words, singular and plural -> object. A name of its own goes before another object's synonym or plural."""
        known = {tuple(_words(name)): name for name in self.names}
        given = [(tuple(_words(form)), name) for name, others in self.names.items() for form in (name, *others)]
        for words, name in given:
            known.setdefault(words, name)
        for words, name in given:
            for plural in _plurals(words[-1]):
                known.setdefault((*words[:-1], plural), name)
        return known

    @cached_property
    def _longest(self) -> int:
        return max(len(words) for words in self._objects)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _plurals(word: str) -> Sequence[str]:
    """Regular plurals, some of which no one says."""
    ends = [f"{word}s", f"{word}es"]
    return [*ends, f"{word[:-1]}ies"] if word.endswith("y") else ends


def read_labelled_pictures(path: str | Path) -> Iterator[LabelledPicture]:
    """The pictures of a file, one after the other; they are opened when they are looked at.

    A line is ``{"image": "photo.jpg", "objects": ["dog", "traffic light"]}``, with all objects of the picture, which is
    looked for beside the file. ``id`` names it. Gzip is unpacked.

    Raises:
        InputError: names file and line, and what a line must look like.
    """
    for number, line in read_lines(path, "a JSONL file of pictures and their objects"):
        where = f"{path}, line {number}"
        entry = json_object(where, line, _SHAPE)
        objects = entry.get("objects")
        if not isinstance(objects, list) or not all(isinstance(name, str) and _words(name) for name in objects):
            raise InputError(f"{where}: no list of names under `objects`: write {_SHAPE}")
        image = picture_file(entry, Path(path).parent, where)
        yield LabelledPicture(image, frozenset(objects), str(entry.get("id", number)))


def read_object_names(path: str | Path) -> ObjectNames:
    """Objects and their synonyms from a JSON file.

    Raises:
        InputError: it holds something else; says what it must look like.
    """
    entry = json_object(str(path), read_text(path, "a JSON file of objects and their synonyms"), _NAMES_SHAPE)
    for name, synonyms in entry.items():
        if not isinstance(synonyms, list) or not all(isinstance(one, str) for one in synonyms):
            raise InputError(f"{path}: {name!r} has no list of synonyms: write {_NAMES_SHAPE}")
    return ObjectNames({name: tuple(synonyms) for name, synonyms in entry.items()})
