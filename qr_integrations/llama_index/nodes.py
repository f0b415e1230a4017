"""LlamaIndex nodes as documents to rank, and ranked nodes as copies of them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from llama_index.core.prompts import BasePromptTemplate, PromptTemplate
from llama_index.core.schema import (
    BaseNode,
    ImageNode,
    MetadataMode,
    NodeRelationship,
    NodeWithScore,
    TextNode,
)
from llama_index.core.schema import Document as LlamaDocument
from llama_index.core.storage.docstore.utils import doc_to_json, json_to_doc

from qr_integrations.errors import InputError
from qr_integrations.indexing import OF_THE_NODE
from qr_integrations.reranking import OWN_KEYS, RETRIEVAL_SCORE, Relevance, RerankSettings
from qr_integrations.types import Document, Span

PROMPT_KEY = "qr_prompt"
_PLACE = "\ue000QUERY\ue000"  # private-use characters: no prompt has them
_MEDIA = ("image_resource", "audio_resource", "video_resource")
# How a document writes its metadata; nodes of llama-index-core 0.14.0 go by the misspelt one.
_TEMPLATES = {
    "text_template": "text_template",
    "metadata_template": "metadata_template",
    "metadata_separator": "metadata_separator",
    "metadata_seperator": "metadata_separator",
}


def rank_nodes(
    settings: RerankSettings,
    query: str,
    nodes: Sequence[NodeWithScore],
    top_n: int | None,
    *,
    metadata_mode: MetadataMode,
    keep_retrieval_score: bool = False,
) -> list[NodeWithScore]:
    """The best nodes, as copies with their new scores; the nodes given stay as they are.

    What is ranked is ``node.get_content(metadata_mode)``.

    Raises:
        InputError: a node holds an image and no text.
    """
    documents = as_ranked([scored.node for scored in nodes], metadata_mode, settings)
    relevances = settings.relevances(query, documents, top_n)
    return with_relevances(nodes, documents, relevances, keep_retrieval_score=keep_retrieval_score)


def as_ranked(nodes: Sequence[BaseNode], metadata_mode: MetadataMode, settings: RerankSettings) -> list[Document]:
    """Nodes as documents to rank, with ``node.get_content(metadata_mode)`` as their text.

    Raises:
        InputError: a node holds an image and no text.
    """
    return [_document(number, node, metadata_mode, settings) for number, node in enumerate(nodes)]


def with_relevances(
    nodes: Sequence[NodeWithScore],
    documents: Sequence[Document],
    relevances: Sequence[Relevance],
    *,
    keep_retrieval_score: bool = False,
) -> list[NodeWithScore]:
    """Copies of the nodes that something is said about, with what is said in their metadata; `documents` are theirs."""
    ranked = []
    for relevance in relevances:
        scored, body = nodes[relevance.index], documents[relevance.index].body
        assert body is not None
        ranked.append(_scored_copy(scored, _in_own_text(relevance, body, scored.node), keep_retrieval_score))
    return ranked


def as_kept(nodes: Sequence[BaseNode], documents: Sequence[Document]) -> list[Document]:
    """Nodes as documents for a file: what is ranked as text, and in the metadata the node itself."""
    return [
        Document(ranked.text, id=node.node_id, metadata={**node.metadata, OF_THE_NODE: doc_to_json(node)})
        for node, ranked in zip(nodes, documents, strict=True)
    ]


def from_kept(documents: Sequence[Document]) -> list[BaseNode]:
    """The nodes again; of another framework's documents, nodes whose content is what was ranked."""
    return [_from_kept(document) for document in documents]


def _from_kept(document: Document) -> BaseNode:
    if OF_THE_NODE in document.metadata:
        node: BaseNode = json_to_doc(document.metadata[OF_THE_NODE])
        return node
    hidden = list(document.metadata)
    return TextNode(
        text=document.text,
        metadata=dict(document.metadata),
        excluded_embed_metadata_keys=hidden,
        excluded_llm_metadata_keys=hidden,
        **({} if document.id is None else {"id_": document.id}),
    )


def _document(number: int, node: BaseNode, metadata_mode: MetadataMode, settings: RerankSettings) -> Document:
    media = isinstance(node, ImageNode) or any(getattr(node, name, None) is not None for name in _MEDIA)
    if media and not node.get_content(MetadataMode.NONE).strip():
        raise InputError(
            f"node #{number} ({node.node_id}) is an image without text (or a recording), which a text model cannot "
            "rank: give it a caption as its text, or leave such nodes out"
        )
    title = settings.title_of(node.metadata)
    if title is not None:  # it stands in front, not once more among the metadata
        rest = {name: value for name, value in node.metadata.items() if name != settings.title_key}
        node = node.model_copy(update={"metadata": rest})
    content = node.get_content(metadata_mode)
    return Document(content, title, id=node.node_id, body=_body(node, content))


def _body(node: BaseNode, content: str) -> Span:
    """The characters of `content` that are the node's own text; the rest is metadata."""
    own = node.get_content(MetadataMode.NONE).strip()  # as the template does
    text_first = getattr(node, "text_template", "").lstrip().startswith("{content}")
    start = content.find(own) if text_first else content.rfind(own)
    return Span(start, start + len(own)) if start >= 0 else Span(0, 0)


def _in_own_text(relevance: Relevance, body: Span, node: BaseNode) -> Relevance:
    """Spans by the characters of the node's own text, where they were of the text with its metadata."""
    if relevance.spans is None:
        return relevance
    own = node.get_content(MetadataMode.NONE)
    by = len(own) - len(own.lstrip()) - body.start
    return replace(relevance, spans=tuple(span.moved(by) for span in relevance.spans))


def _scored_copy(scored: NodeWithScore, relevance: Relevance, keep_retrieval_score: bool) -> NodeWithScore:
    """What we add to the metadata is for programs: neither embeddings nor the language model read it."""
    node = scored.node
    metadata = relevance.added_to(node.metadata)
    written = [key for key in OWN_KEYS if key in metadata]
    if keep_retrieval_score and scored.score is not None:
        metadata[RETRIEVAL_SCORE] = float(scored.score)
        written.append(RETRIEVAL_SCORE)
    update: dict[str, Any] = {"metadata": metadata, "relationships": dict(node.relationships)}
    for field in ("excluded_embed_metadata_keys", "excluded_llm_metadata_keys"):
        known = getattr(node, field)
        update[field] = [*known, *(key for key in written if key not in known)]
    return NodeWithScore(node=node.model_copy(update=update), score=relevance.score)


def pieces(document: LlamaDocument, chunk_size: int, chunk_overlap: int = 0) -> list[TextNode]:
    """A long document as nodes that know their characters in it; `chunk_size` in tokens, about."""
    from qr_integrations.retrieval.chunks import chunk, rough_token_starts

    text = document.text
    nodes = []
    for span in chunk(text, rough_token_starts(text), chunk_size, chunk_overlap):
        node = TextNode(
            id_=f"{document.node_id}-{span.start}",
            text=text[span.slice()],
            start_char_idx=span.start,
            end_char_idx=span.stop,
            metadata=dict(document.metadata),
            excluded_embed_metadata_keys=list(document.excluded_embed_metadata_keys),
            excluded_llm_metadata_keys=list(document.excluded_llm_metadata_keys),
            relationships={NodeRelationship.SOURCE: document.as_related_node_info()},
        )
        for name in _TEMPLATES.keys() & TextNode.model_fields.keys():
            setattr(node, name, getattr(document, _TEMPLATES[name]))
        nodes.append(node)
    return nodes


def prompts_of(settings: RerankSettings) -> dict[str, BasePromptTemplate]:
    """What stands after the documents, as a LlamaIndex prompt with ``{query_str}``."""
    from qr_integrations.retrieval.layout import FIND

    template = settings.prompt or FIND
    return {PROMPT_KEY: PromptTemplate(template.replace("{query}", "{query_str}"))}


def update_prompts_of(settings: RerankSettings, prompts: dict[str, BasePromptTemplate]) -> None:
    """Take over a prompt.

    Raises:
        InputError: it has no ``{query_str}``.
    """
    if PROMPT_KEY not in prompts:
        return
    text = prompts[PROMPT_KEY].format(query_str=_PLACE)
    if text.count(_PLACE) != 1:
        shown = text.replace(_PLACE, "{query_str}")
        raise InputError(f"the prompt {shown!r} has no place for the query: pass one with {{query_str}} in it, once")
    settings.prompt = text.replace(_PLACE, "{query}")
