"""Ways to decode that can be measured side by side.

One is asked for by a line: ``greedy``, ``deco``, ``dola``; the last two may have settings:
``deco:alpha=0.6,layers=4-6``, ``dola:layers=high``. Layers are numbered like hidden states.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qr_integrations.backend.answering import Corrector
from qr_integrations.decoding import DeCo, DoLa
from qr_integrations.evaluation.specs import check_distinct, read_layers, read_layers_or, read_spec

DECODERS = ("greedy", "deco", "dola")
_SETTINGS: Mapping[str, Mapping[str, Callable[[str], Any]]] = {
    "greedy": {},
    "deco": {"alpha": float, "layers": read_layers, "top_p": float, "top_k": int},
    "dola": {"layers": read_layers_or("low", "high"), "relative_top": float},
}


@dataclass(frozen=True, slots=True)
class Decoder:
    """A way to decode.

    Attributes:
        name: as it stands in tables.
        corrector: what is passed as ``deco=``; None leaves the model's own logits.
    """

    name: str
    corrector: Corrector | None


def make_decoders(specs: Sequence[str]) -> list[Decoder]:
    """The decoders that `specs` ask for, see the top of this file.

    Raises:
        InputError: a line that is no decoder, has a setting that there is not, or stands twice.
    """
    check_distinct(specs)
    return [Decoder(spec, _corrector(spec)) for spec in specs]


def _corrector(spec: str) -> Corrector | None:
    name, settings = read_spec(spec, _SETTINGS)
    return {"deco": DeCo, "dola": DoLa}[name](**settings) if name != "greedy" else None
