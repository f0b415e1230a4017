"""Teaches heads of any model to rank documents: LoRA on queries and keys, by the objective that made `qr-mini`.

python -m training.finetune_heads --model MODEL --data lists.jsonl --valid-share 0.2 --out FOLDER

Stopped and started again with the same arguments, it goes on from its last checkpoint, in FOLDER.part.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import mean

from qr_integrations.backend import Backend
from qr_integrations.backend.loading import hide_progress_bars
from qr_integrations.errors import HeadError, InputError, QRError
from qr_integrations.evaluation.lists import read_lists
from qr_integrations.files import whole_folder, write_whole
from qr_integrations.retrieval import HeadSet
from qr_integrations.types import JudgedList

from .head_trainer import FinetuneSettings, HeadTrainer, shuffled


@dataclass(frozen=True, slots=True)
class Finetuned:
    """What came of it.

    Attributes:
        folder: the model.
        before, after: nDCG@10 of `QRHeadReranker` on the validation lists; None where there were none.
        best_step: the step whose adapter was kept; 0 when no later one ranked the validation lists better.
        temperature: the learned one, of the last step.
        losses: of every step.
        checks: ``(step, nDCG@10)`` of every measurement.
    """

    folder: Path
    before: float | None
    after: float | None
    best_step: int
    temperature: float
    losses: tuple[float, ...]
    checks: tuple[tuple[int, float], ...]


def finetune(
    backend: Backend,
    lists: Sequence[JudgedList],
    out: str | Path,
    *,
    heads: HeadSet | str | Path | Sequence[tuple[int, int]] = "auto",
    max_layer: int | None = None,
    valid: Sequence[JudgedList] = (),
    data: str = "",
    settings: FinetuneSettings | None = None,
    progress: Callable[[HeadTrainer], None] | None = None,
) -> Finetuned:
    """Train heads on judged lists and write the model, so that ``QRHeadReranker(out)`` ranks with them.

    `out` is whole or not there: the model with the adapter merged into its weights, the tokenizer, ``qr_heads.json``,
    ``training.json`` with all figures, and the adapter alone in ``adapter``. Until then, checkpoints lie in a folder
    beside it, with ``.part`` behind its name; a run that was stopped goes on from there and ends as one run would.

    Args:
        backend: the model. It is changed: in the end it is the one that was written.
        lists: questions with documents, of which some are relevant and some are not.
        out: a folder that is not there yet.
        heads: as in `QRHeadReranker`.
        max_layer: heads above are left out. Layers above the highest head neither run nor change.
        valid: lists to choose the best checkpoint with; without them it is the last.
        data: what to call the lists in the result.
        settings: how long, and with what.
        progress: called after every step.

    Raises:
        InputError: no lists, one without relevant or without other documents, a folder that is there, a checkpoint of
            another run.
        HeadError: no heads are known for the model, or it lacks them.
        MissingExtra: peft is not installed.
    """
    out = Path(out)
    if out.exists() or not out.parent.is_dir():
        raise InputError(f"{str(out)!r} must be a new folder in one that is there: pass another, or remove it")
    chosen = _below(HeadSet.resolve(heads, backend), max_layer)
    trainer = HeadTrainer(backend, chosen, lists, valid, settings or FinetuneSettings())
    part = out.with_name(out.name + ".part")
    part.mkdir(exist_ok=True)
    trainer.run(part / "checkpoint.safetensors", progress)
    with whole_folder(out) as folder:
        done = _write(trainer, folder, data)
    shutil.rmtree(part)
    return replace(done, folder=out)


def held_out(lists: Sequence[JudgedList], share: float, seed: int = 0) -> tuple[list[JudgedList], list[JudgedList]]:
    """Lists to train on, and a random share of all that is kept apart for validation.

    Raises:
        InputError: nothing is left on one side.
    """
    count = round(share * len(lists))
    if not 0 < count < len(lists):
        raise InputError(f"a share of {share} of {len(lists)} lists leaves none on one side: pass another share")
    apart = set(shuffled(len(lists), f"{seed}-held-out")[:count])
    return [x for i, x in enumerate(lists) if i not in apart], [x for i, x in enumerate(lists) if i in apart]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0 done, 2 error, 130 interrupted."""
    args = _parser().parse_args(arguments)
    if not sys.stderr.isatty():
        hide_progress_bars()
    try:
        done = _run(args)
    except QRError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    if done.before is not None and done.after is not None:
        print(f"nDCG@10 {done.before:.3f} before, {done.after:.3f} after; kept: step {done.best_step}")
    print(f"written to {done.folder}: QRHeadReranker({str(done.folder)!r})")
    return 0


def _run(args: argparse.Namespace) -> Finetuned:
    settings = FinetuneSettings(**{field.name: getattr(args, field.name) for field in fields(FinetuneSettings)})
    lists, valid = list(read_lists(args.data)), list(read_lists(args.valid)) if args.valid else []
    if args.valid_share is not None:
        lists, valid = held_out(lists, args.valid_share, args.seed)
    backend = Backend.load(args.model, device=args.device, dtype=args.dtype)
    return finetune(
        backend,
        lists,
        args.out,
        heads=args.heads,
        max_layer=args.max_layer,
        valid=valid,
        data=Path(args.data).name,
        settings=settings,
        progress=_tell,
    )


def _tell(trainer: HeadTrainer) -> None:
    """A line on stderr whenever something was measured, and at the end."""
    settings, step = trainer.settings, trainer.step
    if step % settings.check_every and step < settings.steps:
        return
    recent = trainer.losses[-settings.check_every :]
    line = f"step {step}/{settings.steps}: loss {mean(recent):.4f}, temperature {trainer.temperature:.4g}"
    if trainer.checks:
        line += f", nDCG@10 {trainer.checks[-1][1]:.4f} (before: {trainer.checks[0][1]:.4f})"
    print(line, file=sys.stderr, flush=True)


def _write(trainer: HeadTrainer, folder: Path, data: str) -> Finetuned:
    """All files of the result."""
    backend, count = trainer.backend, len(trainer.lists)
    trainer.finish(folder / "adapter")
    backend.model.save_pretrained(folder)
    backend.tokenizer.save_pretrained(folder)
    words = [trainer.heads.source, f"trained by python -m training.finetune_heads on {count} lists of {data or '?'}"]
    replace(trainer.heads, source="; ".join(filter(None, words))).save(folder / "qr_heads.json")
    before, after = (trainer.checks[0][1], trainer.ndcg()) if trainer.valid else (None, None)
    losses, checks = tuple(trainer.losses), tuple(trainer.checks)
    done = Finetuned(folder, before, after, trainer.best_step, trainer.temperature, losses, checks)
    told = {name: getattr(done, name) for name in Finetuned.__slots__ if name != "folder"}
    facts = {"data": data, **trainer.identity(), **told}
    lines = (f" {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in facts.items())
    write_whole(folder / "training.json", "{\n" + ",\n".join(lines) + "\n}\n")
    return done


def _below(heads: HeadSet, max_layer: int | None) -> HeadSet:
    kept = tuple(head for head in heads.heads if max_layer is None or head[0] <= max_layer)
    if not kept:
        raise HeadError(f"none of the {len(heads)} heads lies in layers 0..{max_layer}: pass a larger max_layer")
    return replace(heads, heads=kept)


def _parser() -> argparse.ArgumentParser:
    known = FinetuneSettings()
    parser = argparse.ArgumentParser(
        prog="python -m training.finetune_heads", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a bundled name, a folder, or a hub id")
    parser.add_argument("--data", required=True, metavar="FILE", help='{"query", "documents", "gold"} a line')
    parser.add_argument("--out", required=True, metavar="FOLDER", help="the trained model; must not be there yet")
    parser.add_argument("--heads", default="auto", help="auto, all, or a file of heads (default: auto)")
    parser.add_argument("--max-layer", type=int, metavar="N", help="leave out heads above this layer")
    apart = parser.add_mutually_exclusive_group()
    apart.add_argument("--valid", metavar="FILE", help="lists to choose the best checkpoint with")
    apart.add_argument("--valid-share", type=float, metavar="SHARE", help="keep this share of --data apart for that")
    for name in ("steps", "rank", "accumulate", "check-every", "save-every", "seed"):
        parser.add_argument(f"--{name}", type=int, default=getattr(known, name.replace("-", "_")), metavar="N")
    for name in ("rate", "temperature", "warmup", "clip"):
        parser.add_argument(f"--{name}", type=float, default=getattr(known, name), metavar="X")
    parser.add_argument("--targets", metavar="REGEX", help="names of the matrices to train (default: query and key)")
    parser.add_argument("--max-doc-tokens", type=int, metavar="N", help="cut documents to this length")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", help="auto: float32 on a CPU, else the checkpoint's own")
    return parser


if __name__ == "__main__":
    sys.exit(main())
