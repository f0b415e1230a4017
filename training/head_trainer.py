"""The loop that trains heads on judged lists; it resumes where it stopped."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from random import Random
from statistics import mean
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qr_integrations import QRHeadReranker
from qr_integrations.backend import Backend
from qr_integrations.errors import InputError, MemoryLimitError, ScoreError
from qr_integrations.evaluation import ndcg_at_k
from qr_integrations.retrieval import HeadSet
from qr_integrations.types import JudgedList
from qr_integrations.version import __version__

from .trainable_heads import Adapter, ListwiseScorer, listwise_loss, query_key_matrices

FACTOR_RATE = 1e-2
LOWEST_RATE = 0.03
_TEMPERATURE_LISTS = 8


@dataclass(frozen=True, slots=True)
class FinetuneSettings:
    """How long, and with what.

    Attributes:
        steps: of the optimiser.
        rate: the adapter's learning rate at its highest; that of the softmax's factor is `FACTOR_RATE`.
        rank: of the adapter.
        temperature: scores are divided by it at first, then it is learned; None takes the standard deviation of the
            documents' scores in the first lists.
        accumulate: lists per step.
        warmup: share of the steps in which the rate rises; then it falls as a cosine to `LOWEST_RATE` of its height.
        clip: the largest norm of the adapter's gradient.
        targets: which matrices get an adapter, as in `query_key_matrices`.
        max_doc_tokens: documents are cut to this many tokens.
        check_every: steps between measurements on the validation lists.
        save_every: steps between checkpoints.
        seed: of the adapter's first values and of every order.

    Raises:
        InputError: a number that makes no sense.
    """

    steps: int = 500
    rate: float = 1e-4
    rank: int = 8
    temperature: float | None = None
    accumulate: int = 1
    warmup: float = 0.1
    clip: float = 1.0
    targets: str | None = None
    max_doc_tokens: int | None = None
    check_every: int = 50
    save_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "rank", "accumulate", "check_every", "save_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}: pass at least 1")
        for name in ("rate", "clip", "temperature"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} is {getattr(self, name)}: pass a number above 0")
        if not 0 <= self.warmup <= 1:
            raise InputError(f"warmup is a share of the steps, got {self.warmup}: pass a number from 0 to 1")

    def share_of_rate(self, step: int) -> float:
        """What part of the highest rate applies in the step of this number, from 0."""
        rising = max(1, round(self.warmup * self.steps))
        fallen = max(0.0, (step - rising) / max(1, self.steps - rising))
        cosine = 0.5 * (1 + math.cos(math.pi * fallen))
        return min(1.0, (step + 1) / rising) * (LOWEST_RATE + (1 - LOWEST_RATE) * cosine)


class HeadTrainer:
    """Adapter, factor, optimiser and lists of one run; `save` and `resume` keep all of it.

    Which list comes when, and in which order its documents stand, follows from the seed and the step's number alone.
    The model of `backend` is changed: let nothing else use it meanwhile.

    Attributes:
        step: how many are done.
        losses: of every step.
        checks: ``(step, nDCG@10)`` of every measurement on the validation lists.
        best_step: of the adapter that is kept: the one that ranked the validation lists best, or the last one where
            there are no such lists.

    Raises:
        InputError: no lists, or one without relevant or without other documents.
        MissingExtra: peft is not installed.
    """

    def __init__(
        self,
        backend: Backend,
        heads: HeadSet,
        lists: Sequence[JudgedList],
        valid: Sequence[JudgedList],
        settings: FinetuneSettings,
    ) -> None:
        _check("training", lists)
        _check("validation", valid)
        if not lists:
            raise InputError("no lists to train on: pass at least one JudgedList")
        self.backend, self.heads, self.lists, self.valid, self.settings = backend, heads, lists, valid, settings
        matrices = query_key_matrices(backend, heads.top_layer, settings.targets)
        self.adapter = Adapter(backend, matrices, settings.rank, settings.seed)
        self.scorer = ListwiseScorer(backend, heads, max_doc_tokens=settings.max_doc_tokens)
        self.log_factor = nn.Parameter(torch.zeros((), device=backend.device))
        groups = [{"params": list(self.adapter.parameters.values())}, {"params": [self.log_factor]}]
        self._optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
        self.step, self.best_step = 0, 0
        self.losses: list[float] = []
        self.checks: list[tuple[int, float]] = []
        self._best = self.adapter.state()

    @property
    def temperature(self) -> float:
        """What scores are divided by in the softmax."""
        return math.exp(-float(self.log_factor.detach()))

    def run(self, checkpoint: Path, progress: Callable[[HeadTrainer], None] | None = None) -> None:
        """Train to the last step, from `checkpoint` if it is there; `progress` is called after every step."""
        settings = self.settings
        if checkpoint.exists():
            self.resume(checkpoint)
        else:
            self.start()
        while self.step < settings.steps:
            self.one_step()
            last = self.step == settings.steps
            if last or self.step % settings.check_every == 0:
                self._measure()
            if last or self.step % settings.save_every == 0:
                self.save(checkpoint)
            if progress:
                progress(self)

    def start(self) -> None:
        """Choose the temperature and measure, before the first step."""
        with torch.no_grad():
            self.log_factor.fill_(-math.log(self.settings.temperature or self._spread()))
        self._measure()

    def one_step(self) -> float:
        """Some lists forth and back, then the optimiser; returns their mean loss.

        Raises:
            ScoreError: the loss is not finite.
            MemoryLimitError: a list with its gradients does not fit into the device's memory.
        """
        settings, total = self.settings, 0.0
        for group, rate in zip(self._optimiser.param_groups, (settings.rate, FACTOR_RATE), strict=True):
            group["lr"] = rate * settings.share_of_rate(self.step)
        for number in range(self.step * settings.accumulate, (self.step + 1) * settings.accumulate):
            loss = self.loss(number) / settings.accumulate
            total += float(loss.detach())
            if not math.isfinite(total):
                raise ScoreError(f"the loss of step {self.step + 1} is {total}: pass a lower rate, or dtype='float32'")
            try:
                loss.backward()
            except torch.OutOfMemoryError as error:
                raise MemoryLimitError(
                    "no memory for the gradients: pass max_doc_tokens, shorter lists, or heads of lower layers"
                ) from error
        nn.utils.clip_grad_norm_(list(self.adapter.parameters.values()), settings.clip)
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        self.step += 1
        self.losses.append(total)
        return total

    def loss(self, number: int) -> Tensor:
        """Of the training list that comes at this place, from 0: each list once, then each again."""
        seed, count = self.settings.seed, len(self.lists)
        judged = self.lists[shuffled(count, f"{seed}-round-{number // count}")[number % count]]
        order = shuffled(len(judged.documents), f"{seed}-list-{number}")
        scores = self.scorer.scores(judged.query, [judged.documents[i] for i in order])
        gold = [place for place, index in enumerate(order) if index in _gold(judged)]
        return listwise_loss(scores.to(self.log_factor.device), gold, self.log_factor.exp())

    def ndcg(self) -> float:
        """Mean nDCG@10 of the validation lists, documents shuffled, by `QRHeadReranker`."""
        cap, seed = self.settings.max_doc_tokens, self.settings.seed
        reranker = QRHeadReranker(
            self.backend, heads=self.heads, truncation="head", max_doc_tokens=cap, keep_prefixes=0
        )
        values = []
        for number, judged in enumerate(self.valid):
            order = shuffled(len(judged.documents), f"{seed}-validation-{number}")
            ranking = reranker.rank(judged.query, [judged.documents[i] for i in order])
            values.append(ndcg_at_k([order[place] for place in ranking.order], _gold(judged)))
        return mean(values)

    def save(self, path: Path) -> None:
        """Write everything that is needed to go on, as one safetensors file: whole or not there."""
        tensors = {f"adapter.{name}": tensor for name, tensor in self.adapter.state().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self._best.items()}
        tensors["log_factor"] = self.log_factor.detach().cpu().clone()
        for number, values in self._optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{number}.{name}": value.cpu().clone() for name, value in values.items()}
        facts = {name: getattr(self, name) for name in ("step", "best_step", "losses", "checks")}
        new = path.with_suffix(".new")
        save_file(tensors, new, metadata={"run": json.dumps({"identity": self.identity(), **facts})})
        os.replace(new, path)

    def resume(self, path: Path) -> None:
        """Go on from a file of `save`.

        Raises:
            InputError: it is none, or one of another run.
        """
        try:
            with safe_open(path, framework="pt") as file:
                facts = json.loads(file.metadata()["run"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            other = [name for name, value in self.identity().items() if facts["identity"].get(name) != value]
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{str(path)!r} is no checkpoint of fine-tuning ({error}): remove it") from error
        if other:
            raise InputError(f"{str(path)!r} was made with another {', '.join(other)}: remove it, or run as before")
        self.step, self.best_step, self.losses = facts["step"], facts["best_step"], facts["losses"]
        self.checks = [(step, quality) for step, quality in facts["checks"]]
        self._best = _under("best.", tensors)
        self.adapter.load(_under("adapter.", tensors))
        with torch.no_grad():
            self.log_factor.copy_(tensors["log_factor"])
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _under("optimiser.", tensors).items():
            number, value = name.split(".")
            state.setdefault(int(number), {})[value] = tensor
        self._optimiser.load_state_dict({**self._optimiser.state_dict(), "state": state})

    def finish(self, folder: Path) -> None:
        """Write the best adapter alone, and merge it into the model of the backend."""
        self.adapter.load(self._best)
        self.adapter.save(folder)
        self.adapter.merge()

    def identity(self) -> dict[str, Any]:
        """What a half-done run must share with the one that goes on with it."""
        packages = ("torch", "transformers", "peft")
        return {
            "model": self.backend.name,
            "revision": (self.backend.load_arguments or {}).get("revision"),
            "heads": [list(head) for head in self.heads.heads],
            "settings": asdict(self.settings),
            "training lists": _digest(self.lists),
            "validation lists": _digest(self.valid),
            "dtype": str(self.backend.model.dtype).removeprefix("torch."),
            "versions": {"qr-integrations": __version__} | {name: version(name) for name in packages},
        }

    def _measure(self) -> None:
        """Keep this step's adapter if it ranks the validation lists better than all before, or if there are none."""
        better = True
        if self.valid:
            quality = self.ndcg()
            better = all(quality > earlier for _, earlier in self.checks)
            self.checks.append((self.step, quality))
        if better:
            self.best_step, self._best = self.step, self.adapter.state()

    def _spread(self) -> float:
        """The standard deviation of the documents' scores within the first lists, so that logits start around 1."""
        some = [self.scorer.scores(judged.query, judged.documents) for judged in self.lists[:_TEMPERATURE_LISTS]]
        return max(1e-6, mean(float(scores.std()) for scores in some))


def shuffled(count: int, seed: str) -> list[int]:
    """The numbers below `count` in an order that `seed` alone decides."""
    places = list(range(count))
    Random(seed).shuffle(places)
    return places


def _check(what: str, lists: Sequence[JudgedList]) -> None:
    for number, judged in enumerate(lists):
        gold = _gold(judged)
        if not gold or len(gold) == len(judged.documents):
            raise InputError(
                f"{what} list #{number} ({judged.query!r}) has {len(gold)} relevant of {len(judged.documents)} "
                "documents: pass lists with both relevant and other documents"
            )


def _gold(judged: JudgedList) -> set[int]:
    return {index for index, grade in judged.relevance.items() if grade > 0}


def _digest(lists: Sequence[JudgedList]) -> str:
    read = [[x.query, [(d.title, d.text) for d in x.documents], sorted(x.relevance.items())] for x in lists]
    return sha256(json.dumps(read).encode()).hexdigest()


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
