"""Many short texts behind one long prefix, in one pass: each sees the prefix and itself, none sees another.

What the prefix and the new tokens bring home are added up by their shares of the softmax, so that the prefix's keys and
values are read where they lie: nothing is appended to them, and no mask is as wide as they are long. The rows that are
wanted come out of the same softmax. Splitting a softmax so is exact (Hydragen, arXiv 2402.05099).

Legend: N branches, K kept heads, H heads, G key/value heads, P tokens of the prefix, F of the trunk, S of this pass,
T = F + S, M spans; R rows: those of the heads that share keys, one head after the other.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from qr_integrations.backend.attention_tap import Pass, StopForward
from qr_integrations.backend.prefix import Prefix, StoredLayer
from qr_integrations.errors import UnsupportedModelError
from qr_integrations.types import Span

_CPU_BYTES, _GPU_BYTES = 8 * 2**20, 256 * 2**20  # of one block of logits; on a CPU it is to stay in the cache
_LEAST_ROWS = 16


@dataclass(frozen=True, slots=True)
class Trunk:
    """Tokens behind a prefix that all branches begin with, read once.

    Attributes:
        token_ids: F of them.
        keys, values: ``[1, G, F, D]`` of every layer.
        attention: ``[K, P]``, what its rows pay to the prefix, added up.
        by_span: ``[K, F, M]``, what each of its rows pays to each of `Wanted.spans`.
    """

    token_ids: tuple[int, ...]
    keys: Mapping[int, Tensor]
    values: Mapping[int, Tensor]
    attention: Float[Tensor, "K P"]
    by_span: Float[Tensor, "K F M"]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is read of every branch.

    Attributes:
        heads: ``(layer, head)`` pairs, in the order of the result.
        per_head: False adds up the heads; K is 1 then.
        spans: tokens of the prefix, M stretches that follow each other; what every single row pays to each is read too.
    """

    heads: tuple[tuple[int, int], ...]
    per_head: bool = True
    spans: tuple[Span, ...] = ()

    @property
    def top_layer(self) -> int:
        """Nothing above it runs."""
        return max(layer for layer, _ in self.heads)

    @property
    def num_rows(self) -> int:
        """K."""
        return len(self.heads) if self.per_head else 1

    def of_layer(self, layer: int) -> list[tuple[int, int]]:
        """The heads of a layer, each with its row of the result."""
        return [(head, i if self.per_head else 0) for i, (at, head) in enumerate(self.heads) if at == layer]


class _Apart(DynamicLayer):
    """Says how long the prefix is, and gives new keys and values back as they are."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length, self.is_initialized = length, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.length


class BranchPass(Pass):
    """A pass that computes the attention itself and adds up what the rows of each branch pay to the prefix.

    Attributes:
        sums: ``[N, K, P]``, fp32.
        by_span: ``[K, S, M]``, fp32.
        new: layer -> keys and values of this pass's tokens.
        owners: which tokens are whose.
        visible: which tokens behind the prefix each new one sees.
    """

    def __init__(self, prefix: Prefix, trunk: Trunk | None, branches: Sequence[Span], wanted: Wanted) -> None:
        super().__init__(None, wanted.top_layer, 0)
        assert prefix.cache is not None
        self.layers: list[Any] = prefix.cache.layers
        self.trunk, self.heads = trunk, wanted
        self.new: dict[int, tuple[Tensor, Tensor]] = {}
        self.sums: Tensor = torch.zeros(len(branches), wanted.num_rows, len(prefix))
        total = branches[-1].stop
        self.by_span: Tensor = torch.zeros(wanted.num_rows, total, len(wanted.spans))
        self.owners: Float[Tensor, "N S"] = torch.zeros(len(branches), total)  # 1 for a branch's own tokens
        for owner, branch in zip(self.owners, branches, strict=True):
            owner[branch.slice()] = 1.0
        behind = torch.ones(total, len(trunk.token_ids) if trunk else 0)
        self.visible: Bool[Tensor, "S T"] = torch.cat([behind, (self.owners.T @ self.owners).tril()], dim=1).bool()

    def cache(self) -> DynamicCache:
        """For the model's own forward pass."""
        cache = DynamicCache()
        behind = len(self.trunk.token_ids) if self.trunk else 0
        cache.layers = [_Apart(layer.get_seq_length() + behind) for layer in self.layers]
        return cache

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, kwargs: dict[str, Any]) -> Any:
        """The output alone. The pass ends at the top, where nobody asks for it."""
        if kwargs.get("position_bias") is not None:
            raise UnsupportedModelError("a learned position bias is not read: ask one query at a time")
        layer = module.layer_idx
        self.new[layer] = key, value
        for name in ("sums", "by_span", "owners", "visible"):
            setattr(self, name, getattr(self, name).to(query.device))
        is_top = layer == self.stop_after
        brought = self._gather(layer, query, key, None if is_top else value, kwargs)
        if brought is None:
            raise StopForward
        return brought.to(query.dtype), None

    def _gather(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor | None, kwargs: dict[str, Any]
    ) -> Float[Tensor, "1 S H V"] | None:
        """Add up the wanted rows; what the tokens bring home, unless there is no `value` to bring."""
        shared, wanted = query.shape[1] // key.shape[1], self.heads.of_layer(layer)
        groups = list(range(key.shape[1])) if value is not None else sorted({head // shared for head, _ in wanted})
        rows_GRD = query[0].float() * (kwargs.get("scaling") or query.shape[-1] ** -0.5)
        rows_GRD = rows_GRD.unflatten(0, (-1, shared)).flatten(1, 2)[groups]
        near_GTD = self._behind(layer, key, "keys")[groups]
        near_GRT = _capped(rows_GRD @ near_GTD.transpose(1, 2), kwargs.get("softcap"))
        near_GRT.masked_fill_(~self.visible.repeat(shared, 1), -torch.inf)
        near_lse = near_GRT.logsumexp(-1, keepdim=True)
        if (sinks := kwargs.get("s_aux")) is not None:
            sinks_GR1 = sinks.float().reshape(-1, shared, 1, 1).expand(-1, -1, query.shape[2], 1).flatten(1, 2)
            near_lse = torch.logaddexp(near_lse, sinks_GR1[groups])
        worth_GPV = None if value is None else self.layers[layer].values[0].float()
        near_GTV = None if value is None else self._behind(layer, value, "values")
        brought = []
        for rows, far_GRP, far_lse in _far(rows_GRD, _kept_keys(self.layers[layer], groups), kwargs.get("softcap")):
            lse = torch.logaddexp(far_lse, near_lse[:, rows])
            share_GR1 = (far_lse - lse).exp()
            self._add_up(rows, far_GRP, share_GR1, [(groups.index(h // shared), h % shared, at) for h, at in wanted])
            if worth_GPV is not None and near_GTV is not None:
                brought.append(share_GR1 * (far_GRP @ worth_GPV) + (near_GRT[:, rows] - lse).exp() @ near_GTV)
        return torch.cat(brought, 1).unflatten(1, (shared, -1)).flatten(0, 1).transpose(0, 1)[None] if brought else None

    def _behind(self, layer: int, new: Tensor, name: Literal["keys", "values"]) -> Float[Tensor, "G T D"]:
        """Of the trunk and of this pass."""
        if self.trunk is None:
            return new[0].float()
        return torch.cat([getattr(self.trunk, name)[layer][0].float(), new[0].float()], dim=1)

    def _add_up(self, rows: slice, far_GRP: Tensor, share_GR1: Tensor, wanted: list[tuple[int, int, int]]) -> None:
        """Add this block of rows to the sums of their branches; `wanted` are (group, head of it, row of the result)."""
        total = self.owners.shape[1]
        for group, head, place in wanted:
            start, stop = max(rows.start, head * total), min(rows.stop, (head + 1) * total)
            if start < stop:
                here = slice(start - rows.start, stop - rows.start)
                mine = slice(start - head * total, stop - head * total)
                self.sums[:, place] += (self.owners[:, mine] * share_GR1[group, here, 0]) @ far_GRP[group, here]
                if self.heads.spans:
                    self.by_span[place, mine] += share_GR1[group, here] * added_up(
                        far_GRP[group, here], self.heads.spans
                    )


def _far(
    rows_GRD: Float[Tensor, "G R D"], keys_GPD: Float[Tensor, "G P D"], softcap: float | None
) -> Iterator[tuple[slice, Float[Tensor, "G B P"], Float[Tensor, "G B 1"]]]:
    """Softmax over the prefix alone, and the log of its sum, some rows at a time; each takes the last one's memory."""
    num_groups, num_rows, length = len(rows_GRD), rows_GRD.shape[1], keys_GPD.shape[1]
    room = _CPU_BYTES if rows_GRD.device.type == "cpu" else _GPU_BYTES
    at_once = min(num_rows, max(_LEAST_ROWS, room // (4 * num_groups * length)))
    memory = rows_GRD.new_empty(num_groups * at_once * length)
    for start in range(0, num_rows, at_once):
        rows = slice(start, min(start + at_once, num_rows))
        block = rows_GRD[:, rows]
        logits = memory[: num_groups * block.shape[1] * length].view(num_groups, -1, length)
        _capped(torch.bmm(block, keys_GPD.transpose(1, 2), out=logits), softcap)
        highest = logits.amax(-1, keepdim=True)
        torch.softmax(logits, -1, out=logits)
        yield rows, logits, highest - logits.amax(-1, keepdim=True).log()


def added_up(rows_RP: Float[Tensor, "R P"], spans: Sequence[Span]) -> Float[Tensor, "R M"]:
    """What falls on each span; in fp64 where the device has it, as the differences of running sums."""
    precision = torch.float32 if rows_RP.device.type == "mps" else torch.float64
    upto = torch.nn.functional.pad(rows_RP.cumsum(-1, dtype=precision), (1, 0))
    starts, stops = [span.start for span in spans], [span.stop for span in spans]
    return (upto[:, stops] - upto[:, starts]).float()


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def _kept_keys(layer: Any, groups: list[int]) -> Float[Tensor, "G P D"]:
    """Without those of heads that nobody reads, whether they are kept or not."""
    if isinstance(layer, StoredLayer) and layer.heads is not None:
        places = [layer.heads.index(group) for group in groups]
        kept = layer.stored_keys.read(torch.float32)[0]
        return kept if places == list(range(len(kept))) else kept[places]
    keys: Tensor = layer.keys[0]
    return (keys if len(groups) == len(keys) else keys[groups]).float()
