"""The long-context retriever for LlamaIndex: all nodes are read, none has an embedding."""

import asyncio
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.callbacks import CallbackManager
from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.schema import (
    BaseNode,
    Document,
    MetadataMode,
    NodeWithScore,
    QueryBundle,
)

from qr_integrations.errors import InputError
from qr_integrations.indexing import INDEX, IndexSettings, SavedRetriever, load_retriever, save_retriever
from qr_integrations.llama_index.nodes import (
    as_kept,
    as_ranked,
    from_kept,
    pieces,
    prompts_of,
    rank_nodes,
    update_prompts_of,
)


class QRRetriever(BaseRetriever):
    """Retrieve from nodes by reading all of them with a local model (QRRetriever, arXiv 2506.09944).

    No embeddings; what does not fit into the model's window is ranked in several prompts. The nodes stay in memory for
    further questions, which then cost their own tokens only: those of the last prompts, or with ``indexed=True`` all.
    Such an index grows with `insert_nodes`, can be saved, and serves a `QRQueryEngine`.

    Example:
        >>> from qr_integrations.llama_index import QRRetriever
        >>> text = "Cats sleep most of the day.\\n\\nDracula was written by Bram Stoker."
        >>> retriever = QRRetriever.from_text(text, chunk_size=12, similarity_top_k=1, model="qr-mini")
        >>> found = retriever.retrieve("who wrote dracula")[0]
        >>> found.text, found.node.start_char_idx
        ('Dracula was written by Bram Stoker.', 29)
    """

    def __init__(
        self,
        nodes: Sequence[BaseNode],
        *,
        similarity_top_k: int | None = 5,
        metadata_mode: MetadataMode = MetadataMode.EMBED,
        callback_manager: CallbackManager | None = None,
        object_map: dict[str, Any] | None = None,
        objects: list[Any] | None = None,
        verbose: bool = False,
        **settings: Any,
    ) -> None:
        """Args:
        nodes: what is searched.
        similarity_top_k: how many come back; None for all.
        metadata_mode: which metadata is read together with a node's text.
        callback_manager, object_map, objects, verbose: as in every LlamaIndex retriever.
        settings: `model` or `backend`, and the rest of `IndexSettings`.
        """
        super().__init__(callback_manager, object_map, objects, verbose)
        if similarity_top_k is not None and similarity_top_k < 0:
            raise InputError(f"similarity_top_k is {similarity_top_k}: pass 0 or more, or None for all nodes")
        self.similarity_top_k = similarity_top_k
        self.metadata_mode = metadata_mode
        self.nodes = list(nodes)
        self.settings = IndexSettings(**settings)

    @classmethod
    def from_defaults(
        cls,
        *,
        nodes: Sequence[BaseNode] | None = None,
        index: Any = None,
        docstore: Any = None,
        similarity_top_k: int | None = 5,
        verbose: bool = False,
        **settings: Any,
    ) -> "QRRetriever":
        """Over nodes, the nodes of an index, or those of a document store, as they are now.

        Raises:
            InputError: none of the three, more than one, or a store that holds no nodes.
        """
        if sum(source is not None for source in (nodes, index, docstore)) != 1:
            raise InputError("pass one of nodes=..., index=... and docstore=...")
        if nodes is None:
            nodes = list(docstore.docs.values()) if index is None else _nodes_of(index)
            if not nodes:
                raise InputError(
                    "the document store holds no nodes (with some vector stores they live there only): pass nodes=..., "
                    "or build the index with store_nodes_override=True"
                )
        return cls(nodes, similarity_top_k=similarity_top_k, verbose=verbose, **settings)

    @classmethod
    def from_text(
        cls,
        text: str | Document | Sequence[str | Document],
        *,
        chunk_size: int = 256,
        chunk_overlap: int = 0,
        **settings: Any,
    ) -> "QRRetriever":
        """Over the pieces of long texts, which end at paragraphs or sentences where they can.

        Each piece knows its place (``start_char_idx``, ``end_char_idx``) and its source.

        Args:
            text: one or several texts or LlamaIndex documents.
            chunk_size: tokens per piece, about: words of up to six letters and signs count one.
            chunk_overlap: tokens that a piece repeats of the one before, at most.
            settings: further arguments of the retriever.
        """
        sources = [text] if isinstance(text, str | Document) else text
        documents = [source if isinstance(source, Document) else Document(text=source) for source in sources]
        nodes = [node for document in documents for node in pieces(document, chunk_size, chunk_overlap)]
        seen: dict[str, int] = {}
        for node in nodes:  # documents with one id; LlamaIndex would drop all but the first
            times = seen[node.id_] = seen.get(node.id_, 0) + 1
            node.id_ += f"-{times}" if times > 1 else ""
        return cls(nodes, **settings)

    def insert_nodes(self, nodes: Iterable[BaseNode]) -> None:
        """Search these too. They stand behind the others, which are not read again.

        A node whose id is known takes the place of the one that had it, at the end.

        Raises:
            InputError: something that is no node, an id that is there twice, or an image without text; nothing is
                added then.
        """
        given = _checked(nodes)
        as_ranked(given, self.metadata_mode, self.settings)  # refuses images, also before there is an index
        names = [node.node_id for node in given]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise InputError(f"the id {twice!r} is there twice: pass another for each node")
        self._change(set(names), given)

    def delete_nodes(self, node_ids: Iterable[str]) -> bool:
        """Search these no more. With ``refinements={"layout": "block"}`` nothing is read again, else what stood behind.

        Returns:
            All of them were there.
        """
        if isinstance(node_ids, str):
            raise InputError("node_ids is a single id: pass a list")
        gone, known = set(node_ids), {node.node_id for node in self.nodes}
        self._change(gone, [])
        return known >= gone

    def persist(self, persist_dir: str | Path) -> None:
        """Write nodes, their keys and values, and settings into a folder; of the keys and values what is new.

        Raises:
            InputError: a retriever without an index, a folder that holds something else, or metadata that JSON cannot
                hold.
        """
        with self.settings.changing():
            nodes = list(self.nodes)
            ranked = as_ranked(nodes, self.metadata_mode, self.settings)
            mode = MetadataMode(self.metadata_mode).value
            saved = SavedRetriever.of(self.settings, self.similarity_top_k, as_kept(nodes, ranked), metadata_mode=mode)
            save_retriever(persist_dir, self.settings, saved, ranked)

    @classmethod
    def from_persist_dir(cls, persist_dir: str | Path, *, verify: bool = True, **options: Any) -> "QRRetriever":
        """What `persist` wrote, or another framework's retriever of this package.

        The model and its keys and values are loaded with the first question.

        Args:
            persist_dir: where.
            verify: read all files once and compare their digests when the index is loaded.
            options: arguments of the retriever that are to be otherwise. With another model the folder is refused, with
                other heads or another layout the nodes are read again.

        Raises:
            LoadError: there is none, or it is damaged, or newer than this version.
        """
        saved = load_retriever(persist_dir)
        own: dict[str, Any] = {"similarity_top_k": saved.top_k}
        if "metadata_mode" in saved.more:
            own["metadata_mode"] = MetadataMode(saved.more["metadata_mode"])
        retriever = cls(from_kept(saved.documents), **{**own, **saved.settings_with(options)})
        retriever.settings.load_index_from(Path(persist_dir) / INDEX, verify=verify)
        return retriever

    def _change(self, gone: set[str], new: Sequence[BaseNode]) -> None:
        """Nodes leave and come; if there is an index, at once, and if that fails, not at all."""
        with self.settings.changing():
            nodes = [*(node for node in self.nodes if node.node_id not in gone), *new]
            if self.settings.indexed and self.settings.is_index_there:
                self.settings.index_over(as_ranked(nodes, self.metadata_mode, self.settings))
            self.nodes = nodes

    def _get_prompts(self) -> dict[str, BasePromptTemplate]:
        return prompts_of(self.settings)

    def _update_prompts(self, prompts: dict[str, BasePromptTemplate]) -> None:
        update_prompts_of(self.settings, prompts)

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        nodes = [NodeWithScore(node=node) for node in self.nodes]
        return rank_nodes(
            self.settings, query_bundle.query_str, nodes, self.similarity_top_k, metadata_mode=self.metadata_mode
        )

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return await asyncio.to_thread(self._retrieve, query_bundle)


def _checked(nodes: Iterable[BaseNode]) -> list[BaseNode]:
    if isinstance(nodes, str | BaseNode):
        raise InputError("nodes is a single node: pass a list of them")
    given = list(nodes)
    if wrong := [node for node in given if not isinstance(node, BaseNode)]:
        raise InputError(f"{wrong[0]!r} is no node: pass TextNode(text=...); of a NodeWithScore, its .node")
    return given


def _nodes_of(index: Any) -> list[BaseNode]:
    """The nodes of this index; its document store may hold those of others too."""
    structure = index.index_struct
    ids = list(getattr(structure, "nodes_dict", {}).values()) or list(getattr(structure, "nodes", []))
    return list(index.docstore.get_nodes(ids)) if ids else list(index.docstore.docs.values())
