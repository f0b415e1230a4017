"""LlamaIndex messages as conversations with pictures, and answers as LlamaIndex responses."""

import json
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, TypeAlias

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    CitableBlock,
    CitationBlock,
    CompletionResponse,
    ImageBlock,
    MessageRole,
    TextBlock,
)
from llama_index.core.schema import ImageDocument, ImageNode
from PIL import Image

from qr_integrations.chatting import ChatSettings
from qr_integrations.errors import InputError
from qr_integrations.images import PictureSource
from qr_integrations.types import Answer, Message

PictureBeside: TypeAlias = ImageBlock | ImageNode | ImageDocument

_SPEAKERS = {
    MessageRole.SYSTEM: "system",
    MessageRole.DEVELOPER: "system",
    MessageRole.ASSISTANT: "assistant",
    MessageRole.CHATBOT: "assistant",
    MessageRole.MODEL: "assistant",
}  # all others, tools too, speak as the user
_NOT_TOLD = ("cache", "thinking")  # kinds of blocks that say nothing to the next turn


def conversation_of(settings: ChatSettings, messages: Sequence[ChatMessage]) -> list[Message]:
    """The messages with their pictures opened, in the order of their blocks.

    Raises:
        InputError: a block that a model of texts and pictures cannot read, or a picture that cannot be opened.
    """
    return [
        Message(_SPEAKERS.get(message.role, "user"), tuple(_parts(settings, message.blocks, f"message #{number}")))
        for number, message in enumerate(messages)
    ]


def question_of(
    settings: ChatSettings, prompt: str, image_documents: Sequence[PictureBeside] | None = None
) -> list[Message]:
    """A prompt as a conversation of one message, the pictures in front of it.

    Raises:
        InputError: a picture that cannot be opened.
    """
    pictures = [_picture_beside(settings, one, number) for number, one in enumerate(image_documents or ())]
    return [Message.user(*pictures, prompt)]


def chat_response(
    settings: ChatSettings, call: Mapping[str, Any], text: str, delta: str | None, answer: Answer | None
) -> ChatResponse:
    """What was said up to now; `answer` comes with the last piece."""
    message = ChatMessage(role=MessageRole.ASSISTANT, content=text)
    return ChatResponse(message=message, delta=delta, **_what_is_known(settings, call, answer))


def completion_response(
    settings: ChatSettings, call: Mapping[str, Any], text: str, delta: str | None, answer: Answer | None
) -> CompletionResponse:
    """What was said up to now; `answer` comes with the last piece."""
    return CompletionResponse(text=text, delta=delta, **_what_is_known(settings, call, answer))


def _what_is_known(settings: ChatSettings, call: Mapping[str, Any], answer: Answer | None) -> dict[str, Any]:
    """LlamaIndex counts tokens by ``raw["usage"]``, older programs by `additional_kwargs`."""
    if answer is None:
        return {}
    used = answer.usage
    usage = {
        "prompt_tokens": used.prompt_tokens,
        "completion_tokens": used.completion_tokens,
        "total_tokens": used.total_tokens,
    }
    return {"raw": {"usage": usage, **settings.answer_metadata(answer, call)}, "additional_kwargs": dict(usage)}


# ---- from blocks to parts


def _parts(settings: ChatSettings, blocks: Sequence[Any], place: str) -> Iterator[str | Image.Image]:
    for number, block in enumerate(blocks):
        here = f"{place}, block #{number}"
        if isinstance(block, TextBlock):
            yield block.text
        elif isinstance(block, ImageBlock):
            yield _picture(settings, block, here)
        elif isinstance(block, CitableBlock):
            yield from _parts(settings, block.content, here)
        elif isinstance(block, CitationBlock):
            yield from _parts(settings, [block.cited_content], here)
        elif block.block_type == "tool_call":
            yield f"{block.tool_name} {json.dumps(block.tool_kwargs, ensure_ascii=False)}"
        elif block.block_type not in _NOT_TOLD:
            raise InputError(
                f"{here}: the model reads texts and pictures, this is {block.block_type!r}: leave it out, or pass its "
                "text as TextBlock or its pages as ImageBlock"
            )


def _picture(settings: ChatSettings, block: ImageBlock, place: str) -> Image.Image:
    if isinstance(block.image, BytesIO):
        return settings.picture(block.image.getvalue(), place)  # other threads may read it too
    if block.image and not isinstance(block.image, bytes):
        return settings.picture(block.image, place)
    base64 = block.image.decode("latin-1") if block.image else None  # as which a block keeps its bytes
    return settings.picture(_source(base64, block.path, block.url, place), place)


def _picture_beside(settings: ChatSettings, document: PictureBeside, number: int) -> Image.Image:
    place = f"image_documents, #{number}"
    if isinstance(document, ImageBlock):
        return _picture(settings, document, place)
    if not isinstance(document, ImageNode | ImageDocument):
        raise InputError(
            f"{place}: a {type(document).__name__} is no picture beside a prompt: pass ImageBlock(path=...), or an "
            "ImageNode or ImageDocument"
        )
    path = document.image_path or document.metadata.get("file_path")
    return settings.picture(_source(document.image, path, document.image_url, place), place)


def _source(base64: str | None, path: Any, url: Any, place: str) -> PictureSource:
    if base64:
        return f"data:;base64,{base64}"
    if path:
        return Path(path)
    if not url:
        raise InputError(f"{place}: there is no picture in it: give it image=, a path or a URL")
    return str(url)
