"""One model ranks and answers: it goes on from the keys and values of the documents that it ranked first."""

from collections.abc import Sequence
from copy import copy
from typing import Any, Protocol, runtime_checkable

from qr_integrations.backend import Backend, Prefix, cut, in_line, join, key_rotation
from qr_integrations.errors import InputError
from qr_integrations.retrieval.kept_windows import Window
from qr_integrations.retrieval.layout import ANSWER, PromptStyle, PromptWriter, Query
from qr_integrations.retrieval.reranker import AttentionReranker
from qr_integrations.types import Document, GroundedAnswer, Ranking


@runtime_checkable
class KeptDocuments(Protocol):
    """Documents whose keys and values are kept, such as a `DocumentIndex`."""

    reranker: AttentionReranker
    whole: bool

    @property
    def backend(self) -> Backend:
        """The model."""
        ...

    @property
    def layout(self) -> str:
        """``"joint"`` or ``"block"``."""
        ...

    @property
    def windows(self) -> tuple[Window, ...]:
        """The prompts in which the documents stand."""
        ...

    def rank(self, query: str, *, instruction: str | None = None) -> Ranking:
        """Order the documents."""
        ...

    def prefix(self, indices: Sequence[int]) -> Prefix:
        """Keys and values of some of them."""
        ...


def answer(
    index: KeptDocuments,
    question: str,
    *,
    top_k: int = 3,
    instruction: str | None = None,
    template: str = ANSWER,
    documents: Sequence[int] | None = None,
    close_gaps: bool = False,
    **generation: Any,
) -> GroundedAnswer:
    """Rank the documents, keep the best, and answer from them; none of them is read again.

    Example:
        >>> from qr_integrations import DocumentIndex
        >>> texts = ["Cats sleep.", "Dracula was written by Bram Stoker.", "The Danube flows through Vienna."]
        >>> index = DocumentIndex.build(texts, "qr-mini", answers=True)
        >>> found = index.answer("who wrote dracula", top_k=1, max_new_tokens=8)
        >>> found.used, found.sources[0].document.text
        ((1,), 'Dracula was written by Bram Stoker.')

    The documents keep their numbers in the prompt. With ``layout="block"`` the model answers as from a prompt of these
    documents alone. With ``"joint"`` they stay where they stood, as tokens that saw the documents before them; all are
    of the window of the best one, and a document that stands in several windows is left out.

    Args:
        index: a `DocumentIndex` that was built with ``answers=True``; `DocumentIndex.answer` is the same.
        question: what is asked.
        top_k: how many documents the model answers from, at most.
        instruction: what counts as relevant, and what the answer is to heed; a paragraph in front of the question.
        template: what stands behind the documents, ``{query}`` in the question's place.
        documents: positions in `index.documents` to answer from instead of the best.
        close_gaps: with ``"joint"``, move the documents together, see `without_gaps`; with ``"block"`` there are none.
        generation: further arguments of `Backend.answer`, such as `max_new_tokens` and `deco`.

    Raises:
        InputError: no documents, `top_k` below 1, an index without all layers, or what `Backend.answer` refuses.
        WindowError: the question is too long.
        UnsupportedModelError: gaps are to be closed, and this model's keys cannot be moved; or they are not, and its
            layers see fewer tokens back than the documents span.
    """
    _check_top_k(top_k)
    index = copy(index)  # as it is now, whatever other threads add and remove meanwhile
    if not index.whole:
        raise InputError("the upper layers are not kept: build the index with answers=True")
    ranking = index.rank(question, instruction=instruction)
    used = _best(index, ranking, top_k) if documents is None else list(dict.fromkeys(documents))
    if not used:
        raise InputError("there are no documents to answer from: add some to the index")
    prefix = without_gaps(index, used) if close_gaps and index.layout == "joint" else index.prefix(used)
    tail = _tail(index.backend, Query(question, instruction), template, strip=index.reranker.scorer.style.strip)
    return GroundedAnswer(index.backend.answer(tail, prefix=prefix, **generation), ranking, tuple(used))


def without_gaps(index: KeptDocuments, indices: Sequence[int]) -> Prefix:
    """As `DocumentIndex.prefix` of documents read one after the other, moved together to where others stood between.

    Their keys are turned to the new positions, so that distances are those of a prompt of these documents alone; that
    they saw the documents before them stays. The first word of an answer is then nearer to that of such a prompt.

    Args:
        index: with ``layout="joint"``.
        indices: positions in its documents, all in one window.

    Raises:
        InputError: as `DocumentIndex.prefix`.
        UnsupportedModelError: this model's keys cannot be moved.
    """
    prefix = index.prefix(indices)
    if prefix.num_positions == len(prefix):
        return prefix
    window = next(one for one in index.windows if any(candidate.index in indices for candidate in one.candidates))
    beginning, *pieces = cut(window.prefix, window.spans)
    kept = [piece for one, piece in zip(window.candidates, pieces, strict=True) if one.index in indices]
    together = in_line([beginning, *kept], key_rotation(index.backend).moved)
    return join(together, dtype=index.backend.model.dtype)


def answer_afresh(
    backend: Backend,
    ranking: Ranking,
    *,
    top_k: int = 3,
    instruction: str | None = None,
    template: str = ANSWER,
    **generation: Any,
) -> GroundedAnswer:
    """Answer from the best documents of any ranking, written into a prompt of their own, best first, and read again.

    Args:
        backend: the model that answers; it need not be the one that ranked.
        ranking: of a reranker or an index.
        top_k: how many documents the model answers from, at most.
        instruction: what the answer is to heed; a paragraph in front of the question.
        template: what stands behind the documents, ``{query}`` in the question's place.
        generation: further arguments of `Backend.answer`.

    Raises:
        InputError: no documents, or `top_k` below 1.
        WindowError: they do not fit into the model's window.
    """
    _check_top_k(top_k)
    used = ranking.top(top_k)
    if not used:
        raise InputError("there are no documents to answer from: rank some first")
    query = Query(ranking.query, instruction)
    text = _prompt(backend, query, [item.document for item in used], PromptStyle(template=template))
    return GroundedAnswer(backend.answer(text, **generation), ranking, tuple(used.order))


def _check_top_k(top_k: int) -> None:
    if top_k < 1:
        raise InputError(f"top_k={top_k} leaves nothing to answer from: pass at least 1")


def _best(index: KeptDocuments, ranking: Ranking, top_k: int) -> list[int]:
    """The best documents; with the joint layout those of one window."""
    if index.layout == "block":
        return ranking.order[:top_k]
    homes: dict[int, set[int]] = {}
    for number, window in enumerate(index.windows):
        for candidate in window.candidates:
            homes.setdefault(candidate.index, set()).add(number)
    whole = [place for place in ranking.order if len(homes[place]) == 1]
    if ranking.order and not whole:
        raise InputError(
            "every document is longer than a window: build the index with layout='block', or with a larger "
            "max_context_tokens"
        )
    return [place for place in whole if homes[place] == homes[whole[0]]][:top_k]


def _tail(backend: Backend, query: Query, template: str, *, strip: bool) -> str:
    """What stands behind the documents in the user's turn."""
    layout = PromptWriter(backend, PromptStyle(template=template, strip=strip)).write(query, [])
    return layout.text[layout.tail :].removesuffix(backend.chat.closing)


def _prompt(backend: Backend, query: Query, documents: Sequence[Document], style: PromptStyle) -> str:
    """The user's turn, documents first."""
    text = PromptWriter(backend, style).write(query, documents).text
    return text.removeprefix(backend.chat.opening).removesuffix(backend.chat.closing)
