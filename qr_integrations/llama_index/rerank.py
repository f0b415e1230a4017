"""The reranker for LlamaIndex query engines: a node postprocessor."""

from collections.abc import Iterator
from contextlib import contextmanager

from llama_index.core.callbacks import CBEventType, EventPayload
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.prompts.mixin import PromptMixin
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle
from pydantic import Field

from qr_integrations.errors import InputError
from qr_integrations.llama_index.nodes import prompts_of, rank_nodes, update_prompts_of
from qr_integrations.reranking import SETTINGS, RerankSettings

_dispatcher = get_dispatcher(__name__)


class QRRerank(RerankSettings, BaseNodePostprocessor, PromptMixin):
    """Rank nodes by the attention of a local model (QRHead, arXiv 2506.09944).

    Example:
        >>> from llama_index.core.schema import NodeWithScore, TextNode
        >>> from qr_integrations.llama_index import QRRerank
        >>> texts = ["Cats sleep.", "Dracula was written by Bram Stoker."]
        >>> nodes = [NodeWithScore(node=TextNode(text=text), score=0.5) for text in texts]
        >>> rerank = QRRerank(model="qr-mini", top_n=1)
        >>> rerank.postprocess_nodes(nodes, query_str="who wrote dracula")[0].text
        'Dracula was written by Bram Stoker.'

    The nodes that come back are copies with the new score, and in their metadata, hidden from embeddings and language
    models: ``qr_score``, ``qr_score_type``, ``qr_rank``, ``qr_truncated``, with `explain` ``qr_spans`` (characters of
    the node's own text), with `keep_retrieval_score` ``retrieval_score``.

    Where the same nodes come back in other lists, pass ``cache={"max_bytes": 2**30}``, best with
    ``refinements={"layout": "block"}``, whose documents do not see each other: then any list can use what another read.

    Attributes:
        top_n: how many nodes come back; None for all.
        metadata_mode: which metadata is ranked together with a node's text.
        keep_retrieval_score: keep the score that a node came with.

    All other parameters are those of `RerankSettings`.
    """

    model_config = SETTINGS

    top_n: int | None = Field(default=5, ge=0)
    metadata_mode: MetadataMode = MetadataMode.EMBED
    keep_retrieval_score: bool = False

    @classmethod
    def class_name(cls) -> str:
        """The name under which LlamaIndex serialises it."""
        return "QRRerank"

    def _get_prompts(self) -> dict[str, BasePromptTemplate]:
        return prompts_of(self)

    def _update_prompts(self, prompts: dict[str, BasePromptTemplate]) -> None:
        update_prompts_of(self, prompts)

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        if query_bundle is None:
            raise InputError("Missing query bundle in extra info: pass query_str=... or query_bundle=...")
        if not nodes:
            return []
        with self._announced(nodes, query_bundle) as ranked:
            ranked += rank_nodes(
                self,
                query_bundle.query_str,
                nodes,
                self.top_n,
                metadata_mode=self.metadata_mode,
                keep_retrieval_score=self.keep_retrieval_score,
            )
        return ranked

    @contextmanager
    def _announced(self, nodes: list[NodeWithScore], query: QueryBundle) -> Iterator[list[NodeWithScore]]:
        """Events of both kinds around the work; the list that it yields is what they end with, also after an error."""
        ranked: list[NodeWithScore] = []
        top_n = len(nodes) if self.top_n is None else self.top_n
        payload = {
            EventPayload.NODES: nodes,
            EventPayload.MODEL_NAME: self.model,
            EventPayload.QUERY_STR: query.query_str,
            EventPayload.TOP_K: top_n,
        }
        _dispatcher.event(ReRankStartEvent(query=query, nodes=nodes, top_n=top_n, model_name=self.model))
        try:
            with self.callback_manager.event(CBEventType.RERANKING, payload=payload) as event:
                yield ranked
                event.on_end(payload={EventPayload.NODES: ranked})
        finally:
            _dispatcher.event(ReRankEndEvent(nodes=ranked))
