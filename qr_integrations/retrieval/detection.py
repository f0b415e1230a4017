"""Find the heads of a model that look for what a query asks, on questions whose answers are known.

Legend: K heads, N documents of one list.
"""

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from qr_integrations.backend import Backend
from qr_integrations.errors import InputError
from qr_integrations.files import write_whole
from qr_integrations.retrieval.heads import Head, HeadSet
from qr_integrations.retrieval.qrhead import QRHeadReranker
from qr_integrations.types import JudgedList
from qr_integrations.version import __version__

Objective = Literal["qrscore", "ndcg", "contrastive"]
OBJECTIVES: tuple[Objective, ...] = ("qrscore", "ndcg", "contrastive")
TEMPERATURE = 0.01  # of the contrastive objective; attention masses of single heads differ by about as much
_SAVE_EVERY = 8  # lists
_NDCG_AT = 10


def head_scores(
    scores_KN: Float[Tensor, "K N"],
    gold: Collection[int],
    objective: Objective,
    *,
    temperature: float = TEMPERATURE,
) -> Float[Tensor, "K"]:
    """How well every head by itself does on one list.

    Args:
        scores_KN: calibrated attention mass, see `AttentionReranker.score_per_head`.
        gold: the relevant documents.
        objective: ``"qrscore"``: the mass on gold documents (QRHead, arXiv 2506.09944, equation 4). ``"ndcg"``:
            nDCG@10 of the order that the head alone would give, as the authors' BEIR script. ``"contrastive"``: the
            softmax probability of a gold document against the others, mean over the gold ones (CoRe, arXiv 2510.02219).
        temperature: of the softmax.
    """
    chosen = sorted(gold)
    if objective == "qrscore":
        return scores_KN[:, chosen].sum(-1)
    others = [n for n in range(scores_KN.shape[-1]) if n not in set(gold)]
    if objective == "contrastive":
        logits = scores_KN.double() / temperature
        against = torch.logsumexp(logits[:, others], dim=-1, keepdim=True)
        return torch.sigmoid(logits[:, chosen] - against).mean(-1).float()
    order = scores_KN.argsort(dim=-1, descending=True, stable=True)
    hits = torch.isin(order, torch.tensor(chosen, device=order.device))[:, :_NDCG_AT]
    discounts = 1.0 / torch.log2(torch.arange(2, 2 + hits.shape[1], device=order.device, dtype=torch.float64))
    best = discounts[: len(chosen)].sum()
    return ((hits * discounts).sum(-1) / best).float()


@dataclass(frozen=True, slots=True)
class Stability:
    """What two halves of the lists agree on.

    Attributes:
        shared: how many of the best heads of one half are among the best of the other.
        of: how many were compared.
        by_chance: how many two random choices would share.
        rank_correlation: Spearman's, over all heads.
    """

    shared: int
    of: int
    by_chance: float
    rank_correlation: float


@dataclass(frozen=True, slots=True)
class Detection:
    """What was found: for every head and objective its score, in both halves of the lists.

    Attributes:
        heads: all heads that were scored.
        sums: objective -> the sums over the lists of even and of odd number, ``[2, K]`` as nested lists.
        counts: how many lists are in each half.
        provenance: model, data, seed, versions.
    """

    heads: tuple[Head, ...]
    sums: Mapping[str, list[list[float]]]
    counts: tuple[int, int]
    provenance: Mapping[str, Any]

    def scores(self, objective: Objective = "qrscore") -> dict[Head, float]:
        """The mean over all lists."""
        even, odd = self.sums[objective]
        return {head: (a + b) / sum(self.counts) for head, a, b in zip(self.heads, even, odd, strict=True)}

    def ranked(self, objective: Objective = "qrscore", max_layer: int | None = None) -> list[Head]:
        """All heads up to `max_layer`, best first."""
        scores = self.scores(objective)
        allowed = [head for head in self.heads if max_layer is None or head[0] <= max_layer]
        return sorted(allowed, key=lambda head: -scores[head])

    def head_set(self, objective: Objective = "qrscore", *, top_k: int = 16, max_layer: int | None = None) -> HeadSet:
        """The best `top_k` heads; none above `max_layer`, so that no layer above needs to run."""
        if top_k < 1:
            raise InputError(f"top_k is {top_k}: pass at least 1")
        if not (best := self.ranked(objective, max_layer)[:top_k]):
            raise InputError(f"no head lies in layers 0..{max_layer}: pass a max_layer of at least {self.heads[0][0]}")
        return HeadSet.of(
            best,
            model=str(self.provenance["model"]),
            detection_data=str(self.provenance["data"]),
            objective=objective,
            source=f"qr-integrations detect, {sum(self.counts)} lists",
        )

    def by_depth(self, objective: Objective = "qrscore", *, top_k: int = 16) -> dict[int, float]:
        """What a cap costs: layer -> the mean score of the best `top_k` heads up to it.

        Where there are fewer heads than `top_k`, the missing ones count 0.
        """
        scores = self.scores(objective)
        top_k = min(top_k, len(self.heads))
        depths = sorted({layer for layer, _ in self.heads})
        return {d: sum(scores[head] for head in self.ranked(objective, d)[:top_k]) / top_k for d in depths}

    def stability(
        self, objective: Objective = "qrscore", *, top_k: int = 16, max_layer: int | None = None
    ) -> Stability:
        """How alike the two halves choose among the heads up to `max_layer`."""
        allowed = [i for i, (layer, _) in enumerate(self.heads) if max_layer is None or layer <= max_layer]
        halves = [np.asarray(half)[allowed] for half in self.sums[objective]]
        top_k = min(top_k, len(allowed))
        best = [set(np.argsort(-half, kind="stable")[:top_k].tolist()) for half in halves]
        ranks = [_ranks(half) for half in halves]
        known = min(self.counts) > 0 and all(np.ptp(rank) > 0 for rank in ranks)
        correlation = float(np.corrcoef(ranks[0], ranks[1])[0, 1]) if known else math.nan
        return Stability(len(best[0] & best[1]), top_k, top_k * top_k / max(1, len(allowed)), correlation)

    def grid(self, objective: Objective = "qrscore") -> Float[np.ndarray, "layers heads"]:
        """Scores as layers x heads; NaN where there is no head that was read."""
        grid = np.full((1 + max(la for la, _ in self.heads), 1 + max(h for _, h in self.heads)), math.nan)
        for (layer, head), score in self.scores(objective).items():
            grid[layer, head] = score
        return grid

    def save(
        self, path: str | Path, objective: Objective = "qrscore", *, top_k: int = 16, max_layer: int | None = None
    ) -> HeadSet:
        """Write a file that `HeadSet.load` reads, with the scores of all heads and where they come from."""
        chosen = self.head_set(objective, top_k=top_k, max_layer=max_layer)
        stability = self.stability(objective, top_k=top_k, max_layer=max_layer)
        entry = {
            **chosen.as_dict(),
            "top_k": top_k,
            "max_layer": max_layer,
            "lists": sum(self.counts),
            "split_half": {name: getattr(stability, name) for name in Stability.__slots__},
            **self.provenance,
            "scores": [[*head, score] for head, score in self.scores(objective).items()],
        }
        lines = (f" {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in entry.items())
        write_whole(path, "{\n" + ",\n".join(lines) + "\n}\n")
        return chosen


class HeadDetector:
    """Scores all heads of a model on lists with known answers, one list at a time.

    Example:
        >>> from qr_integrations import Backend, HeadDetector
        >>> from qr_integrations.bundled import read_detection_lists
        >>> detector = HeadDetector(Backend.load("qr-mini"))
        >>> detection = detector.detect(read_detection_lists()[:8], data="NQ")
        >>> len(detection.head_set(top_k=5))
        5

    Where we differ from the authors' code (princeton-pli/QRHead): every head keeps its own score in one pass for all
    three objectives; layers above `max_layer` do not run.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        max_layer: int | None = None,
        seed: int = 0,
        temperature: float = TEMPERATURE,
        **options: Any,
    ) -> None:
        """Args:
        backend: the model.
        max_layer: heads above are not looked at.
        seed: for the order of the documents in each list.
        temperature: of the contrastive objective.
        options: of `QRHeadReranker`, such as `truncation` and `max_doc_tokens`.
        """
        heads = [head for head in HeadSet.all(backend).heads if max_layer is None or head[0] <= max_layer]
        if not heads:
            raise InputError(f"{backend.name!r} has no attention layer up to {max_layer}: pass a larger max_layer")
        if temperature <= 0:
            raise InputError(f"temperature is {temperature}: pass a number above 0")
        self.backend, self.seed, self.temperature, self._options = backend, seed, temperature, options
        self._reranker = QRHeadReranker(backend, heads=heads, keep_prefixes=0, **options)

    def detect(
        self,
        lists: Iterable[JudgedList],
        *,
        data: str = "",
        state: str | Path | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Detection:
        """Score all heads on all lists. Memory does not grow with their number.

        Args:
            lists: questions with documents, of which some are relevant and some are not; shuffled before they are read.
            data: what to call them in the result.
            state: a file from which an interrupted run goes on; removed at the end. The result is that of one run.
            progress: called with the number of lists done.

        Raises:
            InputError: no lists, a list without relevant or without other documents, or a `state` of another run.
        """
        run = _Run(self.identity(), np.zeros((len(OBJECTIVES), 2, len(self.heads))))
        done = run.resume(Path(state)) if state and Path(state).exists() else 0
        chain = ""
        for number, judged in enumerate(lists):
            chain = _chained(chain, judged)
            if number < done:
                if number == done - 1 and chain != run.chain:
                    raise InputError(f"{str(state)!r} was made with other lists: remove it, or pass the same ones")
                continue
            run.add(self.scores(number, judged), chain)
            if state and run.done % _SAVE_EVERY == 0:
                run.save(Path(state))
            if progress:
                progress(run.done)
        if chain != run.chain:
            raise InputError(f"{str(state)!r} has seen more lists than these: remove it, or pass the same ones")
        if not run.done:
            raise InputError("no lists to detect heads on: pass at least one JudgedList")
        if state:
            Path(state).unlink(missing_ok=True)
        sums: dict[str, list[list[float]]] = {name: run.sums[i].tolist() for i, name in enumerate(OBJECTIVES)}
        return Detection(self.heads, sums, ((run.done + 1) // 2, run.done // 2), {**self.identity(), "data": data})

    @property
    def heads(self) -> tuple[Head, ...]:
        """Those that are scored."""
        return self._reranker.heads.heads

    def identity(self) -> dict[str, Any]:
        """What a half-done run must share with the one that goes on with it; JSON can hold it."""
        return {
            "model": self.backend.name,
            "revision": (self.backend.load_arguments or {}).get("revision"),
            "num_heads": len(self.heads),
            "seed": self.seed,
            "temperature": self.temperature,
            "options": {name: self._options[name] for name in sorted(self._options)},
            "dtype": str(self.backend.model.dtype).removeprefix("torch."),
            "versions": {"qr-integrations": __version__} | {name: version(name) for name in ("torch", "transformers")},
        }

    def scores(self, number: int, judged: JudgedList) -> Float[np.ndarray, "objective K"]:
        """All heads on one list, its documents in an order of their own; one row for each of `OBJECTIVES`.

        Args:
            number: of the list, from 0; the order follows from it and from the seed.
            judged: the list.

        Raises:
            InputError: no relevant or no other documents, or what `AttentionReranker.score_per_head` cannot score.
        """
        order = list(range(len(judged.documents)))
        Random(f"{self.seed}-{number}").shuffle(order)
        gold = [place for place, document in enumerate(order) if judged.relevance.get(document, 0) > 0]
        if not gold or len(gold) == len(order):
            raise InputError(
                f"list #{number} ({judged.query!r}) has {len(gold)} relevant of {len(order)} documents: pass lists "
                "with both relevant and other documents"
            )
        scores_KN = self._reranker.score_per_head(judged.query, [judged.documents[i] for i in order])
        rows = [head_scores(scores_KN, gold, objective, temperature=self.temperature) for objective in OBJECTIVES]
        return torch.stack(rows).double().cpu().numpy()


@dataclass(slots=True)
class _Run:
    """How far a detection has come: sums of scores ``[objective, half, K]``, and a digest of the lists read."""

    identity: Mapping[str, Any]
    sums: np.ndarray
    done: int = 0
    chain: str = ""

    def add(self, scores: np.ndarray, chain: str) -> None:
        self.sums[:, self.done % 2] += scores
        self.done, self.chain = self.done + 1, chain

    def save(self, path: Path) -> None:
        entry = {"identity": self.identity, "done": self.done, "chain": self.chain, "sums": self.sums.tolist()}
        write_whole(path, json.dumps(entry))

    def resume(self, path: Path) -> int:
        """Go on from a file; how many lists it has seen."""
        try:
            entry = json.loads(path.read_text(encoding="utf-8"))
            identity, done, chain = dict(entry["identity"]), entry["done"], entry["chain"]
            sums = np.asarray(entry["sums"], dtype=np.float64)
            if type(done) is not int or done < 1 or not isinstance(chain, str) or not np.isfinite(sums).all():
                raise ValueError("it holds something else than a detection writes")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{str(path)!r} is no state of a detection ({error}): remove it") from error
        other = [name for name, value in self.identity.items() if identity.get(name) != value]
        if other:
            raise InputError(f"{str(path)!r} was made with another {', '.join(other)}: remove it, or run as before")
        if sums.shape != self.sums.shape:
            raise InputError(f"{str(path)!r} is no state of a detection (sums of shape {sums.shape}): remove it")
        self.done, self.chain, self.sums = done, chain, sums
        return self.done


def _ranks(values: Float[np.ndarray, "K"]) -> Float[np.ndarray, "K"]:
    """From 0; heads that tie share their mean rank."""
    _, group, count = np.unique(values, return_inverse=True, return_counts=True)
    below = count.cumsum() - count
    return np.asarray(below + (count - 1) / 2)[group]


def _chained(chain: str, judged: JudgedList) -> str:
    texts = [(document.title, document.text) for document in judged.documents]
    read = json.dumps([chain, judged.query, texts, sorted(judged.relevance.items())])
    return sha256(read.encode("utf-8", "surrogatepass")).hexdigest()
