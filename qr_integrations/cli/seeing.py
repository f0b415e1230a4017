"""Pictures that a command line names, what it says about answering, and answers as JSON."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from qr_integrations.backend import Backend
from qr_integrations.cli import model, screen
from qr_integrations.decoding import DeCo
from qr_integrations.errors import InputError
from qr_integrations.evaluation.specs import read_layers
from qr_integrations.images import PicturePolicy, open_picture
from qr_integrations.images.policy import shown
from qr_integrations.types import Answer


def check_named(source: str, *, allow_urls: bool) -> None:
    """Whether there is a picture that may be opened; nothing is fetched.

    Raises:
        InputError: not there, not allowed, not a picture, broken, or too large.
    """
    if not is_address(source):
        _opened(source)
    elif not allow_urls:
        raise InputError(f"{shown(source)} is an address: pass --allow-urls to fetch it, or download it yourself")


def open_named(source: str, *, allow_urls: bool) -> Image.Image:
    """The picture in a file or, where that is allowed, behind an http or https address.

    Raises:
        InputError: not there, not allowed, not a picture, broken, or too large.
    """
    if not is_address(source):
        return _opened(source)
    check_named(source, allow_urls=allow_urls)
    return open_picture(source, policy=PicturePolicy(allow_urls=True))


def _opened(path: str) -> Image.Image:
    if not Path(path).is_file():
        raise InputError(f"there is no file {path!r}: check the path")
    return open_picture(Path(path))


def is_address(source: str) -> bool:
    """Whether it begins like an address of the web."""
    return source.lower().startswith(("http://", "https://"))


def load_seeing(args: argparse.Namespace) -> Backend:
    """The model, which must see pictures.

    Raises:
        InputError: it reads text only.
    """
    backend = model.load(args)
    if not backend.sees_pictures:
        raise InputError(f"{backend.name!r} reads text only: pass a vision-language model, such as --model qr-mini-vl")
    return backend


def layers_of(option: str, text: str) -> tuple[int, ...]:
    """``5``, ``4-6`` or ``2,4-6``.

    Raises:
        InputError: no layers.
    """
    try:
        parts = [read_layers(part) for part in text.split(",")]
    except ValueError:
        parts = []
    if not parts or not all(parts):
        raise InputError(f"{option} {text!r} are no layers: write 5, 4-6 or 2,4-6")
    return tuple(layer for part in parts for layer in part)


def deco_of(args: argparse.Namespace) -> DeCo | None:
    """The correction that was asked for, by --deco or by one of its settings."""
    settings: dict[str, Any] = {} if args.alpha is None else {"alpha": args.alpha}
    if args.deco_layers is not None:
        settings["layers"] = layers_of("--deco-layers", args.deco_layers)
    return DeCo(**settings) if args.deco or settings else None


def max_new_tokens_of(args: argparse.Namespace) -> int:
    """How long an answer may be.

    Raises:
        InputError: no token at all.
    """
    if args.max_new_tokens < 1:
        raise InputError(f"--max-new-tokens {args.max_new_tokens} says nothing: pass at least 1")
    return int(args.max_new_tokens)


def note_cut(answers: Sequence[Answer], what: str) -> None:
    """Say so where an answer did not come to its end."""
    if any(answer.finish_reason == "length" for answer in answers):
        screen.note(f"{what} was cut at its longest: --max-new-tokens allows for more")


def answer_as_json(answer: Answer) -> dict[str, Any]:
    """Text, tokens, seconds, and what each step did, as JSON can hold it."""
    steps = answer.steps
    return {
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.usage.prompt_tokens,
        "completion_tokens": answer.usage.completion_tokens,
        "seconds": dict(answer.seconds),
        **({"crop": [look.as_dict() for look in steps["crop"]]} if "crop" in steps else {}),
        **({"deco": steps["deco"].as_dict()} if "deco" in steps else {}),
    }


def seconds_of(answer: Answer) -> float:
    """Of looking and answering together."""
    return answer.seconds.get("crop", 0.0) + answer.seconds["generate"]
