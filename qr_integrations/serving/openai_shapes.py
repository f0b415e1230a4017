"""The JSON of OpenAI's chats, and what this server adds to it, which begins with ``qr_`` in answers."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, WithJsonSchema
from pydantic_core import PydanticCustomError

IGNORED = (
    "metadata",
    "parallel_tool_calls",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
)
"""OpenAI's parameters that say nothing about the answer."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "moderation": (),
    "n": (1,),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""OpenAI's parameters that nothing is done about, and the values, besides null, at which they ask for nothing."""


class _Sent(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False, frozen=True)


# ---- messages

# With a length to check, pydantic refuses what is no Unicode, such as half of a surrogate pair.
Text = Annotated[str, Field(min_length=0)]


class TextPart(_Sent):
    """A text in a message."""

    type: Literal["text"]
    text: Text


class PictureAddress(_Sent):
    """A ``data:`` URI with base64; or an http or https address, where the server fetches such.

    `detail` has no effect: the model sees every picture in the same way, `crop` looks more closely.
    """

    url: Annotated[str, Field(min_length=1, examples=["data:image/png;base64,iVBORw0KGgo="])]
    detail: Literal["auto", "low", "high", "original"] | None = None


class PicturePart(_Sent):
    """A picture in a message."""

    type: Literal["image_url"]
    image_url: PictureAddress


def _told_apart_by(key: str, tags: Mapping[str, str]) -> Discriminator:
    """One schema is chosen by a word, so that errors are about that one; the tags are no part of a place."""

    def tag(value: Any) -> str | None:
        word = value.get(key) if isinstance(value, Mapping) else getattr(value, key, None)
        return tags.get(word) if isinstance(word, str) else None

    words = ", ".join(map(repr, tags))
    return Discriminator(tag, custom_error_type=key, custom_error_message=f"its {key!r} should be one of {words}")


def _text_or_parts(value: Any) -> str | None:
    return "(text)" if isinstance(value, str) else "(parts)" if isinstance(value, list) else None


_TEXT_OR_PARTS = Discriminator(
    _text_or_parts, custom_error_type="content", custom_error_message="should be a text, or a list of parts"
)


_MOST = 2048  # messages; parts of one
_MOST_PARTS = Field(max_length=_MOST, fail_fast=True)
_Part = Annotated[
    Annotated[TextPart, Tag("(text)")] | Annotated[PicturePart, Tag("(picture)")],
    _told_apart_by("type", {"text": "(text)", "image_url": "(picture)"}),
]
_Content = Annotated[
    Annotated[Text, Tag("(text)")] | Annotated[list[_Part], _MOST_PARTS, Tag("(parts)")], _TEXT_OR_PARTS
]
_TextContent = Annotated[
    Annotated[Text, Tag("(text)")] | Annotated[list[TextPart], _MOST_PARTS, Tag("(parts)")], _TEXT_OR_PARTS
]


class SystemTurn(_Sent):
    """What the model is told first."""

    role: Literal["system", "developer"]
    content: _TextContent


class UserTurn(_Sent):
    """What the user says and shows."""

    role: Literal["user"]
    content: _Content


class AssistantTurn(_Sent):
    """What the model said; calls of tools are not read."""

    role: Literal["assistant"]
    content: _TextContent | None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: None = None
    audio: None = None


Turn = Annotated[
    Annotated[SystemTurn, Tag("(system)")]
    | Annotated[UserTurn, Tag("(user)")]
    | Annotated[AssistantTurn, Tag("(assistant)")],
    _told_apart_by(
        "role", {"user": "(user)", "assistant": "(assistant)", "system": "(system)", "developer": "(system)"}
    ),
]


def _few_parts(messages: Any) -> Any:
    """To check a million takes seconds, in which no other request is heard."""
    if isinstance(messages, list) and len(messages) <= _MOST:
        contents = [turn.get("content") for turn in messages if isinstance(turn, Mapping)]
        if sum(len(content) for content in contents if isinstance(content, list)) > 2 * _MOST:
            raise PydanticCustomError("parts", f"should have at most {2 * _MOST} parts together")
    return messages


_Turns = Annotated[list[Turn], Field(min_length=1, max_length=_MOST, fail_fast=True), BeforeValidator(_few_parts)]


# ---- the request


class StreamOptions(_Sent):
    """`include_usage`: one more chunk, without choices, tells the usage."""

    include_usage: bool | None = None


def _as_list(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


_Stop = Annotated[str, Field(min_length=1, max_length=256)]
_StopList = Annotated[list[_Stop], Field(max_length=4, fail_fast=True)]
_Stops = Annotated[_StopList, BeforeValidator(_as_list, json_schema_input_type=_Stop | _StopList)]


_SWITCH: dict[str, Any] = {"type": "boolean"}
_OFF: dict[str, Any] = {"const": False}
_COUNT: dict[str, Any] = {"type": "integer", "minimum": 1}
_AMOUNT: dict[str, Any] = {"type": "number", "exclusiveMinimum": 0}


def _step(what: str, *schemas: dict[str, Any]) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [*schemas, {"type": "object"}, {"type": "null"}], "description": what})


def _others(schema: dict[str, Any]) -> None:
    """Names the parameters that are checked by hand, and says that there are no more."""
    schema["properties"] |= {name: {"description": "Without effect."} for name in IGNORED}
    for name, values in NEUTRAL.items():
        schema["properties"][name] = {"enum": [None, *values], "description": "Nothing else is supported."}
    schema["additionalProperties"] = False


class ChatRequest(_Sent):
    """A conversation to be answered, and how.

    As with OpenAI, besides: `temperature` is 0 where it is left out, which says the most probable token; the seven last
    are this server's own. OpenAI's Python client passes them as ``extra_body={"crop": True}``.
    """

    model_config = ConfigDict(extra="allow", json_schema_extra=_others, protected_namespaces=())

    model: Annotated[str, Field(min_length=1, description="One of /v1/models that answers.")]
    messages: _Turns
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1, description="The longest answer, in tokens.")] = None
    temperature: Annotated[float | None, Field(ge=0.0, le=2.0, description="0 where it is left out.")] = None
    top_p: Annotated[float | None, Field(gt=0.0, le=1.0)] = None
    stop: _Stops | None = None
    seed: Annotated[int | None, Field(ge=0, le=2**62)] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    top_k: Annotated[int | None, Field(ge=1, le=2**31 - 1, description="Sample among so many tokens only.")] = None
    repetition_penalty: Annotated[
        float | None, Field(ge=0.1, le=10.0, description="Above 1 makes what was said less probable.")
    ] = None
    crop: Annotated[Any, _step("Look again at what matters in a picture: true, or settings of ViCrop.", _SWITCH)] = None
    num_visual_tokens: Annotated[
        Any, _step("Tokens of each picture, for matryoshka models; or a budget's settings.", _SWITCH, _COUNT)
    ] = None
    prune: Annotated[
        Any, _step("Tokens of pictures that stay: 64, or 0.25 of all; or a pruner's settings.", _OFF, _AMOUNT)
    ] = None
    deco: Annotated[Any, _step("Let earlier layers correct the answer: true, or settings of DeCo.", _SWITCH)] = None
    heat_map: Annotated[bool | None, Field(description="Send along where `crop` looked in each picture.")] = None

    @property
    def longest(self) -> int | None:
        """Tokens of the answer, by its newer name if both are given; None: not said."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def not_done(self) -> str | None:
        """The first parameter that asks for what is not done here, and what to do about it; None: there is none."""
        for name, value in (self.model_extra or {}).items():
            if name not in NEUTRAL and name not in IGNORED:
                return f"{name[:60]!r} is no parameter of chats: leave it out, or correct it by /openapi.json"
            if name in NEUTRAL and value is not None and not any(_is_same(value, one) for one in NEUTRAL[name]):
                neutral = " or ".join(json.dumps(one) for one in NEUTRAL[name]) or "null"
                return f"{name!r} is not supported here other than as {neutral}: leave it out"
        return None


def _is_same(value: Any, other: Any) -> bool:
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)


# ---- the answer

Finish = Literal["stop", "length"]


class _Answered(BaseModel):
    model_config = ConfigDict(protected_namespaces=())


class TokenUsage(_Answered):
    """Tokens read, tokens written, and both; a picture counts as many as the model reads of it."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class PictureMap(_Answered):
    """Where the model looked in a picture: see `HeatMap`."""

    values: tuple[tuple[float, ...], ...]
    covers: tuple[float, float, float, float]
    image_size: tuple[int, int]


class _Told(_Answered):
    """What is known about an answer: see `ChatSettings.answer_metadata`. As the first base, it comes last in JSON."""

    qr_method: str = "plain"
    qr_params: dict[str, Any] = Field(default_factory=dict)
    qr_steps: dict[str, Any] = Field(default_factory=dict)
    qr_seconds: dict[str, float] = Field(default_factory=dict)
    qr_heat_maps: list[PictureMap] = Field(default_factory=list)


class AnswerMessage(_Answered):
    """What the model says."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(_Answered):
    """The one answer."""

    index: Literal[0] = 0
    message: AnswerMessage
    logprobs: None = None
    finish_reason: Finish


class _Completion(_Answered):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: TokenUsage


class ChatCompletion(_Told, _Completion):
    """An answer. What begins with ``qr_`` is this server's own; `qr_heat_maps` is there if it was asked for."""


class Delta(_Answered):
    """What is new."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(_Answered):
    """A piece of the one answer."""

    index: Literal[0] = 0
    delta: Delta
    logprobs: None = None
    finish_reason: Finish | None = None


class _Chunk(_Answered):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: TokenUsage | None = None


class ChatChunk(_Told, _Chunk):
    """A piece of an answer; the one with the reason why it ended has what begins with ``qr_``."""


class WhatIsWrong(_Answered):
    """`code` is for programs."""

    message: str
    type: str
    param: None = None
    code: str


class ChatError(_Answered):
    """An error as OpenAI's clients read it."""

    error: WhatIsWrong
