"""What every adapter for chats with pictures has in common: its settings, its conversations, its metadata keys.

It stands between the rooms and the roof: `langchain` and `llama_index` add their frameworks' manners, nothing else.
Importing it loads pydantic, which both frameworks bring; the model's libraries are loaded on first use.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from PIL import Image
from pydantic import AliasChoices, ConfigDict, Field, field_serializer, field_validator

from qr_integrations.chat_steps import CHAT_STEPS, Strategy, as_json, as_step
from qr_integrations.errors import InputError
from qr_integrations.model_settings import LOADING
from qr_integrations.picture_settings import PictureSettings
from qr_integrations.types import Answer, AnswerPiece, Message

MODEL_NAME, FINISH_REASON = "model_name", "finish_reason"
METHOD, PARAMS, STEPS, SECONDS = "qr_method", "qr_params", "qr_steps", "qr_seconds"

_GENERATION = (
    "max_new_tokens",
    "temperature",
    "top_p",
    "top_k",
    "repetition_penalty",
    "num_beams",
    "stop",
    "seed",
)
_OPTIONAL = ("top_p", "top_k", "seed")
_ALIASES = {"max_tokens": "max_new_tokens", "stop_sequences": "stop"}


class ChatSettings(PictureSettings):
    """A model that sees pictures, and how it answers. The same names in both frameworks.

    Attributes:
        model, backend, device, dtype, device_map, revision, quantization, attn_implementation, local_files_only,
            trust_remote_code, model_kwargs: see `ModelSettings`.
        crop: look again at the part of a picture that matters: True, False, a `ViCrop`, or a mapping of its settings.
        num_visual_tokens: how many tokens each picture gets, for matryoshka models: a number, a budget that chooses, or
            a mapping such as ``{"budget": "TokenBudget", "total": 256}``. True lets the model's confidence choose.
        prune: drop tokens of the pictures: a pruner such as `CDPruner`, or a mapping such as
            ``{"pruner": "SparseVLM", "keep": 64}``, or what `CDPruner` keeps alone: 64, or 0.25 of all.
        deco: let earlier layers correct what is said: True, False, a `DeCo`, or a mapping of its settings.
        max_new_tokens: the longest answer, in tokens. Also as `max_tokens`.
        temperature: 0 always says the most probable token.
        top_p, top_k: sample among the most probable tokens only; without effect at temperature 0.
        repetition_penalty: above 1 makes what was said less probable.
        num_beams: how many answers are followed at once.
        stop: texts that end an answer and do not belong to it. Also as `stop_sequences`.
        seed: of sampling; None takes torch's random numbers as they come.
        system_prompt: what the model is told first, in conversations that have no system message of their own.
        allow_urls, allow_local_files, max_picture_bytes, max_picture_pixels, picture_timeout: which pictures are
            opened, see `PictureSettings`.
    """

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)

    model: str | None = Field(default=None, validation_alias=AliasChoices("model", "model_name"))
    crop: Any = False
    num_visual_tokens: Any = False
    prune: Any = False
    deco: Any = False
    max_new_tokens: int = Field(default=256, ge=1, validation_alias=AliasChoices("max_new_tokens", "max_tokens"))
    temperature: float = Field(default=0.0, ge=0.0)
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    top_k: int | None = Field(default=None, ge=1)
    repetition_penalty: float = Field(default=1.0, gt=0.0)
    num_beams: int = Field(default=1, ge=1)
    stop: tuple[str, ...] = Field(default=(), validation_alias=AliasChoices("stop", "stop_sequences"))
    seed: int | None = None
    system_prompt: str | None = None

    @field_validator(*CHAT_STEPS)
    @classmethod
    def _steps_are_known(cls, given: Any, info: Any) -> Any:
        return as_step(info.field_name, given)

    @field_serializer(*CHAT_STEPS)
    def _steps_as_json(self, step: Any, info: Any) -> Any:
        return step if isinstance(step, bool) else as_json(info.field_name, step)

    @field_validator("stop", mode="before")
    @classmethod
    def _stops(cls, stop: Any) -> Any:
        return _as_stops(stop)

    @field_validator("max_new_tokens", "temperature", "repetition_penalty", "num_beams", mode="before")
    @classmethod
    def _unset_is_default(cls, given: Any, info: Any) -> Any:
        """Frameworks pass None for what was not set."""
        return cls.model_fields[info.field_name].default if given is None else given

    @property
    def model_name(self) -> str:
        """The model's name."""
        assert self.model is not None
        return self.model

    @property
    def max_tokens(self) -> int:
        """Another name of `max_new_tokens`."""
        return self.max_new_tokens

    @property
    def stop_sequences(self) -> tuple[str, ...]:
        """Another name of `stop`."""
        return self.stop

    def strategy(self, call: Mapping[str, Any] | None = None) -> Strategy:
        """What is done besides generating; `call` may hold ``crop``, ``prune`` and so on for one call."""
        own = {name: getattr(self, name) for name in CHAT_STEPS}
        given = own | {name: value for name, value in (call or {}).items() if name in CHAT_STEPS and value is not None}
        chosen = {name: as_step(name, value) for name, value in given.items()}
        made = {name: CHAT_STEPS[name].kind()() if step is True else step for name, step in chosen.items()}
        return Strategy({name: step for name, step in made.items() if step is not False})

    def generation(self, call: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The arguments of `Backend.answer` for generating: the settings, and what `call` has in their place.

        Stop sequences of the call come to those of the settings; None leaves a setting that cannot be None as it is.

        Raises:
            InputError: `call` has a name that there is not.
        """
        given = {_ALIASES.get(name, name): value for name, value in (call or {}).items()}
        given = {name: value for name, value in given.items() if value is not None or name in _OPTIONAL}
        if unknown := [name for name in given if name not in _GENERATION and name not in CHAT_STEPS]:
            known = ", ".join([*_GENERATION, *_ALIASES, *CHAT_STEPS])
            raise InputError(f"an answer has no setting {unknown[0]!r}: leave it out, or pass one of {known}")
        merged = {name: given.get(name, getattr(self, name)) for name in _GENERATION}
        return {**merged, "stop": tuple(dict.fromkeys([*self.stop, *_as_stops(given.get("stop"))]))}

    def conversation(self, messages: Sequence[Message]) -> list[Message]:
        """As chat templates want it: the system prompt first, turns of one speaker made one, empty ones left out.

        Raises:
            InputError: nothing was said.
        """
        told = self.system_prompt and not any(message.role == "system" for message in messages)
        given = [Message.system(self.system_prompt or ""), *messages] if told else list(messages)
        turns: list[Message] = []
        for message in given:
            if turns and turns[-1].role == message.role:
                message = Message(message.role, (*turns.pop().content, *message.content))
            content = _joined(message.content)
            turns += [Message(message.role, content)] if content else []
        if not any(turn.role != "system" for turn in turns):
            raise InputError("nothing was said: pass at least one message with text or a picture")
        return turns

    def give_answer(self, messages: Sequence[Message], call: Mapping[str, Any] | None = None) -> Answer:
        """Answer a conversation.

        Args:
            messages: as they were said.
            call: settings for this call alone: those for generating, and ``crop``, ``prune`` and so on.

        Raises:
            InputError: nothing to answer, or a setting that there is not.
            ModelError: the model cannot be loaded or run.
        """
        turns, generation = self.conversation(messages), self.generation(call)
        return self.open().answer(turns, **self.strategy(call).steps, **generation)

    def stream_answer(
        self, messages: Sequence[Message], call: Mapping[str, Any] | None = None
    ) -> Iterator[AnswerPiece]:
        """As `give_answer`, piece by piece; the last piece carries the whole answer."""
        turns, generation = self.conversation(messages), self.generation(call)
        return self.open().stream(turns, **self.strategy(call).steps, **generation)

    def answer_metadata(self, answer: Answer, call: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What is known about an answer besides its text and usage; JSON can hold it.

        ``model_name``; ``finish_reason``, see `Answer`; ``qr_method``, see `Strategy`; ``qr_params``, the settings of
        each step; ``qr_steps``, what each step did: for ``crop`` a list of ``box`` (left, top, right, bottom in the
        picture's pixels, None if no crop was worth it), ``sharpness``, ``lift`` and ``reason`` of each picture looked
        at, for ``num_visual_tokens`` how many a budget chose, for ``prune`` which cells stayed, for ``deco``
        ``num_steps``, ``share_changed`` and ``anchors`` (layer -> how often); ``qr_seconds``.
        """
        strategy = self.strategy(call)
        return {
            MODEL_NAME: self.model_name,
            FINISH_REASON: answer.finish_reason,
            METHOD: strategy.method,
            PARAMS: strategy.params,
            STEPS: {name: CHAT_STEPS[name].recorded(record) for name, record in answer.steps.items()},
            SECONDS: dict(answer.seconds),
        }

    def identity(self) -> dict[str, Any]:
        """Everything that an answer depends on, as JSON can hold it: two chats of the same identity answer alike."""
        loading = {name: getattr(self, name) for name in LOADING}
        own = self.backend is not None and self.backend.load_arguments is None
        return {
            MODEL_NAME: self.model_name,
            **{name: value if isinstance(value, bool | str | None) else repr(value) for name, value in loading.items()},
            **({"backend": id(self.backend)} if own else {}),  # of models made by hand the name says little
            METHOD: self.strategy().method,
            PARAMS: self.strategy().params,
            **{name: value for name, value in self.generation().items() if name != "stop"},
            "stop_sequences": list(self.stop),  # LangChain writes those of the call over "stop"
            "system_prompt": self.system_prompt,
        }

    def text_token_ids(self, text: str) -> list[int]:
        """The token ids of a text alone."""
        ids: list[int] = self.open().tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def num_tokens(self, messages: Sequence[Message]) -> int:
        """Tokens of a conversation as the model reads it, pictures included, crops not.

        A number in `num_visual_tokens` counts; what a budget would choose, or `prune` drop, is known with the answer.
        What cannot be answered as it stands, because it is too long or begins with an answer, is counted message by
        message, each in a frame of its own.
        """
        if not any(message.content for message in messages):
            return 0
        try:
            return self._num_laid_out(self.conversation(messages))
        except InputError:
            frame = self._num_laid_out([Message.user("a")]) - len(self.text_token_ids("a"))
            return sum(frame + sum(self._num_part_tokens(part, frame) for part in m.content) for m in messages)

    def _num_part_tokens(self, part: str | Image.Image, frame: int) -> int:
        if isinstance(part, str):
            return len(self.text_token_ids(part))
        return self._num_laid_out([Message.user(part)]) - frame

    def _num_laid_out(self, turns: Sequence[Message]) -> int:
        asked = self.strategy().steps.get("num_visual_tokens")
        return len(self.open().lay_out(turns, num_visual_tokens=asked if isinstance(asked, int) else None))


def _as_stops(stop: Any) -> tuple[Any, ...]:
    return (stop,) if isinstance(stop, str) else tuple(stop or ())


def _joined(content: Sequence[str | Image.Image]) -> tuple[str | Image.Image, ...]:
    """Texts that follow each other become one, a line each; empty ones are left out."""
    parts: list[str | Image.Image] = []
    for part in content:
        if isinstance(part, str) and parts and isinstance(parts[-1], str):
            parts[-1] = f"{parts[-1]}\n{part}" if part else parts[-1]
        elif part != "":
            parts.append(part)
    return tuple(parts)
