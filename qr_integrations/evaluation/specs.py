"""Lines that ask for a system with settings: ``deco:alpha=0.6,layers=4-6``. A comma ends a setting."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qr_integrations.errors import InputError


def check_distinct(specs: Sequence[str]) -> None:
    """No line stands twice.

    Raises:
        InputError: names one that does.
    """
    for number, spec in enumerate(specs):
        if spec in specs[:number]:
            raise InputError(f"the system {spec!r} stands twice: name each once")


def read_spec(spec: str, known: Mapping[str, Mapping[str, Callable[[str], Any]]]) -> tuple[str, dict[str, Any]]:
    """The name before the colon, and the settings behind it.

    Args:
        spec: the line.
        known: name -> its settings, and what reads each.

    Raises:
        InputError: no such name or setting, a setting that stands twice, or a value that cannot be read.

    Example:
        >>> read_spec("deco:layers=4-6", {"greedy": {}, "deco": {"layers": read_layers}})
        ('deco', {'layers': (4, 5, 6)})
    """
    name, _, _ = spec.partition(":")
    if name not in known:
        raise InputError(f"{spec!r} is no system: write {', '.join(known)}, perhaps with settings, NAME:SETTING=VALUE")
    return name, read_settings(spec, known[name], missing=f"{name} has no setting")


def read_settings(
    spec: str, known: Mapping[str, Callable[[str], Any]], *, missing: str = "there is no setting"
) -> dict[str, Any]:
    """The names and values behind the colon.

    Args:
        spec: the line.
        known: settings, and what reads each.
        missing: how an error about any other begins.

    Raises:
        InputError: no such setting, one that stands twice, or a value that cannot be read.
    """
    _, colon, rest = spec.partition(":")
    settings: dict[str, Any] = {}
    for pair in rest.split(",") if colon else ():
        name, _, text = pair.partition("=")
        if name not in known:
            there = f"known are {', '.join(sorted(known))}" if known else "there are none"
            raise InputError(f"{spec!r}: {missing} {name!r}: {there}")
        if name in settings:
            raise InputError(f"{spec!r}: {name} stands twice: write it once")
        try:
            settings[name] = known[name](text)
        except ValueError as error:
            raise InputError(f"{spec!r}: {name} cannot be {text!r} ({error}): write another value") from error
    return settings


def read_layers(text: str) -> tuple[int, ...]:
    """``4-6``, ``2+4+6`` or ``5``."""
    first, dash, last = text.partition("-")
    return tuple(range(int(first), int(last) + 1)) if dash else tuple(int(number) for number in text.split("+"))


def read_layers_or(*words: str) -> Callable[[str], tuple[int, ...] | str]:
    """Layers, or one of some words."""
    return lambda text: text if text in words else read_layers(text)


def read_count_or_share(text: str) -> int | float:
    """``16``, or ``0.25`` of all."""
    return float(text) if "." in text else int(text)
