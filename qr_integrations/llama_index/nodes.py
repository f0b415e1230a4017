"""LlamaIndex nodes as documents to rank, and ranked nodes as copies of them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from llama_index.core.prompts import BasePromptTemplate, PromptTemplate
from llama_index.core.schema import (
    BaseNode,
    ImageDocument,
    ImageNode,
    MetadataMode,
    NodeRelationship,
    NodeWithScore,
    TextNode,
)
from llama_index.core.schema import Document as LlamaDocument

from qr_integrations.errors import InputError
from qr_integrations.reranking import METADATA_KEYS, RETRIEVAL_SCORE, Relevance, RerankSettings
from qr_integrations.types import Document, ScoredSpan, Span

PROMPT_KEY = "qr_prompt"


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
    contents = [_content(number, scored.node, metadata_mode) for number, scored in enumerate(nodes)]
    documents = [Document(text, id=scored.node.node_id) for text, scored in zip(contents, nodes, strict=True)]
    found = settings.relevances(query, documents, top_n, all_spans=True)
    return [
        _scored_copy(
            nodes[item.index],
            _in_body(item, contents[item.index], nodes[item.index].node, settings),
            keep_retrieval_score,
        )
        for item in found
    ]


def _content(number: int, node: BaseNode, metadata_mode: MetadataMode) -> str:
    if isinstance(node, ImageNode | ImageDocument) and not node.get_content(MetadataMode.NONE).strip():
        raise InputError(
            f"node #{number} ({node.node_id}) is an image without text, which a text model cannot rank: give it a "
            "caption as its text, or leave image nodes out"
        )
    content: str = node.get_content(metadata_mode)
    return content


def _in_body(relevance: Relevance, content: str, node: BaseNode, settings: RerankSettings) -> Relevance:
    """Spans by the characters of the node's own text, where they were of the text with its metadata."""
    if relevance.spans is None:
        return relevance
    body = node.get_content(MetadataMode.NONE)
    start = content.rfind(body.strip())  # the template strips, and puts the text last
    shift = start - (len(body) - len(body.lstrip()))
    inside = [span for span in relevance.spans if start <= span.span.start and span.span.stop <= start + len(body)]
    moved = tuple(
        ScoredSpan(Span(span.span.start - shift, span.span.stop - shift), span.text, span.score)
        for span in inside[: settings.max_spans]
    )
    return replace(relevance, spans=moved)


def _scored_copy(scored: NodeWithScore, relevance: Relevance, keep_retrieval_score: bool) -> NodeWithScore:
    """What we add to the metadata is for programs: neither embeddings nor the language model read it."""
    node = scored.node
    metadata = relevance.added_to(node.metadata)
    if keep_retrieval_score and scored.score is not None:
        metadata[RETRIEVAL_SCORE] = float(scored.score)
    update: dict[str, Any] = {"metadata": metadata}
    for field in ("excluded_embed_metadata_keys", "excluded_llm_metadata_keys"):
        known = getattr(node, field)
        update[field] = [*known, *(key for key in METADATA_KEYS if key in metadata and key not in known)]
    return NodeWithScore(node=node.model_copy(update=update), score=relevance.score)


def pieces(document: LlamaDocument, chunk_size: int, chunk_overlap: int = 0) -> list[TextNode]:
    """A long document as nodes that know their characters in it; `chunk_size` in tokens, about."""
    from qr_integrations.retrieval.chunks import chunk, rough_token_starts

    text = document.text
    return [
        TextNode(
            id_=f"{document.node_id}-{span.start}",
            text=text[span.slice()],
            start_char_idx=span.start,
            end_char_idx=span.stop,
            metadata=dict(document.metadata),
            excluded_embed_metadata_keys=list(document.excluded_embed_metadata_keys),
            excluded_llm_metadata_keys=list(document.excluded_llm_metadata_keys),
            relationships={NodeRelationship.SOURCE: document.as_related_node_info()},
        )
        for span in chunk(text, rough_token_starts(text), chunk_size, chunk_overlap)
    ]


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
    template = prompts[PROMPT_KEY].get_template()
    if template.count("{query_str}") != 1:
        raise InputError(f"the prompt {template!r} has no place for the query: pass one with {{query_str}} in it, once")
    settings.prompt = template.replace("{query_str}", "{query}")
