"""Answers from the keys and values that a retriever keeps, as a link of a chain."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from langchain_core.documents import Document
from langchain_core.runnables import Runnable, RunnableLambda

from qr_integrations.errors import InputError
from qr_integrations.indexing import IndexSettings
from qr_integrations.langchain.documents import as_ranked, with_relevances


def as_answerer(
    settings: IndexSettings, documents: Callable[[], Sequence[Document]], top_k: int, generation: Mapping[str, Any]
) -> Runnable[Any, dict[str, Any]]:
    """A runnable, ``QRAnswer``, that ranks documents and answers from the best, which are not read again.

    Args:
        settings: with an index that keeps all layers.
        documents: tells what is searched at the time of the question.
        top_k: how many documents the model answers from, at most.
        generation: further arguments of `DocumentIndex.answer`.

    Raises:
        InputError: the index does not keep all layers, or `top_k` below 1.
    """
    if not (settings.indexed and settings.answers):
        raise InputError("the model's upper layers are not kept: make the retriever with indexed=True, answers=True")
    if top_k < 1:
        raise InputError(f"top_k is {top_k}: pass at least 1")

    def answer(given: Any) -> dict[str, Any]:
        question = given.get("input") if isinstance(given, Mapping) else given
        if not isinstance(question, str):
            raise InputError(f"{given!r} is no question: pass a string, or a mapping with 'input'")
        found, text = _answer(settings, documents(), question, top_k, generation)
        return {"input": question, "context": found, "answer": text}

    return RunnableLambda(answer, name="QRAnswer")


def _answer(
    settings: IndexSettings, documents: Sequence[Document], question: str, top_k: int, generation: Mapping[str, Any]
) -> tuple[list[Document], str]:
    index = settings.index_over(as_ranked(documents, settings))
    grounded = index.answer(question, top_k=top_k, **generation)
    return with_relevances(documents, settings.relevances_used(grounded)), grounded.text
