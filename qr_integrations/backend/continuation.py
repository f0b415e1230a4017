"""Whether a model goes on from kept keys and values as if it had read everything at once: tried out, not looked up.

Most do. Latent attention makes its keys out of cached values, and the recurrent layers of some hybrids forget their
state when more than one token follows; which ones, changes with the version of transformers.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from qr_integrations.backend.attention_tap import AttentionTap
from qr_integrations.backend.prefix import Continuation, Prefix, new_cache
from qr_integrations.types import Span

_KEPT, _NEW = 16, 8  # tokens of the trial
_CLOSE, _CLOSE_IN_HALF = 1e-4, 3e-3  # mean difference of the weights; a lost state makes some 1e-2


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
    limit = _CLOSE if dtype == torch.float32 else _CLOSE_IN_HALF
    with torch.no_grad():
        whole = run(ids, None, 0, None, tap=tap, stop_after=tap.top_layer)
        assert whole is not None
        for continuation in ("keys", "values"):
            rows = _continued(run, config, ids, tap, continuation)
            if rows is not None and rows.shape == whole.shape and (rows - whole).abs().mean() < limit:
                return continuation
    return "tokens"


def _continued(
    run: Callable[..., Tensor | None],
    config: Any,
    ids: Tensor,
    tap: AttentionTap,
    continuation: Literal["keys", "values"],
) -> Tensor | None:
    """The rows of the later tokens on a prefix of the first ones; None where the family does not take our cache."""
    top = tap.top_layer
    try:
        cache = new_cache(config, top, continuation)
        run(ids[:, :_KEPT], cache, 0, None, tap=None, stop_after=top)
        branch = Prefix(tuple(ids[0, :_KEPT].tolist()), top, cache).branch()
        return run(ids[:, _KEPT:], branch, _KEPT, None, tap=tap, stop_after=top)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, NotImplementedError):
        return None
