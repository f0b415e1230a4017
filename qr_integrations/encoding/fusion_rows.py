"""Layers of the tower that arrive within the language model: at the pictures' rows, or for all rows to attend to.

Hooks on the fused model's own layers; the model that it was made of has none of them.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from qr_integrations.encoding.fusion_modules import FusionProjector
from qr_integrations.errors import InputError, UnsupportedModelError

_TOWER_OPTIONS = ("vision_feature_layer", "vision_feature_select_strategy", "image_sizes")
_KEPT = "fused_pictures"  # where a cache keeps keys and values of the pictures that its tokens attend to


def add_to_rows(
    states: Float[Tensor, "B T D"], places: Bool[Tensor, "B T"], features: Float[Tensor, "*N D"]
) -> Float[Tensor, "B T D"]:
    """New states: `features` added at `places`, in order; all other rows as they were.

    Raises:
        InputError: not as many features as places.
    """
    features = features.flatten(0, -2)
    _check_count(features, places)
    where = places[..., None]
    spread = torch.zeros_like(states).masked_scatter(where, features.to(states.dtype))
    return torch.where(where, states + spread, states)


class Arrivals:
    """The hooks of an internal fusion, and what one pass knows of its pictures.

    Args:
        projector: makes what arrives.
        image_token_id: of the pictures' placeholders.
    """

    def __init__(self, projector: FusionProjector, image_token_id: int) -> None:
        self.projector, self.image_token_id = projector, image_token_id
        self._forget()

    def _forget(self) -> None:
        self.places: Tensor | None = None
        self.arriving: list[Tensor] = []
        self._forget_pass()

    def _forget_pass(self) -> None:
        self.before: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # pictures that earlier passes read, by arrival
        self.cache: Any = None
        self.residual: Tensor | None = None

    def attach(self, model: nn.Module, decoder: Any) -> None:
        """Puts the hooks in place.

        Args:
            model: from pictures and token ids to states.
            decoder: the language model in it.
        """
        model.register_forward_pre_hook(self._begin, with_kwargs=True)
        model.register_forward_hook(self._end, always_call=True)
        modular = self.projector.spec.strategy == "internal_modular"
        for index, (_, number) in enumerate(self.projector.layers.arrivals):
            if modular:
                self._attach_crossing(index, decoder.layers[number])
            else:
                decoder.layers[number].register_forward_pre_hook(partial(self._add, index), with_kwargs=True)
        if modular:
            decoder.register_forward_pre_hook(_check_not_recomputed)
            decoder.register_forward_pre_hook(self._remember, with_kwargs=True)
            decoder.register_forward_hook(self._end_pass, always_call=True)

    def _attach_crossing(self, index: int, layer: Any) -> None:
        _check_parts(layer)
        layer.register_forward_pre_hook(self._note_layer, with_kwargs=True)
        if self.projector.spec.wiring == "pre":
            layer.input_layernorm.register_forward_hook(partial(self._cross_before, index))
            return
        norm = layer.post_attention_layernorm.forward
        layer.self_attn.register_forward_hook(partial(self._cross_beside, index, norm), with_kwargs=True)

    @contextmanager
    def at(self, places: Bool[Tensor, "B T"], features: Float[Tensor, "*B N W"]) -> Iterator[Float[Tensor, "*B N D"]]:
        """Within the block, passes through the language model have pictures at `places`; yields their tokens."""
        tokens, self.arriving = self.projector.separate(features)
        self.places = places
        try:
            yield tokens
        finally:
            self._forget()

    # ---- hooks

    def _begin(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pictures are encoded here if they are not yet; the model goes on with their tokens alone."""
        self._forget()
        given = {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs}
        encoded = (given.get("mm_encoder_outputs") or {}).get("image")
        pixels = given.pop("pixel_values", None)
        if encoded is None and pixels is not None:
            options = {name: given[name] for name in _TOWER_OPTIONS if given.get(name) is not None}
            encoded = module.get_image_features(pixel_values=pixels, return_dict=True, **options)
        if encoded is None:
            return (), given
        if given.get("input_ids") is None:
            raise InputError("internal fusion must know where pictures stand: pass input_ids, not inputs_embeds")
        tokens, self.arriving = self.projector.separate(torch.cat(list(encoded.pooler_output)))
        self.places = given["input_ids"] == self.image_token_id
        return (), {**given, "mm_encoder_outputs": {"image": SimpleNamespace(pooler_output=[tokens])}}

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._forget()

    def _add(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.places is None:
            return None
        states = args[0] if args else kwargs["hidden_states"]
        if states.shape[1] != self.places.shape[1]:
            raise InputError(
                f"{self.places.shape[1]} tokens were read and {states.shape[1]} are left: internal direct fusion needs "
                "every token of a picture in its place; prune a model with external fusion instead"
            )
        added = add_to_rows(states, self.places, self.arriving[index])
        return ((added, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": added})

    def _cross_before(self, index: int, module: nn.Module, args: Any, normed: Tensor) -> Tensor | None:
        found = self._pictures(index, len(normed))
        return None if found is None else normed + self.projector.crossings[index](normed, *found)

    def _remember(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._forget_pass()
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length() == 0:
            setattr(cache, _KEPT, {})  # it may have been emptied for another prompt
        self.before = getattr(cache, _KEPT, {})

    def _end_pass(self, module: nn.Module, args: Any, output: Any) -> None:
        self._forget_pass()

    def _note_layer(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.residual = args[0] if args else kwargs["hidden_states"]
        self.cache = kwargs.get("past_key_values")  # the decoder makes one where it was given none

    def _cross_beside(
        self,
        index: int,
        norm: Callable[[Tensor], Tensor],
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: tuple[Any, ...],
    ) -> tuple[Any, ...] | None:
        """Behind the attention, its output is read with the residual and normalised; beside it, what it read."""
        attended = output[0]
        found = self._pictures(index, len(attended))
        if found is None:
            return None
        assert self.residual is not None
        if self.projector.spec.wiring == "post":
            states = norm(self.residual + attended)
        else:
            states = args[0] if args else kwargs["hidden_states"]
        return (attended + self.projector.crossings[index](states, *found), *output[1:])

    # ---- keys and values of pictures

    def _pictures(self, index: int, many: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """Keys, values and which of them are there, of all pictures read so far."""
        found = _repeated(self.before[index], many) if index in self.before else None
        if self.places is None:
            return found
        crossing: Any = self.projector.crossings[index]
        pictures, there = _by_prompt(self.arriving[index], self.places)
        new = (*crossing.keys_and_values(pictures), there)
        if found is not None:
            keys, values, before = found
            new = torch.cat([keys, new[0]], 2), torch.cat([values, new[1]], 2), torch.cat([before, there], 1)
        if self.cache is not None:
            setattr(self.cache, _KEPT, {**getattr(self.cache, _KEPT, {}), index: new})
        return new


def _by_prompt(features: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Features in the order of their places, a row for each prompt, filled up at the end: ``[B K D]``, ``[B K]``."""
    features = features.flatten(0, -2)
    _check_count(features, places)
    counts = places.sum(1)
    there = torch.arange(int(counts.max()), device=places.device) < counts[:, None]
    blank = features.new_zeros(*there.shape, features.shape[-1])
    return blank.masked_scatter(there[..., None], features), there


def _check_count(features: Tensor, places: Tensor) -> None:
    if int(places.sum()) != len(features):
        raise InputError(
            f"{len(features)} tokens of pictures do not fit {int(places.sum())} places: internal fusion takes models "
            "that read a picture's patches as they are; use external_direct"
        )


def _repeated(kept: tuple[Tensor, Tensor, Tensor], many: int) -> tuple[Tensor, Tensor, Tensor]:
    """For as many prompts, where beams or continuations have made several of each."""
    times = many // len(kept[0])
    keys, values, there = (t.repeat_interleave(times, 0) if times > 1 else t for t in kept)
    return keys, values, there


def _check_not_recomputed(decoder: Any, args: Any) -> None:
    """What a layer computes again on the way back knows no pictures any more: gradients would be wrong."""
    if decoder.training and torch.is_grad_enabled() and decoder.is_gradient_checkpointing:
        raise InputError(
            "internal modular fusion cannot be trained with gradient checkpointing: call "
            "model.gradient_checkpointing_disable(), or use internal_direct"
        )


def _check_parts(layer: nn.Module) -> None:
    missing = [n for n in ("input_layernorm", "self_attn", "post_attention_layernorm") if not hasattr(layer, n)]
    if missing:
        raise UnsupportedModelError(
            f"{type(layer).__name__} has no {', '.join(missing)}: use internal_direct or an external strategy"
        )
