"""Passes through a model's decoder: read attention, keep prefixes.

Legend: B batch, K heads, Q rows, S tokens of this pass, T all tokens.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor
from transformers import DynamicCache

from qr_integrations.backend.attention_tap import AttentionTap, run_as, run_tapped
from qr_integrations.backend.blocks import read_blocks
from qr_integrations.backend.branches import BranchPass, Trunk, Wanted, added_up
from qr_integrations.backend.continuation import try_branches, try_continuations
from qr_integrations.backend.interruptions import uninterrupted
from qr_integrations.backend.memory import memory_advice
from qr_integrations.backend.opened import OpenedModel
from qr_integrations.backend.prefix import (
    Continuation,
    Prefix,
    StoredLayer,
    narrowest_window,
    new_cache,
    read_prefix,
    sliding_window,
)
from qr_integrations.errors import InputError, LoadError
from qr_integrations.types import Span

_log = logging.getLogger(__name__)
_CPU_CHUNK = 1024  # a mask costs a CPU kernel little, and activations of 1,024 tokens make room for the kept keys
_BRANCH_TOKENS = 512  # tokens of one pass of branches
_AUTO_CHUNK = 2048  # tokens at a time where a kernel needs a mask of chunk x T or softmaxes in plain torch


class Reader(OpenedModel):
    """What reads: every pass holds the lock, stops where nothing more is wanted, and leaves the model as it was."""

    def forward(
        self,
        token_ids: Sequence[int] | Tensor,
        *,
        tap: AttentionTap,
        prefix: Prefix | None = None,
        attention_mask: Tensor | None = None,
    ) -> Float[Tensor, "B K *Q T"]:
        """Run the layers up to the tap's deepest one and return the attention rows.

        Args:
            token_ids: the tokens after `prefix`, ``[S]`` or ``[B, S]``.
            tap: which heads and rows. Rows count from the start of the sequence, prefix included.
            prefix: what was read before; it stays as it is. Must reach as deep as the tap.
            attention_mask: ``[B, S]``, 0 for left padding; only without a prefix.

        Returns:
            fp32, over all T = len(prefix) + S keys.
        """
        self.check_heads(tap.heads)
        ids = self._batched(token_ids)
        past = len(prefix) if prefix else 0
        if tap.rows.start < past or tap.rows.stop > past + ids.shape[1]:
            raise InputError(f"rows {tap.rows} are not within this pass, tokens {past} to {past + ids.shape[1]}")
        if prefix is not None and (prefix.top_layer < tap.top_layer or attention_mask is not None):
            raise InputError(
                f"the prefix holds layers 0..{prefix.top_layer}, the tap reads layer {tap.top_layer}: prefill with "
                "top_layer=tap.top_layer, and without attention_mask"
            )
        if prefix is not None:
            self._check_kept(prefix, tap.heads)
        if prefix is not None and len(ids) > 1 and not prefix.can_crop:
            raise InputError("recurrent layers and blocks go on with one text at a time: pass one row of token_ids")
        if prefix is not None and prefix.cache is None:
            again = torch.tensor(prefix.token_ids, device=ids.device).expand(ids.shape[0], past)
            ids, past = torch.cat([again, ids], dim=1), 0
        cache, skipped = (prefix.branch(), past - prefix.num_positions) if prefix and past else (None, 0)
        with torch.set_grad_enabled(tap.differentiable and torch.is_grad_enabled()):
            rows = self._run(ids, cache, past, attention_mask, tap=tap, stop_after=tap.top_layer, skipped=skipped)
        assert rows is not None
        return rows

    @torch.no_grad()
    def prefill(
        self,
        token_ids: Sequence[int],
        *,
        top_layer: int,
        reuse: Prefix | None = None,
        chunk_tokens: int | Literal["auto"] | None = "auto",
        values: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> Prefix:
        """Read a text once, layers 0..top_layer, for many passes to stand on. The top layer computes its keys only.

        Args:
            token_ids: the text, ``[T]``.
            top_layer: the deepest layer that will be tapped.
            reuse: an earlier prefix; its common beginning is not computed again.
            chunk_tokens: tokens per pass; ``"auto"`` is 1024 on a CPU, and elsewhere all at once where the kernel then
                needs no mask, else 2048; None reads all at once.
            values: keep the top layer's values too, for passes through the layers above.
            progress: called with the number of tokens read by each pass.
        """
        self.check_heads([(top_layer, 0)])
        token_ids = tuple(token_ids)
        reuse = reuse.beginning_of(token_ids) if reuse is not None and reuse.top_layer == top_layer else None
        if reuse is not None and len(reuse) == len(token_ids):
            return reuse
        kept = self._continuation(top_layer)
        kept = "values" if values and kept == "keys" else kept
        cache = reuse.growing() if reuse else new_cache(self.config, top_layer, kept)
        if cache is None:
            return Prefix(token_ids, top_layer, None)
        done = len(reuse) if reuse else 0
        step = (self.auto_chunk if chunk_tokens == "auto" else chunk_tokens) or max(1, len(token_ids))
        for start in range(done, len(token_ids), step):
            ids = self._batched(token_ids[start : start + step])
            self._run(ids, cache, start, None, tap=None, stop_after=top_layer)
            if progress is not None:
                progress(ids.shape[1])
        return Prefix(token_ids, top_layer, cache)

    @torch.no_grad()
    def prefill_blocks(
        self, token_ids: Sequence[int], blocks: Sequence[Span], *, top_layer: int, values: bool = False
    ) -> Prefix:
        """Read a beginning and, behind it, blocks that do not see each other; all start at the same position.

        What is read afterwards sees the beginning and all blocks, whose order makes no difference to it.

        Args:
            token_ids: beginning and blocks, ``[T]``.
            blocks: one after the other, from the end of the beginning to the end of `token_ids`; at least one.
            top_layer: the deepest layer that will be tapped.
            values: keep the top layer's values too.

        Raises:
            InputError: no blocks, none in front of them, or blocks that leave something out.
            UnsupportedModelError: the model's layers are recurrent, or see fewer tokens back than there are.
        """
        token_ids = tuple(token_ids)
        if not blocks or not blocks[0].start:
            raise InputError("blocks stand behind a beginning: pass at least one token, then at least one block")
        beginning = self.prefill(token_ids[: blocks[0].start], top_layer=top_layer, values=values)
        return read_blocks(self._run, beginning, token_ids, blocks, self.config)

    @torch.no_grad()
    def read_trunk(self, token_ids: Sequence[int], wanted: Wanted, prefix: Prefix) -> Trunk | None:
        """Read what all branches behind `prefix` begin with; None where the model reads each branch by itself anyway.

        Args:
            token_ids: what comes after the prefix, ``[F]``, at least one token.
            wanted: heads, as the branches are to be read with.
            prefix: reaches as deep as the heads.
        """
        self._check_wanted(wanted, prefix)
        if not token_ids or not self._can_branch(wanted.top_layer, prefix, len(token_ids)):
            return None
        state = BranchPass(prefix, None, [Span(0, len(token_ids))], wanted)
        self._run_branches(state, [token_ids], prefix)
        keys = {layer: new[0] for layer, new in state.new.items()}
        values = {layer: new[1] for layer, new in state.new.items()}
        return Trunk(tuple(token_ids), keys, values, state.sums[0], state.by_span)

    @torch.no_grad()
    def forward_branches(
        self,
        branches: Sequence[Sequence[int]],
        wanted: Wanted,
        *,
        prefix: Prefix,
        trunk: Trunk | None = None,
    ) -> Float[Tensor, "N K P"]:
        """The attention that each of several texts behind one prefix pays to it: the mean over the text's rows.

        Each text sees the prefix and itself, none sees another; equal, to rounding, to passes one by one. Where the
        model's layers cannot be read so, it is passes one by one.

        Args:
            branches: N texts, each at least one token; all begin with the trunk, if there is one.
            wanted: which heads.
            prefix: what stands in front of each, P tokens.
            trunk: what `read_trunk` gave for this prefix and these heads.

        Raises:
            InputError: an empty branch, or one that does not begin with the trunk; or the prefix is not that deep.
        """
        means = [means for means, _ in self._each_branch(branches, wanted, prefix, trunk)]
        return torch.stack(means) if means else torch.zeros(0, wanted.num_rows, len(prefix), device=self.device)

    @torch.no_grad()
    def forward_branch_rows(
        self,
        branches: Sequence[Sequence[int]],
        wanted: Wanted,
        *,
        prefix: Prefix,
        trunk: Trunk | None = None,
    ) -> list[tuple[Float[Tensor, "K P"], Float[Tensor, "K _ M"]]]:
        """As `forward_branches`; with each text's mean also what each of its rows pays to each of ``wanted.spans``."""
        return list(self._each_branch(branches, wanted, prefix, trunk))

    def _each_branch(
        self, branches: Sequence[Sequence[int]], wanted: Wanted, prefix: Prefix, trunk: Trunk | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The mean of the rows, and the rows by span."""
        self._check_wanted(wanted, prefix)
        if not branches:
            return
        shared = len(trunk.token_ids) if trunk else 0
        for number, branch in enumerate(branches):
            if len(branch) <= shared or (trunk and tuple(branch[:shared]) != trunk.token_ids):
                raise InputError(f"branch #{number} has no token behind the trunk: pass texts that go on after it")
        if not self._can_branch(wanted.top_layer, prefix, max(map(len, branches))):
            yield from (self._one_branch(branch, wanted, prefix) for branch in branches)
            return
        for group in _groups([len(branch) - shared for branch in branches]):
            own = [branches[i][shared:] for i in group]
            places = [Span(*span) for span in pairwise(accumulate(map(len, own), initial=0))]
            state = BranchPass(prefix, trunk, places, wanted)
            self._run_branches(state, own, prefix)
            for sums, place in zip(state.sums, places, strict=True):
                rows = state.by_span[:, place.slice()]
                if trunk is not None:
                    sums, rows = sums + trunk.attention, torch.cat([trunk.by_span, rows], dim=1)
                yield sums / (shared + len(place)), rows

    def _check_wanted(self, wanted: Wanted, prefix: Prefix) -> None:
        self.check_heads(wanted.heads)
        self._check_kept(prefix, wanted.heads)
        if prefix.top_layer < wanted.top_layer:
            raise InputError(
                f"the prefix holds layers 0..{prefix.top_layer}, the heads go up to layer {wanted.top_layer}: prefill "
                "with top_layer=wanted.top_layer"
            )

    def _can_branch(self, top_layer: int, prefix: Prefix, num_tokens: int) -> bool:
        """Whether the layers see all of the prefix and nothing but its keys and values; tried once per layer."""
        window = narrowest_window(self.config)
        if not prefix.is_plain or (window is not None and prefix.num_positions + num_tokens > window):
            return False
        with self.locked():
            if top_layer not in self._branching:
                heads = tuple((top_layer, head) for head in range(self.attention_layers[top_layer].num_heads))
                self._branching[top_layer] = True  # for the trial itself
                try:
                    with uninterrupted():
                        self._branching[top_layer] = try_branches(self, heads)
                except BaseException:
                    del self._branching[top_layer]  # out of memory is no answer: the next query tries again
                    raise
            return self._branching[top_layer]

    def _one_branch(self, token_ids: Sequence[int], wanted: Wanted, prefix: Prefix) -> tuple[Tensor, Tensor]:
        rows = Span(len(prefix), len(prefix) + len(token_ids))
        tap = AttentionTap(wanted.heads, rows, "none" if wanted.spans else "mean")
        found = self.forward(token_ids, tap=tap, prefix=prefix)[0, ..., : len(prefix)]
        found = found if wanted.per_head else found.sum(0, keepdim=True)
        if not wanted.spans:
            return found, found.new_zeros(len(found), len(token_ids), 0)
        return found.mean(1), torch.stack([added_up(one, wanted.spans) for one in found])

    def _check_kept(self, prefix: Prefix, heads: Sequence[tuple[int, int]]) -> None:
        """Whether the prefix keeps the keys that these heads read."""
        top = prefix.cache.layers[-1] if prefix.cache is not None and prefix.cache.layers else None
        if not isinstance(top, StoredLayer) or top.heads is None:
            return
        layer = self.attention_layers[prefix.top_layer]
        shared = layer.num_heads // layer.num_kv_heads
        for at, head in heads:
            if at == prefix.top_layer and head // shared not in top.heads:
                raise InputError(
                    f"the prefix does not keep the keys that head {(at, head)} reads: prefill the text again for it"
                )

    def _run_branches(self, state: BranchPass, branches: Sequence[Sequence[int]], prefix: Prefix) -> None:
        """One pass of branches side by side, all from the same position on."""
        start = prefix.num_positions + (len(state.trunk.token_ids) if state.trunk else 0)
        ids = self._batched([token for branch in branches for token in branch])
        places = [start + i for branch in branches for i in range(len(branch))]
        with self.locked(), memory_advice(ids.shape[1], self.name):
            layers, decoder = self.attention_layers, self.decoder
            modules = [layers[i].module for i in layers if i <= state.heads.top_layer]
            # any mask of four dimensions: the model passes it on, and the attention here looks at none
            mask = torch.zeros(1, 1, 1, 1, dtype=self.model.dtype, device=ids.device)
            kwargs = {"input_ids": ids, "attention_mask": mask, "position_ids": self._batched(places)}
            run_as(state, lambda: decoder(**kwargs, past_key_values=state.cache(), use_cache=True), modules)

    def load_prefix(self, path: str | Path) -> Prefix:
        """Read what `Prefix.save` wrote, and try on a few tokens that it is this model's.

        Raises:
            LoadError: no such file, not a prefix, or another model's.
        """
        try:
            prefix = read_prefix(path, self.config, self.device)
            sample = self.prefill(prefix.token_ids[:8], top_layer=prefix.top_layer)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise LoadError(
                f"no prefix of {self.name!r} in {str(path)!r} ({error}): prefill and save it again"
            ) from error
        if not prefix.is_of(sample):
            raise LoadError(f"{str(path)!r} holds another model's prefix: load it with that model, or prefill it again")
        return prefix

    def _continuation(self, top_layer: int) -> Continuation:
        """What a prefix that is read up to `top_layer` must keep, found out once per layer."""
        with self.locked():
            if top_layer not in self._continuations:
                heads = tuple((top_layer, head) for head in range(self.attention_layers[top_layer].num_heads))
                with uninterrupted():
                    found = try_continuations(self._run, self.config, heads, device=self.device, dtype=self.model.dtype)
                if found == "tokens":
                    _log.warning("%s cannot continue from a cache: each pass reads its prefix again", self.name)
                self._continuations[top_layer] = found
            return self._continuations[top_layer]

    @property
    def auto_chunk(self) -> int | None:
        """How many tokens of a long text are read at a time, see `prefill`; None: all."""
        kernel = self.attention_layers[min(self.attention_layers)].kernel
        if self.device.type == "cpu":
            return _CPU_CHUNK
        slides = sliding_window(self.config) is not None
        return _AUTO_CHUNK if kernel == "eager" or (kernel == "sdpa" and slides) else None

    def _batched(self, token_ids: Sequence[int] | Tensor) -> Tensor:
        ids = torch.as_tensor(token_ids, dtype=torch.long, device=self.device)
        return ids[None] if ids.dim() == 1 else ids

    def _run(
        self,
        ids: Tensor,
        cache: DynamicCache | None,
        past: int,
        mask: Tensor | None,
        *,
        tap: AttentionTap | None,
        stop_after: int,
        skipped: int = 0,
    ) -> Tensor | None:
        """One pass of the decoder under the lock, to `stop_after`; `skipped` of `past` tokens share positions."""
        if mask is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None].expand(ids.shape) + (past - skipped)
        else:
            positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        kwargs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        with self.locked(), memory_advice(ids.shape[1], self.name):
            layers, decoder = self.attention_layers, self.decoder
            modules = [layers[i].module for i in layers if i <= stop_after]

            def run() -> None:
                decoder(**kwargs, past_key_values=cache, use_cache=cache is not None)

            return run_tapped(run, modules, tap=tap, stop_after=stop_after, past=past)


def _groups(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Numbers of branches that go through the model together."""
    group: list[int] = []
    for number, length in enumerate(lengths):
        if group and sum(lengths[i] for i in group) + length > _BRANCH_TOKENS:
            yield group
            group = []
        group.append(number)
    if group:
        yield group
