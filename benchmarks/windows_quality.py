"""How good rankings are when the documents need several prompts, for every way to merge these.

``python -m benchmarks.windows_quality`` makes one list of passages out of ``benchmarks/nq`` and asks it the questions
of the test split. In ``alone`` one passage answers each question. In ``together`` three more stand beside it, which
hold it amid words of another passage: the hard case, since all that answers meets in one prompt and the others have
nothing. ``whole``, with layout block only, reads everything in one prompt. Intervals are of the difference to ``raw``.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random

import numpy as np
import torch
from jaxtyping import Float

from benchmarks import measure
from qr_integrations import QRHeadReranker
from qr_integrations.backend import Backend
from qr_integrations.evaluation.beir import read_beir
from qr_integrations.evaluation.metrics import ndcg_at_k
from qr_integrations.evaluation.statistics import Estimate, difference
from qr_integrations.types import Document

_HERE = Path(__file__).parent
_RESULTS = _HERE / "results" / "windows-quality.json"
_MERGES, _WHOLE = ("raw", "one_scale", "final"), "whole"
_BESIDE = (0, 25, 40)  # words of another passage in front of the copies of an answer; up to 40 in all
_NO_LIMIT = 10**9


@dataclass(frozen=True, slots=True)
class Corpus:
    """Passages, and questions with the places of those that answer."""

    documents: tuple[Document, ...]
    questions: tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True)
class Result:
    """One way to merge: nDCG@10 of every question, and the mean time."""

    layout: str
    answers: str
    merge: str
    ndcg: tuple[float, ...]
    seconds: float

    def against(self, baseline: "Result") -> Estimate:
        """The difference on the same questions."""
        return difference(_array(self.ndcg), _array(baseline.ndcg))


def make_corpus(num_passages: int, num_questions: int, *, together: bool, split: str = "test", seed: int = 0) -> Corpus:
    """Passages in random order, those that answer among them.

    Args:
        num_passages: in all, without the copies.
        num_questions: as many at most.
        together: beside each passage that answers stand three more.
        split: of ``benchmarks/nq``.
        seed: of the choice and the order.
    """
    draw = Random(seed)
    lists = [judged for judged in read_beir(_HERE / "nq", split=split, depth=20) if judged.relevance]
    pool = {document.id: document for judged in lists for document in judged.documents}
    draw.shuffle(lists)
    asked = [(judged.query, judged.documents[next(iter(judged.relevance))]) for judged in lists[:num_questions]]
    gold = {document.id for _, document in asked}
    others = sorted((document for document in pool.values() if document.id not in gold), key=lambda d: str(d.id))
    draw.shuffle(others)
    answers = {document.id: document for _, document in asked}
    chosen = [*answers.values(), *others[: max(0, num_passages - len(answers))]]
    draw.shuffle(chosen)
    documents: list[Document] = []
    places: dict[str | None, tuple[int, ...]] = {}
    for document in chosen:
        group = [document, *(_copies(document, others, draw) if together and document.id in gold else ())]
        places[document.id] = tuple(range(len(documents), len(documents) + len(group)))
        documents += group
    return Corpus(tuple(documents), tuple((query, places[document.id]) for query, document in asked))


def _copies(document: Document, others: Sequence[Document], draw: Random) -> list[Document]:
    """Documents that answer too: the passage amid words of another."""
    copies = []
    for before in _BESIDE:
        words = draw.choice(others).text.split()
        text = f"{' '.join(words[:before])} {document.text} {' '.join(words[before : max(_BESIDE)])}".strip()
        copies.append(Document(text, document.title))
    return copies


def measure_layout(
    backend: Backend, corpus: Corpus, layout: str, answers: str, merges: Sequence[str], per_prompt: int
) -> Iterator[Result]:
    """Ask every question with every way to merge. The prompts stay in memory, so that each is read once."""
    num_prompts = -(-len(corpus.documents) // per_prompt)
    reranker = QRHeadReranker(
        backend, max_context_tokens=_NO_LIMIT, keep_prefixes=num_prompts + 2, refinements={"layout": layout}
    )
    for merge in merges:
        several = {"batch_size": per_prompt, "merge": merge} if merge != _WHOLE else {"batch_size": None}
        reranker.limits = replace(reranker.limits, **several)
        reranker.rank("who", corpus.documents)
        start = time.process_time()
        found = [ndcg_at_k(reranker.rank(query, corpus.documents).order, places) for query, places in corpus.questions]
        yield Result(layout, answers, merge, tuple(found), (time.process_time() - start) / len(found))


def table(results: Sequence[Result]) -> str:
    """A line for each way to merge."""
    lines = ["| layout | answers | merge | nDCG@10 | against raw | s per question |", "|---|---|---|---|---|---|"]
    for result in results:
        raw = next(r for r in results if (r.layout, r.answers, r.merge) == (result.layout, result.answers, "raw"))
        found = result.against(raw)
        against = "" if result is raw else f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
        mean = _array(result.ndcg).mean()
        lines.append(
            f"| {result.layout} | {result.answers} | `{result.merge}` | {mean:.3f} | {against} | {result.seconds:.2f} |"
        )
    return "\n".join(lines)


def _array(values: Sequence[float]) -> Float[np.ndarray, "n"]:
    return np.array(values)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.windows_quality", description=__doc__)
    parser.add_argument("--model", default="qr-mini")
    parser.add_argument("--passages", type=int, default=600)
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--per-prompt", type=int, default=60, help="passages")
    parser.add_argument("--split", default="test")
    parser.add_argument("--layouts", nargs="+", choices=("joint", "block"), default=("joint", "block"))
    parser.add_argument("--answers", nargs="+", choices=("alone", "together"), default=("alone", "together"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=_RESULTS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    args = _arguments(argv)
    torch.set_num_threads(args.threads)
    backend = Backend.load(args.model)
    results: list[Result] = []
    for answers in args.answers:
        corpus = make_corpus(args.passages, args.questions, together=answers == "together", split=args.split)
        print(f"{answers}: {len(corpus.documents)} passages, {len(corpus.questions)} questions", flush=True)
        for layout in args.layouts:
            merges = [merge for merge in (*_MERGES, _WHOLE) if merge != _WHOLE or layout == "block"]
            for result in measure_layout(backend, corpus, layout, answers, merges, args.per_prompt):
                results.append(result)
                print(table(results).splitlines()[-1], flush=True)
    print("", table(results), sep="\n")
    found = {"machine": measure.machine(), "passages": args.passages, "results": [asdict(result) for result in results]}
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
