"""How well `ChatMemory` finds what was said, and what a further turn costs, at several lengths of the history.

``python -m benchmarks.chat_memory`` generates histories of several people's talk with an assistant
(`qr_integrations.evaluation.chat_histories`) and asks 16 questions of each. Recall is that of the one turn that holds
the answer; ``bare`` systems read the turns without speaker and time. Costs are processor time of one thread: a turn
appended to a history that is kept, the first search after it, the next one, and reading the whole history again.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks import measure
from qr_integrations.backend import Backend
from qr_integrations.bundled import read_detection_lists
from qr_integrations.evaluation.bm25 import Bm25, document_text
from qr_integrations.evaluation.chat_histories import KINDS, History, make_histories
from qr_integrations.retrieval.memory import ChatMemory
from qr_integrations.retrieval.turns import Turn

Layout = Literal["joint", "block"]
_RESULTS = Path(__file__).parent / "results" / "chat-memory.json"
_SYSTEMS = ("joint", "block", "bm25", "joint bare", "block bare")
_RANKS = (1, 5)
_LAYOUTS: dict[str, Layout] = {"joint": "joint", "block": "block"}
_COSTS = ("append", "search after it", "search", "read again")
_NEW = Turn("By the way, I have moved my piano lesson to Thursday, at six in the evening.", "Anna")
_QUERY = "When is Anna's piano lesson?"


@dataclass(frozen=True, slots=True)
class Recall:
    """How often the evidence is among the first ranks, of how many questions of a kind."""

    system: str
    num_tokens: int
    kind: str
    questions: int
    at: dict[int, float]


def turns_of(history: History, is_bare: bool) -> list[Turn]:
    """What is appended to a memory."""
    turns = [Turn.of_document(document) for document in history.turns]
    return [Turn(turn.text) for turn in turns] if is_bare else turns


def orders_of(system: str, backend: Backend, history: History) -> list[list[int]]:
    """The best turns for each question of a history, best first."""
    name, _, bare = system.partition(" ")
    turns, queries = turns_of(history, bool(bare)), [question.text for question in history.questions]
    if name == "bm25":
        found = Bm25([document_text(turn.document()) for turn in turns])
        return [found.top(query, max(_RANKS)) for query in queries]
    memory = ChatMemory(backend, layout=_LAYOUTS[name])
    memory.extend(turns)
    return [ranking.order for ranking in memory.search_batch(queries, max(_RANKS))]


def recall_of(system: str, backend: Backend, histories: Sequence[History], num_tokens: int) -> list[Recall]:
    """One system at one length, by kind of question."""
    found: dict[str, list[list[bool]]] = {kind: [] for kind in KINDS}
    for history in histories:
        for question, order in zip(history.questions, orders_of(system, backend, history), strict=True):
            found[question.kind].append([question.evidence in order[:rank] for rank in _RANKS])
    shares = {kind: [statistics.fmean(column) for column in zip(*hits, strict=True)] for kind, hits in found.items()}
    return [
        Recall(system, num_tokens, kind, len(hits), dict(zip(_RANKS, shares[kind], strict=True)))
        for kind, hits in found.items()
    ]


def seconds(run: Callable[[], Any]) -> float:
    """Processor time of all threads."""
    measure.synchronize()
    start = time.process_time()
    run()
    measure.synchronize()
    return time.process_time() - start


def costs_of(layout: Layout, backend: Backend, history: History, repeats: int) -> dict[str, float]:
    """Seconds, the minimum of several turns or rounds."""
    turns = turns_of(history, is_bare=False)
    kept = ChatMemory(backend, layout=layout)
    kept.extend(turns)
    kept.search(_QUERY)
    taken: dict[str, list[float]] = {name: [] for name in _COSTS}

    def read_again() -> None:
        fresh = ChatMemory(backend, layout=layout)
        fresh.extend([*turns, _NEW])
        fresh.search(_QUERY)

    for _ in range(repeats):
        taken["append"].append(seconds(lambda: kept.append(_NEW)))
        taken["search after it"].append(seconds(lambda: kept.search(_QUERY)))
        taken["search"].append(seconds(lambda: kept.search(_QUERY)))
        taken["read again"].append(seconds(read_again))
    return {name: min(times) for name, times in taken.items()}


def recall_table(found: Sequence[Recall]) -> str:
    """A line for each system and length."""
    kinds = {recall.kind: recall.questions for recall in found}
    lines = [
        f"| system | tokens | {' | '.join(f'{kind} ({count})' for kind, count in kinds.items())} |",
        "|---" * (2 + len(kinds)) + "|",
    ]
    for system, num_tokens in dict.fromkeys((recall.system, recall.num_tokens) for recall in found):
        row = [recall for recall in found if (recall.system, recall.num_tokens) == (system, num_tokens)]
        cells = [" / ".join(f"{100 * share:.0f}" for share in recall.at.values()) for recall in row]
        lines.append(f"| {system} | {num_tokens:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cost_table(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each layout and length, milliseconds."""
    lines = [f"| layout | tokens | turns | {' | '.join(_COSTS)} |", "|---" * (3 + len(_COSTS)) + "|"]
    for row in rows:
        cells = " | ".join(f"{1000 * row['seconds'][name]:.0f}" for name in _COSTS)
        lines.append(f"| {row['layout']} | {row['tokens']:,} | {row['turns']} | {cells} |")
    return "\n".join(lines)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.chat_memory", description=__doc__)
    parser.add_argument("--model", default="qr-mini")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1000, 2000, 4000, 8000, 16000], help="of a history")
    parser.add_argument("--histories", type=int, default=20, help="of each length; 0 leaves out recall")
    parser.add_argument("--systems", nargs="+", choices=_SYSTEMS, default=_SYSTEMS[:3])
    parser.add_argument("--repeats", type=int, default=5, help="turns appended; 0 leaves out costs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=_RESULTS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    args = _arguments(argv)
    torch.set_num_threads(args.threads)
    backend, lists = Backend.load(args.model), read_detection_lists()

    def count_tokens(text: str) -> int:
        return len(backend.tokenizer.encode(text, add_special_tokens=False))

    found: list[Recall] = []
    costs: list[dict[str, Any]] = []
    for num_tokens in args.tokens:
        histories = make_histories(lists, num_tokens, count=max(1, args.histories), count_tokens=count_tokens)
        for system in args.systems if args.histories else ():
            found += recall_of(system, backend, histories, num_tokens)
            print(recall_table(found[-len(KINDS) :]).splitlines()[-1], flush=True)
        for layout in _LAYOUTS.values() if args.repeats else ():
            taken = costs_of(layout, backend, histories[0], args.repeats)
            size = {"layout": layout, "tokens": num_tokens, "turns": len(histories[0].turns)}
            costs.append({**size, "seconds": taken})
            print(cost_table(costs[-1:]).splitlines()[-1], flush=True)
    if found:
        print("", "Recall at 1 / at 5, %", "", recall_table(found), sep="\n")
    if costs:
        print("", "Processor time, ms", "", cost_table(costs), sep="\n")
    result = {"machine": measure.machine(), "recall": [asdict(recall) for recall in found], "costs": costs}
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
