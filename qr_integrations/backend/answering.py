"""Answers to conversations: what is done to the pictures first, then the generation, corrected or not, piece by piece.

The rooms meet here as arguments: what looks again at pictures is a `Cropper`, what corrects logits a `Corrector`.
"""

import contextvars
import copy
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any, Protocol, runtime_checkable

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from qr_integrations.backend.behind_prefix import (
    continued_behind,
    lay_out_behind,
    num_positions_behind,
    read_in_chunks,
)
from qr_integrations.backend.interruptions import interruptible
from qr_integrations.backend.listening import Finite, Listener
from qr_integrations.backend.memory import memory_advice
from qr_integrations.backend.picture_reading import ReadPictures, continued_inputs
from qr_integrations.backend.prefix import Prefix
from qr_integrations.backend.prompts import Prompt, as_messages, check_num_visual_tokens, lay_out
from qr_integrations.backend.random_numbers import drawing, seeded
from qr_integrations.backend.reader import Reader
from qr_integrations.backend.surgery import prefill_pruned
from qr_integrations.backend.visual_tokens import Pruner
from qr_integrations.errors import Cancelled, InputError
from qr_integrations.types import Answer, AnswerPiece, Message, Usage


@dataclass(frozen=True, slots=True)
class Cropped:
    """A conversation with further pictures in it.

    Attributes:
        messages: what is answered.
        record: what was done, for `Answer.steps`.
        read: the beginning of the conversation as it was read on the way, for the answer to stand on; None if nothing
            can be shared.
    """

    messages: tuple[Message, ...]
    record: Any
    read: ReadPictures | None = None


@runtime_checkable
class Cropper(Protocol):
    """What looks at a conversation's pictures before it is answered, and may add some."""

    def crop(self, backend: Any, messages: tuple[Message, ...]) -> Cropped:
        """Look, and say what to answer."""
        ...


@runtime_checkable
class Corrector(Protocol):
    """What changes logits while the model generates."""

    def on(self, backend: Any) -> AbstractContextManager[Any]:
        """Within the block, the backend's model is corrected; gives a record that grows meanwhile."""
        ...


@runtime_checkable
class VisualBudget(Protocol):
    """What decides how many tokens each picture of a conversation gets."""

    def choose(self, backend: Any, messages: tuple[Message, ...]) -> int:
        """The number."""
        ...


@dataclass(frozen=True, slots=True)
class Steps:
    """What is done besides generating, in the order in which it is done; None: nothing. See `Backend.answer`.

    Raises:
        InputError: something that cannot do its part.
    """

    crop: Cropper | None = None
    num_visual_tokens: int | VisualBudget | None = None
    prune: Pruner | None = None
    deco: Corrector | None = None
    prefix: Prefix | None = None

    def __post_init__(self) -> None:
        for name, kind, cure in _KINDS:
            step = getattr(self, name)
            if step is not None and (isinstance(step, type) or not isinstance(step, kind)):
                raise InputError(f"{name}={step!r} cannot be used: pass {cure}")
            if step is not None and self.prefix is not None and name not in ("deco", "prefix"):
                raise InputError(f"{name} reads pictures, and a prefix holds text: leave out {name} or prefix")


_KINDS = (
    ("crop", Cropper, "crop=ViCrop()"),
    ("num_visual_tokens", int | VisualBudget, "a number, or a budget such as TokenBudget(256)"),
    ("prune", Pruner, "prune=CDPruner(keep=64) or another pruner"),
    ("deco", Corrector, "deco=DeCo()"),
    ("prefix", Prefix, "what DocumentIndex.prefix or Backend.prefill gives"),
)


@dataclass(frozen=True, slots=True)
class Generation:
    """How an answer is generated, in the terms of ``generate``.

    Raises:
        InputError: a setting out of range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    num_beams: int = 1
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        counted = self.max_new_tokens >= 1 and self.num_beams >= 1
        if not (counted and 0 <= self.temperature < math.inf and 0 < self.repetition_penalty < math.inf):  # nor NaN
            raise InputError(
                f"max_new_tokens={self.max_new_tokens}, temperature={self.temperature}, num_beams={self.num_beams}, "
                f"repetition_penalty={self.repetition_penalty} cannot be: pass at least 1, 0, 1 and more than 0"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p={self.top_p} is no share: pass more than 0 and at most 1")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k={self.top_k} leaves no token: pass at least 1")
        if not all(isinstance(one, str) and one for one in self.stop):
            raise InputError(f"stop={self.stop} ends no answer, or every one: pass texts that are not empty")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise InputError(f"seed={self.seed} is out of range: pass 0 to 2**63 - 1")

    @property
    def is_sampled(self) -> bool:
        """Whether random numbers are drawn."""
        return self.temperature >= _COLD

    def config(self, backend: Reader, room: int | None) -> GenerationConfig:
        """For ``generate``: nothing of the checkpoint's own sampling settings, its special tokens kept."""
        config = copy.deepcopy(backend.model.generation_config or GenerationConfig())
        sampled = self.is_sampled
        config.update(
            max_new_tokens=self.max_new_tokens if room is None else max(1, min(self.max_new_tokens, room)),
            do_sample=sampled,
            temperature=float(self.temperature) if sampled else 1.0,  # `generate` refuses whole numbers
            top_p=1.0 if self.top_p is None or not sampled else self.top_p,
            top_k=(self.top_k or 0) if sampled else 50,
            num_beams=self.num_beams,
            repetition_penalty=float(self.repetition_penalty),
            **_ONE_SEQUENCE,
            **_NOTHING_ELSE,
            **(_ALL_TOKENS if sampled else {}),
        )
        config.eos_token_id = backend.tokenizer.eos_token_id if config.eos_token_id is None else config.eos_token_id
        if config.pad_token_id is None:
            config.pad_token_id = backend.tokenizer.pad_token_id
        if config.pad_token_id is None and _end_tokens(config):
            config.pad_token_id = _end_tokens(config)[0]
        return config


_COLD = 1e-5  # below that, logits over the temperature overflow; the most probable token is said anyway
_ONE_SEQUENCE = {"num_return_sequences": 1, "return_dict_in_generate": False}
_NOTHING_ELSE = {
    "cache_implementation": None,
    "stop_strings": None,
    "penalty_alpha": None,
    "dola_layers": None,
    "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None,
    "token_healing": False,
    "num_beam_groups": 1,
    "max_time": None,
}
"""What a checkpoint may ask for and what does not go with a cache, a listener or hooks of ours."""
_ALL_TOKENS = {"min_p": 0.0, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}
"""What a checkpoint's own settings would cut off stays; None would be filled in with those settings."""


def as_generation(settings: Mapping[str, Any]) -> Generation:
    """Settings by name.

    Raises:
        InputError: a name that there is not.
    """
    known = [one.name for one in fields(Generation)]
    if unknown := [name for name in settings if name not in known]:
        raise InputError(f"unknown setting {unknown[0]!r}: pass {', '.join(known)}")
    given = {name: value for name, value in settings.items() if value is not None}
    stop = given.get("stop", ())
    try:
        return Generation(**{**given, "stop": (stop,) if isinstance(stop, str) else tuple(stop)})
    except TypeError as error:
        raise InputError(f"{given} are no settings ({error}): pass numbers, and texts as stop") from error


def answer(
    backend: Reader,
    messages: str | Sequence[Message],
    steps: Steps,
    generation: Generation,
    emit: Callable[[str], None] | None = None,
) -> Answer:
    """See `Backend.answer`; `emit` takes each piece of text as it comes."""
    done: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    conversation = as_messages(messages)
    with drawing() if generation.is_sampled else nullcontext(), backend.locked():
        read = None
        if steps.crop is not None and any(message.pictures for message in conversation):
            started = time.perf_counter()
            cropped = steps.crop.crop(backend, conversation)
            conversation, done["crop"], read = cropped.messages, cropped.record, cropped.read
            del cropped
            seconds["crop"] = time.perf_counter() - started
        started = time.perf_counter()
        prompt = _lay_out(backend, conversation, steps, done)
        room = backend.max_tokens and backend.max_tokens - num_positions_behind(prompt, steps.prefix)
        config = generation.config(backend, room)
        begun = _begin(backend, prompt, steps, read, config.num_beams)  # before what corrects every pass
        read = None  # the answer has its own copy
        done |= begun.record
        listener = Listener(
            backend.tokenizer, len(begun.prompt), generation.stop, emit, shares_model=not begun.is_pruned
        )
        with begun.decoding, steps.deco.on(backend) if steps.deco is not None else nullcontext() as record:
            token_ids = _generate(backend, begun.prompt, begun.inputs, config, generation.seed, listener)
        seconds["generate"] = time.perf_counter() - started
        if listener.first_token_at is not None:
            seconds["first_token"] = listener.first_token_at - started
    if steps.deco is not None:
        done["deco"] = record
    text, stopped = listener.read(token_ids)
    listener.finish(text)
    ended = stopped or (len(token_ids) > 0 and int(token_ids[-1]) in _end_tokens(config))
    usage = Usage(len(begun.prompt), len(token_ids))
    return Answer(text, "stop" if ended else "length", usage, done, seconds)


def _lay_out(backend: Reader, conversation: tuple[Message, ...], steps: Steps, done: dict[str, Any]) -> Prompt:
    if steps.prefix is not None:
        return lay_out_behind(backend, conversation, steps.prefix)
    return lay_out(backend, conversation, _num_visual_tokens(backend, conversation, steps, done))


def _num_visual_tokens(
    backend: Reader, conversation: tuple[Message, ...], steps: Steps, done: dict[str, Any]
) -> int | None:
    """As many as were asked for, or as a budget chooses, which is noted; without pictures it is not asked."""
    asked = steps.num_visual_tokens
    if asked is None or isinstance(asked, int):
        return asked
    check_num_visual_tokens(backend, 1)
    if not any(message.pictures for message in conversation):
        return None
    done["num_visual_tokens"] = asked.choose(backend, conversation)
    return int(done["num_visual_tokens"])


@dataclass(frozen=True, slots=True)
class _Begun:
    """A prompt as the generation goes on from it; pruned layers hold tokens of their own, each others."""

    prompt: Prompt
    inputs: Mapping[str, Any]
    record: Mapping[str, Any]
    decoding: AbstractContextManager[None]

    is_pruned: bool = False


def _begin(backend: Reader, prompt: Prompt, steps: Steps, read: ReadPictures | None, num_beams: int) -> _Begun:
    """Read what is to be read before `generate`: with fewer tokens, or behind what was read before."""
    prune, prefix = steps.prune, steps.prefix
    with torch.no_grad(), memory_advice(len(prompt), backend.name):
        if prefix is not None:
            inputs = continued_behind(backend, prompt, prefix, num_beams)
            return _Begun(prompt, inputs, {"prefix": len(prefix) if prefix.cache is not None else 0}, nullcontext())
        if prune is None or not prompt.pictures:
            begun = read_in_chunks(backend, prompt)
            if begun is not None:
                return _Begun(prompt, continued_behind(backend, prompt, begun, num_beams), {}, nullcontext())
            inputs = continued_inputs(backend, prompt, read if num_beams == 1 else None)
            return _Begun(prompt, inputs, {}, nullcontext())
        prefilled = prefill_pruned(backend, prompt.inputs, prune, (prompt.messages[-1].text,))
    inputs = prefilled.continued(num_beams)
    shorter = Prompt(prompt.messages, inputs, tuple(prefilled.token_ids[0].tolist()))
    return _Begun(shorter, inputs, {"prune": prefilled.record}, prefilled.decoding(backend), is_pruned=True)


def _generate(
    backend: Reader,
    prompt: Prompt,
    inputs: Mapping[str, Any],
    config: GenerationConfig,
    seed: int | None,
    listener: Listener,
) -> torch.Tensor:
    """The new tokens, without the padding behind them."""
    generator = _generator(backend, prompt)
    own = generator.generation_config
    with torch.no_grad(), memory_advice(len(prompt), backend.name), seeded(seed, backend.device):
        try:
            generator.generation_config = config  # else what is None here is filled in with the checkpoint's own
            ids: Any = generator.generate(
                **inputs,
                generation_config=config,
                logits_processor=LogitsProcessorList([Finite()]),
                stopping_criteria=StoppingCriteriaList([listener]),
            )
        finally:
            generator.generation_config = own
    new = ids[0, len(prompt) :] if _echoes(ids, prompt) else ids[0]
    ends = torch.isin(new, torch.tensor(_end_tokens(config), dtype=new.dtype, device=new.device)).nonzero()
    return new[: int(ends[0]) + 1] if len(ends) else new


def _generator(backend: Reader, prompt: Prompt) -> Any:
    """The model; its language model where there are no pictures and it generates from pictures only (InstructBLIP)."""
    model: Any = backend.model
    alone = model.main_input_name == "pixel_values" and not prompt.pictures
    return getattr(model, "language_model", model) if alone else model


def _end_tokens(config: GenerationConfig) -> list[int]:
    given = config.eos_token_id
    return list(given) if isinstance(given, list | tuple) else [given] if given is not None else []


def _echoes(ids: torch.Tensor, prompt: Prompt) -> bool:
    """Whether what `generate` gave begins with the prompt; from embeddings alone it gives the new tokens only."""
    return tuple(ids[0, : len(prompt)].tolist()) == prompt.token_ids


def stream(
    backend: Reader,
    messages: str | Sequence[Message],
    steps: Steps,
    generation: Generation,
) -> Iterator[AnswerPiece]:
    """See `Backend.stream`: the generation runs in a thread of its own and ends when the caller stops listening."""
    if backend.held:
        raise InputError(
            "this thread holds the model, and a stream runs in a thread of its own: pass deco=... to stream, or stream "
            "outside the block"
        )
    pieces: queue.SimpleQueue[AnswerPiece | BaseException] = queue.SimpleQueue()
    closed = threading.Event()

    def check_listener() -> None:
        if closed.is_set():
            raise Cancelled("nobody listens any more")

    def work() -> None:
        try:
            with interruptible(check_listener):
                whole = answer(backend, messages, steps, generation, lambda delta: pieces.put(AnswerPiece(delta)))
            pieces.put(AnswerPiece("", whole))
        except BaseException as error:  # goes to the caller, who waits for it
            pieces.put(error)

    thread = threading.Thread(target=contextvars.copy_context().run, args=(work,), daemon=True)
    thread.start()
    try:
        while True:
            piece = pieces.get()
            if isinstance(piece, BaseException):
                raise piece
            yield piece
            if piece.answer is not None:
                return
    finally:
        closed.set()
        thread.join()
