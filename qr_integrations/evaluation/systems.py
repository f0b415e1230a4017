"""What can be measured side by side: each a name and scores for a list of documents.

A system is asked for by a line: ``random``, ``retrieved``, ``bm25``, ``icr``, ``qr``, ``cross:PATH``, ``bi:PATH``;
``icr`` and ``qr`` may have settings: ``qr:heads=all,layout=block``; ``qr:kept=int8`` ranks out of an index that keeps
keys and values so; ``qr:random=5,seed=1``, heads drawn at random, is a control. A comma ends a setting, so none can
hold one.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, Protocol, get_args, runtime_checkable

import numpy as np
from safetensors import SafetensorError

from qr_integrations.backend import Backend, KeptDtype
from qr_integrations.errors import InputError, LoadError, MissingExtra
from qr_integrations.evaluation.bm25 import Bm25, document_text
from qr_integrations.evaluation.specs import check_distinct, read_settings
from qr_integrations.retrieval import DocumentIndex, HeadSet, ICRReranker, QRHeadReranker
from qr_integrations.retrieval.refinements import Refinements
from qr_integrations.retrieval.reranker import AttentionReranker
from qr_integrations.retrieval.windows import Merge, Truncation
from qr_integrations.types import Document, JudgedList

GRAMMAR = "random, retrieved, bm25, icr, qr, qr:heads=all,layout=block, cross:PATH or bi:PATH"


@runtime_checkable
class System(Protocol):
    """Something that scores documents for a query."""

    @property
    def name(self) -> str:
        """As it stands in tables."""
        ...

    @property
    def reads_order(self) -> bool:
        """Whether the order in which it gets the documents can change their scores."""
        ...

    def score(self, query: str, documents: Sequence[Document]) -> list[float]:
        """A score for every document, in the given order; higher is better."""
        ...


@dataclass(frozen=True, slots=True)
class RandomOrder:
    """Scores that mean nothing: the floor. The same for the same query and documents in the same order."""

    name: str = "random"
    reads_order: bool = True

    def score(self, query: str, documents: Sequence[Document]) -> list[float]:
        """Uniform from 0 to 1."""
        draw = Random(repr((query, [document.text for document in documents])))
        return [draw.random() for _ in documents]


@dataclass(frozen=True, slots=True)
class Retrieved:
    """The order in which the documents came from the retriever, which `run_systems` passes first."""

    name: str = "retrieved"
    reads_order: bool = False

    def score(self, query: str, documents: Sequence[Document]) -> list[float]:
        """Minus the place."""
        return [-float(place) for place in range(len(documents))]


class Bm25System:
    """BM25 with the word counts of all documents of all lists."""

    reads_order = False

    def __init__(self, lists: Iterable[JudgedList], name: str = "bm25") -> None:
        texts = {document_text(document) for judged in lists for document in judged.documents}
        self.name = name
        self._places = {text: place for place, text in enumerate(sorted(texts))}
        self._index = Bm25(list(self._places))

    def score(self, query: str, documents: Sequence[Document]) -> list[float]:
        """BM25 of title and text."""
        scores = self._index.scores(query)
        return [float(scores[self._places[document_text(document)]]) for document in documents]


class AttentionSystem:
    """QRHead or ICR; with `kept`, out of an index that keeps keys and values so."""

    reads_order = True

    def __init__(self, reranker: AttentionReranker, name: str, kept: KeptDtype | None = None) -> None:
        self.reranker, self.name, self.kept = reranker, name, kept

    def score(self, query: str, documents: Sequence[Document]) -> list[float]:
        """Calibrated attention mass.

        With ``merge="final"``, those documents that did not reach the last prompt may all have the score of its last
        document; here each is a little below the one before, as it was ranked.
        """
        scores, above = [0.0] * len(documents), math.inf
        if self.kept is None:
            ranking = self.reranker.rank(query, documents)
        else:
            ranking = DocumentIndex.build(documents, self.reranker, kv_dtype=self.kept).rank(query)
        for item in ranking:
            in_last_prompt = item.window == ranking[0].window
            above = item.score if in_last_prompt else min(item.score, math.nextafter(above, -math.inf))
            scores[item.index] = above
        return scores


class CrossEncoderSystem:
    """A sentence-transformers `CrossEncoder`: reads query and document together, one pair at a time."""

    reads_order = False

    def __init__(self, path: str, device: str | None = None, name: str = "") -> None:
        self.name = name or f"cross:{path}"
        self._model = _from_sentence_transformers("CrossEncoder", path, device)

    def score(self, query: str, documents: Sequence[Document]) -> list[float]:
        """The model's own."""
        pairs = [(query, document_text(document)) for document in documents]
        return [float(score) for score in np.asarray(self._model.predict(pairs, show_progress_bar=False)).reshape(-1)]


class BiEncoderSystem:
    """A sentence-transformers `SentenceTransformer`: query and documents are embedded apart, each text once."""

    reads_order = False

    def __init__(self, path: str, device: str | None = None, name: str = "") -> None:
        self.name = name or f"bi:{path}"
        self._model = _from_sentence_transformers("SentenceTransformer", path, device)
        self._known: dict[str, np.ndarray] = {}

    def score(self, query: str, documents: Sequence[Document]) -> list[float]:
        """The cosine, or what the model names as its similarity."""
        texts = [document_text(document) for document in documents]
        if new := [text for text in dict.fromkeys(texts) if text not in self._known]:
            self._known |= dict(zip(new, self._model.encode_document(new, show_progress_bar=False), strict=True))
        asked = self._model.encode_query([query], show_progress_bar=False)
        similar = self._model.similarity(asked, np.stack([self._known[text] for text in texts]))
        return [float(score) for score in similar[0]]


def make_systems(
    specs: Sequence[str], lists: Sequence[JudgedList], *, backend: Callable[[], Backend], device: str | None = None
) -> list[System]:
    """The systems that `specs` ask for, see the top of this file.

    Args:
        specs: one line each, no two the same.
        lists: what they will be measured on; BM25 counts words in them.
        backend: gives the model that qr and icr read.
        device: for cross- and bi-encoders; None lets sentence-transformers choose.

    Raises:
        InputError: a line that is no system, has a setting that there is not, or stands twice.
        LoadError: a cross- or bi-encoder cannot be loaded.
        MissingExtra: sentence-transformers or bm25s is not installed.
    """
    check_distinct(specs)
    return [_make(spec, lists, backend, device) for spec in specs]


def _make(spec: str, lists: Sequence[JudgedList], backend: Callable[[], Backend], device: str | None) -> System:
    kind, _, rest = spec.partition(":")
    if kind in ("icr", "qr"):
        return AttentionSystem(*_reranker(spec, kind, backend()))
    if kind in ("cross", "bi") and rest:
        return CrossEncoderSystem(rest, device, spec) if kind == "cross" else BiEncoderSystem(rest, device, spec)
    makers: dict[str, Callable[[], System]] = {
        "random": RandomOrder,
        "retrieved": Retrieved,
        "bm25": lambda: Bm25System(lists),
    }
    if spec not in makers:
        raise InputError(f"{spec!r} is no system: write {GRAMMAR}")
    return makers[spec]()


def _reranker(spec: str, kind: str, backend: Backend) -> tuple[AttentionReranker, str, KeptDtype | None]:
    """QRHead or ICR with settings, its name, and how an index keeps its keys and values, if there is one.

    Nothing is kept between lists: every one is timed as a new one.
    """
    given = read_settings(spec, {**_SETTINGS, **_REFINEMENTS, **(_CHOICE_OF_HEADS if kind == "qr" else {})})
    refined = {name: given.pop(name) for name in _REFINEMENTS if name in given}
    if "random" in given and not {"heads", "top"}.isdisjoint(given):
        raise InputError(f"{spec!r}: heads are drawn from all of the model's: leave out heads and top, or random")
    heads, top = given.pop("heads", "auto"), given.pop("top", None)
    drawn, seed = given.pop("random", None), given.pop("seed", 0)
    kept = given.pop("kept", None)
    options: dict[str, Any] = {"truncation": "head", "keep_prefixes": 0, "refinements": Refinements(**refined), **given}
    if kind == "icr":
        return ICRReranker(backend, **options), spec, kept
    chosen = HeadSet.resolve(heads, backend) if drawn is None else HeadSet.random(backend, drawn, seed=seed)
    return QRHeadReranker(backend, heads=chosen if top is None else chosen.top(top), **options), spec, kept


def _one_of(choices: Mapping[str, Any]) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        if text not in choices:
            raise ValueError(f"it is {' or '.join(choices)}")
        return choices[text]

    return read


def _literal(kind: Any) -> Callable[[str], str]:
    return _one_of({choice: choice for choice in get_args(kind)})


def _count(text: str) -> int:
    if (count := int(text)) < 1:
        raise ValueError("it counts from 1")
    return count


_SETTINGS: dict[str, Callable[[str], Any]] = {
    "calibrated": _one_of({"yes": True, "no": False}),
    "instruction": str,
    "kept": _literal(KeptDtype),
    "max_context_tokens": _count,
    "max_doc_tokens": _count,
    "merge": _literal(Merge),
    "null_instruction": float,
    "truncation": _literal(Truncation),
}
_CHOICE_OF_HEADS: dict[str, Callable[[str], Any]] = {"heads": str, "top": _count, "random": _count, "seed": int}
_KINDS: dict[Any, Callable[[str], Any]] = {int: int, float: float}
_REFINEMENTS = {field.name: _KINDS.get(field.type) or _literal(field.type) for field in fields(Refinements)}


@cache
def _from_sentence_transformers(kind: str, path: str, device: str | None) -> Any:
    """Loaded once, whatever number of systems reads it. Weights come from safetensors only."""
    try:
        import sentence_transformers
    except ImportError as error:
        raise MissingExtra("a cross-encoder or bi-encoder", "eval") from error
    folder = Path(path).expanduser()
    try:
        return getattr(sentence_transformers, kind)(
            str(folder) if folder.is_dir() else path, device=device, model_kwargs={"use_safetensors": True}
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise LoadError(f"{path!r} is no {kind} that can be loaded ({error}): pass a folder or a hub id") from error
