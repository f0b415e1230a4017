"""`Backend`: one loaded model, opened up. Everything else in the package stands on it."""

import logging
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import ProcessorMixin

from qr_integrations.backend.answering import (
    Corrector,
    Cropper,
    Steps,
    VisualBudget,
    answer,
    as_generation,
    stream,
)
from qr_integrations.backend.loading import load_model, load_processor, resolve_device, resolve_dtype, resolve_name
from qr_integrations.backend.memory import free_memory
from qr_integrations.backend.prefix import Prefix
from qr_integrations.backend.prompts import Prompt, as_messages, lay_out
from qr_integrations.backend.reader import Reader
from qr_integrations.backend.visual_tokens import Pruner
from qr_integrations.errors import InputError
from qr_integrations.types import Answer, AnswerPiece, Message

_log = logging.getLogger(__name__)
_registry: dict[tuple[Any, ...], "Backend"] = {}
_registry_lock = threading.Lock()
_loading: dict[tuple[Any, ...], threading.Lock] = {}


class Backend(Reader):
    """A Hugging Face model on its device, with its insides within reach.

    Make one with `Backend.load` or, around a model that you loaded yourself, with ``Backend(model, tokenizer)``; for
    pictures ``Backend(model, tokenizer, processor=processor)``. Every pass through the model holds one lock, so any
    number of threads may share a backend.
    """

    _key: tuple[Any, ...] | None = None
    _source: tuple[str, dict[str, Any]] | None = None  # where `load` found the model
    load_arguments: dict[str, Any] | None = None  # what `load` was called with; None around your own model

    @classmethod
    def load(
        cls,
        name_or_path: str | Path,
        *,
        device: str = "auto",
        dtype: str | torch.dtype = "auto",
        revision: str | None = None,
        quantization: Any = None,
        device_map: Any = None,
        attn_implementation: str | None = None,
        local_files_only: bool = False,
        trust_remote_code: bool = False,
        model_kwargs: dict[str, Any] | None = None,
    ) -> "Backend":
        """Load a model, or hand out the one already loaded with the same arguments.

        Args:
            name_or_path: a bundled name (``"qr-mini"``), a local folder, or a hub id.
            device: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``. Ignored with `device_map`.
            dtype: ``"auto"`` is float32 on the CPU and the checkpoint's own elsewhere.
            revision: branch, tag or commit on the hub.
            quantization: ``"8bit"``, ``"4bit"`` (bitsandbytes) or a transformers quantization config.
            device_map: as in transformers, ``"auto"`` spreads layers over all GPUs; needs the extra ``accelerate``.
            attn_implementation: ``"sdpa"``, ``"flash_attention_2"``, ``"eager"``; None takes the model's default.
            local_files_only: never ask the hub.
            trust_remote_code: run code that the checkpoint brings along.
            model_kwargs: further arguments of ``from_pretrained``.

        Raises:
            LoadError: wrong id, missing file, no space left, no such device.
            MissingExtra: `device_map` or `quantization` without its dependency.
        """
        given = {name: value for name, value in locals().items() if name != "cls"}
        given |= {"name_or_path": str(name_or_path), "dtype": str(dtype).removeprefix("torch.")}
        device, name = resolve_device(device), resolve_name(name_or_path)
        hub_kwargs = {
            "revision": revision,
            "local_files_only": local_files_only,
            "trust_remote_code": trust_remote_code,
        }
        all_kwargs = {"dtype": resolve_dtype(dtype, device), **(model_kwargs or {})}
        if attn_implementation is not None:
            all_kwargs["attn_implementation"] = attn_implementation
        key = (name, device, repr(device_map), repr(quantization), repr(hub_kwargs), repr(sorted(all_kwargs.items())))
        with _registry_lock:
            lock = _loading.setdefault(key, threading.Lock())
        with lock:  # two threads that ask for the same model load it once; other models load meanwhile
            backend = _registry.get(key)
            if backend is None:
                model, tokenizer = load_model(
                    name,
                    device=device,
                    device_map=device_map,
                    quantization=quantization,
                    hub_kwargs=hub_kwargs,
                    model_kwargs=all_kwargs,
                )
                backend = _registry[key] = cls(model, tokenizer, name=str(name_or_path))
                backend._key, backend.load_arguments = key, given
                backend._source = (name, hub_kwargs)
                _log.info("loaded %r", backend)
            return backend

    def close(self) -> None:
        """Let go of the weights once the pass that is running has ended; closing twice is fine.

        Threads that come later get a `ClosedError`. The next `load` with the same arguments loads afresh.
        """
        with self._lock:
            self._model, self._attention_layers = None, None
            self._continuations.clear()
        with _registry_lock:
            if self._key is not None and _registry.get(self._key) is self:
                del _registry[self._key]
        free_memory()

    def answer(
        self,
        messages: str | Sequence[Message],
        *,
        crop: Cropper | None = None,
        num_visual_tokens: int | VisualBudget | None = None,
        prune: Pruner | None = None,
        deco: Corrector | None = None,
        prefix: Prefix | None = None,
        **generation: Any,
    ) -> Answer:
        """Answer a question, or a conversation with any number of pictures; greedy unless a temperature is given.

        Args:
            messages: a question, or messages in the order in which they were said; `Message.user("What?", picture)`.
            crop: looks again at the pictures first: `qr_integrations.cropping.ViCrop`.
            num_visual_tokens: of each picture, for matryoshka models; or a budget that chooses, such as
                `qr_integrations.encoding.TokenBudget`.
            prune: drops tokens of the pictures: `qr_integrations.pruning.CDPruner`, `SparseVLM`.
            deco: corrects what is said: `qr_integrations.decoding.DeCo`.
            prefix: what was read before, through all layers: the beginning of the user's turn, which `messages`, one
                text, go on with. Only what follows it is read; `steps["prefix"]` counts the tokens that were not. See
                `DocumentIndex.prefix`.
            generation: `max_new_tokens` (256), `temperature` (0), `top_p`, `top_k`, `num_beams` (1),
                `repetition_penalty` (1), `stop` (texts that end the answer), `seed`; see `Generation`.

        Raises:
            InputError: nothing to answer, pictures for a model that reads text only, a broken picture, a setting, a
                prefix that lacks layers or is another model's.
            WindowError: the conversation is longer than the model's window.
        """
        return answer(self, messages, Steps(crop, num_visual_tokens, prune, deco, prefix), as_generation(generation))

    def stream(
        self,
        messages: str | Sequence[Message],
        *,
        crop: Cropper | None = None,
        num_visual_tokens: int | VisualBudget | None = None,
        prune: Pruner | None = None,
        deco: Corrector | None = None,
        prefix: Prefix | None = None,
        **generation: Any,
    ) -> Iterator[AnswerPiece]:
        """As `answer`, piece by piece; the last piece carries the whole. Who stops listening stops the generation."""
        return stream(self, messages, Steps(crop, num_visual_tokens, prune, deco, prefix), as_generation(generation))

    def lay_out(self, messages: str | Sequence[Message], *, num_visual_tokens: int | None = None) -> Prompt:
        """The conversation as the model reads it, up to where the answer begins."""
        return lay_out(self, as_messages(messages), num_visual_tokens)

    def _load_processor(self) -> ProcessorMixin:
        return load_processor(*self._source) if self._source is not None else super()._load_processor()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Backend":
        """The same object: weights are not copied."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as the call that loads it, without the weights."""
        if self.load_arguments is None:
            raise InputError(
                f"{self.name!r} stands around a model object and cannot be pickled: make it with Backend.load(folder)"
            )
        return _load_again, (self.load_arguments,)


def _load_again(arguments: dict[str, Any]) -> Backend:
    return Backend.load(**arguments)
