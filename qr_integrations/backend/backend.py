"""`Backend`: one loaded model, opened up. Everything else in the package stands on it."""

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from qr_integrations.backend.attention_tap import AttentionLayer, AttentionTap, run_tapped, survey_attention
from qr_integrations.backend.blocks import read_blocks
from qr_integrations.backend.continuation import try_continuations
from qr_integrations.backend.families import ChatPieces, published_pieces, template_pieces
from qr_integrations.backend.loading import load_model, resolve_device, resolve_dtype, resolve_name
from qr_integrations.backend.memory import free_memory, memory_advice
from qr_integrations.backend.prefix import Continuation, Prefix, new_cache, read_prefix, sliding_window
from qr_integrations.errors import ClosedError, HeadError, InputError, LoadError
from qr_integrations.types import Span

_log = logging.getLogger(__name__)
_CPU_CHUNK = 1024  # a mask costs a CPU kernel little, and activations of 1,024 tokens make room for the kept keys
_AUTO_CHUNK = 2048  # tokens at a time where a kernel needs a mask of chunk x T or softmaxes in plain torch
_registry: dict[tuple[Any, ...], "Backend"] = {}
_registry_lock = threading.Lock()
_loading: dict[tuple[Any, ...], threading.Lock] = {}


class Backend:
    """A Hugging Face decoder on its device, with its attention within reach.

    Make one with `Backend.load` or, around a model that you loaded yourself, with ``Backend(model, tokenizer)``.
    Every pass through the model holds one lock, so any number of threads may share a backend.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str | None = None) -> None:
        self.name = name or model.config._name_or_path or type(model).__name__
        self._model: PreTrainedModel | None = model
        self.tokenizer = tokenizer
        self._lock = threading.RLock()
        self._attention_layers: dict[int, AttentionLayer] | None = None
        self._continuations: dict[int, Continuation] = {}
        self._key: tuple[Any, ...] | None = None
        self.load_arguments: dict[str, Any] | None = None  # what `load` was called with; None around your own model

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

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._model is None

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
        """Hold the model: no other thread's pass runs meanwhile."""
        with self._lock:
            yield

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

    def forward(
        self,
        token_ids: Sequence[int] | Tensor,
        *,
        tap: AttentionTap,
        prefix: Prefix | None = None,
        attention_mask: Tensor | None = None,
    ) -> Float[Tensor, "B K *Q T"]:
        """Run the layers up to the tap's deepest one and return the attention rows.

        Args:
            token_ids: the tokens after `prefix`, ``[S]`` or ``[B, S]``.
            tap: which heads and rows. Rows count from the start of the sequence, prefix included.
            prefix: what was read before; it stays as it is. Must reach as deep as the tap.
            attention_mask: ``[B, S]``, 0 for left padding; only without a prefix.

        Returns:
            fp32, over all T = len(prefix) + S keys.
        """
        self.check_heads(tap.heads)
        ids = self._batched(token_ids)
        past = len(prefix) if prefix else 0
        if tap.rows.start < past or tap.rows.stop > past + ids.shape[1]:
            raise InputError(f"rows {tap.rows} are not within this pass, tokens {past} to {past + ids.shape[1]}")
        if prefix is not None and (prefix.top_layer < tap.top_layer or attention_mask is not None):
            raise InputError(
                f"the prefix holds layers 0..{prefix.top_layer}, the tap reads layer {tap.top_layer}: prefill with "
                "top_layer=tap.top_layer, and without attention_mask"
            )
        if prefix is not None and len(ids) > 1 and not prefix.can_crop:
            raise InputError("recurrent layers and blocks go on with one text at a time: pass one row of token_ids")
        if prefix is not None and prefix.cache is None:
            again = torch.tensor(prefix.token_ids, device=ids.device).expand(ids.shape[0], past)
            ids, past = torch.cat([again, ids], dim=1), 0
        cache, skipped = (prefix.branch(), past - prefix.num_positions) if prefix and past else (None, 0)
        with torch.set_grad_enabled(tap.differentiable and torch.is_grad_enabled()):
            rows = self._run(ids, cache, past, attention_mask, tap=tap, stop_after=tap.top_layer, skipped=skipped)
        assert rows is not None
        return rows

    @torch.no_grad()
    def prefill(
        self,
        token_ids: Sequence[int],
        *,
        top_layer: int,
        reuse: Prefix | None = None,
        chunk_tokens: int | Literal["auto"] | None = "auto",
    ) -> Prefix:
        """Read a text once, layers 0..top_layer, for many passes to stand on. The top layer computes its keys only.

        Args:
            token_ids: the text, ``[T]``.
            top_layer: the deepest layer that will be tapped.
            reuse: an earlier prefix; its common beginning is not computed again.
            chunk_tokens: tokens per pass; ``"auto"`` is 1024 on a CPU, and elsewhere all at once where the kernel then
                needs no mask, else 2048; None reads all at once.
        """
        self.check_heads([(top_layer, 0)])
        token_ids = tuple(token_ids)
        reuse = reuse.beginning_of(token_ids) if reuse is not None and reuse.top_layer == top_layer else None
        if reuse is not None and len(reuse) == len(token_ids):
            return reuse
        cache = reuse.growing() if reuse else new_cache(self.config, top_layer, self._continuation(top_layer))
        if cache is None:
            return Prefix(token_ids, top_layer, None)
        done = len(reuse) if reuse else 0
        step = (self._auto_chunk() if chunk_tokens == "auto" else chunk_tokens) or max(1, len(token_ids))
        for start in range(done, len(token_ids), step):
            ids = self._batched(token_ids[start : start + step])
            self._run(ids, cache, start, None, tap=None, stop_after=top_layer)
        return Prefix(token_ids, top_layer, cache)

    @torch.no_grad()
    def prefill_blocks(self, token_ids: Sequence[int], blocks: Sequence[Span], *, top_layer: int) -> Prefix:
        """Read a beginning and, behind it, blocks that do not see each other; all start at the same position.

        What is read afterwards sees the beginning and all blocks, whose order makes no difference to it.

        Args:
            token_ids: beginning and blocks, ``[T]``.
            blocks: one after the other, from the end of the beginning to the end of `token_ids`; at least one.
            top_layer: the deepest layer that will be tapped.

        Raises:
            UnsupportedModelError: the model's layers are recurrent, or see fewer tokens back than there are.
        """
        token_ids = tuple(token_ids)
        beginning = self.prefill(token_ids[: blocks[0].start], top_layer=top_layer)
        return read_blocks(self._run, beginning, token_ids, blocks, self.config)

    def load_prefix(self, path: str | Path) -> Prefix:
        """Read what `Prefix.save` wrote, and try on a few tokens that it is this model's.

        Raises:
            LoadError: no such file, not a prefix, or another model's.
        """
        try:
            prefix = read_prefix(path, self.config, self.device)
            sample = self.prefill(prefix.token_ids[:8], top_layer=prefix.top_layer)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise LoadError(
                f"no prefix of {self.name!r} in {str(path)!r} ({error}): prefill and save it again"
            ) from error
        if not prefix.is_of(sample):
            raise LoadError(f"{str(path)!r} holds another model's prefix: load it with that model, or prefill it again")
        return prefix

    def _continuation(self, top_layer: int) -> Continuation:
        """What a prefix that is read up to `top_layer` must keep, found out once per layer."""
        with self.locked():
            if top_layer not in self._continuations:
                heads = tuple((top_layer, head) for head in range(self.attention_layers[top_layer].num_heads))
                found = try_continuations(self._run, self.config, heads, device=self.device, dtype=self.model.dtype)
                if found == "tokens":
                    _log.warning("%s cannot continue from a cache: each pass reads its prefix again", self.name)
                self._continuations[top_layer] = found
            return self._continuations[top_layer]

    def _auto_chunk(self) -> int | None:
        kernel = self.attention_layers[min(self.attention_layers)].kernel
        if self.device.type == "cpu":
            return _CPU_CHUNK
        slides = sliding_window(self.config) is not None
        return _AUTO_CHUNK if kernel == "eager" or (kernel == "sdpa" and slides) else None

    def _batched(self, token_ids: Sequence[int] | Tensor) -> Tensor:
        ids = torch.as_tensor(token_ids, dtype=torch.long, device=self.device)
        return ids[None] if ids.dim() == 1 else ids

    def _run(
        self,
        ids: Tensor,
        cache: DynamicCache | None,
        past: int,
        mask: Tensor | None,
        *,
        tap: AttentionTap | None,
        stop_after: int,
        skipped: int = 0,
    ) -> Tensor | None:
        """One pass of the decoder under the lock, to `stop_after`; `skipped` of `past` tokens share positions."""
        if mask is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None].expand(ids.shape) + (past - skipped)
        else:
            positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        kwargs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        with self.locked(), memory_advice(ids.shape[1], self.name):
            layers, decoder = self.attention_layers, self.decoder
            modules = [layers[i].module for i in layers if i <= stop_after]

            def run() -> None:
                decoder(**kwargs, past_key_values=cache, use_cache=cache is not None)

            return run_tapped(run, modules, tap=tap, stop_after=stop_after, past=past)


def _load_again(arguments: dict[str, Any]) -> Backend:
    return Backend.load(**arguments)


def _ranges(numbers: list[int]) -> str:
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}..{numbers[-1]}"
    return ", ".join(map(str, numbers))
