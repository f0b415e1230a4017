"""Which words made a document relevant: the token scores that ranked it, put back onto its text."""

import re

import numpy as np
from jaxtyping import Float
from torch import Tensor

from qr_integrations.errors import ModelError
from qr_integrations.retrieval.layout import PromptLayout
from qr_integrations.retrieval.scoring import drop_outliers
from qr_integrations.types import ScoredSpan, Span

_WORD = re.compile(r"\w+(?:['\u2019-]\w+)*")


def attended_words(layout: PromptLayout, scores_KT: Float[Tensor, "K T"], index: int) -> list[ScoredSpan]:
    """The words of document `index` in reading order, each with the share of the document's score that fell on it.

    A token's score is spread evenly over its characters, so words cut into several tokens, and tokens that hold parts
    of two words, count right. Number, title and white space get their share too but are not words: the scores add up to
    less than the document's.

    Raises:
        ModelError: the tokenizer cannot tell which characters a token stands for.
    """
    if layout.offsets is None:
        raise ModelError(
            "this tokenizer does not tell the characters of its tokens: load the model with its tokenizer.json"
        )
    span, text = layout.documents[index], layout.texts[index]
    scores = drop_outliers(scores_KT.sum(0, keepdim=True)[:, span.slice()])[0].double().tolist()
    per_char = np.zeros(len(layout.text))
    for (start, stop), score in zip(layout.offsets[span.slice()].tolist(), scores, strict=True):
        per_char[start:stop] += score / max(1, stop - start)
    words = _WORD.finditer(layout.text, text.start, text.stop)
    return [
        ScoredSpan(
            Span(m.start() - text.start, m.end() - text.start), m.group(), float(per_char[m.start() : m.end()].sum())
        )
        for m in words
    ]
