"""Local vision-language models as LLMs for LlamaIndex: they look twice, or weigh their words."""

from collections.abc import AsyncGenerator, Generator, Sequence
from functools import partial
from typing import Any

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    LLMMetadata,
)
from llama_index.core.llms import LLM
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from pydantic import ConfigDict, Field

from qr_integrations.chatting import ChatSettings
from qr_integrations.llama_index.messages import (
    PictureBeside,
    chat_response,
    completion_response,
    conversation_of,
    question_of,
)
from qr_integrations.llama_index.streaming import (
    aanswer,
    announced,
    announced_astream,
    announced_stream,
    aresponses,
    responses,
)

_PICTURES = "image_documents"
_TOLD = {"crop", "num_visual_tokens", "prune", "deco", "max_new_tokens", "temperature", "top_p", "top_k", "num_beams"}
_TOLD |= {"repetition_penalty", "stop"}


class _PictureLLM(ChatSettings, LLM):
    """All of it but the defaults. Generation settings may also be passed with each call."""

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid", validate_assignment=True)

    context_window: int | None = Field(default=None, ge=1)
    allow_local_files: bool = True

    @property
    def metadata(self) -> LLMMetadata:
        """What LlamaIndex plans with. Without a `context_window` the model is loaded, which knows its own.

        Raises:
            LoadError: it cannot be loaded.
        """
        window = self.context_window or self.open().max_tokens
        return LLMMetadata(
            **({"context_window": window} if window else {}),
            num_output=self.max_new_tokens,
            is_chat_model=True,
            is_function_calling_model=False,
            model_name=self.model_name,
        )

    def to_payload(self) -> dict[str, Any]:
        """What events tell: the settings of the answer, without loading anything, and none that may hold a secret."""
        return {"model_name": self.model_name, **self.model_dump(include=_TOLD), "class_name": self.class_name()}

    @announced(llm_chat_callback())
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer a conversation.

        Raises:
            InputError: nothing was said, a block or picture that cannot be read, or a setting that there is not.
            ModelError: the model cannot be loaded or run.
        """
        answer = self.give_answer(conversation_of(self, messages), kwargs)
        return chat_response(self, kwargs, answer.text, None, answer)

    @announced(llm_completion_callback())
    def complete(
        self,
        prompt: str,
        formatted: bool = False,
        image_documents: Sequence[PictureBeside] | None = None,
        **kwargs: Any,
    ) -> CompletionResponse:
        """Answer a prompt, which is the user's message in a conversation of one; see `chat`.

        Args:
            prompt: what is asked.
            formatted: without effect; the model's chat format always goes around the prompt.
            image_documents: pictures in front of it.
            kwargs: settings of this call.
        """
        answer = self.give_answer(question_of(self, prompt, image_documents), kwargs)
        return completion_response(self, kwargs, answer.text, None, answer)

    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> Generator[ChatResponse, None, None]:
        """As `chat`, piece by piece: the text so far and, in `delta`, what is new. Closing it stops the generation."""
        return announced_stream(llm_chat_callback(), self, messages, kwargs, self._chat_stream)

    def stream_complete(
        self,
        prompt: str,
        formatted: bool = False,
        image_documents: Sequence[PictureBeside] | None = None,
        **kwargs: Any,
    ) -> Generator[CompletionResponse, None, None]:
        """As `complete`, piece by piece; see `stream_chat`."""
        call = _with_pictures(image_documents, kwargs)
        return announced_stream(llm_completion_callback(), self, prompt, call, self._completion_stream)

    @announced(llm_chat_callback())
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """As `chat`, in a thread; cancelling it stops the generation."""
        answer = await aanswer(partial(self._chat_pieces, messages, kwargs))
        return chat_response(self, kwargs, answer.text, None, answer)

    @announced(llm_completion_callback())
    async def acomplete(
        self,
        prompt: str,
        formatted: bool = False,
        image_documents: Sequence[PictureBeside] | None = None,
        **kwargs: Any,
    ) -> CompletionResponse:
        """As `complete`, in a thread; cancelling it stops the generation."""
        answer = await aanswer(partial(self._completion_pieces, prompt, _with_pictures(image_documents, kwargs)))
        return completion_response(self, kwargs, answer.text, None, answer)

    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> AsyncGenerator[ChatResponse, None]:
        """As `stream_chat`, made in a thread."""
        return await announced_astream(llm_chat_callback(), self, messages, kwargs, self._achat_stream)

    async def astream_complete(
        self,
        prompt: str,
        formatted: bool = False,
        image_documents: Sequence[PictureBeside] | None = None,
        **kwargs: Any,
    ) -> AsyncGenerator[CompletionResponse, None]:
        """As `stream_complete`, made in a thread."""
        call = _with_pictures(image_documents, kwargs)
        return await announced_astream(llm_completion_callback(), self, prompt, call, self._acompletion_stream)

    # ---- streams

    def _chat_pieces(self, messages: Sequence[ChatMessage], call: dict[str, Any]) -> Any:
        return self.stream_answer(conversation_of(self, messages), call)

    def _completion_pieces(self, prompt: str, call: dict[str, Any]) -> Any:
        return self.stream_answer(question_of(self, prompt, call.get(_PICTURES)), _settings(call))

    def _chat_stream(self, messages: Sequence[ChatMessage], call: dict[str, Any]) -> Any:
        return responses(self._chat_pieces(messages, call), partial(chat_response, self, call))

    def _completion_stream(self, prompt: str, call: dict[str, Any]) -> Any:
        return responses(self._completion_pieces(prompt, call), partial(completion_response, self, _settings(call)))

    def _achat_stream(self, messages: Sequence[ChatMessage], call: dict[str, Any]) -> Any:
        return aresponses(partial(self._chat_pieces, messages, call), partial(chat_response, self, call))

    def _acompletion_stream(self, prompt: str, call: dict[str, Any]) -> Any:
        respond = partial(completion_response, self, _settings(call))
        return aresponses(partial(self._completion_pieces, prompt, call), respond)


def _with_pictures(documents: Sequence[PictureBeside] | None, call: dict[str, Any]) -> dict[str, Any]:
    return call if documents is None else {_PICTURES: documents, **call}


def _settings(call: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in call.items() if name != _PICTURES}


class ViCropLLM(_PictureLLM):
    """A local vision-language model that looks again at the part of a picture that matters (ViCrop, arXiv 2502.17422).

    Example:
        >>> from io import BytesIO
        >>> from llama_index.core.llms import ChatMessage, ImageBlock, TextBlock
        >>> from PIL import Image
        >>> from qr_integrations.llama_index import ViCropLLM
        >>> llm = ViCropLLM(model="qr-mini-vl", max_new_tokens=8)  # loaded when it is first used
        >>> Image.new("RGB", (640, 480), "red").save(file := BytesIO(), "PNG")
        >>> blocks = [ImageBlock(image=file.getvalue()), TextBlock(text="is there a red box ?")]
        >>> llm.chat([ChatMessage(role="user", blocks=blocks)]).raw["qr_method"]
        'vicrop'

    It is for everything in LlamaIndex that takes an LLM and calls no functions: query engines, chat engines,
    ``ReActAgent``. ``response.raw`` holds ``usage`` and what `ChatSettings.answer_metadata` names, such as the box of
    each crop; ``response.additional_kwargs`` holds the usage once more.

    Attributes:
        crop: True here; a `ViCrop`, or a mapping of its settings, says how to look.
        num_visual_tokens, prune: also tell pictures in fewer tokens, see `ChatSettings`.
        deco: also correct what is said, see `DeCoLLM`.
        context_window: tokens of the prompt and the answer; None is the model's own, for which it is loaded, on an
            event loop too where LlamaIndex asks there first (``apredict``, agents).
        allow_local_files: True here: open pictures from paths. Pass False where messages come from other people.

    All other parameters are those of `ChatSettings`.
    """

    crop: Any = True

    @classmethod
    def class_name(cls) -> str:
        """The name under which LlamaIndex serialises it."""
        return "ViCropLLM"


class DeCoLLM(_PictureLLM):
    """A local vision-language model whose earlier layers correct what it says (DeCo, arXiv 2410.11779).

    Example:
        >>> from qr_integrations.llama_index import DeCoLLM
        >>> llm = DeCoLLM(model="qr-mini-vl", deco={"alpha": 0.3}, crop=True)
        >>> llm.deco.alpha
        0.3

    Attributes:
        deco: True here; a `DeCo`, or a mapping of its settings, says how strongly and by which layers.
        crop: also look again at pictures, see `ViCropLLM`.

    All other parameters are those of `ViCropLLM`.
    """

    deco: Any = True

    @classmethod
    def class_name(cls) -> str:
        """The name under which LlamaIndex serialises it."""
        return "DeCoLLM"
