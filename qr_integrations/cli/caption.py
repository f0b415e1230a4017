"""`qr-integrations caption`: what is in a picture, said plainly and with earlier layers' correction (DeCo)."""

import argparse
import json
from collections.abc import Mapping
from typing import Any

from PIL import Image
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from qr_integrations.backend import Backend
from qr_integrations.cli import screen, seeing
from qr_integrations.cropping import ViCrop
from qr_integrations.decoding import DeCo, LayerProbe, probe_layers
from qr_integrations.errors import InputError
from qr_integrations.evaluation.hallucination import DESCRIBE
from qr_integrations.types import Answer, Message

_NAMES = {"plain": "Plain", "deco": "DeCo"}


def run(args: argparse.Namespace) -> int:
    """Caption one picture after the other. What fails for its arguments does so before the long work."""
    prompt = DESCRIBE if args.prompt is None else args.prompt
    if not prompt.strip():
        raise InputError("--prompt is empty: say what is asked for, or leave it out")
    deco, longest = seeing.deco_of(args), seeing.max_new_tokens_of(args)
    for source in args.images:
        seeing.check_named(source, allow_urls=args.allow_urls)
    backend = seeing.load_seeing(args)
    console = screen.stdout()
    for source in args.images:
        picture = seeing.open_named(source, allow_urls=args.allow_urls)
        message = Message.user(picture, prompt)
        captions = _captions(backend, message, deco, longest, crop=args.crop)
        probe = _probed(backend, message, longest) if args.probe else None
        seeing.note_cut(list(captions.values()), f"a caption of {screen.one_line(source)}")
        if args.json:
            found = {"image": source, "prompt": prompt, "model": backend.name}
            screen.write_json(json.dumps(found | _as_json(captions, probe), ensure_ascii=False))
        else:
            _show(console, source, picture, captions, probe)
    return 0


def _captions(
    backend: Backend, message: Message, deco: DeCo | None, max_new_tokens: int, *, crop: bool
) -> dict[str, Answer]:
    decoders = {"plain": None} if deco is None else {"plain": None, "deco": deco}
    look_again = ViCrop() if crop else None
    return {
        name: backend.answer([message], crop=look_again, deco=decoder, max_new_tokens=max_new_tokens)
        for name, decoder in decoders.items()
    }


def _probed(backend: Backend, message: Message, max_new_tokens: int) -> LayerProbe:
    """The plain caption, without a crop, layer by layer."""
    prompt = backend.lay_out([message])
    room = max_new_tokens if backend.max_tokens is None else backend.max_tokens - len(prompt)
    return probe_layers(backend, prompt.inputs, max_new_tokens=min(max_new_tokens, room))


def _as_json(captions: Mapping[str, Answer], probe: LayerProbe | None) -> dict[str, Any]:
    found: dict[str, Any] = {name: seeing.answer_as_json(answer) for name, answer in captions.items()}
    if probe is not None:
        found["probe"] = {
            "said": [guess.token for guess in probe.said],
            "agreement": {str(layer): share for layer, share in probe.agreement.items()},
            "mean_prob": {str(layer): prob for layer, prob in probe.mean_prob.items()},
            "settled_at": list(probe.settled_at),
        }
    return found


def _show(
    console: Console, source: str, picture: Image.Image, captions: Mapping[str, Answer], probe: LayerProbe | None
) -> None:
    size = f"  {picture.width} x {picture.height} pixels"
    console.print(Padding(Text.assemble((screen.one_line(source), "bold"), (size, "dim")), (0, 1)))
    for name, answer in captions.items():
        console.print(Padding(Text.assemble(_NAMES[name], (f"  {_cost(answer)}", "dim")), (0, 1)))
        console.print(Padding(Text(screen.printable(answer.text)), (0, 1, 1, 3)))
    if probe is not None:
        console.print(Padding(Text(str(probe), overflow="fold"), (0, 1, 1, 1)))


def _cost(answer: Answer) -> str:
    """Tokens, seconds, and in a few words what was done besides."""
    told = f"{answer.usage.completion_tokens:,} tokens, {seeing.seconds_of(answer):.2f} s"
    if "crop" in answer.steps:
        (look,) = answer.steps["crop"]
        told += (
            f", no crop: {look.reason}"
            if look.box is None
            else f", crop {look.box.as_tuple()} with lift {look.lift:.2f}"
        )
    if "deco" in answer.steps:
        record = answer.steps["deco"]
        heard = ", ".join(f"{layer} ({count})" for layer, count in record.anchors.items())
        told += f", {record.share_changed:.0%} of tokens changed" + (f", by layer {heard}" if heard else "")
    return told
