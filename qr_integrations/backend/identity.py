"""Which model it is that computed something, so that what is kept of it is not given to another one."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from qr_integrations.backend.opened import OpenedModel
from qr_integrations.errors import LoadError

_ATTENTION = re.compile(r"rope|rotary|theta|window|sliding|layer_types|chunk|scal|cap|eps$|alibi")
_SAMPLE = 64  # numbers of each parameter
_known: WeakKeyDictionary[nn.Module, tuple[torch.dtype, str]] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """What tells a model from another.

    Attributes:
        name: as it was loaded.
        revision: the commit of its checkpoint; "" where there is none.
        dtype: of its weights.
        weights: a digest of the shapes of all parameters, some numbers of each, and of what the config says about
            positions and attention.
    """

    name: str
    revision: str
    dtype: str
    weights: str

    @classmethod
    def of(cls, opened: OpenedModel) -> "ModelIdentity":
        """Of a loaded model; the weights are looked at once. Weights replaced in place are not noticed."""
        model = opened.model
        found = _known.get(model)
        if found is None or found[0] != model.dtype:
            found = _known[model] = model.dtype, _digest(model)
        revision = str(getattr(model.config, "_commit_hash", None) or "")
        return cls(opened.name, revision, str(model.dtype).removeprefix("torch."), found[1])

    def as_dict(self) -> dict[str, str]:
        """For JSON."""
        return asdict(self)

    def check(self, kept: Mapping[str, Any], what: str) -> None:
        """Whether what was `kept` is this model's; the name alone makes no difference.

        Raises:
            LoadError: says what differs.
        """
        for name, cure in _CURES.items():
            mine, its = getattr(self, name), kept.get(name)
            if mine != its:
                raise LoadError(
                    f"{what} is of a model with {name} {its!r} ({kept.get('name')!r}), this one ({self.name!r}) has "
                    f"{mine!r}: {cure}"
                )


_CURES = {
    "dtype": "load the model with that dtype, or build it again",
    "weights": "load the model that it was built with, or build it again",
}


def _digest(model: Any) -> str:
    config = model.config.get_text_config(decoder=True).to_dict()
    told = {name: value for name, value in config.items() if _ATTENTION.search(name) and value is not None}
    digest = sha256(json.dumps(told, sort_keys=True, default=str).encode())
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if parameter.device.type != "meta":
            sample = parameter.detach().flatten()[:_SAMPLE].contiguous().view(torch.uint8)
            digest.update(bytes(sample.cpu().numpy()))
    return digest.hexdigest()
