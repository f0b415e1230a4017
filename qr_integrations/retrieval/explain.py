"""Which words made a document relevant: the token scores that ranked it, put back onto its text.

tokens -> characters -> words -> spans
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import regex
from jaxtyping import Float
from torch import Tensor

from qr_integrations.errors import ModelError
from qr_integrations.retrieval.layout import PromptLayout
from qr_integrations.retrieval.scoring import drop_outliers
from qr_integrations.retrieval.words import WORD
from qr_integrations.types import ScoredSpan, Span

_BASELINE = 0.9  # of the mean word: what a word must have to lengthen a span; below 1, so that a single word is one
_EMPTY_LINE = regex.compile(r"\n\s*\n")


def attended_words(layout: PromptLayout, scores_KT: Float[Tensor, "K T"], index: int) -> list[ScoredSpan]:
    """The words of document `index` in reading order, each with the part of the document's score that fell on it.

    A token's score is spread evenly over its characters, so words cut into several tokens, and tokens that hold parts
    of two words, count right. Number, title and white space get their part too but are not words: the scores add up to
    less than the document's.

    Raises:
        ModelError: the tokenizer cannot tell which characters a token stands for.
    """
    if layout.offsets is None:
        raise ModelError(
            "this tokenizer does not tell the characters of its tokens: load the model with its tokenizer.json"
        )
    span, chars = layout.documents[index], layout.texts[index]
    scores = drop_outliers(scores_KT.sum(0, keepdim=True)[:, span.slice()])[0].double().tolist()
    per_char = np.zeros(len(chars))
    for (start, stop), score in zip((layout.offsets[span.slice()] - chars.start).tolist(), scores, strict=True):
        per_char[max(0, start) : max(0, stop)] += score / max(1, stop - start)
    upto = np.append(0.0, per_char.cumsum())
    words = WORD.finditer(layout.text[chars.slice()])
    return [ScoredSpan(Span(m.start(), m.end()), m.group(), float(upto[m.end()] - upto[m.start()])) for m in words]


def strongest_spans(text: str, words: Sequence[ScoredSpan], max_spans: int | None = 3) -> list[ScoredSpan]:
    """The stretches of `text` that hold most of its score for their length.

    They are the maximal scoring subsequences (Ruzzo and Tompa, 1999) of the words' scores above nine tenths of their
    mean: a weak word between two strong ones is taken in, a weak sentence is not.

    Args:
        text: what `words` are words of.
        words: in reading order, as `attended_words` returns them.
        max_spans: the strongest so many; None returns all.

    Returns:
        Disjoint spans from the first letter of a word to the last of another, none across an empty line, strongest
        first. `score` is the part of the document's score that fell on their words.
    """
    baseline = _BASELINE * sum(max(0.0, word.score) for word in words) / max(1, len(words))
    spans = []
    for paragraph in _paragraphs(text, words) if baseline > 0.0 else []:
        for first, last in maximal_runs([words[i].score - baseline for i in paragraph]):
            inside = [words[paragraph[i]] for i in range(first, last)]
            span = Span(inside[0].span.start, inside[-1].span.stop)
            spans.append(ScoredSpan(span, text[span.slice()], sum(word.score for word in inside)))
    return sorted(spans, key=lambda span: -span.score)[:max_spans]


def _paragraphs(text: str, words: Sequence[ScoredSpan]) -> list[range]:
    """The numbers of the words between empty lines."""
    breaks = [i for i in range(1, len(words)) if _EMPTY_LINE.search(text, words[i - 1].span.stop, words[i].span.start)]
    return [range(start, stop) for start, stop in pairwise([0, *breaks, len(words)])]


def maximal_runs(scores: Sequence[float]) -> list[tuple[int, int]]:
    """All maximal scoring subsequences, half-open and in order, in linear time (Ruzzo and Tompa, ISMB 1999)."""
    runs: list[_Run] = []
    total = 0.0
    for i, score in enumerate(scores):
        run = _Run(i, i + 1, total, total + score)
        total += score
        if score <= 0:
            continue
        while True:
            left = len(runs) - 1
            while left >= 0 and runs[left].before >= run.before:
                left = runs[left].left
            if left < 0 or runs[left].after >= run.after:
                break
            run = _Run(runs[left].start, run.stop, runs[left].before, run.after)
            del runs[left:]
        runs.append(run._replace(left=left))
    return [(run.start, run.stop) for run in runs]


class _Run(NamedTuple):
    """`before`, `after`: the sums of all scores up to its ends; `left`: the nearest run with a smaller `before`."""

    start: int
    stop: int
    before: float
    after: float
    left: int = -1
