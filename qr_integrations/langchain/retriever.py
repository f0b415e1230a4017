"""The long-context retriever for LangChain: all documents are read, none has an embedding."""

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any
from uuid import uuid4

from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import Runnable, run_in_executor
from pydantic import Field

from qr_integrations.errors import InputError, QRError
from qr_integrations.indexing import INDEX, OF_THE_NODE, IndexSettings, SavedRetriever, load_retriever, save_retriever
from qr_integrations.langchain.answers import as_answerer
from qr_integrations.langchain.documents import as_ranked, rank_documents, with_relevances
from qr_integrations.reranking import SETTINGS
from qr_integrations.types import Document as Ranked

Together = dict[str, list[Document]]


class QRRetriever(IndexSettings, BaseRetriever):
    """Retrieve documents by reading all of them with a local model (QRRetriever, arXiv 2506.09944).

    No vector store and no embeddings; what does not fit into the model's window is ranked in several prompts. The
    documents stay in memory for further questions, which then cost their own tokens only: those of the last prompts,
    or with ``indexed=True`` all. An index answers the questions of a `batch` in one pass, grows with `add_documents`,
    and can be saved.

    Example:
        >>> from qr_integrations.langchain import QRRetriever
        >>> texts = ["Cats sleep.", "Dracula was written by Bram Stoker."]
        >>> retriever = QRRetriever.from_texts(texts, ids=["a", "b"], model="qr-mini")
        >>> [document.id for document in retriever.invoke("who wrote dracula", k=1)]
        ['b']

        >>> from langchain_core.documents import Document
        >>> kept = QRRetriever.from_texts(texts, ids=["a", "b"], model="qr-mini", indexed=True, answers=True)
        >>> kept.add_documents([Document("The Danube flows through Vienna.", id="c")])
        ['c']
        >>> [found[0].id for found in kept.batch(["who wrote dracula", "where is the danube"])]
        ['b', 'c']
        >>> answer = kept.as_answerer(top_k=1, max_new_tokens=8).invoke("who wrote dracula")
        >>> [document.id for document in answer["context"]]
        ['b']

    Attributes:
        documents: what is searched.
        k: how many come back, None for all; ``invoke(query, k=...)`` and ``bind(k=...)`` override it. Not so
            `configurable_fields`: it makes a new retriever for each question, which reads all documents again.

    All other parameters are those of `IndexSettings`; metadata keys as in `QRRerank`.
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
        return cls.from_documents(_documents(texts, metadatas, ids), **kwargs)

    def add_documents(self, documents: Iterable[Document], ids: Sequence[str] | None = None) -> list[str]:
        """Search these too. They stand behind the others, which are not read again.

        Args:
            documents: not changed.
            ids: of the documents; None takes their own, or makes some up. A document whose id is known takes the place
                of the one that had it, at the end.

        Returns:
            The ids.

        Raises:
            InputError: something that is no document, not as many ids as documents, or one twice; nothing is added
                then.
        """
        given = _checked(documents)
        if ids is not None and len(ids) != len(given):
            raise InputError(f"{len(given)} documents and {len(ids)} ids: pass one for each document")
        names = [(ids[i] if ids else document.id) or str(uuid4()) for i, document in enumerate(given)]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise InputError(f"the id {twice!r} is there twice: pass another for each document")
        new = [document.model_copy(update={"id": name}) for document, name in zip(given, names, strict=True)]
        self._change(set(names), new)
        return names

    def add_texts(
        self, texts: Sequence[str], metadatas: Sequence[dict[str, Any]] | None = None, ids: Sequence[str] | None = None
    ) -> list[str]:
        """As `add_documents`, of texts."""
        return self.add_documents(_documents(texts, metadatas, ids))

    def delete(self, ids: Iterable[str]) -> bool:
        """Search these no more. With ``refinements={"layout": "block"}`` nothing is read again, else what stood behind.

        Returns:
            All of them were there.
        """
        if isinstance(ids, str):
            raise InputError("ids is a single id: pass a list")
        gone, known = set(ids), {document.id for document in self.documents}
        self._change(gone, [])
        return known >= gone

    async def aadd_documents(self, documents: Iterable[Document], ids: Sequence[str] | None = None) -> list[str]:
        """`add_documents` in a worker thread."""
        added: list[str] = await run_in_executor(None, self.add_documents, documents, ids)
        return added

    async def adelete(self, ids: Iterable[str]) -> bool:
        """`delete` in a worker thread."""
        deleted: bool = await run_in_executor(None, self.delete, ids)
        return deleted

    def save_local(self, folder: str | Path) -> None:
        """Write documents, their keys and values, and settings into a folder; of the keys and values what is new.

        Raises:
            InputError: a retriever without an index, a folder that holds something else, or metadata that JSON cannot
                hold.
        """
        with self.changing():
            documents = list(self.documents)
            kept = [Ranked(d.page_content, id=d.id, metadata=d.metadata) for d in documents]
            saved = SavedRetriever.of(self, self.k, kept)
            save_retriever(folder, self, saved, as_ranked(documents, self))

    @classmethod
    def load_local(cls, folder: str | Path, *, verify: bool = True, **kwargs: Any) -> "QRRetriever":
        """What `save_local` wrote, or another framework's retriever of this package.

        The model and its keys and values are loaded with the first question.

        Args:
            folder: where.
            verify: read all files once and compare their digests when the index is loaded.
            kwargs: fields of the retriever that are to be otherwise. With another model the folder is refused, with
                other heads or another layout the documents are read again.

        Raises:
            LoadError: there is none, or it is damaged, or newer than this version.
        """
        saved = load_retriever(folder)
        documents = [
            Document(d.text, id=d.id, metadata={key: d.metadata[key] for key in d.metadata if key != OF_THE_NODE})
            for d in saved.documents
        ]
        retriever = cls(**{"documents": documents, "k": saved.top_k, **saved.settings_with(kwargs)})
        retriever.load_index_from(Path(folder) / INDEX, verify=verify)
        return retriever

    def as_answerer(self, top_k: int = 3, **generation: Any) -> Runnable[Any, dict[str, Any]]:
        """A runnable that ranks, and answers from the best documents, which are not read again.

        It takes a question, or ``{"input": question}``, and returns ``{"input", "context", "answer"}`` like LangChain's
        retrieval chains; ``context`` holds the documents that it answered from, `score_threshold` does not count.

        Args:
            top_k: how many documents the model answers from, at most.
            generation: further arguments of `DocumentIndex.answer`, such as `max_new_tokens`.

        Raises:
            InputError: the retriever was not made with ``indexed=True, answers=True``.
        """
        return as_answerer(self, lambda: self.documents, top_k, generation)

    def batch(
        self, inputs: list[str], config: Any = None, *, return_exceptions: bool = False, **kwargs: Any
    ) -> list[Any]:
        """Several questions; with an index they go through the model together. Each is a run of its own."""
        kwargs |= self._together(inputs, kwargs)
        return super().batch(inputs, config, return_exceptions=return_exceptions, **kwargs)

    async def abatch(
        self, inputs: list[str], config: Any = None, *, return_exceptions: bool = False, **kwargs: Any
    ) -> list[Any]:
        """`batch`, off the event loop."""
        kwargs |= await run_in_executor(None, self._together, inputs, kwargs)
        return await super().abatch(inputs, config, return_exceptions=return_exceptions, **kwargs)

    def _together(self, queries: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Together]:
        """What is found for several questions, for `_get_relevant_documents` to hand out; nothing if it cannot be."""
        asked = [query for query in dict.fromkeys(q for q in queries if isinstance(q, str)) if query.strip()]
        if not self.indexed or self.explain or len(asked) < 2:
            return {}
        documents = self.documents
        try:
            found = self.relevances_together(asked, as_ranked(documents, self), self._count(kwargs.get("k")))
        except QRError:  # of one question perhaps: asked one by one, only that one fails
            return {}
        return {"together": {query: with_relevances(documents, one) for query, one in zip(asked, found, strict=True)}}

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,
        k: int | None = None,
        together: Together | None = None,
    ) -> list[Document]:
        if together and query in together:
            return [document.model_copy(deep=True) for document in together[query]]
        return rank_documents(self, query, self.documents, self._count(k))

    async def _aget_relevant_documents(
        self,
        query: str,
        *,
        run_manager: AsyncCallbackManagerForRetrieverRun,
        k: int | None = None,
        together: Together | None = None,
    ) -> list[Document]:
        search, manager = self._get_relevant_documents, run_manager.get_sync()
        found: list[Document] = await run_in_executor(None, search, query, run_manager=manager, k=k, together=together)
        return found

    def _count(self, k: int | None) -> int | None:
        if k is not None and (not isinstance(k, Integral) or k < 0):
            raise InputError(f"k is {k!r}: pass a whole number, 0 or more")
        return self.k if k is None else k

    def _change(self, gone: set[str], new: Sequence[Document]) -> None:
        """Documents leave and come; if there is an index, at once, and if that fails, not at all."""
        with self.changing():
            documents = [*(document for document in self.documents if document.id not in gone), *new]
            if self.indexed and self.is_index_there:
                self.index_over(as_ranked(documents, self))
            self.documents = documents


def _checked(documents: Iterable[Document]) -> list[Document]:
    if isinstance(documents, str | Document):
        raise InputError("documents is a single document: pass a list of them")
    given = list(documents)
    if wrong := [document for document in given if not isinstance(document, Document)]:
        raise InputError(f"{wrong[0]!r} is no LangChain document: pass Document(text), or texts to add_texts")
    return given


def _documents(
    texts: Sequence[str], metadatas: Sequence[dict[str, Any]] | None, ids: Sequence[str] | None
) -> list[Document]:
    if isinstance(texts, str):
        raise InputError("texts is a single text: pass a list; chunk_size=... cuts long ones into pieces")
    for name, given in (("metadatas", metadatas), ("ids", ids)):
        if given is not None and len(given) != len(texts):
            raise InputError(f"{len(texts)} texts and {len(given)} {name}: pass one for each text")
    return [
        Document(text, metadata=metadatas[i] if metadatas else {}, id=ids[i] if ids else None)
        for i, text in enumerate(texts)
    ]


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
