"""Whether an answer in words is right: compared without case, punctuation and articles, numbers as digits."""

import re
import unicodedata
from collections.abc import Sequence

_ARTICLES = {"a", "an", "the"}
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)}
_YES, _NO = {"yes", "yeah", "yep"}, {"no", "not", "nope", "isn't", "aren't"}


def normalised(text: str) -> tuple[str, ...]:
    """The words of a text as they are compared; articles stay where there is nothing else.

    Example:
        >>> normalised("A Red ball.")
        ('red', 'ball')
        >>> normalised("Two"), normalised("A")
        (('2',), ('a',))
    """
    found = [_DIGITS.get(word, word) for word in _words(text)]
    return tuple(word for word in found if word not in _ARTICLES) or tuple(found)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+(?:['.]\w+)*", unicodedata.normalize("NFKC", text).replace("\u2019", "'").casefold())


def is_right(text: str, answers: Sequence[str], *, contains: bool = False) -> bool:
    """Whether a text is one of the answers.

    Args:
        text: what was said.
        answers: any of them is right. Of those without words, such as ``"?"``, the signs are compared.
        contains: it is enough that the text holds the words of an answer, one after the other.

    Example:
        >>> is_right("The ball.", ["ball"]), is_right("It is a red ball", ["ball"])
        (True, False)
        >>> is_right("It is a red ball", ["red ball"], contains=True)
        True
    """
    return any(_is_one(text, answer, contains) for answer in answers)


def _is_one(text: str, answer: str, contains: bool) -> bool:
    said, words = normalised(text), normalised(answer)
    if not words:  # "?" has none
        said, words = (tuple(text.strip()), tuple(answer.strip()))
    return _holds(said, words) if contains and words else said == words


def _holds(said: tuple[str, ...], words: tuple[str, ...]) -> bool:
    return any(said[start : start + len(words)] == words for start in range(len(said) - len(words) + 1))


def yes_or_no(text: str) -> bool | None:
    """What the first sentence says, True for yes; None if it says neither, or both.

    Example:
        >>> yes_or_no("Yes, there is."), yes_or_no("There is no dog."), yes_or_no("Perhaps.")
        (True, False, None)
    """
    said = set(_words(text.strip().split(".")[0]))
    yes, no = bool(said & _YES), bool(said & _NO)
    return yes if yes != no else None
