"""What earlier layers would say, beside what the model says, while it generates.

Legend: B batch, N positions whose logits are asked for, J layers, V vocabulary, D width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from qr_integrations.backend.backend import Backend
from qr_integrations.errors import InputError, UnsupportedModelError

Transform = Callable[[Float[Tensor, "B N V"], Float[Tensor, "J B N V"]], Float[Tensor, "B N V"]]
Needed = Callable[[Float[Tensor, "B N V"]], Bool[Tensor, "B N"]]


@contextmanager
def early_logits(
    backend: Backend,
    layers: Sequence[int],
    transform: Transform,
    *,
    needed: Needed | None = None,
    normed: bool = True,
    first: int = 1,
) -> Iterator[None]:
    """Within the block, `transform` rewrites the logits of every pass of the model; other threads wait.

    It is given the model's logits and those that the head makes of earlier layers' states, after the final norm, all
    fp32. One matrix product serves both: the head's weights are read once. What a family does to logits behind its head
    (a soft cap, a scale) is done to all of them.

    Args:
        backend: the model. Generate with ``backend.model.generate``.
        layers: as transformers numbers hidden states: layer i is the output of the i-th block, counted from 1. Not the
            last one, whose logits are the model's own.
        transform: final and early logits in, logits out. Called once per pass, for the positions asked for.
        needed: told the model's logits, says where earlier layers must be read. They are read in a second product then,
            and only if some position of the pass needs them; else `transform` gets those of no layer, J = 0. The
            model's own logits are, to the last bit, what they are without this block. A family that does something
            behind its head pays for both products in every pass. None reads all layers always, in one product.
        normed: apply the final norm to earlier states, as the last state has it.
        first: the lowest layer that may be asked for; 0 are the embeddings.

    Raises:
        InputError: layers that the model does not have between `first` and its last.
        UnsupportedModelError: blocks, final norm or head cannot be found.
    """
    blocks, norm = _blocks_and_norm(backend.decoder)
    if not layers or len(set(layers)) < len(layers) or min(layers) < first or max(layers) >= len(blocks):
        raise InputError(
            f"{list(layers)} are no layers to look at: {backend.name!r} has {len(blocks)} blocks, pass distinct "
            f"numbers from {first} to {len(blocks) - 1}"
        )
    with backend.locked():
        head, owner = _head_and_owner(backend)
        reading = _Reading(head, norm if normed else nn.Identity(), layers, transform, needed)
        hooks = [_watch(blocks, layer, reading) for layer in layers]
        hooks.append(head.register_forward_pre_hook(reading.before_head))
        hooks.append(head.register_forward_hook(reading.after_head))
        hooks.append(owner.register_forward_hook(reading.after_model))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _watch(blocks: nn.ModuleList, layer: int, reading: "_Reading") -> Any:
    """Have a layer's states kept, by reference, in every pass."""
    if layer == 0:
        return blocks[0].register_forward_pre_hook(
            lambda module, args, kwargs: reading.keep(0, args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
    return blocks[layer - 1].register_forward_hook(
        lambda module, args, output: reading.keep(layer, output[0] if isinstance(output, tuple) else output)
    )


class _Reading:
    """The states of one pass, from the blocks to the head, and what the head makes of them."""

    def __init__(
        self, head: nn.Module, norm: nn.Module, layers: Sequence[int], transform: Transform, needed: Needed | None
    ) -> None:
        self._head, self._norm, self._layers = head, norm, layers
        self._transform, self._needed = transform, needed
        self._states: dict[int, Tensor] = {}
        self._early = torch.empty(0)  # [B, J N, D]: states that the head has not read yet
        self._own = torch.empty(0)  # what the head made of the last layer, while that is to be compared
        self._head_is_last: bool | None = None  # the model's logits are the head's, found out in the first pass
        self._asking = False

    def keep(self, layer: int, state: Tensor) -> None:
        """A layer is done."""
        self._states[layer] = state

    def before_head(self, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        """The head is about to read the last state: behind it the earlier ones, if one product is to serve all."""
        (states,) = args
        if not self._asking:
            positions = states.shape[1]
            early = [self._norm(self._states[layer][:, -positions:]).to(states) for layer in self._layers]
            self._states.clear()
            if self._needed is not None:
                self._early = torch.cat(early, dim=1)
                return None
            states = torch.cat([states, *early], dim=1)
        return (states.to_mkldnn() if _is_faster_in_onednn(module, states) else states,)

    def after_head(self, module: nn.Module, args: Any, logits: Tensor) -> Tensor:
        """The head is done: what comes behind it in the model shall see all logits, unless there is nothing."""
        logits = logits.to_dense() if logits.is_mkldnn else logits
        if self._asking or self._needed is None or self._head_is_last:
            return logits
        self._own = logits
        return torch.cat([logits, self._ask()], dim=1)

    def after_model(self, module: nn.Module, args: Any, output: Any) -> Any:
        """The model is done: its logits and the others part."""
        if self._needed is not None and self._head_is_last:
            final = output.logits.float()
            needed = bool(self._needed(final).any())
            early = self._ask().float() if needed else final[:, :0]
        else:
            positions = output.logits.shape[1] // (1 + len(self._layers))
            own, rest = output.logits[:, :positions], output.logits[:, positions:]
            final, early = own.float(), rest.float()
            if self._needed is not None and self._head_is_last is None:
                self._head_is_last = torch.equal(own.to(self._own), self._own)
        self._early = self._own = torch.empty(0)
        by_layer = early.unflatten(1, (-1, final.shape[1])).movedim(1, 0)
        output.logits = self._transform(final, by_layer)
        return output

    def _ask(self) -> Tensor:
        """The head reads the earlier states by themselves."""
        self._asking = True
        try:
            logits: Tensor = self._head(self._early)
        finally:
            self._asking = False
        return logits


def _is_faster_in_onednn(head: nn.Module, states: Tensor) -> bool:
    """Ten fp32 rows cost torch's usual product three times as much as one; oneDNN's, half as much again.

    Tensors in oneDNN's layout are what leads there; the weights stay as they are. Half precision goes there by itself.
    """
    return (
        type(head) is nn.Linear
        and head.weight.dtype == states.dtype == torch.float32
        and head.weight.device.type == states.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_grad_enabled()
    )


def _blocks_and_norm(decoder: nn.Module) -> tuple[nn.ModuleList, nn.Module]:
    """The one list of blocks that a decoder has, and its last norm."""
    lists = [module for module in decoder.children() if isinstance(module, nn.ModuleList)]
    norms = [module for name, module in decoder.named_children() if "norm" in name or name == "ln_f"]
    if len(lists) != 1 or not norms:
        raise UnsupportedModelError(
            f"{type(decoder).__name__} is not made of blocks and a final norm: use a decoder in the shape of Llama's"
        )
    return lists[0], norms[-1]


def _head_and_owner(backend: Backend) -> tuple[nn.Module, nn.Module]:
    """The head, and the module whose output holds its logits."""
    head = backend.model.get_output_embeddings()
    owners = [m for m in backend.model.modules() if any(child is head for child in m.children())]
    if head is None or not owners:
        raise UnsupportedModelError(f"{backend.name!r} has no language-model head: load a model that generates text")
    return head, owners[0]
