"""Which heads look for what a query asks: published sets with their provenance, and your own."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from random import Random

from qr_integrations.backend import Backend
from qr_integrations.bundled import BUNDLED, bundled_path
from qr_integrations.errors import HeadError
from qr_integrations.files import write_whole

Head = tuple[int, int]
_PUBLISHED = Path(__file__).parent / "head_sets" / "published.json"


@dataclass(frozen=True, slots=True)
class HeadSet:
    """Heads as ``(layer, head)``, zero-based, best first, and where they come from.

    Attributes:
        heads: no repeats.
        model: the checkpoint they were found in.
        detection_data: the data they were found with, e.g. ``"NQ"`` or ``"LME"`` (LongMemEval).
        objective: what ranked them, e.g. ``"qrscore"``.
        source: file and commit, or the command that found them.
    """

    heads: tuple[Head, ...]
    model: str = ""
    detection_data: str = ""
    objective: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        if not self.heads:
            raise HeadError("a head set needs at least one head: pass [(layer, head), ...]")
        for head in self.heads:
            if len(head) != 2 or not all(isinstance(n, int) and n >= 0 for n in head):
                raise HeadError(f"{head!r} is not a head: write (layer, head) with two numbers counted from 0")
        if len(set(self.heads)) < len(self.heads):
            twice = next(head for head in self.heads if self.heads.count(head) > 1)
            raise HeadError(f"head {twice} stands twice in the set: name each head once")

    def __len__(self) -> int:
        return len(self.heads)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers read, ascending."""
        return tuple(sorted({layer for layer, _ in self.heads}))

    @property
    def top_layer(self) -> int:
        """The deepest layer read: no layer above it runs."""
        return self.layers[-1]

    def top(self, k: int) -> "HeadSet":
        """The `k` best heads."""
        return replace(self, heads=self.heads[:k])

    @classmethod
    def of(cls, heads: Iterable[Iterable[int]], **provenance: str) -> "HeadSet":
        """From any iterable of pairs."""
        return cls(tuple(tuple(int(n) for n in head) for head in heads), **provenance)  # type: ignore[misc]

    @classmethod
    def all(cls, backend: Backend) -> "HeadSet":
        """Every head of every attention layer: the choice of ICR (arXiv 2410.02642)."""
        layers = backend.attention_layers.items()
        heads = tuple((index, head) for index, layer in layers for head in range(layer.num_heads))
        return cls(heads, model=backend.name, source="all heads")

    @classmethod
    def random(cls, backend: Backend, count: int, *, seed: int = 0) -> "HeadSet":
        """Heads drawn at random: the control that a detection has to beat.

        Raises:
            HeadError: the model has fewer heads than `count`.
        """
        every = cls.all(backend).heads
        if not 1 <= count <= len(every):
            raise HeadError(f"{count} of the {len(every)} heads of {backend.name!r}: pass 1 to {len(every)}")
        drawn = tuple(Random(seed).sample(every, count))
        return cls(drawn, model=backend.name, source=f"drawn at random, seed {seed}")

    @classmethod
    def load(cls, path: str | Path) -> "HeadSet":
        """Read a file written by `save`.

        Raises:
            HeadError: no such file, or not a head set.
        """
        try:
            return _from_json(json.loads(Path(path).read_text(encoding="utf-8")))
        except FileNotFoundError as error:
            raise HeadError(
                f"no head set at {str(path)!r}: pass a JSON file written by HeadSet.save, or a list of heads"
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise HeadError(
                f'{str(path)!r} is not a head set ({error}): it needs {{"heads": [[layer, head], ...]}}'
            ) from error

    def as_dict(self) -> dict[str, object]:
        """As it stands in a file."""
        return {name: getattr(self, name) for name in ("model", "detection_data", "objective", "heads", "source")}

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        write_whole(path, json.dumps(self.as_dict(), indent=1) + "\n")

    @classmethod
    def published(cls, model: str, detection_data: str | None = None) -> "HeadSet":
        """A published set, by the model's hub id (``"meta-llama/Llama-3.1-8B-Instruct"``) or its last part.

        Args:
            model: case and organisation do not matter.
            detection_data: ``"LME"`` or ``"NQ"``; None takes LME where there is one, as the authors' code does.

        Raises:
            HeadError: nothing is published for it; the message lists what is.
        """
        found = [s for s in published_sets() if _same_model(s.model, model)]
        if detection_data is not None:
            found = [s for s in found if s.detection_data == detection_data]
        if not found:
            known = sorted({f"{s.model} ({s.detection_data})" for s in published_sets()})
            wanted = model if detection_data is None else f"{model} ({detection_data})"
            raise HeadError(
                f"no heads are known for {wanted!r}: pass heads='all', a list or a file; published: {'; '.join(known)}"
            )
        return next((s for s in found if s.detection_data == "LME"), found[0])

    @classmethod
    def resolve(cls, heads: "HeadSet | str | Path | Iterable[Head]", backend: Backend) -> "HeadSet":
        """What the argument `heads` of the rerankers means, checked against the model.

        ``"auto"``: the set shipped or published for this model; ``"all"``: every head; a path: a file; else pairs.

        Raises:
            HeadError: no set is known for the model, or it has no such heads.
        """
        if isinstance(heads, HeadSet):
            chosen = heads
        elif heads == "auto":
            chosen = cls._known_for(backend)
        elif heads == "all":
            chosen = cls.all(backend)
        elif isinstance(heads, str | Path):
            chosen = cls.load(heads)
        else:
            chosen = cls.of(heads)
        backend.check_heads(chosen.heads)
        return chosen

    @classmethod
    def _known_for(cls, backend: Backend) -> "HeadSet":
        if backend.name in BUNDLED:
            return cls.load(bundled_path(backend.name) / "qr_heads.json")
        beside = Path(backend.name) / "qr_heads.json"
        if beside.is_file():
            return cls.load(beside)
        return cls.published(backend.name)


def read_scores(path: str | Path) -> dict[Head, float]:
    """The scores of all heads from a file that a detection wrote.

    Raises:
        HeadError: no such file, or one without scores.
    """
    try:
        entry = json.loads(Path(path).read_text(encoding="utf-8"))
        return {(int(layer), int(head)): float(score) for layer, head, score in entry["scores"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HeadError(
            f"{str(path)!r} holds no scores of heads ({error!r}): write the file with `qr-integrations detect`"
        ) from error


def _from_json(data: dict[str, object]) -> HeadSet:
    heads = data["heads"]
    assert isinstance(heads, list)
    names = ("model", "detection_data", "objective", "source")
    return HeadSet.of(heads, **{name: str(data.get(name, "")) for name in names})


def _same_model(published: str, asked: str) -> bool:
    return published.split(" (")[0].split("/")[-1].lower() == asked.rstrip("/").split("/")[-1].lower()


@cache
def published_sets() -> tuple[HeadSet, ...]:
    """All published sets that ship with the package."""
    return tuple(_from_json(entry) for entry in json.loads(_PUBLISHED.read_text(encoding="utf-8"))["sets"])
