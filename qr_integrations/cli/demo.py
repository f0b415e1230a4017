"""`qr-integrations demo`: real questions, ranked by a model of a few megabytes, next to BM25."""

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.progress import track
from rich.table import Table
from rich.text import Text

from qr_integrations.bundled import BUNDLED, SAMPLE_SOURCE, SampleQuestion, read_sample
from qr_integrations.cli import model, screen
from qr_integrations.errors import InputError
from qr_integrations.evaluation import ndcg_at_k, random_ndcg_at_k
from qr_integrations.retrieval import ICRReranker, QRHeadReranker
from qr_integrations.types import Ranking

_SHOWN = 8  # rows of the table, and the gold passage in any case


@dataclass(frozen=True, slots=True)
class _Shown:
    """One question in full. Times in seconds."""

    number: int
    of: int
    question: SampleQuestion
    ranking: Ranking
    load: float
    cold: float
    warm: float


def run(args: argparse.Namespace) -> int:
    """Show one question in full, then measure all of them."""
    sample = read_sample()
    if not 1 <= args.question <= len(sample):
        raise InputError(f"there is no question {args.question}: pass --question 1 to {len(sample)}")
    if args.questions < 1:
        raise InputError(f"--questions {args.questions} measures nothing: pass 1 to {len(sample)}")
    console, progress = screen.stdout(), screen.stderr()
    with progress.status("Loading the model ...") if progress.is_terminal else nullcontext():
        start = time.perf_counter()
        backend = model.load(args)
        qrhead = QRHeadReranker(backend, truncation="head", keep_prefixes=1)
        icr = ICRReranker(backend, truncation="head", keep_prefixes=1)
        shown = _show(qrhead, sample, args.question - 1, time.perf_counter() - start)
    for part in _one_question(shown, console):
        console.print(part)
    measured = sample[: args.questions]
    scores = _measure(qrhead, icr, measured, progress)
    console.print()
    console.print(_table_of_scores(scores, console, backend.name, len(qrhead.heads)))
    console.print(Padding(_fine_print(backend.name, len(measured)), (0, 1)), style="dim")
    return 0


def _show(qrhead: QRHeadReranker, sample: Sequence[SampleQuestion], number: int, load: float) -> _Shown:
    """Rank, and ask another question about the same passages, which are not read again."""
    question, other = sample[number], sample[number - 1]
    start = time.perf_counter()
    ranking = qrhead.rank(question.question, question.documents, explain=True, max_spans=None)
    cold = time.perf_counter() - start
    start = time.perf_counter()
    qrhead.rank(other.question, question.documents)
    warm = time.perf_counter() - start
    return _Shown(number + 1, len(sample), question, ranking, load, cold, warm)


def _one_question(shown: _Shown, console: Console) -> Iterator[RenderableType]:
    yield ""
    yield Text.assemble(
        (f" Question {shown.number} of {shown.of}  ", "dim"), (screen.one_line(shown.question.question), "bold")
    )
    yield _table_of_passages(shown, console)
    left_out, star = len(shown.ranking) - len(_rows(shown)), _star(console)
    yield Padding(
        f"{star} answers the question, {left_out} more passages were ranked. Score: share of the attention.",
        (0, 1),
        style="dim",
    )
    best = shown.ranking[0]
    yield Panel(
        Group(
            screen.highlighted(best.document.text, best.spans),
            Text(f"\nMost attended: {screen.most_attended(best)}", style="dim"),
        ),
        title=Text(screen.one_line(f"1. {best.document.title or best.document.id or ''}")),
        title_align="left",
        border_style="dim",
    )
    tokens = sum(item.num_tokens for item in shown.ranking)
    yield Padding(
        f"Model loaded in {shown.load:.2f} s. {len(shown.ranking)} passages ({tokens:,} tokens) read and ranked in "
        f"{shown.cold:.2f} s; another question about the same passages takes {shown.warm:.2f} s.",
        (0, 1),
    )


def _rows(shown: _Shown) -> list[int]:
    """Ranks in the table: the first ones, and the gold passage's."""
    gold = shown.ranking.order.index(shown.question.gold)
    return sorted({*range(min(_SHOWN, len(shown.ranking))), gold})


def _table_of_passages(shown: _Shown, console: Console) -> Table:
    wide = console.width >= screen.NARROW
    table = Table(box=None, padding=(0, 1), expand=True)
    table.add_column("#", justify="right")
    table.add_column("", width=1)
    table.add_column("score", justify="right")
    if wide:
        table.add_column("", width=8)
    table.add_column("passage", ratio=1, no_wrap=True, overflow="ellipsis")
    table.add_column("BM25", justify="right", no_wrap=True)
    bm25 = _by_bm25(shown.question)
    highest = max(shown.ranking[0].score, 1e-9)
    for rank in _rows(shown):
        item = shown.ranking[rank]
        gold = item.index == shown.question.gold
        bar: list[RenderableType] = [screen.bar(item.score / highest, 8, console)] if wide else []
        cells: list[RenderableType] = [
            str(rank + 1),
            _star(console) if gold else "",
            f"{item.score:z.3f}",
            *bar,
            screen.label(item.document),
        ]
        table.add_row(*cells, f"#{bm25.index(item.index) + 1}", style="green" if gold else "")
    return table


def _star(console: Console) -> str:
    return "*" if console.options.ascii_only else "★"


def _by_bm25(question: SampleQuestion) -> list[int]:
    return sorted(range(len(question.bm25)), key=lambda i: -question.bm25[i])


def _measure(
    qrhead: QRHeadReranker, icr: ICRReranker, questions: Sequence[SampleQuestion], progress: Console
) -> dict[str, float]:
    """Mean nDCG@10 of each way to rank."""
    sums = dict.fromkeys(("heads", "bm25", "icr", "random"), 0.0)
    watched = track(
        questions, "Ranking", console=progress, transient=True, disable=not progress.is_terminal, update_period=0.2
    )
    for question in watched:
        text, documents, gold = question.question, question.documents, {question.gold}
        sums["heads"] += ndcg_at_k(qrhead.rank(text, documents).order, gold)
        sums["bm25"] += ndcg_at_k(_by_bm25(question), gold)
        sums["icr"] += ndcg_at_k(icr.rank(text, documents).order, gold)
        sums["random"] += random_ndcg_at_k(len(documents))
    return {name: total / len(questions) for name, total in sums.items()}


def _table_of_scores(scores: dict[str, float], console: Console, name: str, num_heads: int) -> Table:
    table = Table(box=None, padding=(0, 1), title_justify="left")
    table.add_column("ranked by", no_wrap=True)
    table.add_column("nDCG@10", justify="right")
    if console.width >= screen.NARROW:
        table.add_column("", width=20)
    names = {
        "heads": f"{num_heads} query-focused heads of {name}",
        "icr": f"all heads of {name} (ICR)",
        "bm25": "BM25",
        "random": "random order (expected)",
    }
    for key in sorted(names, key=lambda key: -scores[key]):
        bar = [screen.bar(scores[key], 20, console)] if console.width >= screen.NARROW else []
        table.add_row(names[key], f"{scores[key]:.3f}", *bar, style="bold" if key == "heads" else "")
    return table


def _fine_print(name: str, count: int) -> str:
    """What the numbers are, and what they are not."""
    trained = f" {name} was not trained on these questions." if name in BUNDLED else ""
    return (
        f"Mean over {count} question{'s' * (count != 1)}, each with the passage that answers it and the other passages "
        f"that BM25 ranks highest for it.{trained} A sample this small shows that it works; it settles no comparison.\n"
        f"Source: {SAMPLE_SOURCE}."
    )
