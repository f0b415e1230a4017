"""`qr-integrations detect`: which heads of a model look for what a query asks."""

import argparse
import math
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from qr_integrations.bundled import read_detection_lists
from qr_integrations.cli import model, screen
from qr_integrations.errors import InputError
from qr_integrations.evaluation.lists import read_lists
from qr_integrations.evaluation.plots import plot_heads
from qr_integrations.retrieval import HeadDetector, HeadSet
from qr_integrations.retrieval.detection import Detection
from qr_integrations.types import JudgedList

_BUILT_IN = "Natural Questions, 100 lists of 10 that ship with the package"
_SHADES, _ASCII_SHADES = " ░▒▓█", " .:*#"
_UNITS = {
    "qrscore": "attention mass on the gold passages",
    "ndcg": "nDCG@10 of the head alone",
    "contrastive": "probability of gold against the others",
}


def run(args: argparse.Namespace) -> int:
    """Read, score all heads, write the best."""
    if args.top_k < 1 or (args.limit is not None and args.limit < 1):
        raise InputError("--top-k and --limit count from 1: pass at least 1, or leave them out")
    out = Path(args.out)
    if not out.parent.is_dir():
        raise InputError(f"there is no folder {str(out.parent)!r}: make it, or pass another --out")
    lists: Iterable[JudgedList] = read_lists(args.data) if args.data else read_detection_lists()[: args.limit]
    detector = HeadDetector(
        model.load(args),
        max_layer=args.max_layer,
        seed=args.seed,
        truncation="head",
        max_doc_tokens=args.max_doc_tokens,
    )
    total = len(lists) if isinstance(lists, list) else args.limit
    with screen.counting("Detecting", total) as advance:
        detection = detector.detect(
            islice(lists, args.limit),
            data=args.data or _BUILT_IN,
            state=out.with_suffix(".part"),
            progress=lambda done: advance(done, total),
        )
    chosen = detection.save(out, args.objective, top_k=args.top_k, max_layer=args.max_layer)
    if args.plot:
        title = f"{len(chosen)} heads of {detector.backend.name}"
        plot_heads(
            detection.grid(args.objective), set(chosen.heads), args.plot, title=title, label=_UNITS[args.objective]
        )
    if args.json:
        screen.write_json(out.read_text(encoding="utf-8").replace("\n", ""))
    else:
        show(screen.stdout(), detection, chosen, args)
    return 0


def show(console: Console, detection: Detection, chosen: HeadSet, args: argparse.Namespace) -> None:
    """The chosen heads, all heads as a grid, and what a cap of layers would cost."""
    scores = detection.scores(args.objective)
    console.print(Text(f" {len(chosen)} of {len(detection.heads)} heads of {chosen.model}", style="bold"))
    console.print(Padding(Text(", ".join(f"{la}-{h} {scores[la, h]:.3f}" for la, h in chosen.heads)), (0, 1)))
    console.print(Padding(Text(f"layer-head, {_UNITS[args.objective]}", style="dim"), (0, 1)))
    console.print()
    console.print(_grid(detection.grid(args.objective), set(chosen.heads), console))
    stable = detection.stability(args.objective, top_k=args.top_k)
    deepest = max(layer for layer, _ in detection.heads)
    console.print(
        Padding(
            f"Two halves of the {sum(detection.counts)} lists share {stable.shared} of their best {stable.of} heads "
            f"({stable.by_chance:.1f} by chance); rank correlation of all heads {stable.rank_correlation:.2f}. "
            f"Layers 0 to {chosen.top_layer} of {deepest} need to run.",
            (1, 1, 0, 1),
        )
    )
    console.print(Padding(_depths(detection.by_depth(args.objective, top_k=args.top_k), args.top_k), (1, 1)))
    console.print(
        Padding(Text(f"Written to {args.out}: QRHeadReranker(model, heads={args.out!r})", style="dim"), (0, 1))
    )


def _depths(means: dict[int, float], top_k: int) -> str:
    """What --max-layer would cost, at up to eight depths."""
    layers = list(means)
    shown = sorted({layers[round(i * (len(layers) - 1) / 7)] for i in range(8)})
    told = ", ".join(f"{layer}: {means[layer]:.3f}" for layer in shown)
    return f"Mean of the best {top_k} heads with --max-layer  {told}"


def _grid(grid: np.ndarray, chosen: set[tuple[int, int]], console: Console) -> Text:
    """Layers from the top down, one shade per head, chosen ones in colour."""
    shades = _ASCII_SHADES if console.options.ascii_only else _SHADES
    low, high = float(np.nanmin(grid)), float(np.nanmax(grid))
    text = Text()
    for layer in reversed(range(len(grid))):
        text.append(f" {layer:>3} ", style="dim")
        for head, score in enumerate(grid[layer]):
            share = 0.0 if math.isnan(score) or high <= low else (score - low) / (high - low)
            shade = shades[round(share * (len(shades) - 1))]
            text.append(shade * 2, style="bold bright_yellow" if (layer, head) in chosen else "")
        text.append("\n")
    return text.append(f"     head 0 to {grid.shape[1] - 1}", style="dim")
