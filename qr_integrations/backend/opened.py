"""A model on its device, with what the package asks of it: its parts, its attention layers, its chat format."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from qr_integrations.backend.attention_tap import AttentionLayer, survey_attention
from qr_integrations.backend.families import ChatPieces, published_pieces, template_pieces
from qr_integrations.backend.interruptions import held
from qr_integrations.backend.prefix import Continuation
from qr_integrations.errors import ClosedError, HeadError, InputError, LoadError, UnsupportedModelError

_locks: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
_looking_up = threading.Lock()


def lock_of(model: nn.Module) -> Any:
    """The reentrant lock of a model: the same one for everything that is opened around this object."""
    with _looking_up:
        return _locks.setdefault(model, threading.RLock())


class OpenedModel:
    """What stands still: a model, its tokenizer, its processor if it sees pictures, and one lock for all passes
    through the model, shared with whatever else is opened around it."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str | None = None,
        processor: ProcessorMixin | None = None,
    ) -> None:
        self.name = name or model.config._name_or_path or type(model).__name__
        self._model: PreTrainedModel | None = model
        self.tokenizer = tokenizer
        self._processor = processor
        self._lock = lock_of(model)
        self._attention_layers: dict[int, AttentionLayer] | None = None
        self._continuations: dict[int, Continuation] = {}
        self._branching: dict[int, bool] = {}

    @property
    def sees_pictures(self) -> bool:
        """Whether the model takes pictures beside text."""
        return type(self.model.config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    @property
    def processor(self) -> ProcessorMixin:
        """What turns pictures and text into the model's inputs; loaded from where the model came from.

        Raises:
            InputError: the model reads text only.
            LoadError: there is none beside the model, or it needs a library that is not installed.
        """
        if self._processor is None:
            if not self.sees_pictures:
                raise InputError(f"{self.name!r} reads text only: load a vision-language model for pictures")
            self._processor = self._load_processor()
        return self._processor

    def _load_processor(self) -> ProcessorMixin:
        raise LoadError(f"{self.name!r} has no processor: pass one, Backend(model, tokenizer, processor=...)")

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._model is None

    def __repr__(self) -> str:
        if self.closed:
            return f"Backend({self.name!r}, closed)"
        return f"Backend({self.name!r}, device={str(self.device)!r}, dtype={self.model.dtype})"

    @property
    def model(self) -> PreTrainedModel:
        """The transformers model itself.

        Raises:
            ClosedError: after `close()`.
        """
        if self._model is None:
            raise ClosedError(f"{self.name!r} was closed: load it again with Backend.load({self.name!r})")
        return self._model

    @property
    def decoder(self) -> nn.Module:
        """The stack of layers without the language-model head; the text half of a vision-language model."""
        decoder: nn.Module = self.model.get_decoder()
        if self.model.get_input_embeddings() in decoder.modules():
            return decoder
        return self.model.base_model  # where a family calls its language-model head `decoder`

    @property
    def device(self) -> torch.device:
        """Where token ids go in."""
        embeddings = self.model.get_input_embeddings()
        device: torch.device = embeddings.weight.device
        return torch.device(embeddings._hf_hook.execution_device) if device.type == "meta" else device  # offloaded

    @property
    def config(self) -> Any:
        """The text model's config."""
        return self.model.config.get_text_config(decoder=True)

    @property
    def max_tokens(self) -> int | None:
        """The longest sequence the model was made for; None where its config states no limit."""
        limit = getattr(self.config, "max_position_embeddings", None) or getattr(self.config, "n_positions", None)
        return int(limit) if limit else None

    @property
    def attention_layers(self) -> dict[int, AttentionLayer]:
        """Layer -> what can be read there. In hybrids, only the attention layers.

        Raises:
            UnsupportedModelError: the family's attention cannot be read.
        """
        layers = self._attention_layers
        if self.model.config.is_encoder_decoder:
            raise UnsupportedModelError(
                f"{self.name!r} has an encoder for its text, and a decoder whose attention does not see it: load a "
                "decoder-only model"
            )
        if layers is None:  # another thread may survey meanwhile; both find the same
            with self.locked(), torch.no_grad():
                ids = torch.zeros(1, 2, dtype=torch.long, device=self.device)
                layers = survey_attention(self.decoder, lambda: self.decoder(input_ids=ids, use_cache=False))
                self._attention_layers = layers
        return layers

    @cached_property
    def chat(self) -> ChatPieces:
        """What stands around a user's message: the published prompt for its families, else the chat template."""
        return published_pieces(self.config, self.tokenizer) or template_pieces(self.tokenizer)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the model: no other thread's pass runs meanwhile. See `interruptible` for giving up instead."""
        with held(self._lock):
            yield

    @property
    def held(self) -> bool:
        """Whether this thread holds the model."""
        owned: bool = self._lock._is_owned()
        return owned

    def check_heads(self, heads: Sequence[tuple[int, int]]) -> None:
        """Every head exists.

        Raises:
            HeadError: names the ones that don't, and the model's shape.
        """
        layers = self.attention_layers
        wrong = [(la, h) for la, h in heads if la not in layers or not 0 <= h < layers[la].num_heads]
        if wrong:
            shape = f"attention layers {_ranges(list(layers))} with {max(x.num_heads for x in layers.values())} heads"
            named = ", ".join(map(str, wrong[:5])) + (" ..." if len(wrong) > 5 else "")
            raise HeadError(
                f"{self.name!r} has no head {named}: it has {shape}, counted from 0; pass heads of this model as "
                "(layer, head)"
            )


def _ranges(numbers: list[int]) -> str:
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}..{numbers[-1]}"
    return ", ".join(map(str, numbers))
