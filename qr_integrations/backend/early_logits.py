"""What earlier layers would say, beside what the model says, while it generates.

Legend: B batch, N positions whose logits are asked for, J layers, V vocabulary, D width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qr_integrations.backend.backend import Backend
from qr_integrations.errors import InputError, UnsupportedModelError

Transform = Callable[[Float[Tensor, "B N V"], Float[Tensor, "J B N V"]], Float[Tensor, "B N V"]]


@contextmanager
def early_logits(backend: Backend, layers: Sequence[int], transform: Transform) -> Iterator[None]:
    """Within the block, `transform` rewrites the logits of every pass of the model; other threads wait.

    It is given the model's logits and those that the head makes of earlier layers' states, after the final norm, all
    fp32. One matrix product serves both: the head's weights are read once. What a family does to logits behind its head
    (a soft cap, a scale) is done to all of them.

    Args:
        backend: the model. Generate with ``backend.model.generate``.
        layers: as transformers numbers hidden states: layer i is the output of the i-th block, counted from 1. Not the
            last one, whose logits are the model's own.
        transform: final and early logits in, logits out. Called once per pass, for the positions asked for.

    Raises:
        InputError: layers that the model does not have between its first and its last.
        UnsupportedModelError: blocks, final norm or head cannot be found.
    """
    blocks, norm = _blocks_and_norm(backend.decoder)
    if not layers or len(set(layers)) < len(layers) or min(layers) < 1 or max(layers) >= len(blocks):
        raise InputError(
            f"{list(layers)} are no layers to look at: {backend.name!r} has {len(blocks)} blocks, pass distinct "
            f"numbers from 1 to {len(blocks) - 1}"
        )
    with backend.locked():
        states = _States(norm, len(layers))
        head, owner = _head_and_owner(backend)
        hooks = [blocks[layer - 1].register_forward_hook(states.keep) for layer in layers]
        hooks.append(head.register_forward_pre_hook(states.widen))
        hooks.append(owner.register_forward_hook(lambda module, args, out: states.split(out, transform)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class _States:
    """The states of one pass, from the blocks to the head."""

    def __init__(self, norm: nn.Module, count: int) -> None:
        self._norm, self._count = norm, count
        self._kept: list[Tensor] = []

    def keep(self, module: nn.Module, args: Any, output: Any) -> None:
        """A block is done: hold on to its output, without a copy."""
        if len(self._kept) == self._count:
            self._kept.clear()  # a pass that never came to the head
        self._kept.append(output[0] if isinstance(output, tuple) else output)

    def widen(self, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        """The head reads the earlier states too, behind its own."""
        (final_BND,) = args
        positions = final_BND.shape[1]
        early = [self._norm(state[:, -positions:]).to(final_BND) for state in self._kept]
        self._kept.clear()
        return (torch.cat([final_BND, *early], dim=1),)

    def split(self, output: Any, transform: Transform) -> Any:
        """The model is done: its logits and the others part."""
        parts = output.logits.unflatten(1, (1 + self._count, -1)).float()
        output.logits = transform(parts[:, 0], parts[:, 1:].movedim(1, 0)).to(output.logits.dtype)
        return output


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
