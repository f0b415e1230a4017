"""The long-context retriever for LangChain: all documents are read, none has an embedding."""

from collections.abc import Sequence
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import run_in_executor
from pydantic import Field

from qr_integrations.errors import InputError
from qr_integrations.langchain.documents import rank_documents
from qr_integrations.reranking import SETTINGS, RerankSettings


class QRRetriever(RerankSettings, BaseRetriever):
    """Retrieve documents by reading all of them with a local model (QRRetriever, arXiv 2506.09944).

    No vector store and no embeddings; what does not fit into the model's window is ranked in several prompts. The
    documents stay in memory for further questions, which then cost their own tokens only.

    Example:
        >>> from qr_integrations.langchain import QRRetriever
        >>> texts = ["Cats sleep.", "Dracula was written by Bram Stoker."]
        >>> retriever = QRRetriever.from_texts(texts, ids=["a", "b"], model="qr-mini")
        >>> [document.id for document in retriever.invoke("who wrote dracula", k=1)]
        ['b']

    Attributes:
        documents: what is searched.
        k: how many come back, None for all; ``invoke(query, k=...)`` overrides it.

    All other parameters are those of `RerankSettings`; metadata keys as in `QRRerank`.
    """

    model_config = SETTINGS

    documents: list[Document] = Field(default_factory=list, repr=False)
    k: int | None = Field(default=4, ge=0)

    @classmethod
    def from_documents(
        cls, documents: Sequence[Document], *, chunk_size: int | None = None, chunk_overlap: int = 0, **kwargs: Any
    ) -> "QRRetriever":
        """Over documents, or over their pieces.

        Args:
            documents: not changed.
            chunk_size: cut long documents into pieces of about so many tokens, at paragraphs or sentences where they
                can end; words of up to six letters and signs count one. Pieces tell their place as ``start_index``.
            chunk_overlap: tokens that a piece repeats of the one before, at most.
            kwargs: fields of the retriever.
        """
        given = list(documents)
        if chunk_size is None and chunk_overlap:
            raise InputError(f"chunk_overlap={chunk_overlap} cuts nothing by itself: pass chunk_size=... too")
        if chunk_size is not None:
            given = [piece for document in given for piece in _pieces(document, chunk_size, chunk_overlap)]
        return cls(documents=given, **kwargs)

    @classmethod
    def from_texts(
        cls,
        texts: Sequence[str],
        metadatas: Sequence[dict[str, Any]] | None = None,
        ids: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> "QRRetriever":
        """Over texts.

        Raises:
            InputError: not as many metadatas or ids as texts.
        """
        if isinstance(texts, str):
            raise InputError("texts is a single text: pass a list; chunk_size=... cuts long ones into pieces")
        for name, given in (("metadatas", metadatas), ("ids", ids)):
            if given is not None and len(given) != len(texts):
                raise InputError(f"{len(texts)} texts and {len(given)} {name}: pass one for each text")
        documents = [
            Document(text, metadata=metadatas[i] if metadatas else {}, id=ids[i] if ids else None)
            for i, text in enumerate(texts)
        ]
        return cls.from_documents(documents, **kwargs)

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, k: int | None = None
    ) -> list[Document]:
        if k is not None and k < 0:
            raise InputError(f"k is {k}: pass 0 or more")
        return rank_documents(self, query, self.documents, self.k if k is None else k)

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, k: int | None = None
    ) -> list[Document]:
        search = self._get_relevant_documents
        found: list[Document] = await run_in_executor(None, search, query, run_manager=run_manager.get_sync(), k=k)
        return found


def _pieces(document: Document, chunk_size: int, chunk_overlap: int) -> list[Document]:
    from qr_integrations.retrieval.chunks import chunk, rough_token_starts

    text = document.page_content
    start = document.metadata.get("start_index", 0)  # of a document that is a piece itself
    return [
        document.model_copy(
            update={
                "page_content": text[span.slice()],
                "metadata": {**document.metadata, "start_index": start + span.start},
                "id": None if document.id is None else f"{document.id}-{span.start}",
            }
        )
        for span in chunk(text, rough_token_starts(text), chunk_size, chunk_overlap)
    ]
