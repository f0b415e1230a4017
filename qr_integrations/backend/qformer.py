"""Queries that look at a picture for the language model (InstructBLIP): how they look, and how that composes.

Legend: P pictures, H heads, Q queries, N patches, D width of a head; L layers and T tokens of the language model.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from qr_integrations.backend.attention_tap import scaled_gradients
from qr_integrations.backend.picture_geometry import PictureTokens
from qr_integrations.types import Grid

_PUBLISHED = 2  # of the cross-attentions, counted from 0 (arXiv 2502.17422): layer 4 of the Q-Former's 12


class QueryLooks:
    """How the queries look at the patches in one layer of the Q-Former, of the last pass that was watched.

    The attention is computed from what goes into the layer: the model's kernel and its config stay as they are.
    """

    def __init__(self) -> None:
        self._weights_PHQN, self._values_PHND = torch.empty(0), torch.empty(0)
        self._zero, self._gradient_PHQD = torch.empty(0), torch.empty(0)

    def read(self, module: Any, args: Any, kwargs: dict[str, Any], output: tuple[Tensor, Any]) -> Any:
        """A forward hook of a cross-attention; in a pass with gradients it adds a zero whose gradient is wanted."""
        queries, patches = kwargs["hidden_states"], kwargs["encoder_hidden_states"]
        with torch.no_grad():
            query_PHQD, key_PHND = _in_heads(module, module.query(queries)), _in_heads(module, module.key(patches))
            self._weights_PHQN = (query_PHQD @ key_PHND.transpose(-1, -2) * module.scaling).softmax(-1)
        if not torch.is_grad_enabled():
            return None
        brought, weights = output
        self._zero = torch.zeros_like(brought).requires_grad_()
        with torch.no_grad():
            self._values_PHND = _in_heads(module, module.value(patches))
        return brought + self._zero, weights

    def differentiate(self, number: Tensor) -> None:
        """Keep the gradient of a number at what the queries bring home. Parameters get none, and the graph stays."""
        (gradient,) = scaled_gradients(number, [self._zero])
        heads = self._weights_PHQN.shape[1]
        self._gradient_PHQD = gradient.unflatten(-1, (heads, -1)).transpose(1, 2)

    def shares(self) -> Float[Tensor, "P Q N"]:
        """The mean over heads of the weights, times the part of their gradients above 0 if there are any, fp32.

        A query brings home the sum of its weights times the values, so the derivative with respect to the weight of a
        patch is the product of its value and the gradient of what is brought home. The class token, which stands
        before the patches, is left out.
        """
        shares_PHQN = self._weights_PHQN
        if self._gradient_PHQD.numel():
            shares_PHQN = shares_PHQN * (self._gradient_PHQD @ self._values_PHND.transpose(-1, -2)).relu()
        return shares_PHQN.mean(1)[..., 1:]


@contextmanager
def watched_queries(model: Any) -> Iterator[QueryLooks]:
    """Within the block, each pass of the model tells how its queries look, at the published layer.

    A Q-Former with fewer than three cross-attentions, for which nothing is published, is watched in the middle one.
    """
    layers = [layer for layer in model.qformer.encoder.layer if layer.has_cross_attention]
    chosen = layers[_PUBLISHED if len(layers) > _PUBLISHED else len(layers) // 2]
    looks = QueryLooks()
    hook = chosen.crossattention.attention.register_forward_hook(looks.read, with_kwargs=True)
    try:
        yield looks
    finally:
        hook.remove()


def composed(
    rows_LT: Float[Tensor, "L T"], pictures: Sequence[PictureTokens], shares_PQN: Float[Tensor, "P Q N"], grid: Grid
) -> tuple[Float[Tensor, "L rows columns"], ...]:
    """For each picture, the attention to each of its queries times the query's attention to each patch, summed."""
    maps = []
    for picture, shares_QN in zip(pictures, shares_PQN, strict=True):
        slots = torch.tensor(picture.positions, device=rows_LT.device)
        maps.append((rows_LT[:, slots].to(shares_QN) @ shares_QN).unflatten(1, (grid.rows, grid.columns)))
    return tuple(maps)


def _in_heads(module: Any, states: Float[Tensor, "P S W"]) -> Float[Tensor, "P H S D"]:
    return states.float().unflatten(-1, (module.num_attention_heads, -1)).transpose(1, 2)
