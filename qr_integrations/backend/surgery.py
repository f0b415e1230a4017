"""Reads prompts while tokens of their pictures are dropped, before the language model or between its layers.

The model runs its own forward pass with its own kernels. Hooks on its decoder shorten what the layers are given, and
are gone afterwards. Who drops nothing changes nothing, not even a bit.

Legend: B prompts, T tokens, H heads, r rows of attention, V words of the vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from qr_integrations.backend.attention_rows import attention_rows
from qr_integrations.backend.attention_tap import rows_watched
from qr_integrations.backend.memory import memory_advice
from qr_integrations.backend.picture_families import picture_family
from qr_integrations.backend.prefix import new_cache, sliding_window
from qr_integrations.backend.reader import Reader
from qr_integrations.backend.visual_tokens import NOT_VISUAL, Embedded, Left, Pruner, Pruning, TowerView
from qr_integrations.errors import InputError, UnsupportedModelError
from qr_integrations.types import Span


@dataclass(frozen=True, slots=True)
class Prefilled:
    """Prompts that were read with fewer tokens.

    Attributes:
        logits: of the token behind each prompt.
        cache: keys and values; later layers may hold fewer tokens than earlier ones.
        token_ids, mask, positions: of what the first layer read.
        compact: whether each layer counts positions by what it holds itself.
        record: what was done.
        held: how many tokens each layer held when the prompts had been read.
    """

    logits: Float[Tensor, "B V"]
    cache: DynamicCache
    token_ids: Int[Tensor, "B T"]
    mask: Bool[Tensor, "B T"]
    positions: Int[Tensor, "*three B T"]
    compact: bool
    record: Any
    held: tuple[int, ...]

    @property
    def lengths(self) -> tuple[int, ...]:
        """How many tokens each layer holds now."""
        return tuple(int(self.cache.get_seq_length(layer)) for layer in range(len(self.cache.layers)))

    def continued(self, num_beams: int = 1) -> dict[str, Any]:
        """What ``generate`` is given to go on from the one prompt: it reads the last token again.

        The cache is the only one. Each call takes out what was generated behind the prompt before.
        """
        for layer, length in zip(self.cache.layers, self.held, strict=True):
            beams = len(layer.keys) // len(self.token_ids)  # of the call before: alike as far as the prompt goes
            layer.keys, layer.values = (part[::beams, :, : length - 1] for part in (layer.keys, layer.values))
        if num_beams > 1:
            self.cache.batch_repeat_interleave(num_beams)
        return {
            "input_ids": self.token_ids,
            "attention_mask": self.mask.long(),
            "position_ids": self.positions,
            "past_key_values": self.cache,
        }

    @contextmanager
    def decoding(self, backend: Reader) -> Iterator[None]:
        """Within the block, tokens that follow get in each layer the positions that the published method gives them."""
        lengths = self.lengths
        shorter = [number for number, length in enumerate(lengths) if length != lengths[0]]
        with ExitStack() as stack:
            for number in shorter:
                layer = _layers(backend)[number]
                hook = layer.register_forward_pre_hook(self._counting_own(backend, number), with_kwargs=True)
                stack.callback(hook.remove)
            yield

    def _counting_own(self, backend: Reader, number: int) -> Callable[..., Any]:
        """Positions, and the columns of a mask, by what a layer holds itself, not by what the first one holds."""

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            cache, states = kwargs["past_key_values"], args[0] if args else kwargs["hidden_states"]
            past, given = cache.get_seq_length(number), dict(kwargs)
            if given.get("attention_mask") is not None:  # the eager kernel's: the one prompt has no padding
                given["attention_mask"] = given["attention_mask"][..., -(past + states.shape[1]) :]
            if self.compact:
                positions = torch.arange(past, past + states.shape[1], device=states.device).expand(states.shape[:2])
                given["position_embeddings"] = _rotary(backend)(states, positions)
            return args, given

        return before


@torch.no_grad()
def prefill_pruned(
    backend: Reader, inputs: Mapping[str, Tensor], pruner: Pruner, questions: Sequence[str] = ()
) -> Prefilled:
    """Read one or more prompts, padded at the left, while `pruner` drops tokens of their pictures.

    Args:
        backend: the model.
        inputs: what the processor made of them, on the model's device.
        pruner: what drops tokens.
        questions: what each prompt asks, for pruners that want to know.

    Raises:
        UnsupportedModelError: a family whose pictures' tokens cannot be dropped.
        InputError: prompts that are padded at the right.
    """
    family, _ = picture_family(backend.model.config), backend.attention_layers  # surveyed before there are hooks
    mask = inputs.get("attention_mask")
    if mask is not None and not bool(mask[:, -1].all()):
        raise InputError("prompts are padded at the right: set tokenizer.padding_side = 'left'")
    places = family.places(backend.model, inputs)
    cache = new_cache(backend.config, backend.config.num_hidden_layers - 1, "values")
    if cache is None:
        raise UnsupportedModelError(f"{backend.name!r} keeps no keys and values: use a model that does")
    operation = _Operation(backend, inputs, places, pruner, tuple(questions))
    with backend.locked(), memory_advice(inputs["input_ids"].shape[1], backend.name), operation.prepared():
        output = backend.model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return operation.result(output.logits[:, -1], cache)


class _Operation:
    """One pass: hooks, and what they hand on from layer to layer."""

    def __init__(
        self, backend: Reader, inputs: Mapping[str, Tensor], places: Any, pruner: Pruner, questions: tuple[str, ...]
    ) -> None:
        self.backend, self.inputs, self.places, self.pruner = backend, inputs, places, pruner
        self.questions = questions
        self.token_ids = inputs["input_ids"]
        self.tower_patches: Tensor | None = None
        self.tower_attended: Tensor | None = None
        self.pruning: Pruning | None = None
        self.seen: Embedded | None = None  # as the first layer reads it
        self.now: Embedded | None = None
        self.given: dict[str, Any] = {}  # what layers are given in the place of what the decoder made
        self.stack = ExitStack()
        self.rows: list[Tensor] = []
        self.attention: list[Tensor] = []

    # ---- hooks

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """The hooks are there within the block."""
        with ExitStack() as stack:
            for module, hook in self._tower_hooks():
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            decoder = self.backend.decoder
            stack.callback(decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True).remove)
            for number, layer in enumerate(_layers(self.backend)):
                stack.callback(layer.register_forward_pre_hook(self._before_layer(number), with_kwargs=True).remove)
                stack.callback(layer.register_forward_hook(self._after_layer(number)).remove)
            self.stack = stack
            yield

    def _tower_hooks(self) -> list[tuple[nn.Module, Callable[..., None]]]:
        base: Any = self.backend.model.base_model
        projector = getattr(base, "multi_modal_projector", None)
        if projector is None:
            return []

        def at_projector(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.tower_patches = args[0] if args else next(iter(kwargs.values()))

        def at_attention(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.tower_attended = args[0] if args else kwargs["hidden_states"]

        hooks: list[tuple[nn.Module, Callable[..., None]]] = [(projector, at_projector)]
        chosen, layer = _tower_layers(base.vision_tower), self.backend.model.config.vision_feature_layer
        if chosen and isinstance(layer, int):
            number = layer - 1 if layer > 0 else len(chosen) + layer  # states before the first layer have none
            hooks += [(chosen[number].self_attn, at_attention)] if 0 <= number < len(chosen) else []
        return hooks

    def _before_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pictures' features are in place: choose what the first layer reads."""
        seen = self._embedded(kwargs)
        self.pruning = self.pruner.start(self.backend, seen)
        self.seen = self.now = seen
        attending = self.backend.attention_layers
        watched = [attending[number].module for number in self.pruning.layers]
        self.stack.enter_context(rows_watched(watched, self._watch))
        left = self.pruning.before()
        if left is None or not self._drops(left):
            return None
        self.now = self.seen = seen.take(left, self.pruning.compact)
        given = {"inputs_embeds": self.now.states, "position_ids": self.now.positions}
        return args, {**kwargs, **given, "attention_mask": self.now.mask.long()}

    def _embedded(self, kwargs: Mapping[str, Any]) -> Embedded:
        states, given = kwargs["inputs_embeds"], kwargs.get("attention_mask")
        mask = torch.ones_like(self.token_ids, dtype=torch.bool) if given is None else given.bool()
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        visual = self.token_ids == self.backend.model.config.image_token_id
        spread = {}
        for name in ("picture", "view", "cell"):
            spread[name] = torch.full_like(self.token_ids, NOT_VISUAL)
            spread[name][visual] = getattr(self.places, name)
        source = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
        tower = None
        if self.tower_patches is not None:
            tower = TowerView(self.tower_patches, self.tower_attended)
        return Embedded(
            states=states,
            mask=mask,
            positions=positions[-3:] if positions.dim() == 3 else positions.expand(mask.shape),
            source=source,
            tower=tower,
            questions=self.questions,
            **spread,
        )

    def _drops(self, left: Left) -> bool:
        assert self.now is not None
        whole = self.now.mask.sum(-1).tolist()
        return left.merged is not None or [len(kept) for kept in left.kept] != whole

    def _before_layer(self, number: int) -> Callable[..., Any]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            assert self.now is not None and self.pruning is not None
            if number in self.pruning.layers:
                states = args[0] if args else kwargs["hidden_states"]
                self.rows = list(self.pruning.rows(replace(self.now, states=states)))
            return (args, {**kwargs, **self.given}) if self.given else None

        return before

    def _after_layer(self, number: int) -> Callable[..., Any]:
        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            assert self.now is not None and self.pruning is not None
            if number not in self.pruning.layers:
                return None
            states = output[0] if isinstance(output, tuple) else output
            self.now = replace(self.now, states=states)
            left = self.pruning.after(number, self.now, self.attention)
            self.rows, self.attention = [], []
            if left is None or not self._drops(left):
                return None
            if sliding_window(self.backend.config) is not None:
                raise UnsupportedModelError(
                    f"{self.backend.name!r} has layers that see a window of tokens only, which dropping tokens between "
                    "layers would shift: prune before the language model, with CDPruner"
                )
            self.now = self.now.take(left, self.pruning.compact)
            kernel = self.backend.attention_layers[number].kernel.removeprefix("qr_tap_")
            self.given = {
                "attention_mask": _mask(self.now.mask, kernel, states.dtype),
                "position_embeddings": _rotary(self.backend)(self.now.states, self.now.positions),
                "position_ids": None,
            }
            return (self.now.states, *output[1:]) if isinstance(output, tuple) else self.now.states

        return after

    def _watch(self, module: Any, query: Tensor, key: Tensor, mask: Any, kwargs: dict[str, Any]) -> None:
        assert self.pruning is not None
        if module.layer_idx in self.pruning.layers and self.rows:
            self.attention = _rows_at(self.rows, query, key, mask, kwargs)

    # ---- afterwards

    def result(self, logits: Tensor, cache: DynamicCache) -> Prefilled:
        """What the pass leaves behind."""
        assert self.seen is not None and self.pruning is not None
        source = self.seen.source.clamp(min=0)
        token_ids = self.token_ids.gather(1, source).masked_fill(~self.seen.mask, self.token_ids[0, 0])
        return Prefilled(
            logits,
            cache,
            token_ids,
            self.seen.mask,
            self.seen.positions,
            self.pruning.compact,
            self.pruning.record,
            tuple(int(cache.get_seq_length(layer)) for layer in range(len(cache.layers))),
        )


def _layers(backend: Reader) -> Any:
    return backend.decoder.layers


def _tower_layers(tower: Any) -> Any:
    """The tower's layers, in whatever it keeps them."""
    for holder in (tower, getattr(tower, "encoder", None), getattr(tower, "vision_model", None)):
        found = getattr(holder, "layers", None)
        if found is not None:
            return found
    inner = getattr(getattr(tower, "vision_model", None), "encoder", None)
    return getattr(inner, "layers", None)


def _rotary(backend: Reader) -> Any:
    rotary = getattr(backend.decoder, "rotary_emb", None)
    if rotary is None:
        raise UnsupportedModelError(
            f"{backend.name!r} does not rotate its queries and keys, so that dropped tokens leave no known positions: "
            "prune before the language model, with CDPruner"
        )
    return rotary


def _mask(mask_BT: Bool[Tensor, "B T"], kernel: str, dtype: torch.dtype) -> Tensor | None:
    """What the kernel is given so that every token sees those before it, and none sees padding."""
    if bool(mask_BT.all()) and kernel != "eager":
        return None
    if kernel.startswith("flash"):
        return mask_BT.long()
    length = mask_BT.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=mask_BT.device).tril()
    itself = torch.eye(length, dtype=torch.bool, device=mask_BT.device)  # rows of padding must see something
    seen = (causal & mask_BT[:, None, None, :]) | itself
    if kernel != "eager":
        return seen
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)


def _rows_at(
    rows: Sequence[Tensor], query: Tensor, key: Tensor, mask: Any, kwargs: Mapping[str, Any]
) -> list[Float[Tensor, "H _ T"]]:
    """The attention of all heads at some tokens of each prompt."""
    found, columns = [], torch.arange(key.shape[2], device=key.device)
    for prompt, places in enumerate(rows):
        if mask is None or mask.dim() == 2:
            visible = (columns <= places[:, None])[None, None]
            chosen = visible if mask is None else visible & mask[prompt].bool()
        else:
            chosen = mask[prompt : prompt + 1, :, places]
        heads = list(range(query.shape[1]))
        some = query[prompt : prompt + 1, :, places]
        mine = key[prompt : prompt + 1]
        span = Span(0, len(places))
        found.append(attention_rows(some, mine, chosen, rows=span, heads=heads, reduce="none", **kwargs)[0])
    return found
