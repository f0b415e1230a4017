"""LangChain documents as documents to rank, and ranked documents as copies of them."""

from collections.abc import Mapping, Sequence
from typing import Any

from langchain_core.documents import Document

from qr_integrations.errors import InputError
from qr_integrations.reranking import RELEVANCE_SCORE, RETRIEVAL_SCORE, Relevance, RerankSettings
from qr_integrations.types import Document as Ranked


def as_ranked(documents: Sequence[str | Document | Mapping[str, Any]], settings: RerankSettings) -> list[Ranked]:
    """What callers pass to rerank: strings, LangChain documents, or mappings with ``text``.

    Raises:
        InputError: a single document, or an entry that is none of them.
    """
    if isinstance(documents, str | Document | Mapping):
        raise InputError("documents is a single document: pass a list of them")
    return [_as_ranked(number, document, settings) for number, document in enumerate(documents)]


def _as_ranked(number: int, given: Any, settings: RerankSettings) -> Ranked:
    text, title = given, None
    if isinstance(given, Document):
        text, title = given.page_content, settings.title_of(given.metadata)
    elif isinstance(given, Mapping):
        text, title = given.get("text", given.get("page_content")), settings.title_of(given)
    if not isinstance(text, str):
        raise InputError(f"document #{number} has no text: pass a string, a Document, or a mapping with 'text'")
    return Ranked(text, title, id=getattr(given, "id", None))


def rank_documents(
    settings: RerankSettings, query: str, documents: Sequence[Document], top_n: int | None
) -> list[Document]:
    """The best documents, as copies with ``relevance_score`` in their metadata; those given stay as they are.

    A ``relevance_score`` that a document came with is kept as ``retrieval_score``.
    """
    return with_relevances(documents, settings.relevances(query, as_ranked(documents, settings), top_n))


def _as_number(score: Any) -> Any:
    """For JSON; what is no number stays as it is."""
    try:
        return float(score)
    except (TypeError, ValueError):
        return score


def with_relevances(documents: Sequence[Document], relevances: Sequence[Relevance]) -> list[Document]:
    """Copies of the documents that something is said about, with what is said in their metadata."""
    found = []
    for relevance in relevances:
        document = documents[relevance.index]
        before = document.metadata.get(RELEVANCE_SCORE)
        metadata = {**relevance.added_to(document.metadata), RELEVANCE_SCORE: relevance.score}
        if before is not None:
            metadata[RETRIEVAL_SCORE] = _as_number(before)
        found.append(document.model_copy(update={"metadata": metadata}))
    return found
