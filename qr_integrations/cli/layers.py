"""`qr-integrations layers`: how alike the layers of a vision tower see, their groups, and candidates out of each."""

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from qr_integrations.backend.loading import hide_progress_bars
from qr_integrations.backend.tower_states import open_tower
from qr_integrations.cli import screen
from qr_integrations.encoding.layers import (
    LayerSimilarity,
    Representative,
    cut_strengths,
    group_layers,
    layer_similarity,
    representatives,
)
from qr_integrations.errors import InputError
from qr_integrations.evaluation.layer_plots import plot_similarity
from qr_integrations.evaluation.layer_skills import skill_scenes
from qr_integrations.evaluation.plots import require_matplotlib
from qr_integrations.images import open_picture

_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif")
_RULES: tuple[Representative, ...] = Representative.__args__  # type: ignore[attr-defined]
_DRAWN = 64  # pictures of the example


def run(args: argparse.Namespace) -> int:
    """Compare, draw if asked to, print. What fails for its arguments does so before the model is loaded."""
    if args.example == (args.images is not None):
        raise InputError("no pictures, or two kinds of them: pass either --images FOLDER or --example")
    if args.groups < 1:
        raise InputError(f"--groups {args.groups} are none: pass at least 1")
    paths = [] if args.example else _pictures_in(args.images)
    if args.limit is not None and args.limit < 1:
        raise InputError(f"--limit {args.limit} leaves no picture: pass at least 1")
    limit = args.limit or len(paths) or _DRAWN
    limit = min(limit, len(paths)) if paths else limit
    if args.out is not None:
        _check_out(args.out)
    if not sys.stderr.isatty():
        hide_progress_bars()
    tower = open_tower(args.model, device=args.device, dtype=args.dtype, trust_remote_code=args.trust_remote_code)
    if args.groups > tower.num_layers + 1:
        raise InputError(f"--groups {args.groups} are too many: pass up to {tower.num_layers + 1} for {args.model!r}")
    with screen.counting("pictures", limit) as tell:
        pictures = _counted(_opened(paths, limit), limit, tell)
        similarity = layer_similarity(tower, pictures, compare=args.compare, tokens=args.tokens)
    groups = group_layers(similarity, args.groups, args.rule)
    if args.out is not None:
        plot_similarity(similarity, args.out, groups)
    if args.json:
        screen.write_json(json.dumps(_as_json(similarity, groups, args), ensure_ascii=False))
    else:
        _show(screen.stdout(), similarity, groups, args)
    return 0


def _pictures_in(folder: str) -> list[Path]:
    """The pictures of a folder by name, its folders not included."""
    if not Path(folder).is_dir():
        raise InputError(f"there is no folder {folder!r}: check the path")
    paths = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in _ENDINGS and path.is_file())
    if not paths:
        raise InputError(f"the folder {folder!r} holds no pictures: pass one with files in {', '.join(_ENDINGS)}")
    return paths


def _opened(paths: list[Path], limit: int) -> Iterator[Image.Image]:
    """The pictures of files, or drawn ones; one at a time."""
    if not paths:
        return (scene.picture() for scene in skill_scenes(limit))
    return (open_picture(path) for path in islice(paths, limit))


def _counted(pictures: Iterator[Image.Image], total: int, tell: Any) -> Iterator[Image.Image]:
    for number, picture in enumerate(pictures):
        tell(number, total)
        yield picture


def _check_out(out: str) -> None:
    path = Path(out)
    if path.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise InputError(f"--out {out!r} is in no known format: end its name in .png, .pdf or .svg")
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise InputError(f"--out {out!r} cannot be written: pass the name of a file in a folder that is there")
    require_matplotlib()


# ---- what is told


def _candidates(similarity: LayerSimilarity, groups: tuple[range, ...]) -> dict[str, list[int]]:
    return {rule: list(representatives(similarity, groups, rule)) for rule in _RULES}


def _as_json(similarity: LayerSimilarity, groups: tuple[range, ...], args: argparse.Namespace) -> dict[str, Any]:
    return {
        **similarity.as_dict(),
        "adjacent": similarity.adjacent.tolist(),
        "rule": args.rule,
        "cut_strengths": cut_strengths(similarity, args.rule).tolist(),
        "groups": [[group[0], group[-1]] for group in groups],
        "candidates": _candidates(similarity, groups),
        "picture": args.out,
    }


def _show(console: Console, similarity: LayerSimilarity, groups: tuple[range, ...], args: argparse.Namespace) -> None:
    table = Table(box=None, padding=(0, 1))
    for title in ("layers", "cosine", "±", "cut"):
        table.add_column(title, justify="right")
    table.add_column("")
    starts = {group[0] for group in groups[1:]}
    strengths = cut_strengths(similarity, args.rule)
    for layer, (cosine, strength) in enumerate(zip(similarity.adjacent, strengths, strict=True)):
        error = similarity.error[layer, layer + 1]
        mark = "<- cut" if layer + 1 in starts else ""
        spread = "" if math.isnan(error) else f"{error:.3f}"
        table.add_row(f"{layer} | {layer + 1}", f"{cosine:.3f}", spread, f"{strength:.3f}", mark)
    console.print(table)
    lines = [f"{similarity.num_pictures} pictures, {similarity.num_layers} layers, 0 are the embeddings"]
    lines.append("Groups: " + ", ".join(_named(group) for group in groups))
    for rule, layers in _candidates(similarity, groups).items():
        lines.append(f"Candidates ({rule}): vision_feature_layer={layers}")
    if similarity.feature_layers:
        lines.append(f"The model reads: {', '.join(map(str, similarity.feature_layers))}")
    if args.out is not None:
        lines.append(f"Map: {screen.one_line(args.out)}")
    for line in lines:
        console.print(Padding(Text(line), (0, 1)))


def _named(group: range) -> str:
    return str(group[0]) if len(group) == 1 else f"{group[0]}-{group[-1]}"
