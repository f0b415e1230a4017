"""`qr-integrations look`: a question about a picture, answered without and with a second look (ViCrop)."""

import argparse
import json
import os
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from qr_integrations.cli import screen, seeing
from qr_integrations.cropping import Look, ViCrop
from qr_integrations.errors import InputError
from qr_integrations.evaluation.drawn_world import held_out_scene, render, resized
from qr_integrations.evaluation.drawn_world.world import LETTERS
from qr_integrations.files import write_whole
from qr_integrations.types import Answer, Message

_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
_EXAMPLES, _SMALL = 5000, 0.08  # scenes from that number on; the share of the picture that is asked about
_SIDE, _GAP = 1280, 8  # pixels: the longest side of what is drawn, and between map and crop


def run(args: argparse.Namespace) -> int:
    """Answer twice, draw where was looked, print. What fails for its arguments does so before the long work."""
    if args.example:
        if args.image is not None or args.question is not None:
            raise InputError(
                "--example brings its own picture and question: leave out IMAGE and QUESTION, or --example"
            )
        args.image, args.question = _draw_example()
    if args.image is None or args.question is None:
        raise InputError("nothing to look at: pass a picture and a question, or --example")
    if not args.question.strip():
        raise InputError("the question is empty: ask for something in the picture")
    crop, deco, longest = _second_look(args), seeing.deco_of(args), seeing.max_new_tokens_of(args)
    picture = seeing.open_named(args.image, allow_urls=args.allow_urls)
    out = _checked_out(args.out, args.image)
    backend = seeing.load_seeing(args)
    messages = [Message.user(picture, args.question)]
    plain = backend.answer(messages, deco=deco, max_new_tokens=longest)
    closer = backend.answer(messages, crop=crop, deco=deco, max_new_tokens=longest)
    (look,) = closer.steps["crop"]
    write_whole(out, _encoded(_drawn(picture, look), out))
    seeing.note_cut([plain, closer], "an answer")
    if args.json:
        found = {"image": args.image, "size": list(picture.size), "question": args.question, "model": backend.name}
        screen.write_json(json.dumps(found | _as_json(plain, closer, look, out), ensure_ascii=False))
        return 0
    console = screen.stdout()
    _show(console, args.question, plain, closer, look)
    drawn = "Map" if look.box is None else "Map and crop"
    console.print(Padding(Text(f"{drawn}: {screen.one_line(str(out))}", style="dim"), (0, 1)))
    return 0


def _second_look(args: argparse.Namespace) -> ViCrop:
    if args.layers is not None and args.method == "input_gradient":
        raise InputError("--method input_gradient reads no layer: leave out --layers, or pass another method")
    all_or_none = args.layers in (None, "all")
    return ViCrop(
        method=args.method,
        layers=args.layers if all_or_none else seeing.layers_of("--layers", args.layers),
        base=args.base,
        high_resolution=args.high_resolution,
        min_lift=args.min_lift,
    )


def _draw_example() -> tuple[str, str]:
    """Draws a scene with something small to read, and asks for it."""
    number = next(n for n in range(_EXAMPLES, 2 * _EXAMPLES) if held_out_scene(n).things[0].mark in LETTERS)
    scene = resized(held_out_scene(number), 0, _SMALL)
    path = Path("example.png")
    drawn = _encoded(render(scene), path)
    if path.exists() and not (path.is_file() and path.read_bytes() == drawn):
        raise InputError("there is another 'example.png' here: move it, or run in another folder")
    write_whole(path, drawn)
    return str(path), f"What letter is on the {scene.things[0].name}?"


# ---- what is written


def _checked_out(out: str | None, image: str) -> Path:
    """Where the drawing goes; a file that can be written, and not the picture itself."""
    path = Path(out) if out is not None else _beside(image)
    if path.suffix.lower() not in _FORMATS:
        raise InputError(f"--out {str(path)!r} is in no known format: end its name in .png or .jpg")
    if path.is_dir():
        raise InputError(f"--out {str(path)!r} is a folder: pass the name of a file")
    if not path.parent.is_dir():
        raise InputError(f"there is no folder {str(path.parent)!r}: make it, or pass another --out")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"nothing can be written to the folder {str(path.parent)!r}: pass --out elsewhere/look.png")
    if path.exists() and Path(image).is_file() and path.samefile(image):
        raise InputError(f"--out {str(path)!r} is the picture itself: pass another name")
    return path


def _beside(image: str) -> Path:
    """``photo.look.png`` beside ``photo.jpg``; what comes from the web goes where the command runs."""
    path = Path(Path(urlsplit(image).path).name) if seeing.is_address(image) else Path(image)
    return path.parent / f"{path.stem or 'picture'}.look.png"


def _drawn(picture: Image.Image, look: Look) -> Image.Image:
    """The picture, tinted where the model looked; beside it the crop, if there is one, as high as the picture."""
    scale = min(1.0, _SIDE / max(picture.size))
    shown = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
    tinted = look.importance.heat_map(shown, look.box)
    if look.box is None:
        return tinted
    crop = picture.crop(look.box.as_tuple())
    crop = crop.resize((max(1, round(crop.width * tinted.height / crop.height)), tinted.height))
    drawn = Image.new("RGB", (tinted.width + _GAP + crop.width, tinted.height), "white")
    drawn.paste(tinted, (0, 0))
    drawn.paste(crop, (tinted.width + _GAP, 0))
    return drawn


def _encoded(picture: Image.Image, path: Path) -> bytes:
    encoded = BytesIO()
    picture.save(encoded, format=_FORMATS[path.suffix.lower()])
    return encoded.getvalue()


# ---- what is told


def _as_json(plain: Answer, closer: Answer, look: Look, out: Path) -> dict[str, Any]:
    with_crop = None if look.box is None else seeing.answer_as_json(closer)
    return {
        "plain": seeing.answer_as_json(plain),
        "with_crop": with_crop,
        "look": {"method": look.importance.method, **look.as_dict()},
        "picture": str(out),
    }


def _show(console: Console, question: str, plain: Answer, closer: Answer, look: Look) -> None:
    wide = console.width >= screen.NARROW
    table = Table(box=None, padding=(0, 1), expand=True)
    table.add_column("", no_wrap=True)
    table.add_column("answer", ratio=1, overflow="fold")
    if wide:
        table.add_column("tokens", justify="right")
    table.add_column("seconds", justify="right")
    shown = {"whole picture": plain} if look.box is None else {"whole picture": plain, "with the crop": closer}
    for name, answer in shown.items():
        tokens = [f"{answer.usage.prompt_tokens:,} + {answer.usage.completion_tokens:,}"] if wide else []
        table.add_row(name, Text(screen.one_line(answer.text)), *tokens, f"{seeing.seconds_of(answer):.2f}")
    console.print(Padding(Text(screen.one_line(question), style="bold"), (0, 1)))
    console.print(table)
    console.print(Padding(Text(_told(look, closer.seconds["crop"])), (0, 1)))


def _told(look: Look, seconds: float) -> str:
    searched = f"Second look ({look.importance.method}, {seconds:.2f} s)"
    if look.box is None:
        return f"{searched}: no crop, {look.reason}."
    width, height = look.importance.image_size
    size = f"{look.box.width} x {look.box.height} of {width} x {height} pixels"
    return f"{searched}: crop {look.box.as_tuple()}, {size}, lift {look.lift:.2f}."
