"""Keys of a text that was read at one position, moved to another: tried out, not looked up.

Rotary embeddings turn pairs of a key's numbers by angles that grow with the position, so that a later position is one
more turn, K(p + d) = R(d) K(p) (TurboRAG, arXiv 2410.07590; Block-attention, arXiv 2409.15355). Which numbers are
pairs, how fast each turns, and in which layers, differs from family to family. The model's own modules give the speeds;
the rest is tried until moved keys are those that the model computes.

Legend: G key/value heads, T tokens, D head width, P pairs.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from qr_integrations.backend.prefix import new_cache
from qr_integrations.backend.reader import Reader
from qr_integrations.backend.rotary_speeds import rotary_speeds
from qr_integrations.errors import ModelError, UnsupportedModelError

_TRIAL_TOKENS = 8
_TRIAL_POSITIONS = 1, 7, 1000
_CLOSE, _CLOSE_IN_HALF = 1e-4, 2e-2  # relative; keys turned in a wrong way are off by 0.3 and more
_ROUNDING = 2e-7  # per position: models compute their angles in fp32
_ALIKE, _ALIKE_IN_HALF = 0.05, 0.2
_Kept = dict[int, dict[str, Tensor]]  # layer -> name -> what a cache keeps


@dataclass(frozen=True, slots=True, eq=False)
class _Turn:
    """Which numbers of a key are pairs, and by how many radians per position each pair turns."""

    speeds: Float[Tensor, "P"]
    start: int
    interleaved: bool

    def moved(self, keys: Tensor, by: int | Int[Tensor, "T"]) -> Tensor:
        shifts, places = torch.unique(torch.as_tensor(by).cpu(), return_inverse=True)
        angles = shifts[:, None].double() * self.speeds
        cos, sin = (table[places].float().to(keys.device) for table in (angles.cos(), angles.sin()))
        moved = keys.clone()
        part = moved[..., self.start : self.start + 2 * len(self.speeds)]
        halves = (part[..., ::2], part[..., 1::2]) if self.interleaved else part.chunk(2, dim=-1)
        first, second = (half.float() for half in halves)
        turned = first * cos - second * sin, second * cos + first * sin
        for half, new in zip(halves, turned, strict=True):
            half.copy_(new)
        return moved


_STILL = _Turn(torch.zeros(0), 0, interleaved=False)


class KeyRotation:
    """Moves kept keys of one model to other positions; made by `key_rotation`."""

    def __init__(self, turns: Mapping[int, _Turn]) -> None:
        self._turns = turns

    def moved(self, keys: Float[Tensor, "*G T D"], layer: int, by: int | Int[Tensor, "T"]) -> Float[Tensor, "*G T D"]:
        """The keys as the model computes them `by` positions further on; computed in fp32, returned in their dtype.

        Args:
            keys: as a cache keeps them.
            layer: where they were kept.
            by: one number for all tokens, or one for each; negative moves to the front. At 0 they come back
                as they are, and so they do from a layer that knows no positions.
        """
        turn = self._turns[layer]
        return keys if turn is _STILL or (isinstance(by, int) and by == 0) else turn.moved(keys, by)


_found: WeakKeyDictionary[nn.Module, dict[torch.dtype, KeyRotation]] = WeakKeyDictionary()


def key_rotation(reader: Reader) -> KeyRotation:
    """How this model's keys move, found out once per model by seven passes over 8 tokens.

    The last of the trial's positions is the end of the model's window: speeds that depend on the length show there.

    Raises:
        UnsupportedModelError: moved keys are not what the model computes at the new position.
    """
    with reader.locked(), torch.no_grad():
        found = _found.setdefault(reader.model, {})
        if reader.model.dtype not in found:
            found[reader.model.dtype] = KeyRotation(_try_turns(reader))
        return found[reader.model.dtype]


def _try_turns(reader: Reader) -> dict[int, _Turn]:
    """The turn of each layer that keeps keys."""
    try:
        trial = _trial(reader)
    except ModelError:
        raise  # out of memory is no answer
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError) as error:
        raise _unsupported(reader, f"cannot be read at other positions ({error})") from error
    turns: dict[int, _Turn] = {}
    for layer, kept in trial.tokens.items():
        later = [(shift, tokens[layer]) for shift, tokens in trial.later_tokens]
        choices = [*dict.fromkeys(turns.values()), _STILL, *_turns(trial.speeds, kept["keys"].shape[-1])]
        found = next((turn for turn in choices if _fits(turn, kept, later)), None)
        if found is None:
            raise _unsupported(reader, f"keeps something in layer {layer} that turning the keys does not move")
        turns[layer] = found
    if not _attends_alike(turns, trial):
        raise _unsupported(reader, "attends in another way at other positions")
    return turns


@dataclass(frozen=True, slots=True)
class _Trial:
    """What a model keeps of single tokens, and of a text, at position 0 and later.

    Single tokens attend to themselves alone: nothing but the turn differs, whatever the depth and the precision. The
    text shows whether attention, too, depends on distances only.
    """

    tokens: _Kept
    later_tokens: Sequence[tuple[int, _Kept]]
    text: _Kept
    later_text: tuple[int, _Kept]
    speeds: Sequence[Tensor]


def _trial(reader: Reader) -> _Trial:
    places = torch.arange(_TRIAL_TOKENS, device=reader.device)
    ids = (places * 7 + 11) % reader.config.vocab_size
    limit = max(1, reader.max_tokens - _TRIAL_TOKENS) if reader.max_tokens else max(_TRIAL_POSITIONS)
    shifts = sorted({*(min(position, limit) for position in _TRIAL_POSITIONS), limit})
    text: list[_Kept] = []
    speeds = rotary_speeds(reader.decoder, lambda: text.append(_read(reader, ids[None], 0)), places, limit)
    later_text = limit, _read(reader, ids[None], limit)
    later_tokens = [(shift, _read(reader, ids[:, None], shift)) for shift in shifts]
    tokens = _read(reader, ids[:, None], 0)  # last, so that speeds that grow with the length are as before
    return _Trial(tokens, later_tokens, text[0], later_text, speeds)


def _unsupported(reader: Reader, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{reader.name!r} {why}: leave out what moves texts to other positions, e.g. with positions='shared'"
    )


def _read(reader: Reader, ids: Tensor, position: int) -> _Kept:
    """What each attention layer keeps of texts that begin at `position`."""
    top = max(reader.attention_layers)
    cache = new_cache(reader.config, top, "values")
    assert cache is not None
    reader._run(ids, cache, 0, None, tap=None, stop_after=top, skipped=-position)
    layers = {i: layer for i, layer in enumerate(cache.layers) if i in reader.attention_layers}
    kept = {i: {n: v for n, v in vars(layer).items() if isinstance(v, Tensor)} for i, layer in layers.items()}
    return {i: tensors for i, tensors in kept.items() if "keys" in tensors}  # some layers borrow those of others


def _fits(turn: _Turn, first: Mapping[str, Tensor], trials: Sequence[tuple[int, Mapping[str, Tensor]]]) -> bool:
    """Whether `turn` makes the later keys of the first ones, and what else is kept is the same at all positions."""
    limit = _CLOSE if first["keys"].dtype == torch.float32 else _CLOSE_IN_HALF
    for shift, later in trials:
        moved = {**first, "keys": turn.moved(first["keys"], shift)}
        if not all(_distance(moved[name], later[name]) < limit + _ROUNDING * shift for name in moved):
            return False
    return True


def _attends_alike(turns: Mapping[int, _Turn], trial: _Trial) -> bool:
    """Whether the text's keys move, in the median layer: rounding grows with the depth, and differs with positions."""
    shift, later = trial.later_text
    pairs = [(turn.moved(trial.text[i]["keys"], shift), later[i]["keys"]) for i, turn in turns.items()]
    limit = _ALIKE if pairs[0][0].dtype == torch.float32 else _ALIKE_IN_HALF
    return median(_distance(moved, keys) for moved, keys in pairs) < limit


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-30))


def _turns(tables: Sequence[Tensor], width: int) -> Iterator[_Turn]:
    """Every way to turn keys of `width` numbers: tables may hold each speed once or twice, in either order."""
    for table in tables:
        for once in (table[: len(table) // 2], table[::2], table):
            for speeds in (once, -once):
                rest = width - 2 * len(speeds)
                for start in (0, rest) if rest > 0 else (0,) if rest == 0 else ():
                    yield from (_Turn(speeds, start, interleaved) for interleaved in (False, True))
