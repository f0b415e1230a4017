"""What is trained when layers of the tower are fused: projectors, and attention to pictures within the language model.

Legend: B prompts, N patches, V the tower's width, D the language model's, F features of all layers that are read, T
tokens, W tokens and arrivals side by side, K tokens of the pictures of a prompt, H heads.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from qr_integrations.encoding.deformable import Fuser
from qr_integrations.encoding.fusion_layers import FusionLayers, FusionSpec
from qr_integrations.errors import InputError


@dataclass(frozen=True, slots=True)
class FusionSizes:
    """Sizes of the model that is fused.

    Attributes:
        tower_depth, tower_width: layers of the tower, and V.
        depth, width, inner: layers of the language model, D, and the inner width of its MLPs.
        num_heads, head_width: of the language model's attention.
    """

    tower_depth: int
    tower_width: int
    depth: int
    width: int
    inner: int
    num_heads: int
    head_width: int


class Projector(nn.Module):
    """Linear, GELU, linear: a layer's patches as the language model reads them.

    Args:
        width: of what goes in.
        out_width: of what comes out.
        silent: begin with zeros, so that a model to whose states this is added begins with what it knows.
    """

    def __init__(self, width: int, out_width: int, *, silent: bool = False) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, out_width)
        self.linear_2 = nn.Linear(out_width, out_width)
        if silent:
            nn.init.zeros_(self.linear_2.weight)
            nn.init.zeros_(self.linear_2.bias)

    def forward(self, patches: Float[Tensor, "*B N V"]) -> Float[Tensor, "*B N D"]:
        """The patches, projected."""
        return self.linear_2(nn.functional.gelu(self.linear_1(patches)))


class Crossing(nn.Module):
    """All rows of a layer attend to the pictures; two gates, zero at the start, say how much of it counts.

    No position and no causal mask on the pictures' keys: the published code cuts the query at place p off from all
    patches behind the first p.

    Args:
        sizes: of the language model.
    """

    def __init__(self, sizes: FusionSizes) -> None:
        super().__init__()
        self.num_heads = sizes.num_heads
        across = sizes.num_heads * sizes.head_width
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(sizes.width, across, bias=False) for _ in range(3))
        self.o_proj = nn.Linear(across, sizes.width, bias=False)
        self.gate_proj, self.up_proj = (nn.Linear(sizes.width, sizes.inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(sizes.inner, sizes.width, bias=False)
        self.attention_gate, self.mlp_gate = (nn.Parameter(torch.zeros(1)) for _ in range(2))

    def keys_and_values(self, pictures: Float[Tensor, "B K D"]) -> tuple[Tensor, Tensor]:
        """What the pictures are attended to by, ``[B H K d]`` each."""
        return self._by_head(self.k_proj(pictures)), self._by_head(self.v_proj(pictures))

    def forward(
        self,
        states: Float[Tensor, "B T D"],
        keys: Float[Tensor, "B H K d"],
        values: Float[Tensor, "B H K d"],
        there: Bool[Tensor, "B K"],
    ) -> Float[Tensor, "B T D"]:
        """What is added to the states; nothing in prompts without pictures."""
        any_there = there.any(1)[:, None, None]
        mask = (there[:, None] | ~any_there)[:, None]
        queries = self._by_head(self.q_proj(states))
        found = scaled_dot_product_attention(queries, keys.to(queries.dtype), values.to(queries.dtype), attn_mask=mask)
        found = self.o_proj(found.transpose(1, 2).flatten(2)) * any_there
        seen = self.attention_gate.tanh() * found
        inner = states + seen
        mixed = self.down_proj(nn.functional.silu(self.gate_proj(inner)) * self.up_proj(inner)) * any_there
        return (seen + self.mlp_gate.tanh() * mixed).to(states.dtype)

    def _by_head(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class FusionProjector(nn.Module):
    """Stands in the place of a model's projector and is given the features of several layers side by side.

    Args:
        spec: how they are fused.
        layers: which they are.
        sizes: of the model.
    """

    def __init__(self, spec: FusionSpec, layers: FusionLayers, sizes: FusionSizes) -> None:
        super().__init__()
        self.spec, self.layers, self.sizes = spec, layers, sizes
        self.arrivals: Any = None  # the hooks of internal fusion, once they are in place
        width, groups = sizes.tower_width, len(layers.groups)
        direct = spec.strategy in ("linear", "external_direct")
        if spec.strategy == "external_modular":
            self.fuser = Fuser(width, len(layers.levels))
        self.linear_1 = nn.Linear(width * (groups if direct else 1), sizes.width)
        if spec.strategy != "linear":
            self.linear_2 = nn.Linear(sizes.width, sizes.width)
        arrivals = layers.arrivals if spec.internal else ()
        modular = spec.strategy == "internal_modular"
        self.projectors = nn.ModuleList(Projector(width, sizes.width, silent=not modular) for _ in arrivals)
        self.crossings = nn.ModuleList(Crossing(sizes) for _ in (arrivals if modular else ()))

    def forward(self, features: Float[Tensor, "*B N F"]) -> Float[Tensor, "*B N W"]:
        """The pictures' tokens; behind each of them, side by side, what arrives within the language model."""
        parts = dict(zip(self.layers.read, features.split(self.sizes.tower_width, -1), strict=True))
        tokens = self.linear_1(self._fused(parts))
        if self.spec.strategy != "linear":
            tokens = self.linear_2(nn.functional.gelu(tokens))
        arrivals = zip(self.layers.arrivals, self.projectors, strict=False)  # external fusion has no projectors here
        return torch.cat([tokens, *(projector(parts[layer]) for (layer, _), projector in arrivals)], dim=-1)

    def separate(self, wide: Float[Tensor, "*B N W"]) -> tuple[Float[Tensor, "*B N D"], list[Tensor]]:
        """Tokens and arrivals of what `forward` made.

        Raises:
            InputError: it has another width, and was not made by it.
        """
        width, parts = self.sizes.width, 1 + len(self.projectors)
        if wide.shape[-1] != width * parts:
            raise InputError(
                f"pictures' tokens are {wide.shape[-1]} wide, {parts} times {width} are expected: make them with the "
                "fused model's get_image_features"
            )
        tokens, *arriving = wide.split(width, -1)
        return tokens, arriving

    def _fused(self, parts: dict[int, Tensor]) -> Tensor:
        final = parts[self.layers.final]
        if self.spec.internal:
            return final
        if self.spec.strategy == "external_modular":
            return self.fuser(final, torch.stack([parts[v] for v in self.layers.levels], dim=1))
        means = [torch.stack([parts[v] for v in g]).mean(0) if len(g) > 1 else parts[g[0]] for g in self.layers.groups]
        return torch.cat(means, dim=-1)
