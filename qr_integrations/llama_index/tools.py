"""Tools for LlamaIndex agents: search, rerank, find in a text."""

from copy import copy
from typing import Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.schema import Document, MetadataMode, NodeWithScore, TextNode
from llama_index.core.tools.tool_spec.base import BaseToolSpec

from qr_integrations.errors import InputError
from qr_integrations.indexing import IndexSettings
from qr_integrations.llama_index.nodes import pieces, rank_nodes
from qr_integrations.llama_index.retriever import QRRetriever
from qr_integrations.reranking import RerankSettings


class QRToolSpec(BaseToolSpec):
    """Tools that answer with passages and their scores, best first.

    The question reaches the model as the agent wrote it: LlamaIndex's own `RetrieverTool` would wrap it in "input is
    ...", which attention would pick up.

    Example:
        >>> from qr_integrations.llama_index import QRToolSpec
        >>> spec = QRToolSpec(model="qr-mini")
        >>> [tool.metadata.name for tool in spec.to_tool_list()]
        ['rerank_passages', 'find_in_text']
        >>> passages = ["Cats sleep.", "Dracula was written by Bram Stoker."]
        >>> print(spec.rerank_passages("who wrote dracula", passages, top_n=1))
        1. [passage 2, score 0...] Dracula was written by Bram Stoker.
    """

    def __init__(self, retriever: BaseRetriever | None = None, *, chunk_size: int = 128, **settings: Any) -> None:
        """Args:
        retriever: adds the tool `search_documents`. With a `QRRetriever` its model serves the other tools too; what any
            other retriever finds is ranked again if a model is given.
        chunk_size: tokens per piece of `find_in_text`, about.
        settings: `model` or `backend`, and the rest of `RerankSettings`.

        Raises:
            InputError: neither a retriever nor a model.
        """
        if retriever is None and not settings:
            raise InputError(
                "QRToolSpec has nothing to search or rank with: pass retriever=..., model=... or backend=..."
            )
        self._retriever, self._chunk_size = retriever, chunk_size
        self._settings: RerankSettings | None = None
        if isinstance(retriever, QRRetriever) and not {"model", "backend"} & settings.keys():
            self._settings = retriever.settings.model_copy() if settings else retriever.settings
            for name, value in settings.items():
                setattr(self._settings, name, value)
        elif settings:
            self._settings = RerankSettings(**settings)
        self.spec_functions = [
            *(["search_documents"] if retriever is not None else []),
            *(["rerank_passages", "find_in_text"] if self._settings is not None else []),
        ]

    def search_documents(self, query: str, top_k: int = 5) -> str:
        """Search the documents. Ask a full question. Returns the best passages with their scores, best first."""
        if self._retriever is None:
            raise InputError("there are no documents to search: make QRToolSpec with retriever=...")
        top_k = _count("top_k", top_k)
        if isinstance(self._retriever, QRRetriever):
            retriever = copy(self._retriever)
            retriever.similarity_top_k = top_k
            nodes = retriever.retrieve(query)
        else:
            nodes = self._retriever.retrieve(query)
            if self._settings is not None:
                nodes = rank_nodes(self._settings, query, nodes, top_k, metadata_mode=MetadataMode.EMBED)
        return _numbered(nodes[:top_k], [_source(scored) for scored in nodes[:top_k]])

    def rerank_passages(self, query: str, passages: list[str], top_n: int = 5) -> str:
        """Order passages by how well they answer a question. Returns the best with their numbers and scores."""
        if isinstance(passages, str):
            raise InputError("passages is a single text: pass a list of texts")
        nodes = [NodeWithScore(node=TextNode(text=text, id_=str(i))) for i, text in enumerate(passages, start=1)]
        ranked = rank_nodes(self._ranker, query, nodes, _count("top_n", top_n), metadata_mode=MetadataMode.NONE)
        return _numbered(ranked, [f"passage {scored.node_id}" for scored in ranked])

    def find_in_text(self, query: str, text: str, top_k: int = 3) -> str:
        """Find where a long text answers a question. Returns the best pieces with their characters and scores."""
        nodes = [NodeWithScore(node=node) for node in pieces(Document(text=text), self._chunk_size)]
        ranked = rank_nodes(self._ranker, query, nodes, _count("top_k", top_k), metadata_mode=MetadataMode.NONE)
        return _numbered(ranked, [f"characters {n.node.start_char_idx}-{n.node.end_char_idx}" for n in ranked])

    @property
    def _ranker(self) -> RerankSettings:
        if self._settings is None:
            raise InputError("there is no model to rank with: make QRToolSpec with model=... or backend=...")
        return self._settings.without_index() if isinstance(self._settings, IndexSettings) else self._settings


def _count(name: str, given: Any) -> int:
    """Language models also write "3" and 3.0."""
    try:
        count = int(given)
    except (TypeError, ValueError, OverflowError):
        count = -1
    if count < 0:
        raise InputError(f"{name} is {given!r}: pass a whole number, how many are wanted")
    return count


def _numbered(nodes: list[NodeWithScore], places: list[str]) -> str:
    """One paragraph each: line ends within a passage become spaces."""
    paragraphs = []
    for rank, (scored, place) in enumerate(zip(nodes, places, strict=True), start=1):
        score = "" if scored.score is None else f", score {scored.score:.3f}"
        text = " ".join(scored.node.get_content(MetadataMode.NONE).split())
        paragraphs.append(f"{rank}. [{place}{score}] {text}")
    return "\n\n".join(paragraphs) or "Nothing found."


def _source(scored: NodeWithScore) -> str:
    metadata = scored.node.metadata
    return str(metadata.get("title") or metadata.get("file_name") or scored.node.node_id)
