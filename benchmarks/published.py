"""The procedure as published, re-stated on stock transformers: what our speed is compared with.

Source read: princeton-pli/QRHead, ``src/qrretriever/attn_retriever.py`` (score_docs,
score_per_token_attention_to_query, _get_attn_weights), ``custom_cache.py`` and ``custom_modeling_llama.py``
(the attention's forward, LlamaForCausalLM.forward). What it does, and so do we here:

- one forward pass of all layers over the whole prompt with a cache; of every layer the query rows' query vectors are
  kept (gathered by a list of indices) next to all keys and values; no logits (the call says ``compute_logits=False``);
- afterwards, layer by layer and for all heads whatever the head set, the keys are repeated to the number of query
  heads, multiplied with the kept queries, softmaxed in the model's dtype and averaged over the rows;
- the cache is cut to the documents and the null prompt's end runs on it, again through all layers and heads;
- both prompts are tokenized with offsets for the spans, and once more each for the forward pass;
- subtraction, choice of heads, sum, outlier rule document by document.

Kinder than the published code: one causal mask for all heads and layers instead of one per head and layer; a fused
softmax; no dictionary of every character's token. Stock sdpa stands in for flash-attention 2.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.rank_workload import Workload
from qr_integrations.retrieval import HeadSet, PromptLayout
from qr_integrations.types import Span

_NAME = "published_sdpa"
_NULL = "N/A"


class _Kept:
    """The query vectors of one pass: layer -> ``[1, H, Q, D]``."""

    rows: Tensor
    queries: dict[int, Tensor]


def _keeping_queries(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
    _Kept.queries[module.layer_idx] = query[:, :, _Kept.rows, :]
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, *args, **kwargs)


class Published:
    """Scores documents as the published code does."""

    def __init__(self, work: Workload, heads: HeadSet) -> None:
        self._work, self._heads = work, heads
        AttentionInterface.register(_NAME, _keeping_queries)
        AttentionMaskInterface.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])

    def install(self) -> None:
        """Let the model keep its query vectors; not part of the timing."""
        self._work.backend.model.set_attn_implementation(_NAME)

    def uninstall(self) -> None:
        """Give the model its own attention back."""
        self._work.backend.model.set_attn_implementation("sdpa")
        _Kept.queries = {}

    @torch.no_grad()
    def rank(self, query: str) -> list[float]:
        """One score per document, in the given order."""
        layout = PromptLayout.build(self._work.backend, query, self._work.documents)
        null = PromptLayout.build(self._work.backend, _NULL, self._work.documents)
        start, cache = layout.query.start, DynamicCache(config=self._work.backend.config)
        scores_LHT = self._per_token(layout, cache, 0)
        cache.crop(-len(layout.query))
        null_LHT = self._per_token(null, cache, start)
        shorter = min(scores_LHT.shape[-1], null_LHT.shape[-1])
        calibrated_LHT = scores_LHT[..., :shorter] - null_LHT[..., :shorter]
        layers, heads = torch.tensor(self._heads.heads, device=calibrated_LHT.device).T
        return _document_scores(calibrated_LHT[layers, heads].sum(0), layout.documents)

    def _per_token(self, layout: PromptLayout, cache: DynamicCache, start: int) -> Tensor:
        """``[layers, H, T]``, averaged over the query rows."""
        backend = self._work.backend
        again = backend.tokenizer(layout.text, add_special_tokens=backend.chat.add_special_tokens)["input_ids"]
        ids = torch.tensor([again], device=backend.device)[:, start:]
        _Kept.rows = torch.arange(layout.query.start - start, layout.query.stop - start, device=ids.device)
        _Kept.queries = {}
        backend.decoder(input_ids=ids, past_key_values=cache, use_cache=True)
        mask_QT = _causal(len(layout.query), len(layout), ids.device)
        rows = [_rows(layer.keys, _Kept.queries[i], mask_QT).mean(1) for i, layer in enumerate(cache.layers)]
        return torch.stack(rows)


def _causal(num_rows: int, num_tokens: int, device: torch.device) -> Tensor:
    positions = torch.arange(num_tokens - num_rows, num_tokens, device=device)[:, None]
    return torch.arange(num_tokens, device=device) > positions


def _rows(keys: Tensor, queries: Tensor, hidden_QT: Tensor) -> Tensor:
    """Softmax rows ``[H, Q, T]`` of all heads of a layer."""
    keys = repeat_kv(keys, queries.shape[1] // keys.shape[1])
    logits = (queries * queries.shape[-1] ** -0.5) @ keys.transpose(2, 3)
    return logits.masked_fill_(hidden_QT, torch.finfo(logits.dtype).min).softmax(-1)[0]


def _document_scores(scores_T: Tensor, documents: Sequence[Span]) -> list[float]:
    scores = []
    for span in documents:
        tokens = scores_T[span.slice()]
        kept = tokens > tokens.mean() - 2 * tokens.std()
        scores.append((tokens * kept).sum())
    return [score.item() for score in scores]


class EagerAttentions:
    """The plain way: ``output_attentions=True``, every layer's H x T x T matrix returned, then the rows picked out."""

    def __init__(self, work: Workload, heads: HeadSet) -> None:
        self._work, self._heads = work, heads

    def install(self) -> None:
        """Eager attention: the only kind that returns its weights."""
        self._work.backend.model.set_attn_implementation("eager")

    def uninstall(self) -> None:
        """Give the model its own attention back."""
        self._work.backend.model.set_attn_implementation("sdpa")

    @torch.no_grad()
    def rank(self, query: str) -> list[float]:
        """One score per document; the null query runs on the kept documents."""
        layout = PromptLayout.build(self._work.backend, query, self._work.documents)
        null = PromptLayout.build(self._work.backend, _NULL, self._work.documents)
        cache = DynamicCache(config=self._work.backend.config)
        scores_KT = self._per_token(layout, cache, 0)
        cache.crop(-len(layout.query))
        null_KT = self._per_token(null, cache, layout.query.start)
        shared = layout.shared.slice()
        return _document_scores((scores_KT[:, shared] - null_KT[:, shared]).sum(0), layout.documents)

    def _per_token(self, layout: PromptLayout, cache: DynamicCache, start: int) -> Tensor:
        backend, rows = self._work.backend, slice(layout.query.start - start, layout.query.stop - start)
        ids = torch.tensor([layout.token_ids[start:]], device=backend.device)
        out = backend.decoder(input_ids=ids, past_key_values=cache, use_cache=True, output_attentions=True)
        return torch.stack([out.attentions[layer][0, head, rows].mean(0) for layer, head in self._heads.heads])

    def bytes_needed(self, num_tokens: int) -> int:
        """Memory of the attention matrices: all layers kept, one more in fp32 while it is softmaxed."""
        layers = self._work.backend.attention_layers
        heads = sum(layer.num_heads for layer in layers.values())
        per_head = num_tokens**2
        most = max(layer.num_heads for layer in layers.values())
        return per_head * (heads * self._work.backend.model.dtype.itemsize + most * 4 * 2)
