"""A query engine of LlamaIndex that answers from the keys and values a retriever keeps."""

import asyncio
from dataclasses import asdict
from typing import Any

from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.base.response.schema import Response
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload
from llama_index.core.prompts.mixin import PromptMixinType
from llama_index.core.schema import NodeWithScore, QueryBundle

from qr_integrations.errors import InputError
from qr_integrations.llama_index.nodes import as_ranked, with_relevances
from qr_integrations.llama_index.retriever import QRRetriever


class QRQueryEngine(BaseQueryEngine):
    """One local model finds the nodes and answers from them; they are not read again.

    Example:
        >>> from llama_index.core.schema import TextNode
        >>> from qr_integrations.llama_index import QRQueryEngine, QRRetriever
        >>> nodes = [TextNode(text="Cats sleep."), TextNode(text="Dracula was written by Bram Stoker.")]
        >>> retriever = QRRetriever(nodes, model="qr-mini", indexed=True, answers=True)
        >>> response = QRQueryEngine(retriever, top_k=1, max_new_tokens=8).query("who wrote dracula")
        >>> response.source_nodes[0].text
        'Dracula was written by Bram Stoker.'

    The response's metadata holds ``finish_reason``, ``usage``, ``seconds``, and ``steps``: what each step did, such as
    how many tokens were not read again.
    """

    def __init__(
        self,
        retriever: QRRetriever,
        *,
        top_k: int = 3,
        callback_manager: CallbackManager | None = None,
        **generation: Any,
    ) -> None:
        """Args:
        retriever: made with ``indexed=True, answers=True``. Its `score_threshold` and `explain` do not count.
        top_k: how many nodes the model answers from, at most.
        callback_manager: None takes the retriever's.
        generation: further arguments of `DocumentIndex.answer`, such as `max_new_tokens`.

        Raises:
            InputError: the retriever's index does not keep all layers, or `top_k` below 1.
        """
        if not (retriever.settings.indexed and retriever.settings.answers):
            raise InputError(
                "the model's upper layers are not kept: make the retriever with indexed=True, answers=True"
            )
        if top_k < 1:
            raise InputError(f"top_k is {top_k}: pass at least 1")
        super().__init__(callback_manager or retriever.callback_manager)
        self.retriever, self.top_k, self.generation = retriever, top_k, generation

    def _get_prompt_modules(self) -> PromptMixinType:
        return {"retriever": self.retriever}

    def _query(self, query_bundle: QueryBundle) -> Response:
        payload = {EventPayload.QUERY_STR: query_bundle.query_str}
        with self.callback_manager.event(CBEventType.QUERY, payload=payload) as event:
            response = self._answer(query_bundle.query_str)
            event.on_end(payload={EventPayload.RESPONSE: response})
        return response

    async def _aquery(self, query_bundle: QueryBundle) -> Response:
        return await asyncio.to_thread(self._query, query_bundle)

    def _answer(self, question: str) -> Response:
        settings, nodes = self.retriever.settings, self.retriever.nodes
        documents = as_ranked(nodes, self.retriever.metadata_mode, settings)
        grounded = settings.index_over(documents).answer(question, top_k=self.top_k, **self.generation)
        scored = [NodeWithScore(node=node) for node in nodes]
        sources = with_relevances(scored, documents, settings.relevances_used(grounded))
        how = grounded.answer
        usage = {**asdict(how.usage), "total_tokens": how.usage.total_tokens}
        metadata = {"finish_reason": how.finish_reason, "usage": usage}
        metadata |= {"steps": dict(how.steps), "seconds": dict(how.seconds)}
        return Response(response=grounded.text, source_nodes=sources, metadata=metadata)
