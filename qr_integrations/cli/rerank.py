"""`qr-integrations rerank`: your files, ranked for a query."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from qr_integrations.cli import model, screen
from qr_integrations.cli.reading import read_documents
from qr_integrations.errors import InputError
from qr_integrations.retrieval import ICRReranker, QRHeadReranker
from qr_integrations.retrieval.reranker import AttentionReranker
from qr_integrations.types import Ranking, ScoredDocument

_HEAD_PAIRS = re.compile(r"\d+-\d+(?:,\d+-\d+)*")
_EXPLAINED = 3  # panels below the table, unless --top-k asks for another number


def run(args: argparse.Namespace) -> int:
    """Read, rank, print."""
    if args.icr and args.heads != "auto":
        raise InputError("--icr takes all heads: leave out --heads, or --icr")
    documents = read_documents(args.files, paragraphs=args.split == "paragraphs")
    reranker = _reranker(args)
    ranking = reranker.rank(args.query, documents, explain=args.explain, max_spans=None)
    _note_what_was_lost(ranking, reranker.limits.max_context_tokens)
    ranking = ranking.top(args.top_k)
    if args.json:
        screen.write_json(json.dumps(_as_json(ranking, reranker, args.explain), ensure_ascii=False))
        return 0
    console = screen.stdout()
    console.print(_table(ranking, console))
    if args.explain:
        for rank, item in enumerate(ranking.top(args.top_k or _EXPLAINED), start=1):
            console.print(_panel(item, rank))
    return 0


def _reranker(args: argparse.Namespace) -> AttentionReranker:
    if args.top_k is not None and args.top_k < 1:
        raise InputError(f"--top-k {args.top_k} shows nothing: pass at least 1, or leave it out")
    backend = model.load(args)
    options: dict[str, Any] = {
        "truncation": args.truncation,
        "max_doc_tokens": args.max_doc_tokens,
        "instruction": args.instruction,
    }
    if args.icr:
        return ICRReranker(backend, **options)
    return QRHeadReranker(backend, heads=heads_of(args.heads), **options)


def heads_of(given: str) -> str | Path | list[tuple[int, int]]:
    """What --heads means: a word, pairs, or else a file.

    Raises:
        InputError: there is no such file.
    """
    if given in ("auto", "all"):
        return given
    if _HEAD_PAIRS.fullmatch(given.replace(" ", "")):
        layer_heads = (pair.split("-") for pair in given.replace(" ", "").split(","))
        return [(int(layer), int(head)) for layer, head in layer_heads]
    if not Path(given).is_file():
        raise InputError(f'--heads {given!r} is no file: pass auto, all, a JSON file, or pairs from 0 like "1-3,2-5"')
    return Path(given)


def _note_what_was_lost(ranking: Ranking, max_context_tokens: int | None) -> None:
    cut = [item for item in ranking if item.num_tokens_cut]
    if cut:
        worst = max(cut, key=lambda item: item.num_tokens_cut)
        total = sum(item.num_tokens_cut for item in cut)
        window = f" (the model's window holds {max_context_tokens:,})" if max_context_tokens else ""
        screen.note(
            f"{len(cut)} of {len(ranking)} documents were cut at their end, {total:,} tokens were not read{window}; "
            f"most in {worst.document.id}: {worst.num_tokens_cut:,} of {worst.num_tokens_cut + worst.num_tokens:,}"
        )
    empty = sorted(str(item.document.id) for item in ranking if not item.document.text.strip())
    if empty:
        screen.note(f"without text, ranked by title alone: {', '.join(empty)}")
    if len({item.window for item in ranking}) > 1:
        screen.note("ranked in several prompts: scores compare within one window only")


def _as_json(ranking: Ranking, reranker: AttentionReranker, explained: bool) -> dict[str, Any]:
    return {
        "query": ranking.query,
        "model": reranker.backend.name,
        "num_heads": len(reranker.heads),
        "items": [_item(rank, item, explained) for rank, item in enumerate(ranking, start=1)],
    }


def _item(rank: int, item: ScoredDocument, explained: bool) -> dict[str, Any]:
    entry: dict[str, Any] = {"rank": rank, "index": item.index, "score": item.score, "id": item.document.id}
    entry |= {"file": item.document.metadata["file"], "title": item.document.title}
    entry |= {"num_tokens": item.num_tokens, "num_tokens_cut": item.num_tokens_cut, "window": item.window}
    if explained:
        entry["spans"] = [span.as_dict() for span in item.spans]
    return entry


def _table(ranking: Ranking, console: Console) -> Table:
    wide = console.width >= screen.NARROW
    table = Table(box=None, padding=(0, 1), expand=True)
    table.add_column("#", justify="right")
    table.add_column("score", justify="right")
    if wide:
        table.add_column("", width=8)
    table.add_column("document", ratio=1, no_wrap=True, overflow="ellipsis")
    if wide:
        table.add_column("tokens", justify="right")
    highest = max((item.score for item in ranking), default=0.0)
    for rank, item in enumerate(ranking, start=1):
        tokens = f"{item.num_tokens:,}" + (f" (-{item.num_tokens_cut:,})" if item.num_tokens_cut else "")
        bar = screen.bar(item.score / highest if highest > 0 else 0.0, 8, console)
        cells: list[RenderableType] = [str(rank), f"{item.score:z.4f}", bar, screen.label(item.document), tokens]
        table.add_row(*(cells if wide else [*cells[:2], cells[3]]))
    return table


def _panel(item: ScoredDocument, rank: int) -> Panel:
    spans = item.spans if item.score > 0 else ()
    attended = screen.most_attended(item) if spans else ""
    below = f"Most attended: {attended}" if attended else "The query looks at this no more than any query would."
    return Panel(
        Group(screen.highlighted(item.document.text, spans), Text(f"\n{below}", style="dim")),
        title=Text(screen.one_line(f"{rank}. {item.document.title or item.document.id}")),
        title_align="left",
        border_style="dim",
    )
