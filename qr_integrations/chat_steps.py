"""What chats do besides generating: the steps of `Backend.answer` as settings that JSON can hold."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from qr_integrations.errors import InputError


@dataclass(frozen=True, slots=True)
class Step:
    """One argument of `Backend.answer`, and the setting of the same name.

    Attributes:
        load: its kinds, the first of which True means. Imports the model's libraries.
        recorded: what stands in `Answer.steps`, as JSON can hold it.
        tag: the key that says which kind a mapping means, where there are several.
        name: the method's, where it is not that of the kind.
        of_number: what a number alone means; None: nothing.
    """

    load: Callable[[], tuple[type, ...]]
    recorded: Callable[[Any], Any]
    tag: str | None = None
    name: str | None = None
    of_number: Callable[[Any], Any] | None = None

    def kind(self, called: Any = None) -> type:
        """The kind of that name, None for the first.

        Raises:
            InputError: there is none.
        """
        kinds = {kind.__name__: kind for kind in self.load()}
        if called is None:
            return next(iter(kinds.values()))
        if not isinstance(called, str) or called not in kinds:
            raise InputError(f"there is no {self.tag} {called!r}: pass {', '.join(kinds)}")
        return kinds[called]


def _vicrop() -> tuple[type, ...]:
    from qr_integrations.cropping.vicrop import ViCrop

    return (ViCrop,)


def _budgets() -> tuple[type, ...]:
    from qr_integrations.encoding.matryoshka import Confidence, TimeBudget, TokenBudget

    return Confidence, TokenBudget, TimeBudget


def _pruners() -> tuple[type, ...]:
    from qr_integrations.pruning import (
        CDPruner,
        ClassAttention,
        LastTokenAttention,
        RandomTokens,
        SparseVLM,
        UniformGrid,
    )

    return CDPruner, SparseVLM, ClassAttention, LastTokenAttention, RandomTokens, UniformGrid


def _deco() -> tuple[type, ...]:
    from qr_integrations.decoding import DeCo

    return (DeCo,)


def _each(number: int | float) -> int:
    """Tokens of each picture."""
    if not 1 <= number < math.inf or number != int(number):
        raise InputError(f"num_visual_tokens={number!r} is no number of tokens: pass a whole number from 1 on")
    return int(number)


def _looks(looks: Sequence[Any]) -> list[dict[str, Any]]:
    return [look.as_dict() for look in looks]


def _told(record: Any) -> dict[str, Any]:
    told: dict[str, Any] = record.as_dict()
    return told


CHAT_STEPS = {
    "crop": Step(_vicrop, _looks),
    "num_visual_tokens": Step(_budgets, int, tag="budget", name="mqt", of_number=_each),
    "prune": Step(_pruners, _told, tag="pruner", of_number=lambda number: _pruners()[0](keep=number)),
    "deco": Step(_deco, _told),
}


@dataclass(frozen=True)
class Strategy:
    """What is done besides generating.

    Attributes:
        steps: argument of `Backend.answer` -> what is passed there, in the order in which it is done.
    """

    steps: Mapping[str, Any]

    @cached_property
    def method(self) -> str:
        """``"vicrop"``, ``"deco"``, ``"vicrop+cdpruner+deco"``, or ``"plain"``."""
        names = [CHAT_STEPS[name].name or type(step).__name__.lower() for name, step in self.steps.items()]
        return "+".join(names) or "plain"

    @cached_property
    def params(self) -> dict[str, Any]:
        """The settings of each step, as JSON can hold them."""
        return {name: as_json(name, step) for name, step in self.steps.items()}


def as_json(name: str, step: Any) -> Any:
    """The settings of a step, as JSON can hold them and `as_step` reads them."""
    if isinstance(step, int):
        return step
    values = {field.name: getattr(step, field.name) for field in fields(step)}
    tag = CHAT_STEPS[name].tag
    named = {tag: type(step).__name__} if tag else {}
    return named | {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def as_step(name: str, given: Any) -> Any:
    """What was passed for a step: on, off, or with settings.

    Raises:
        InputError: something that is no setting of it.
    """
    if name == "prune" and given is True:
        raise InputError("prune=True does not say how many tokens stay: pass prune=64, or prune=CDPruner(keep=64)")
    if given is None or isinstance(given, bool):
        return bool(given)
    step = CHAT_STEPS[name]
    if isinstance(given, step.load()):
        return given
    if isinstance(given, int | float) and step.of_number is not None:
        return step.of_number(given)
    if not isinstance(given, Mapping):
        kinds = [kind.__name__ for kind in step.load()]
        number = "a number, " if step.of_number is not None else "True, "
        ways = ", ".join(f"{kind}(...)" for kind in kinds)
        raise InputError(f"{name}={given!r} is no {kinds[0]}: pass {number}False, {ways} or a mapping")
    settings = dict(given)
    kind = step.kind(settings.pop(step.tag, None) if step.tag else None)
    known = [field.name for field in fields(kind)]
    if unknown := [key for key in settings if key not in known]:
        raise InputError(f"{kind.__name__} has no setting {unknown[0]!r}: pass {', '.join(known)}")
    try:
        return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()})
    except TypeError as error:
        raise InputError(
            f"{name}={given!r} lacks a value, or has one of a wrong type ({error}): pass values as {kind.__name__} has "
            "them"
        ) from error
