"""From LangChain's messages to the package's: every form in which a picture stands in one."""

import json
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from typing import Any

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from PIL import Image

from qr_integrations.errors import InputError
from qr_integrations.types import Message

OpenPicture = Callable[[Any, str], Image.Image]
"""Takes what holds a picture, and the place where it stood, for errors."""

_ROLES: tuple[tuple[tuple[type[BaseMessage], ...], str], ...] = (
    ((SystemMessage,), "system"),
    ((HumanMessage, ToolMessage, FunctionMessage), "user"),  # models that see pictures know no role for tools
    ((AIMessage,), "assistant"),
)
_CHAT_ROLES = {"human": "user", "ai": "assistant", "developer": "system"}
_PICTURE_KEYS = ("base64", "url", "path", "image", "image_url", "data")


def as_messages(messages: Sequence[BaseMessage], open_picture: OpenPicture) -> list[Message]:
    """Texts and pictures in their order; what another model thought is left out, what it called is told as JSON.

    Raises:
        InputError: audio, video and other things that the model cannot read, or a picture that cannot be opened.
    """
    return [_as_message(message, number, open_picture) for number, message in enumerate(messages)]


def with_embedded_pictures(messages: Sequence[BaseMessage], open_picture: OpenPicture) -> list[BaseMessage]:
    """Copies in which Pillow pictures are PNG in base64, for caches and traces, which tell by their text what differs.

    Base64 without a MIME type gets one, which LangChain's tracing asks for. Messages without such stay as they are.
    """
    return [_embedded(message, number, open_picture) for number, message in enumerate(messages)]


# ---- one message


def _as_message(message: BaseMessage, number: int, open_picture: OpenPicture) -> Message:
    role = _role(message)
    content: list[str | Image.Image] = []
    for place, block in enumerate(message.content_blocks):
        found = _as_part(dict(block), f"messages[{number}].content[{place}]", open_picture, role)
        content += [] if found is None else [found]
    calls = message.tool_calls if isinstance(message, AIMessage) else []
    content += [json.dumps({"name": call["name"], "arguments": call["args"]}, ensure_ascii=False) for call in calls]
    return Message(role, tuple(content))


def _role(message: BaseMessage) -> str:
    for kinds, role in _ROLES:
        if isinstance(message, kinds):
            return role
    if isinstance(message, ChatMessage):
        return _CHAT_ROLES.get(message.role, message.role)
    raise InputError(f"a {type(message).__name__} says nothing to the model: leave it out")


def _as_part(block: Mapping[str, Any], place: str, open_picture: OpenPicture, role: str) -> str | Image.Image | None:
    kind, value = block.get("type"), block
    if kind == "non_standard":
        value = block["value"]
        kind = value.get("type") or ("image" if "image" in value else None)
    if kind in ("text", "text-plain"):
        return str(value.get("text", ""))
    if kind in ("image", "image_url"):
        return _picture(value, place, open_picture)
    if role == "assistant":
        return None  # thoughts, calls and citations, in the form of the model that made them
    raise InputError(f"{place}: a block of type {kind!r} is not read: pass texts and pictures only")


def _picture(block: Mapping[str, Any], place: str, open_picture: OpenPicture) -> Image.Image:
    if "file_id" in block or block.get("source_type") == "id":
        raise InputError(f"{place}: a file_id names a picture on another's server: pass the picture itself, as base64")
    for key in _PICTURE_KEYS:
        source = block.get(key)
        if source is None:
            continue
        if isinstance(source, Mapping):  # {"image_url": {"url": ...}}
            return _picture(source, place, open_picture)
        return open_picture(_as_uri(source) if key in ("base64", "data") else source, place)
    raise InputError(f"{place}: an image without a picture: pass {{'type': 'image', 'base64': ..., 'mime_type': ...}}")


def _as_uri(base64: Any) -> str:
    text = base64.decode("ascii", "replace") if isinstance(base64, bytes) else str(base64)
    return text if text.startswith("data:") else f"data:;base64,{text}"


# ---- for caches and traces


def _embedded(message: BaseMessage, number: int, open_picture: OpenPicture) -> BaseMessage:
    if isinstance(message.content, str):
        return message
    content = [
        _embedded_block(block, f"messages[{number}].content[{place}]", open_picture)
        for place, block in enumerate(message.content)
    ]
    unchanged = all(new is old for new, old in zip(content, message.content, strict=True))
    return message if unchanged else message.model_copy(update={"content": content})


def _embedded_block(block: Any, place: str, open_picture: OpenPicture) -> Any:
    if not isinstance(block, dict):
        return block
    in_base64 = "base64" in block or block.get("source_type") == "base64"
    if block.get("type") == "image" and in_base64 and "mime_type" not in block:
        return {**block, "mime_type": "image/*"}
    key = next((key for key in ("image", "image_url") if isinstance(block.get(key), Image.Image)), None)
    if key is None:
        return block
    buffer = BytesIO()
    open_picture(block[key], place).save(buffer, "PNG", compress_level=1)
    return {"type": "image", "base64": b64encode(buffer.getvalue()).decode("ascii"), "mime_type": "image/png"}
