"""The reranker for LangChain retrieval chains: a document compressor."""

from collections.abc import Mapping, Sequence
from typing import Any

from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.runnables import Runnable, RunnableLambda
from pydantic import Field

from qr_integrations.errors import InputError
from qr_integrations.langchain.documents import as_ranked, rank_documents
from qr_integrations.reranking import RELEVANCE_SCORE, SETTINGS, RerankSettings

_RUN_NAME = "QRRerank"


class QRRerank(RerankSettings, BaseDocumentCompressor):
    """Rank documents by the attention of a local model (QRHead, arXiv 2506.09944).

    Example:
        >>> from langchain_core.documents import Document
        >>> from qr_integrations.langchain import QRRerank
        >>> texts = ["Cats sleep.", "Dracula was written by Bram Stoker."]
        >>> documents = [Document(text, id=str(i)) for i, text in enumerate(texts)]
        >>> best = QRRerank(model="qr-mini", top_n=1).compress_documents(documents, "who wrote dracula")[0]
        >>> best.id, best.metadata["qr_rank"]
        ('1', 1)

    The documents that come back are copies, ids kept, with ``relevance_score``, ``qr_score``, ``qr_score_type``,
    ``qr_rank``, ``qr_truncated`` and, with `explain`, ``qr_spans`` (characters of ``page_content``) in their metadata.
    Where the same passages come back in other lists, pass ``cache={"max_bytes": 2**30}``, best with
    ``refinements={"layout": "block"}``, whose documents do not see each other: then any list can use what another read.
    It goes into a ``ContextualCompressionRetriever(base_compressor=..., base_retriever=...)`` of ``langchain_classic``.

    Attributes:
        top_n: how many documents come back; None for all.

    All other parameters are those of `RerankSettings`.
    """

    model_config = SETTINGS

    top_n: int | None = Field(default=3, ge=0)

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """The best `top_n` documents. The work is a run of its own, ``QRRerank``, below that of `callbacks`.

        Raises:
            InputError: no query.
            ModelError: the model cannot be loaded or read.
        """
        if not documents:
            return []
        config = {"callbacks": callbacks, "run_name": _RUN_NAME}
        ranked: list[Document] = self.as_runnable().invoke(
            {"query": query, "documents": list(documents)}, config=config
        )
        return ranked

    def rerank(
        self,
        documents: Sequence[str | Document | Mapping[str, Any]],
        query: str,
        *,
        top_n: int | None = -1,
    ) -> list[dict[str, Any]]:
        """Index and score of the best documents: ``[{"index": 1, "relevance_score": 0.2}, ...]``.

        Args:
            documents: strings, documents, or mappings with ``text``.
            query: what is asked.
            top_n: None for all, -1 for the field's.
        """
        top_n = self.top_n if top_n == -1 else top_n
        if top_n is not None and top_n < 0:
            raise InputError(f"top_n is {top_n}: pass 0 or more, None for all, or -1 for the reranker's own")
        found = self.relevances(query, as_ranked(documents, self), top_n)
        return [{"index": relevance.index, RELEVANCE_SCORE: relevance.score} for relevance in found]

    def as_runnable(self) -> Runnable[dict[str, Any], list[Document]]:
        """For chains: takes ``{"query": ..., "documents": [...]}``, returns the best documents."""

        def rank(given: dict[str, Any]) -> list[Document]:
            if not isinstance(given, Mapping) or not {"query", "documents"} <= given.keys():
                raise InputError(f"{given!r} is no input: pass {{'query': ..., 'documents': [...]}}")
            return rank_documents(self, given["query"], given["documents"], self.top_n)

        return RunnableLambda(rank, name=_RUN_NAME)
