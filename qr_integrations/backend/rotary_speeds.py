"""How fast a model's rotary embeddings turn, read off its own modules while it reads.

Legend: T positions, W width of a module's tables.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn

_LAST_POWER = 10  # angles are read off at the positions 1, 2, 4, ..., 1024
_Call = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


def rotary_speeds(
    decoder: nn.Module, run: Callable[[], Any], positions: Int[Tensor, "T"], limit: int
) -> list[Float[Tensor, "W"]]:
    """Radians per position of each number in the tables of cosines and sines that `decoder` makes, fp64 on the CPU.

    Modules without weights that are told the positions are asked again, for other positions and in fp32.

    Args:
        decoder: whose modules are listened to.
        run: one pass, that reads tokens at `positions`.
        positions: what to recognise them by; several.
        limit: the last position that may be asked for.

    Returns:
        One for each call of such a module.
    """
    asked = torch.tensor([2**power for power in range(_LAST_POWER + 1) if 2**power <= max(limit, 1)])
    with _calls(decoder, positions) as calls:
        run()
    tables = [_as_turns(_ask_again(call, positions, asked)) for call in calls]
    return [_speeds(turns, asked) for turns in tables if turns is not None]


@contextmanager
def _calls(decoder: nn.Module, positions: Tensor) -> Iterator[list[_Call]]:
    calls: list[_Call] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(_are(positions, value) for value in (*args, *kwargs.values())):
            calls.append((module, args, kwargs))

    leaves = [m for m in decoder.modules() if not any(m.children()) and not any(True for _ in m.parameters())]
    hooks = [leaf.register_forward_pre_hook(note, with_kwargs=True) for leaf in leaves]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _are(positions: Tensor, value: Any) -> bool:
    """Whether `value` is `positions`, perhaps several times."""
    if not isinstance(value, Tensor) or value.dtype != torch.long or value.shape[-1:] != positions.shape:
        return False
    return torch.equal(value, positions.to(value.device).expand(value.shape))


def _ask_again(call: _Call, positions: Tensor, asked: Tensor) -> Any:
    module, args, kwargs = call

    def instead(value: Any) -> Any:
        if _are(positions, value):
            return asked.to(value.device).expand(*value.shape[:-1], len(asked))
        return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value

    return module(*map(instead, args), **{name: instead(value) for name, value in kwargs.items()})


def _as_turns(tables: Any) -> Complex[Tensor, "T W"] | None:
    """Cosines and sines, or complex numbers, as complex numbers; their length (YaRN scales attention) is no matter."""
    if isinstance(tables, Tensor) and tables.is_complex():
        turns = tables
    elif isinstance(tables, tuple | list) and len(tables) == 2 and all(isinstance(t, Tensor) for t in tables):
        turns = torch.complex(*(table.double() for table in tables))
    else:
        return None
    return turns.reshape(-1, *turns.shape[-2:])[0].to("cpu", torch.complex128)


def _speeds(turns: Complex[Tensor, "T W"], positions: Int[Tensor, "T"]) -> Float[Tensor, "W"]:
    """The angle at position 1, made finer by those at 2, 4, 8, ..., which are known but for whole turns."""
    speeds = turns[0].angle()
    for position, turn in zip(positions.tolist(), turns, strict=True):
        speeds += (turn * torch.polar(torch.ones_like(speeds), -position * speeds)).angle() / position
    return speeds
