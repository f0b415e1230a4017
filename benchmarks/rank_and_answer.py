"""One model ranks and answers: what an answer behind kept documents costs, and whether it is the same answer.

``python -m benchmarks.rank_and_answer`` measures qr-mini-answers. Time: ranking known documents and answering from the
best of them, with a fresh prompt for the answer or behind the keys and values that the ranking used; and the same with
documents that nobody has read yet. An answer may end earlier by one way than by the other. Answers: made-up facts with
a gold answer, and the passages of real questions without one; each way of answering is compared with a fresh prompt of
the same documents.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.rank_workload import GPU_ONLY, SHAPES, Workload, load
from qr_integrations import Backend, Document, DocumentIndex, HeadSet, QRHeadReranker
from qr_integrations.backend import Prefix
from qr_integrations.backend.behind_prefix import lay_out_behind
from qr_integrations.bundled import read_detection_lists
from qr_integrations.retrieval.answers import answer_afresh, without_gaps
from qr_integrations.retrieval.layout import ANSWER, PromptLayout, PromptStyle
from qr_integrations.types import Message

_RESULTS = Path(__file__).parent / "results"
_NEW_TOKENS, _ANSWER_TOKENS = 16, 8
_WAYS = ("fresh prompt", "joint, gaps open", "joint, gaps closed", "block", "all documents")


# ---- time


def workload(name: str, num_tokens: int) -> Workload:
    """A bundled model with its own heads, or a random one with heads up to half its depth."""
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    work = Workload.make(load(name, dtype, device), num_tokens)
    heads = work.half if name in SHAPES else HeadSet.resolve("auto", work.backend)
    return Workload(work.backend, work.documents, heads, work.last)


def jobs(work: Workload, layout: str, top_k: int) -> list[measure.Measurable]:
    """Rank and answer: as two prompts, and from what is kept; documents known, and new."""
    settings: dict[str, Any] = {"heads": work.half, "refinements": {"layout": layout}}
    warm = QRHeadReranker(work.backend, **settings)
    index = DocumentIndex.build(work.documents, QRHeadReranker(work.backend, **settings), answers=True)
    generation: dict[str, Any] = {"top_k": top_k, "max_new_tokens": _NEW_TOKENS}
    warm.rank(work.query(0), work.documents)
    index.rank(work.query(0))

    def two_prompts(reranker: QRHeadReranker, number: int) -> None:
        answer_afresh(work.backend, reranker.rank(work.query(number), work.documents), **generation)

    def new_two_prompts(repeat: int) -> None:
        two_prompts(QRHeadReranker(work.backend, **settings), 1 + repeat % 8)

    def new_kept(repeat: int) -> None:
        read = DocumentIndex.build(work.documents, QRHeadReranker(work.backend, **settings), answers=True)
        read.answer(work.query(1 + repeat % 8), **generation)

    return [
        measure.Job("known, two prompts", lambda repeat: two_prompts(warm, 1 + repeat % 8)),
        measure.Job("known, kept", lambda repeat: index.answer(work.query(1 + repeat % 8), **generation)),
        measure.Job("new, two prompts", new_two_prompts),
        measure.Job("new, kept", new_kept),
    ]


def time_table(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Print seconds of rank and answer; return the numbers."""
    print(
        f"\n{name}: rank and answer with {_NEW_TOKENS} tokens, seconds (processor seconds)\n\n"
        f"| tokens of documents | layout | top_k | documents | two prompts | kept | ratio |\n{'|---' * 7}|"
    )
    rows = []
    for num_tokens in options.tokens:
        work = workload(name, num_tokens)
        for layout in options.layouts:
            for top_k in options.top_k:
                times = measure.interleaved(jobs(work, layout, top_k), options.repeats, lambda job: 1)
                found = {job: measure.summary(taken) for job, taken in times.items()}
                for state in ("known", "new"):
                    two, kept = found[f"{state}, two prompts"], found[f"{state}, kept"]
                    cells = [f"{one['min_s']:.3f} ({one['cpu_min_s']:.3f})" for one in (two, kept)]
                    ratio = f"{two['min_s'] / kept['min_s']:.2f} ({two['cpu_min_s'] / kept['cpu_min_s']:.2f})"
                    print(
                        f"| {num_tokens:,} | {layout} | {top_k} | {state} | {' | '.join(cells)} | {ratio} |", flush=True
                    )
                rows.append({"model": name, "tokens": num_tokens, "layout": layout, "top_k": top_k, "jobs": found})
    return rows


# ---- answers


@dataclass(frozen=True, slots=True)
class Question:
    """A question about documents, and its answer if it is known."""

    text: str
    documents: tuple[Document, ...]
    answer: str | None = None


def facts(count: int, size: int) -> list[Question]:
    """Made-up facts in documents of one to three sentences, names and wordings as in no training."""
    from training.answers.facts import FactWriter  # needs the extra of the training
    from training.answers.vocabulary import Vocabulary

    writer, rng, found = FactWriter(Vocabulary(True), new_wordings=True), Random(7), list[Question]()
    while len(found) < count:
        lesson = writer.draw(size, 1, rng)
        documents = tuple(Document(one.text, one.title or None) for one in lesson.documents)
        found += [Question(asked.text, documents, asked.answer) for asked in lesson.asked]
    return found[:count]


def passages(count: int) -> list[Question]:
    """Real questions with ten passages each; what answers them is not known."""
    rng, found = Random(3), list[Question]()
    for judged in read_detection_lists()[:count]:
        found.append(Question(judged.query, tuple(rng.sample(judged.documents, len(judged.documents)))))
    return found


@dataclass(frozen=True, slots=True)
class Said:
    """What a model says behind a prefix.

    Attributes:
        first: log probabilities of the first token.
        gold: log probability of the known answer, all tokens together and the end; NaN without one.
        text: the answer, greedy.
    """

    first: Tensor
    gold: float
    text: str


def say(backend: Backend, prefix: Prefix, question: Question) -> Said:
    """Ask behind a prefix."""
    tail = ANSWER.format(query=question.text)
    prompt = lay_out_behind(backend, (Message.user(tail),), prefix)
    wanted = [] if question.answer is None else [*_ids(backend, question.answer), *_end(backend)]
    ids = torch.tensor([[*prompt.token_ids[len(prefix) :], *wanted]], device=backend.device)
    places = torch.arange(ids.shape[1], device=backend.device)[None] + prefix.num_positions
    with torch.no_grad():
        logits = backend.model(input_ids=ids, position_ids=places, past_key_values=prefix.growing()).logits[0].float()
    rows = logits[len(prompt) - len(prefix) - 1 :].log_softmax(-1)
    gold = sum(float(rows[i, token]) for i, token in enumerate(wanted)) if wanted else math.nan
    return Said(rows[0], gold, backend.answer(tail, prefix=prefix, max_new_tokens=_ANSWER_TOKENS).text)


def _ids(backend: Backend, text: str) -> list[int]:
    return list(backend.tokenizer(text, add_special_tokens=False)["input_ids"])


def _end(backend: Backend) -> list[int]:
    """The first token of what closes a turn of the assistant."""
    return _ids(backend, backend.chat.closing)[:1]


def fresh(backend: Backend, question: Question, used: Sequence[int]) -> Prefix:
    """A prompt of the used documents alone."""
    documents = [question.documents[place] for place in used]
    layout = PromptLayout.build(backend, question.text, documents, PromptStyle(template=ANSWER))
    top = max(backend.attention_layers)
    return backend.prefill(layout.token_ids[layout.shared.slice()], top_layer=top, values=True)


def ways(backend: Backend, question: Question, top_k: int) -> dict[str, Said]:
    """The answer to one question by each way; all but the last from the same documents, in the same order."""
    joint = DocumentIndex.build(question.documents, backend, answers=True)
    block = DocumentIndex.build(question.documents, backend, layout="block", answers=True)
    used = sorted(joint.rank(question.text, top_k).order)
    prefixes = (
        fresh(backend, question, used),
        joint.prefix(used),
        without_gaps(joint, used),
        block.prefix(used),
        joint.prefix(),
    )
    return {way: say(backend, prefix, question) for way, prefix in zip(_WAYS, prefixes, strict=True)}


def compared(backend: Backend, questions: Sequence[Question], top_k: int) -> dict[str, dict[str, float]]:
    """By way: KL from the fresh prompt's first token, agreement with it, and what is known of the gold answer."""
    found = [ways(backend, question, top_k) for question in questions]
    table = {}
    for way in _WAYS:
        pairs = [(one["fresh prompt"], one[way]) for one in found]
        divergences = sorted(float((a.first.exp() * (a.first - b.first)).sum()) for a, b in pairs)
        table[way] = {
            "kl_mean": _mean(divergences),
            "kl_median": divergences[len(divergences) // 2],
            "same_first": _mean([float(a.first.argmax() == b.first.argmax()) for a, b in pairs]),
            "same_answer": _mean([float(a.text == b.text) for a, b in pairs]),
            "gold_log_probability": _mean([one[way].gold for one in found]),
            "exact": _mean([_exact(one[way].text, q.answer) for one, q in zip(found, questions, strict=True)]),
        }
    return table


def _exact(said: str, wanted: str | None) -> float:
    return math.nan if wanted is None else float(_plain(said) == _plain(wanted))


def _plain(text: str) -> str:
    return text.strip().rstrip(".").lower()


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def answer_table(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Print how answers compare; return the numbers."""
    device, dtype = ("cuda", torch.float32) if torch.cuda.is_available() else ("cpu", torch.float32)
    backend, rows = Backend.load(name, device=device, dtype=dtype), []
    lists = {f"facts, {options.size} documents": facts(options.questions, options.size)}
    lists["passages, 10 documents"] = passages(options.questions)
    for kind, questions in lists.items():
        for top_k in options.top_k:
            if top_k >= len(questions[0].documents):
                continue
            print(
                f"\n{name}, {len(questions)} questions, {kind}, the best {top_k} kept\n\n"
                "| way | KL mean (median) | same first token | same answer | log p(gold) | exact |\n"
                "|---|---|---|---|---|---|"
            )
            found = compared(backend, questions, top_k)
            for way, one in found.items():
                shares = [f"{100 * one[key]:.0f} %" for key in ("same_first", "same_answer")]
                gold = f"{one['gold_log_probability']:.2f} | {100 * one['exact']:.0f} %"
                print(
                    f"| {way} | {one['kl_mean']:.4f} ({one['kl_median']:.4f}) | {' | '.join(shares)} | {gold} |",
                    flush=True,
                )
            rows.append({"model": name, "kind": kind, "top_k": top_k, "questions": len(questions), "ways": found})
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.rank_and_answer", description=__doc__)
    parser.add_argument(
        "--model", nargs="+", default=["qr-mini-answers"], help="bundled, a folder, or a shape (times only)"
    )
    parser.add_argument("--tokens", type=int, nargs="*", default=[2048, 8192], help="of documents; none: no times")
    parser.add_argument("--layouts", nargs="+", default=["joint", "block"])
    parser.add_argument("--top-k", type=int, nargs="+", default=[3, 10])
    parser.add_argument("--questions", type=int, default=100, help="0: answers are not compared")
    parser.add_argument("--size", type=int, default=20, help="documents with made-up facts")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; default: torch's own choice")
    parser.add_argument("--json", type=Path, default=_RESULTS / "rank-and-answer.json")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    machine = measure.machine()
    print(f"{machine['gpu'] or machine['processor']}, {machine['threads']} threads")
    found: dict[str, Any] = {"machine": machine, "times": [], "answers": []}
    for name in options.model:
        if name in GPU_ONLY and not torch.cuda.is_available():
            parser.error(f"{name} needs a GPU: pass --model qr-mini random-cpu")
        found["answers"] += answer_table(name, options) if options.questions and name not in SHAPES else []
        found["times"] += time_table(name, options)
    options.json.parent.mkdir(exist_ok=True)
    options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
