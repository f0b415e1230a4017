"""Tools for LangChain agents: search documents, rerank passages."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from langchain_core.callbacks import Callbacks
from langchain_core.documents import Document
from langchain_core.prompts import BasePromptTemplate, PromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.tools import BaseTool, StructuredTool, ToolException, create_retriever_tool
from pydantic import BaseModel, Field

from qr_integrations.errors import InputError
from qr_integrations.langchain.rerank import QRRerank
from qr_integrations.reranking import RELEVANCE_SCORE

_SEARCH = "Search the documents. Ask a full question. Returns the best passages with their scores, best first."
_RERANK = (
    "Order passages by how well they answer a question. Returns the best with their numbers and scores, best first."
)
_NOTHING = "Nothing found."
_PASSAGE = PromptTemplate.from_template("[score {relevance_score:.3f}] {page_content}")


def create_qr_retriever_tool(
    retriever: BaseRetriever,
    name: str = "search_documents",
    description: str = _SEARCH,
    *,
    document_prompt: BasePromptTemplate | None = None,
    document_separator: str = "\n\n",
    response_format: Literal["content", "content_and_artifact"] = "content_and_artifact",
) -> BaseTool:
    """A tool that searches: LangChain's `create_retriever_tool`, whose answer shows scores and carries the documents.

    Args:
        retriever: a `QRRetriever`, or any whose documents have ``relevance_score`` in their metadata, such as a
            compression retriever with `QRRerank`.
        name: what the agent calls it.
        description: when to call it; up to 1,024 characters for most model providers.
        document_prompt: how one document is shown; None shows score and text.
        document_separator: between documents.
        response_format: with ``"content_and_artifact"`` the documents come along as the message's artifact.
    """
    tool = create_retriever_tool(
        retriever,
        name,
        description,
        document_prompt=document_prompt or _PASSAGE,
        document_separator=document_separator,
        response_format=response_format,
    )
    search, asearch = tool.func, tool.coroutine

    def func(query: str, callbacks: Callbacks = None) -> Any:
        with _told_to_the_agent():
            return _never_silent(search(query, callbacks))

    async def coroutine(query: str, callbacks: Callbacks = None) -> Any:
        with _told_to_the_agent():
            return _never_silent(await asearch(query, callbacks))

    return tool.model_copy(update={"func": func, "coroutine": coroutine, "handle_tool_error": True})


def _never_silent(answer: Any) -> Any:
    if isinstance(answer, tuple):
        return answer[0] or _NOTHING, answer[1]
    return answer or _NOTHING


@contextmanager
def _told_to_the_agent() -> Iterator[None]:
    """Wrong arguments come from the agent, which can mend them if it is told."""
    try:
        yield
    except InputError as error:
        raise ToolException(str(error)) from error


class _RerankInput(BaseModel):
    """What the agent passes."""

    query: str = Field(description="the question, in full")
    passages: list[str] = Field(description="the passages to order")
    top_n: int | None = Field(default=None, ge=1, description="how many to return; leave out for the usual number")


def create_qr_rerank_tool(
    reranker: QRRerank | None = None,
    name: str = "rerank_passages",
    description: str = _RERANK,
    **settings: Any,
) -> BaseTool:
    """A tool that orders passages which the agent already has; the artifact is the list of ranked documents.

    Args:
        reranker: or pass `model`, `backend` and other fields of `QRRerank` as `settings`.
        name: what the agent calls it.
        description: when to call it.
        settings: fields of `QRRerank`.

    Raises:
        InputError: both a reranker and settings.
    """
    if reranker is not None and settings:
        raise InputError(f"pass a reranker or its settings, not both: leave out {', '.join(settings)}")
    ranks = reranker or QRRerank(**settings)

    def rerank_passages(
        query: str, passages: list[str], top_n: int | None = None, callbacks: Callbacks = None
    ) -> tuple[str, list[Document]]:
        documents = [Document(text, id=str(number)) for number, text in enumerate(passages, start=1)]
        chosen = ranks if top_n is None else ranks.model_copy(update={"top_n": top_n})
        with _told_to_the_agent():
            found = chosen.compress_documents(documents, query, callbacks=callbacks)
        lines = [
            f"{rank}. [passage {document.id}, score {document.metadata[RELEVANCE_SCORE]:.3f}] {document.page_content}"
            for rank, document in enumerate(found, start=1)
        ]
        return "\n\n".join(lines) or _NOTHING, found

    return StructuredTool.from_function(
        rerank_passages,
        name=name,
        description=description,
        args_schema=_RerankInput,
        response_format="content_and_artifact",
        handle_tool_error=True,
    )
