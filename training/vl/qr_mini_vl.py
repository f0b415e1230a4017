"""Makes qr-mini-vl with one command; every stage goes on where it stopped.

python -m training.vl.qr_mini_vl --out FOLDER [--hours 2]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from .evaluate import caption_table, format_table, skill_table
from .export import export, load_exported
from .model import Sizes, build_model, build_processor
from .packing import Packer
from .tower import DenseHeads
from .train import Parts, Stage, Trainer


def plan(hours: float) -> list[Stage]:
    """The stages and their shares of the time; the steps only bound runs on faster machines."""
    seconds = hours * 3600
    return [
        Stage("tower", steps=10000, seconds=0.3 * seconds, pictures=32),
        Stage("language", steps=8000, seconds=0.38 * seconds, pictures=16, pairs=0.3),
        Stage("both", steps=3000, seconds=0.32 * seconds, pictures=16, pairs=0.4, rate=6e-4, tower_rate=3e-4),
    ]


def start(sizes: Sizes, device: str, seed: int = 0) -> Parts:
    """Everything before training."""
    processor = build_processor(sizes)
    model = build_model(sizes, processor.tokenizer, seed)
    heads = DenseHeads(sizes.tower_width)
    return Parts(model.to(device), heads.to(device), processor.tokenizer, sizes)


def train(parts: Parts, stages: list[Stage], folder: Path, workers: int = 1) -> None:
    """All stages that are not over yet."""
    folder.mkdir(parents=True, exist_ok=True)
    for stage in stages:
        trainer = Trainer(parts, stage, folder, workers)
        trainer.load()
        trainer.run()


def report(folder: Path, sizes: Sizes, scenes: int) -> str:
    """Measures the exported model on scenes held out, writes `report.json` beside it, and returns the tables."""
    model, processor = load_exported(folder)
    packer = Packer(processor.tokenizer, sizes)
    tables = {
        "whole": skill_table(model, packer, scenes),
        "whole and oracle crop": skill_table(model, packer, scenes, cropped=True),
    }
    captions = caption_table(model, packer, scenes)
    measured = {**tables, "captions": captions}
    (folder.parent / "report.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    return "\n\n".join([*(format_table(name, table) for name, table in tables.items()), json.dumps(captions)])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for checkpoints; the model goes to OUT/qr-mini-vl"
    )
    parser.add_argument("--hours", type=float, default=2.0, help="time for all stages together")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--workers", type=int, default=1, help="threads that draw pictures; 8 beside a GPU")
    parser.add_argument("--scenes", type=int, default=200, help="held-out scenes to measure on")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sizes = Sizes()
    parts = start(sizes, options.device)
    train(parts, plan(options.hours), options.out, options.workers)
    export(options.out / "qr-mini-vl", parts.model, build_processor(sizes))
    print(report(options.out / "qr-mini-vl", sizes, options.scenes), flush=True)


if __name__ == "__main__":
    main()
