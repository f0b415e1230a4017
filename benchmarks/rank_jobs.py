"""The jobs of the ranking benchmark: ours, the floors below them, and the ways it is done elsewhere."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from benchmarks.measure import available_bytes
from benchmarks.published import EagerAttentions, Published
from benchmarks.rank_workload import Workload
from qr_integrations import ICRReranker, QRHeadReranker
from qr_integrations.retrieval import HeadSet
from qr_integrations.retrieval.reranker import AttentionReranker

_QUERIES = 4  # the warm jobs take these in turn


def _nothing(repeat: int) -> None:
    """No preparation."""


@dataclass(frozen=True, slots=True)
class Job:
    """Something to time: `run` is measured, `prepare` and `finish` are not. All three get the number of the repeat."""

    name: str
    what: str
    run: Callable[[int], Any]
    prepare: Callable[[int], None] = _nothing
    finish: Callable[[int], None] = _nothing
    skip: str = ""  # why it cannot run here


def _cold(name: str, what: str, reranker: AttentionReranker, work: Workload) -> Job:
    """`rank` on documents never seen: everything kept is dropped before."""
    query = work.query(0)
    return Job(
        name,
        what,
        run=lambda repeat: reranker.rank(query, work.documents),
        prepare=lambda repeat: reranker.forget(),
        finish=lambda repeat: reranker.forget(),
    )


def ours_cold_half(work: Workload) -> Job:
    """New documents, top head at half depth."""
    reranker = QRHeadReranker(work.backend, heads=work.half)
    return _cold("ours_cold_half", "QRHeadReranker.rank, new documents, top head at half depth", reranker, work)


def ours_cold_last(work: Workload) -> Job:
    """New documents, top head in the last layer."""
    reranker = QRHeadReranker(work.backend, heads=work.last)
    return _cold("ours_cold_last", "QRHeadReranker.rank, new documents, top head in the last layer", reranker, work)


def ours_icr(work: Workload) -> Job:
    """New documents, all heads."""
    return _cold("ours_icr", "ICRReranker.rank, new documents, all heads", ICRReranker(work.backend), work)


def ours_warm(work: Workload) -> Job:
    """Another query over documents that were ranked before."""
    reranker = QRHeadReranker(work.backend, heads=work.half)
    queries = [work.query(1 + number) for number in range(_QUERIES)]

    known: list[Any] = []

    def know(repeat: int) -> None:
        if not known:
            known.append(reranker.rank(work.query(0), work.documents))

    return Job(
        "ours_warm",
        "QRHeadReranker.rank, another query, known documents, top head at half depth",
        run=lambda repeat: reranker.rank(queries[repeat % _QUERIES], work.documents),
        prepare=know,
    )


def truncated(decoder: Any, top_layer: int) -> Any:
    """The same decoder with layers 0..top_layer only, sharing their weights, and without the final norm."""
    shorter = copy.copy(decoder)
    shorter._modules = dict(decoder._modules)
    shorter.layers = nn.ModuleList(decoder.layers[: top_layer + 1])
    shorter.norm = nn.Identity()
    shorter.config = copy.copy(decoder.config)
    shorter.config.num_hidden_layers = top_layer + 1
    return shorter


def _floor_cold(name: str, what: str, work: Workload, heads: HeadSet, *, use_cache: bool = False) -> Job:
    decoder = truncated(work.backend.decoder, heads.top_layer)
    ids = torch.tensor([work.layout().token_ids], device=work.backend.device)

    @torch.no_grad()
    def run(repeat: int) -> Tensor:
        hidden: Tensor = decoder(input_ids=ids, use_cache=use_cache).last_hidden_state
        return hidden

    return Job(name, what, run=run)


def floor_cold_half(work: Workload) -> Job:
    """The bare forward pass of the layers up to half depth."""
    what = "forward pass of layers 0..top over the prompt, no cache, no logits; top at half depth"
    return _floor_cold("floor_cold_half", what, work, work.half)


def floor_cold_half_cached(work: Workload) -> Job:
    """The same, keeping keys and values."""
    what = "the same with a stock cache (keys and values kept)"
    return _floor_cold("floor_cold_half_cached", what, work, work.half, use_cache=True)


def floor_cold_last(work: Workload) -> Job:
    """The bare forward pass of all layers."""
    what = "forward pass of all layers over the prompt, no cache, no logits"
    return _floor_cold("floor_cold_last", what, work, work.last)


def floor_warm(work: Workload) -> Job:
    """The query's tokens over kept documents, stock cache, no tap."""
    decoder = truncated(work.backend.decoder, work.half.top_layer)
    layouts = [work.layout(1 + number) for number in range(_QUERIES)]
    shared = layouts[0].shared
    tails = [torch.tensor([x.token_ids[shared.stop :]], device=work.backend.device) for x in layouts]
    cache = DynamicCache(config=decoder.config)

    @torch.no_grad()
    def know(repeat: int) -> None:
        if not cache.get_seq_length():
            ids = torch.tensor([layouts[0].token_ids[shared.slice()]], device=work.backend.device)
            decoder(input_ids=ids, past_key_values=cache, use_cache=True)

    @torch.no_grad()
    def run(repeat: int) -> Tensor:
        hidden: Tensor = decoder(input_ids=tails[repeat % _QUERIES], past_key_values=cache, use_cache=True)[0]
        return hidden

    return Job(
        "floor_warm",
        "forward pass of instruction, query and closing over the kept documents, layers 0..top, stock cache, no tap",
        run=run,
        prepare=know,
        finish=lambda repeat: cache.crop(-tails[repeat % _QUERIES].shape[1]),
    )


def published(work: Workload) -> Job:
    """The authors' procedure."""
    way, query = Published(work, work.half), work.query(0)
    return Job(
        "published",
        "the published procedure: all layers, rows of all heads of all layers, null pass on the kept documents",
        run=lambda repeat: way.rank(query),
        prepare=lambda repeat: way.install(),
        finish=lambda repeat: way.uninstall(),
    )


def eager_attentions(work: Workload) -> Job:
    """Full matrices."""
    way, query, num_tokens = EagerAttentions(work, work.half), work.query(0), len(work.layout())
    needed, free = way.bytes_needed(num_tokens), available_bytes(work.backend.device)
    too_much = f"{num_tokens} tokens need {needed / 2**30:.0f} GiB of matrices, {free / 2**30:.0f} GiB are free"
    return Job(
        "eager_attentions",
        "output_attentions=True with eager attention: every layer's heads x T x T matrix",
        run=lambda repeat: way.rank(query),
        prepare=lambda repeat: way.install(),
        finish=lambda repeat: way.uninstall(),
        skip=too_much if needed > 0.6 * free else "",
    )


JOBS: dict[str, Callable[[Workload], Job]] = {
    make.__name__: make
    for make in (
        floor_cold_half,
        ours_cold_half,
        published,
        floor_warm,
        ours_warm,
        floor_cold_half_cached,
        floor_cold_last,
        ours_cold_last,
        ours_icr,
        eager_attentions,
    )
}
