"""Keys and values as they are kept: in the precision that was asked for, cast back when a pass reads them.

Legend: G key/value heads, T tokens, D head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qr_integrations.errors import InputError

KeptDtype = Literal["auto", "float32", "float16", "bfloat16", "int8"]
"""``"auto"``: as the model computed them. ``"int8"``: 8 bits and a scale per token and head."""
KEPT_DTYPES = ("auto", "float32", "float16", "bfloat16", "int8")
_STEPS = 127


def check_kept_dtype(dtype: str) -> None:
    """Say which there are.

    Raises:
        InputError: `dtype` is none of them.
    """
    if dtype not in KEPT_DTYPES:
        raise InputError(f"keys and values cannot be kept as {dtype!r}: pass one of {', '.join(KEPT_DTYPES)}")


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor ``[1, G, T, D]``, perhaps as 8-bit steps with a scale ``[1, G, T, 1]`` in fp32."""

    steps: Tensor
    scale: Tensor | None = None

    @classmethod
    def of(cls, tensor: Tensor, dtype: KeptDtype = "auto") -> "Stored":
        """Keep `tensor`.

        Symmetric rounding: a step is the largest absolute value of a token's head over 127. What does not fit into
        float16 becomes its largest number.
        """
        if dtype == "auto":
            return cls(tensor)
        if dtype == "float16":
            limit = torch.finfo(torch.float16).max
            return cls(tensor.clamp(-limit, limit).half())
        if dtype != "int8":
            return cls(tensor.to(getattr(torch, dtype)))
        numbers = tensor.float()
        scale = (numbers.abs().amax(-1, keepdim=True) / _STEPS).clamp(min=torch.finfo(torch.float32).tiny)
        return cls((numbers / scale).round().to(torch.int8), scale)

    @classmethod
    def joined(cls, parts: "Sequence[Stored]") -> "Stored":
        """Side by side, token after token; all kept alike."""
        if len(parts) == 1:
            return parts[0]
        scales = [part.scale for part in parts if part.scale is not None]
        return cls(torch.cat([part.steps for part in parts], dim=-2), torch.cat(scales, dim=-2) if scales else None)

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.steps.shape[-2]

    @property
    def num_bytes(self) -> int:
        """What it takes in memory."""
        tensors = [self.steps] if self.scale is None else [self.steps, self.scale]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def read(self, dtype: torch.dtype) -> Tensor:
        """The tensor in `dtype`; itself where it is kept so."""
        if self.scale is None:
            return self.steps.to(dtype)
        return (self.steps.to(self.scale.dtype) * self.scale).to(dtype)

    def tokens(self, start: int, stop: int) -> "Stored":
        """Those tokens; shares memory."""
        scale = None if self.scale is None else self.scale[..., start:stop, :]
        return Stored(self.steps[..., start:stop, :], scale)

    def own(self) -> "Stored":
        """The same in memory of its own, so that what it was cut from can go."""
        return Stored(self.steps.clone(), None if self.scale is None else self.scale.clone())

    def to(self, device: torch.device) -> "Stored":
        """On another device."""
        return Stored(self.steps.to(device), None if self.scale is None else self.scale.to(device))
