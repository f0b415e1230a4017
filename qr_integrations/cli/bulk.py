"""`qr-integrations bulk`: rank or detect over millions of lists, with Ray Data."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qr_integrations.bundled import BUNDLED
from qr_integrations.cli import screen
from qr_integrations.cli.detect import show
from qr_integrations.cli.rerank import heads_of
from qr_integrations.errors import InputError
from qr_integrations.model_settings import ModelSettings
from qr_integrations.reranking import RerankSettings
from qr_integrations.retrieval import HeadSet
from qr_integrations.serving.bulk import (
    BulkReport,
    ListsFile,
    RunFile,
    Workers,
    detect_in_bulk,
    rerank_in_bulk,
    write_trec,
)

_PASSED_OVER = 1  # exit code
_TELL_EVERY = 60.0  # seconds, where there is no terminal to draw a bar on


def run(args: argparse.Namespace) -> int:
    """Do what is asked; 1 if lists were passed over."""
    return _rerank(args) if args.task == "rerank" else _detect(args)


def _rerank(args: argparse.Namespace) -> int:
    trec = None if args.trec is None else _in_a_folder(args.trec, "--trec")
    settings, begun = _ranking(args), time.monotonic()
    with _counting("Ranking") as progress:
        report = rerank_in_bulk(
            _source(args),
            _in_a_folder(args.out, "--out"),
            settings,
            top_n=args.top_n,
            batch_size=args.batch_size,
            shard_lists=args.shard_lists,
            workers=_workers(args),
            strict=args.strict,
            progress=progress,
        )
    if trec:
        write_trec(args.out, trec)
    if args.json:
        screen.write_json(json.dumps(_as_json(report, time.monotonic() - begun) | {"out": args.out}))
    else:
        screen.stdout().print(_told(report, time.monotonic() - begun), soft_wrap=True)
    return _bad(report, Path(args.out))


def _detect(args: argparse.Namespace) -> int:
    if args.top_k < 1:
        raise InputError(f"--top-k {args.top_k} keeps no head: pass at least 1")
    out = _in_a_folder(args.out, "--out")
    parts, begun = out.with_name(f"{out.name}.parts"), time.monotonic()
    with _counting("Detecting") as progress:
        detection, report = detect_in_bulk(
            ListsFile(Path(args.data).resolve(), judged=True),
            parts,
            ModelSettings(**_model(args)),
            data=args.data,
            shard_lists=args.shard_lists,
            workers=_workers(args),
            strict=args.strict,
            progress=progress,
            max_layer=args.max_layer,
            seed=args.seed,
            truncation="head",
            max_doc_tokens=args.max_doc_tokens,
        )
    chosen = detection.save(out, args.objective, top_k=args.top_k, max_layer=args.max_layer)
    if args.json:
        screen.write_json(out.read_text(encoding="utf-8").replace("\n", ""))
    else:
        screen.stdout().print(_told(report, time.monotonic() - begun), soft_wrap=True)
        show(screen.stdout(), detection, chosen, args)
    return _bad(report, parts)


def _source(args: argparse.Namespace) -> ListsFile | RunFile:
    if bool(args.lists) == bool(args.run) or {bool(args.corpus), bool(args.queries)} != {bool(args.run)}:
        raise InputError("what is to be ranked is not clear: pass --lists, or --run with --corpus and --queries")
    if args.depth is not None and (args.lists or args.depth < 1):
        raise InputError("--depth counts documents of a run: pass at least 1, with --run")
    if args.lists:
        return ListsFile(Path(args.lists).resolve())
    run, corpus, queries = (Path(given).resolve() for given in (args.run, args.corpus, args.queries))
    return RunFile(run, corpus, queries, args.depth)


def _ranking(args: argparse.Namespace) -> RerankSettings:
    if args.method == "icr" and args.heads != "auto":
        raise InputError("--method icr takes all heads: leave out --heads, or --method")
    if any(given is not None and given < 1 for given in (args.max_doc_tokens, args.max_context_tokens)):
        raise InputError("--max-doc-tokens and --max-context-tokens count from 1: pass at least 1")
    heads = heads_of(args.heads)
    return RerankSettings(
        **_model(args),
        method=args.method,
        heads=list(HeadSet.load(heads).heads) if isinstance(heads, Path) else heads,
        instruction=args.instruction,
        truncation=args.truncation,
        max_doc_tokens=args.max_doc_tokens,
        max_context_tokens=args.max_context_tokens,
        refinements={"layout": args.layout},
        normalize=None if args.normalize == "none" else args.normalize,
    )


def _model(args: argparse.Namespace) -> dict[str, Any]:
    """The name of a folder is the same for all workers."""
    is_folder = args.model not in BUNDLED and Path(args.model).is_dir()
    device = "cpu" if args.device == "auto" and args.num_gpus == 0 else args.device
    return {
        "model": str(Path(args.model).resolve()) if is_folder else args.model,
        "device": device,
        "dtype": args.dtype,
        "trust_remote_code": args.trust_remote_code,
    }


def _workers(args: argparse.Namespace) -> Workers:
    memory = None if args.memory_gb is None else int(args.memory_gb * 2**30)
    return Workers(args.replicas, args.threads, args.num_gpus, memory)


def _in_a_folder(path: str, name: str) -> Path:
    found = Path(path).resolve()
    if not found.parent.is_dir():
        raise InputError(f"there is no folder {str(found.parent)!r}: make it, or pass another {name}")
    return found


@contextmanager
def _counting(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar at a terminal, else a line now and then."""
    told = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal told
        advance(done, total)
        if not sys.stderr.isatty() and time.monotonic() - told >= _TELL_EVERY:
            told = time.monotonic()
            screen.note(f"{done:,} of {total:,} lists")

    with screen.counting(what, None) as advance:
        yield tell


def _as_json(report: BulkReport, seconds: float) -> dict[str, Any]:
    return {"lists": report.lists, "bad": report.bad, "done_now": report.done_now, "seconds": round(seconds, 1)}


def _told(report: BulkReport, seconds: float) -> str:
    earlier = f", {report.lists - report.done_now:,} of them earlier" if report.done_now < report.lists else ""
    return f"{report.lists - report.bad:,} of {report.lists:,} lists done{earlier}, in {seconds:,.0f} seconds"


def _bad(report: BulkReport, folder: Path) -> int:
    if not report.bad:
        return 0
    screen.note(f"{report.bad:,} of {report.lists:,} lists were passed over: see {folder / '_errors.jsonl'}")
    return _PASSED_OVER
