"""What every adapter for reranking has in common: its parameters, its model opened on first use, its metadata keys.

It stands between the rooms and the roof: `langchain` and `llama_index` add their frameworks' manners, nothing else.
Importing it loads pydantic, which both frameworks bring; the model's libraries are loaded on first use.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakValueDictionary

from pydantic import ConfigDict, Field, PrivateAttr, field_serializer, field_validator, model_validator

from qr_integrations.errors import InputError
from qr_integrations.model_settings import LoadSettings, OpenedModels
from qr_integrations.types import Document, Ranking, ScoredSpan

if TYPE_CHECKING:
    from qr_integrations.backend import Backend
    from qr_integrations.retrieval.reranker import AttentionReranker
    from qr_integrations.retrieval.store import DocumentCache

RELEVANCE_SCORE, RETRIEVAL_SCORE, SPANS = "relevance_score", "retrieval_score", "qr_spans"
OWN_KEYS = ("qr_score", "qr_score_type", "qr_rank", "qr_truncated", SPANS)
SETTINGS: ConfigDict = {**LoadSettings.model_config, "extra": "forbid"}  # a typo is an error
Normalize = Literal["share", "sigmoid"] | Callable[[list[float]], Sequence[float]]

_KEPT_RERANKERS = 4  # of one adapter and its copies, whose settings may differ
_RANKING = (
    "prompt",
    "instruction",
    "null_instruction",
    "calibrated",
    "truncation",
    "max_doc_tokens",
    "max_context_tokens",
    "batch_size",
    "merge",
    "keep_prefixes",
    "refinements",
)
_CACHE = ("max_bytes", "folder", "max_disk_bytes", "kv_dtype")


@dataclass(frozen=True, slots=True)
class Relevance:
    """What is said about one document.

    Attributes:
        index: position in the list the caller passed.
        score: the score after `normalize`, a python float; higher is better.
        qr_score: the attention itself, see `ScoredDocument.score`.
        score_type: which scale `score` has: "raw", "share", "sigmoid" or "custom".
        rank: from 1.
        truncated: the document was not read in full.
        spans: strongest first; None if they were not asked for.
    """

    index: int
    score: float
    qr_score: float
    score_type: str
    rank: int
    truncated: bool
    spans: tuple[ScoredSpan, ...] | None = None

    def added_to(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """A copy of `metadata` with what is said here, in place of what another reranker said; JSON can hold it."""
        keys: dict[str, Any] = {name: value for name, value in metadata.items() if name not in OWN_KEYS}
        keys |= {"qr_score": self.qr_score, "qr_score_type": self.score_type}
        keys |= {"qr_rank": self.rank, "qr_truncated": self.truncated}
        return keys if self.spans is None else {**keys, SPANS: [span.as_dict() for span in self.spans]}


class _Opened(OpenedModels):
    """Also the rerankers made of the backends.

    Attributes:
        rerankers, caches: by their settings.
        in_use: the rerankers that something else holds too, such as an index; however many.
        reading: held while documents are read into an index.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rerankers: dict[str, AttentionReranker] = {}
        self.in_use: WeakValueDictionary[str, AttentionReranker] = WeakValueDictionary()
        self.caches: dict[str, DocumentCache] = {}
        self.reading = RLock()

    def get(self, key: str) -> "AttentionReranker | None":
        """The one for these settings."""
        with self.lock:
            return self.rerankers.get(key) or self.in_use.get(key)

    def keep(self, key: str, made: "AttentionReranker") -> "AttentionReranker":
        """Keep it, and drop the oldest and the closed; of several threads that made one, all go on with the first."""
        with self.lock:
            known = self.rerankers.setdefault(key, self.in_use.setdefault(key, made))
            usable = [name for name, reranker in self.rerankers.items() if not reranker.backend.closed]
            for name in self.rerankers.keys() - set(usable[-_KEPT_RERANKERS:]):
                del self.rerankers[name]
            return known

    def cache(self, arguments: dict[str, Any]) -> "DocumentCache":
        """The one with these arguments."""
        from qr_integrations.retrieval.store import DocumentCache

        with self.lock:
            if (key := repr(arguments)) not in self.caches:
                self.caches[key] = DocumentCache(**arguments)
            return self.caches[key]

    def forget(self) -> "list[Backend]":
        """Keep nothing any more; returns the backends."""
        with self.lock:
            self.rerankers.clear()
            self.caches.clear()
        return super().forget()


class RerankSettings(LoadSettings):
    """How to rank. The same names in both frameworks; all of it, but for a function as `normalize`, can be JSON.

    Attributes:
        model, backend, device, dtype, device_map, revision, quantization, attn_implementation, local_files_only,
            trust_remote_code, model_kwargs: see `LoadSettings`.
        method: ``"qrhead"``, or ``"icr"`` for all heads and ICR's prompt.
        heads: ``"auto"``, ``"all"``, a file, a `HeadSet`, or ``(layer, head)`` pairs.
        prompt, instruction, null_instruction, calibrated, truncation, max_doc_tokens, max_context_tokens, batch_size,
            merge, keep_prefixes, refinements: see `QRHeadReranker`. On a CPU a `max_context_tokens` of 2,048 or 4,096
            ranks long lists much faster than a model's whole window: the time for attention grows with the square of a
            prompt's length.
        cache: a `DocumentCache`, or its arguments as a mapping such as ``{"max_bytes": 2**30, "folder": "kept"}``:
            documents that come back in another list are not read again. Copies share it. With
            ``refinements={"layout": "block"}``, which ranked as well as the published layout where we measured it
            (`qr-mini`), any list finds what another one left, in any order; documents that see those before them, as
            published, are found only in a list that begins with the same ones. A folder gets what memory has no room
            for; the rest is written by `close`, if arguments were passed, or by the `flush` of your `DocumentCache`.
        normalize: None leaves the attention as it is. ``"share"`` divides what is positive by the sum of it: a share of
            this list, no probability. ``"sigmoid"`` is 1 / (1 + exp(-score)): 0.5 for a document that the query looks
            at no more than the null query. A function takes all scores, best first, and returns as many.
        score_threshold: leave out documents whose score, after `normalize`, is below.
        title_key: the metadata key whose value is a document's title; it is read in a line of its own in front.
        explain: add `qr_spans`, the stretches of text that a document was ranked by.
        max_spans: the strongest so many of each document; None for all.
        show_progress: a bar over the prompts, where there are several.
    """

    model_config = SETTINGS

    method: Literal["qrhead", "icr"] = "qrhead"
    heads: str | list[tuple[int, int]] = "auto"
    prompt: str | None = None
    instruction: str | None = None
    null_instruction: float = Field(default=0.0, ge=0.0, le=1.0)
    calibrated: bool = True
    truncation: Literal["head", "error", "chunk"] = "head"
    max_doc_tokens: int | None = Field(default=None, ge=1)
    max_context_tokens: int | None = Field(default=None, ge=1)
    batch_size: int | None = Field(default=None, ge=1)
    merge: Literal["one_scale", "final", "raw"] = "one_scale"
    keep_prefixes: int = Field(default=2, ge=0)
    cache: Any = None
    refinements: dict[str, Any] = Field(default_factory=dict)
    normalize: Normalize | None = None
    score_threshold: float | None = None
    title_key: str | None = None
    explain: bool = False
    max_spans: int | None = Field(default=3, ge=1)
    show_progress: bool = False

    _opened: _Opened = PrivateAttr(default_factory=_Opened)

    @field_validator("prompt")
    @classmethod
    def _prompt_has_a_place(cls, prompt: str | None) -> str | None:
        if prompt is not None and prompt.count("{query}") != 1:
            raise InputError(f"the prompt {prompt!r} has no place for the query: pass one with {{query}} in it, once")
        return prompt

    @field_validator("heads", mode="before")
    @classmethod
    def _heads_are_plain(cls, heads: Any) -> Any:
        return str(heads) if isinstance(heads, Path) else getattr(heads, "heads", heads)

    @field_validator("cache")
    @classmethod
    def _cache_can_be_made(cls, cache: Any) -> Any:
        if cache is None:
            return None
        if isinstance(cache, Mapping):
            if unknown := [name for name in cache if name not in _CACHE]:
                raise InputError(f"a cache has no {unknown[0]!r}: known are {', '.join(_CACHE)}")
            return dict(cache)
        from qr_integrations.retrieval.store import DocumentCache

        if not isinstance(cache, DocumentCache):
            raise InputError(f"the cache is a {type(cache).__name__}: pass a DocumentCache, or its arguments as a dict")
        return cache

    @field_serializer("cache")
    def _cache_as_its_arguments(self, cache: Any) -> dict[str, Any] | None:
        if cache is None:
            return None
        arguments = cache if isinstance(cache, dict) else {name: getattr(cache, name) for name in _CACHE}
        return {name: str(value) if isinstance(value, Path) else value for name, value in arguments.items()}

    @model_validator(mode="after")
    def _icr_reads_all_heads(self) -> "RerankSettings":
        if self.method == "icr" and self.heads not in ("auto", "all"):
            raise InputError(f"ICR reads all heads, heads={self.heads!r} have no effect: leave out heads or method")
        return self

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        if "normalize" not in state["__dict__"]:  # LlamaIndex drops what cannot be pickled
            raise InputError("normalize is a function that cannot be pickled: pass one defined at a module's top level")
        return state

    def close(self) -> None:
        """Let go of the weights as `LoadSettings.close` does, and of a cache made of arguments: its folder has all."""
        with self._opened.lock:
            caches = list(self._opened.caches.values())
        try:
            for cache in caches:
                cache.flush()
        finally:
            super().close()

    def title_of(self, metadata: Mapping[str, Any]) -> str | None:
        """The title under `title_key`, if there is one."""
        title = None if self.title_key is None else metadata.get(self.title_key)
        return None if title is None else str(title)

    def open(self) -> "AttentionReranker":
        """The reranker behind the adapter; the first call loads the model.

        Raises:
            LoadError: the model cannot be loaded.
            HeadError: no heads are known for it.
        """
        backend, cache = self._open_backend(), self._open_cache()
        key = f"{id(backend)} {id(cache)} {[getattr(self, name) for name in ('method', 'heads', *_RANKING)]!r}"
        return self._opened.get(key) or self._opened.keep(key, self._make(backend, cache))

    def _open_cache(self) -> "DocumentCache | None":
        cache: DocumentCache | None = self.cache
        return self._opened.cache(self.cache) if isinstance(self.cache, dict) else cache

    def _make(self, backend: "Backend", cache: "DocumentCache | None") -> "AttentionReranker":
        from qr_integrations.retrieval import ICRReranker, QRHeadReranker

        options = {**{name: getattr(self, name) for name in _RANKING}, "cache": cache}
        if self.method == "icr":
            return ICRReranker(backend, **options)
        return QRHeadReranker(backend, heads=self.heads, **options)

    def relevances(self, query: str, documents: Sequence[Document], top_n: int | None) -> list[Relevance]:
        """Rank, normalize, leave out what is below the threshold, keep the best `top_n`; None keeps all.

        No documents, or ``top_n=0``, give an empty list without loading the model.

        Raises:
            InputError: no query, or a `normalize` that does not return one number per document.
        """
        if not documents or top_n == 0:
            return []
        with shown_progress("Ranking", "prompt", self.show_progress) as progress:
            ranking = self.open().rank(
                query,
                documents,
                explain=self.num_explained(len(documents), top_n),
                max_spans=self.max_spans,
                progress=progress,
            )
        return self.relevances_of(ranking, top_n)

    def num_explained(self, num_documents: int, top_n: int | None) -> int:
        """How many documents, best first, need their spans; a function as `normalize` may put any of them first."""
        if not self.explain:
            return 0
        return num_documents if top_n is None or callable(self.normalize) else top_n

    def relevances_of(self, ranking: Ranking, top_n: int | None) -> list[Relevance]:
        """What a ranking says, normalized, without what is below the threshold, the best `top_n`; None keeps all."""
        scores, score_type = self._normalized(ranking)
        scored = list(zip(scores, ranking, strict=True))
        if score_type == "custom":
            scored.sort(key=lambda pair: (-pair[0], pair[1].index))
        kept = [pair for pair in scored if self.score_threshold is None or pair[0] >= self.score_threshold]
        return [
            Relevance(
                item.index,
                score,
                item.score,
                score_type,
                rank,
                item.num_tokens_cut > 0,
                item.spans if self.explain else None,
            )
            for rank, (score, item) in enumerate(kept[:top_n], start=1)
        ]

    def scores(self, query: str, documents: Sequence[Document]) -> list[float]:
        """The score of every document in the given order, after `normalize`."""
        if not documents:
            return []
        ranking = self.open().rank(query, documents)
        scores, _ = self._normalized(ranking)
        return [score for _, score in sorted(zip(ranking.order, scores, strict=True))]

    def _normalized(self, ranking: Ranking) -> tuple[list[float], str]:
        raw = [item.score for item in ranking]
        if self.normalize is None:
            return raw, "raw"
        if self.normalize == "share":
            whole = sum(max(0.0, score) for score in raw)
            return [max(0.0, score) / whole if whole > 0 else 0.0 for score in raw], "share"
        if self.normalize == "sigmoid":
            return [1.0 / (1.0 + math.exp(-score)) for score in raw], "sigmoid"
        given = self.normalize(raw)
        try:
            scores = [float(score) for score in given]
        except (TypeError, ValueError) as error:
            raise InputError(f"normalize returned {given!r}: return a list of numbers, one per score") from error
        if len(scores) != len(raw) or not all(math.isfinite(score) for score in scores):
            raise InputError(f"normalize made {scores} of {len(raw)} scores: return one finite number per score")
        return scores, "custom"


@contextmanager
def shown_progress(what: str, unit: str, show: bool) -> Iterator[Callable[[int, int], None] | None]:
    """Something that draws a bar when it is told how far the work is, and in all; None if it is not to be shown."""
    if not show:
        yield None
        return
    from tqdm import tqdm

    bars: list[Any] = []  # made with the first prompt: a single one has no progress

    def update(done: int, total: int) -> None:
        if not bars:
            bars.append(tqdm(desc=what, unit=unit, total=total))
        bars[0].update(done - bars[0].n)

    try:
        yield update
    finally:
        for bar in bars:
            bar.close()
