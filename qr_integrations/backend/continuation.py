"""Whether a model goes on from kept keys and values as if it had read everything at once: tried out, not looked up.
Also whether several texts may go on from them side by side.

Most do. Latent attention makes its keys out of cached values, and the recurrent layers of some hybrids forget their
state when more than one token follows; which ones, changes with the version of transformers.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from qr_integrations.backend.attention_tap import AttentionTap
from qr_integrations.backend.branches import Wanted
from qr_integrations.backend.prefix import Continuation, Prefix, new_cache
from qr_integrations.errors import ModelError
from qr_integrations.types import Span

_KEPT, _NEW = 16, 8  # tokens of the trial
# Mean difference of the weights. A lost state makes 3e-3 and more; half precision alone may make 1e-3 in a deep model,
# so the limit is wide where no layer has a state to lose.
_CLOSE, _CLOSE_IN_HALF, _CLOSE_IN_HALF_WITHOUT_STATES = 1e-4, 2e-3, 2e-2


def try_continuations(
    run: Callable[..., Tensor | None],
    config: Any,
    heads: tuple[tuple[int, int], ...],
    *,
    device: Any,
    dtype: torch.dtype,
) -> Continuation:
    """The least a prefix must keep at the layer of `heads` for later tokens to attend as they would without a prefix.

    `run` is `Backend._run`. Costs three to five passes over 24 tokens.
    """
    ids = (torch.arange(_KEPT + _NEW, device=device)[None] * 7 + 11) % config.vocab_size
    tap = AttentionTap(heads, Span(_KEPT, _KEPT + _NEW), reduce="none")
    with torch.no_grad():
        whole = run(ids, None, 0, None, tap=tap, stop_after=tap.top_layer)
        assert whole is not None
        for continuation in ("keys", "values"):
            try:
                rows, stateless = _continued(run, config, ids, tap, continuation)
            except ModelError:
                raise  # out of memory is no answer
            except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError):
                continue  # the family does not take this cache
            if rows.shape == whole.shape and (rows - whole).abs().mean() < _limit(dtype, stateless):
                return continuation
    return "tokens"


def try_branches(reader: Any, heads: tuple[tuple[int, int], ...]) -> bool:
    """Whether `Reader.forward_branches` gives what `Reader.forward` gives. Costs four short passes."""
    ids = [(7 * i + 11) % reader.config.vocab_size for i in range(_KEPT + _NEW)]
    wanted, trunk_ids = Wanted(heads), ids[_KEPT : _KEPT + 2]
    branches = [trunk_ids + ids[-2:], trunk_ids + ids[-5:-2]]
    try:
        prefix = reader.prefill(ids[:_KEPT], top_layer=wanted.top_layer)
        trunk = reader.read_trunk(trunk_ids, wanted, prefix)
        together = reader.forward_branches(branches, wanted, prefix=prefix, trunk=trunk)
        for branch, means in zip(branches, together, strict=True):
            tap = AttentionTap(heads, Span(_KEPT, _KEPT + len(branch)))
            alone = reader.forward(branch, tap=tap, prefix=prefix)[0, :, :_KEPT]
            if not (means - alone).abs().mean() < _limit(reader.model.dtype, stateless=True):
                return False
    except ModelError:
        raise
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError):
        return False  # the family does not take this cache, or this mask
    return True


def _limit(dtype: torch.dtype, stateless: bool) -> float:
    if dtype == torch.float32:
        return _CLOSE
    return _CLOSE_IN_HALF_WITHOUT_STATES if stateless else _CLOSE_IN_HALF


def _continued(
    run: Callable[..., Tensor | None],
    config: Any,
    ids: Tensor,
    tap: AttentionTap,
    continuation: Literal["keys", "values"],
) -> tuple[Tensor, bool]:
    """The rows of the later tokens on a prefix of the first ones, and whether it is keys and values only."""
    top = tap.top_layer
    prefix = Prefix(tuple(ids[0, :_KEPT].tolist()), top, new_cache(config, top, continuation))
    run(ids[:, :_KEPT], prefix.cache, 0, None, tap=None, stop_after=top)
    rows = run(ids[:, _KEPT:], prefix.branch(), _KEPT, None, tap=tap, stop_after=top)
    assert rows is not None
    return rows, prefix.can_crop
