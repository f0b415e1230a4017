"""Chat models for LangChain that look again at pictures (ViCrop) and speak carefully (DeCo), on a local model."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.prompt_values import ChatPromptValue, PromptValue
from pydantic import ConfigDict, model_validator

from qr_integrations.chatting import ChatSettings
from qr_integrations.langchain.messages import as_messages, with_embedded_pictures
from qr_integrations.types import Answer, Message, Usage

_log = logging.getLogger(__name__)
_OF_SERVICES = {"api_key", "base_url", "max_retries", "timeout"}  # LangChain's common ones, without meaning here
_FOR_LANGCHAIN = {"stream"}  # arguments of a call that say how to answer, not what


class _ChatPictures(ChatSettings, BaseChatModel):
    """What both chat models have in common: a local model behind LangChain's interface."""

    model_config = ConfigDict(extra="ignore")  # applications pass the settings of whatever model they know

    streaming: bool = False

    @model_validator(mode="before")
    @classmethod
    def _tell_what_is_ignored(cls, given: Any) -> Any:
        known = set(cls.model_fields) | {"model_name", "max_tokens", "stop_sequences"} | _OF_SERVICES
        for name in given if isinstance(given, dict) else ():
            if name not in known and not name.startswith("_"):
                _log.warning("%s has no setting %r: it is ignored", cls.__name__, name)
        return given

    @property
    def _identifying_params(self) -> dict[str, Any]:
        """Everything that an answer depends on: caches tell models apart by it."""
        return self.identity()

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> Any:
        params = super()._get_ls_params(stop=stop, **kwargs)
        params["ls_provider"] = "qr_integrations"
        given = [kwargs[name] for name in ("max_tokens", "max_new_tokens") if isinstance(kwargs.get(name), int)]
        params["ls_max_tokens"] = next(iter(given), self.max_new_tokens)
        if stops := [*self.stop, *(one for one in stop or () if one not in self.stop)]:
            params["ls_stop"] = stops
        return params

    def _resolve_model_profile(self) -> Any:
        limit = self.backend.max_tokens if self.backend is not None else None
        return {
            **({"max_input_tokens": limit} if limit else {}),
            "max_output_tokens": self.max_new_tokens,
            "text_inputs": True,
            "image_inputs": self.backend is None or self.backend.sees_pictures,
            "image_url_inputs": self.allow_urls,
            "image_tool_message": True,
            "text_outputs": True,
            "tool_calling": False,
            "structured_output": False,
        }

    def get_token_ids(self, text: str) -> list[int]:
        """The model's own tokens of a text."""
        if self.custom_get_token_ids is not None:
            own: list[int] = self.custom_get_token_ids(text)
            return own
        return self.text_token_ids(text)

    def get_num_tokens_from_messages(self, messages: Sequence[BaseMessage], tools: Sequence[Any] | None = None) -> int:
        """Tokens of a conversation as the model reads it, pictures included; `tools` are not read."""
        return self.num_tokens(self._read(messages))

    def _convert_input(self, model_input: Any) -> PromptValue:
        messages = super()._convert_input(model_input).to_messages()
        return ChatPromptValue(messages=with_embedded_pictures(messages, self.picture))

    def _read(self, messages: Sequence[BaseMessage]) -> list[Message]:
        return as_messages(messages, self.picture)

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        call = _call(stop, kwargs)
        answer = self.give_answer(self._read(messages), call)
        message = AIMessage(answer.text, **self._said(answer, call))
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        call = _call(stop, kwargs)
        for piece in self.stream_answer(self._read(messages), call):
            if piece.answer is not None:
                told = self._said(piece.answer, call)
                yield ChatGenerationChunk(message=AIMessageChunk("", chunk_position="last", **told))
                return
            chunk = ChatGenerationChunk(message=AIMessageChunk(piece.delta))
            if run_manager is not None:
                run_manager.on_llm_new_token(piece.delta, chunk=chunk)
            yield chunk

    def _said(self, answer: Answer, call: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "usage_metadata": _as_usage_metadata(answer.usage),
            "response_metadata": self.answer_metadata(answer, call),
        }


class ChatViCrop(_ChatPictures):
    """A chat model that looks again, at the part of a picture that matters (ViCrop, arXiv 2502.17422).

    Example:
        >>> from langchain_core.messages import HumanMessage
        >>> from PIL import Image
        >>> from qr_integrations.langchain import ChatViCrop
        >>> chat = ChatViCrop(model="qr-mini-vl", max_tokens=3)
        >>> picture = {"type": "image", "image": Image.new("RGB", (640, 480), "red")}
        >>> question = {"type": "text", "text": "what color is the square"}
        >>> answer = chat.invoke([HumanMessage([picture, question])])
        >>> answer.response_metadata["qr_method"], len(answer.response_metadata["qr_steps"]["crop"])
        ('vicrop', 1)

    Pictures stand in messages in any of LangChain's forms (base64, ``data:`` URI, OpenAI's ``image_url``, Anthropic's
    ``source``), as a Pillow picture (``{"type": "image", "image": picture}``) and, if the settings allow it, as a URL
    or a path. Answers tell their tokens in ``usage_metadata``; for ``response_metadata`` see
    `ChatSettings.answer_metadata`.

    All parameters are those of `ChatSettings`. Those for generating, `crop`, `num_visual_tokens`, `prune` and `deco`
    may be given for one call: ``chat.invoke(messages, temperature=0.7, crop=False)``. `crop` is on, the others are off.
    Unknown ones are ignored here, with a line in the log, and an error in a call. With ``streaming=True`` also `invoke`
    answers piece by piece.
    """

    crop: Any = True

    @property
    def _llm_type(self) -> str:
        return "qr-vicrop"


class ChatDeCo(_ChatPictures):
    """A chat model whose earlier layers correct what it says (DeCo, arXiv 2410.11779): fewer things that are not there.

    Example:
        >>> from qr_integrations.langchain import ChatDeCo
        >>> chat = ChatDeCo(model="qr-mini-vl", deco={"alpha": 0.3}, max_tokens=3)
        >>> chat.invoke("what color is the square").response_metadata["qr_params"]["deco"]["alpha"]
        0.3

    As `ChatViCrop`, with `deco` on and `crop` off. It takes models that read text only, too.
    """

    deco: Any = True

    @property
    def _llm_type(self) -> str:
        return "qr-deco"


def _call(stop: list[str] | None, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in kwargs.items() if name not in _FOR_LANGCHAIN}
    return given if stop is None else {**given, "stop": stop}


def _as_usage_metadata(usage: Usage) -> dict[str, int]:
    return {
        "input_tokens": usage.prompt_tokens,
        "output_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
    }
