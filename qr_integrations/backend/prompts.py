"""From a conversation to the model's inputs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from qr_integrations.backend.opened import OpenedModel
from qr_integrations.backend.picture_families import picture_family
from qr_integrations.errors import InputError, WindowError
from qr_integrations.images import DECODED, open_picture
from qr_integrations.types import Message

_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation as a model reads it.

    Attributes:
        messages: the conversation, pictures in RGB.
        inputs: what the processor (or the tokenizer) makes of it, ``[1, T]`` and the pictures' pixels, on the device.
        token_ids: the T tokens, each picture's own included.
    """

    messages: tuple[Message, ...]
    inputs: Mapping[str, Tensor]
    token_ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def pictures(self) -> tuple[Any, ...]:
        """All pictures, in the order in which they are read."""
        return tuple(picture for message in self.messages for picture in message.pictures)


def as_messages(given: str | Sequence[Message]) -> tuple[Message, ...]:
    """A question alone, or a message, becomes a conversation; pictures are opened and checked.

    Raises:
        InputError: no message, an unknown role, nothing to read, or a broken picture.
    """
    one = Message.user(given) if isinstance(given, str) else given
    messages: tuple[Any, ...] = tuple(one) if isinstance(one, Iterable) else (one,)
    if strange := [type(one).__name__ for one in messages if not isinstance(one, Message)]:
        raise InputError(f"a {strange[0]} is no message: pass a question, or Message.user('...', picture)")
    if not any(message.pictures or message.text.strip() for message in messages):
        raise InputError("there is nothing to answer: pass a question, or at least one message with content")
    if wrong := [message.role for message in messages if message.role not in _ROLES]:
        raise InputError(f"unknown role {wrong[0]!r}: pass {', '.join(_ROLES)}")
    return tuple(Message(message.role, tuple(map(_opened, message.content))) for message in messages)


def _opened(part: Any) -> Any:
    return part if isinstance(part, str) else open_picture(part, policy=DECODED)


def lay_out(opened: OpenedModel, messages: tuple[Message, ...], num_visual_tokens: int | None = None) -> Prompt:
    """The conversation in the model's chat format, up to where the answer begins.

    A model without a chat template reads its family's published prompt or, if it reads text only, the bare texts.

    Args:
        opened: the model.
        messages: the conversation.
        num_visual_tokens: how many tokens each picture gets, for models that can tell it in any number of them.

    Raises:
        InputError: pictures for a model that reads text only, a conversation that the template refuses, or a number of
            tokens that the model cannot make.
        WindowError: it is longer than the model's window.
    """
    pictures = [picture for message in messages for picture in message.pictures]
    if num_visual_tokens is not None:
        check_num_visual_tokens(opened, num_visual_tokens)
    if pictures or opened.sees_pictures:
        inputs = _with_pictures(opened, messages, pictures)
        if num_visual_tokens is not None:
            inputs = _with_fewer(opened, inputs, num_visual_tokens)
    else:
        text = _render(opened.tokenizer, [{"role": m.role, "content": m.text} for m in messages])
        text = "\n".join(message.text for message in messages) if text is None else text
        inputs = opened.tokenizer(text, add_special_tokens=_adds_special(opened, text), return_tensors="pt")
    tensors = {name: value.to(opened.device) for name, value in inputs.items() if isinstance(value, Tensor)}
    token_ids = tuple(tensors["input_ids"][0].tolist())
    if opened.max_tokens is not None and len(token_ids) >= opened.max_tokens:
        raise WindowError(
            f"the conversation needs {len(token_ids):,} tokens, {opened.name!r} holds {opened.max_tokens:,} with the "
            "answer: pass fewer or shorter messages, or fewer pictures"
        )
    return Prompt(messages, tensors, token_ids)


def check_num_visual_tokens(opened: OpenedModel, given: Any) -> None:
    """Whether the model can tell a picture in so many tokens.

    Raises:
        InputError: it has a fixed number, or fewer, or that is no number.
    """
    most = getattr(opened.model.config, "num_queries", None)
    if most is None:
        raise InputError(
            f"{opened.name!r} makes a fixed number of tokens of a picture: load a matryoshka model, such as "
            "'qr-mini-vl-mqt', or drop tokens with prune=CDPruner(keep=...)"
        )
    if isinstance(given, bool) or not isinstance(given, int) or not 1 <= given <= most:
        raise InputError(f"num_visual_tokens={given!r} cannot be made by {opened.name!r}: pass 1 to {most}")


def _with_fewer(opened: OpenedModel, inputs: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The first `count` placeholders of each picture stay."""
    ids, most = inputs["input_ids"], opened.model.config.num_queries
    visual = ids[0] == opened.model.config.image_token_id
    stays = ~visual | ((visual.long().cumsum(0) - 1) % most < count)
    return {name: value[:, stays] if value.shape == ids.shape else value for name, value in inputs.items()}


def _with_pictures(opened: OpenedModel, messages: tuple[Message, ...], pictures: list[Any]) -> Mapping[str, Any]:
    processor: Any = opened.processor
    tokens = _tokens_of(processor)
    parts = [
        {"role": message.role, "content": [_part(part, tokens) for part in message.content]} for message in messages
    ]
    text = _render(processor, parts)
    if text is None:
        text = _published(opened, messages)
    if hasattr(processor, "qformer_tokenizer"):
        return _with_slots(opened, text, pictures)
    kwargs = {"images": pictures} if pictures else {}
    try:
        inputs: Mapping[str, Any] = processor(
            text=[text], **kwargs, add_special_tokens=_adds_special(opened, text), return_tensors="pt"
        )
    except ValueError as error:
        raise InputError(
            f"the processor of {opened.name!r} refuses a conversation with {len(pictures)} pictures ({error}): pass "
            "another number of pictures, or larger ones, or a chat template that gives each picture its place"
        ) from error
    return inputs


def _with_slots(opened: OpenedModel, text: str, pictures: list[Any]) -> Mapping[str, Any]:
    """Slots of all pictures before the text, which the queries of each picture read too (InstructBLIP).

    The processor of that family makes slots and a text for the queries for one picture only.
    """
    processor, config = opened.processor, opened.model.config
    inputs = dict(processor(text=[text], add_special_tokens=_adds_special(opened, text), return_tensors="pt"))
    asked = {name: inputs.pop(name).repeat(len(pictures), 1) for name in list(inputs) if name.startswith("qformer_")}
    if not pictures:
        return inputs
    longest, needed = config.qformer_config.max_position_embeddings, asked["qformer_input_ids"].shape[1]
    if needed > longest:
        raise WindowError(
            f"the question needs {needed:,} tokens of the Q-Former, which holds {longest:,}: pass a shorter question"
        )
    slots = torch.full((1, len(pictures) * config.num_query_tokens), config.image_token_id)
    inputs["input_ids"] = torch.cat([slots, inputs["input_ids"]], dim=1)
    inputs["attention_mask"] = torch.cat([torch.ones_like(slots), inputs["attention_mask"]], dim=1)
    return inputs | asked | dict(processor(images=pictures, return_tensors="pt"))


def _tokens_of(processor: Any) -> dict[str, str]:
    """What stands in a text for a picture, a video, or the ends of one, by the processor's names for it."""
    return {name: str(token) for name, token in vars(processor).items() if name.endswith("_token") and token}


def _part(part: Any, tokens: Mapping[str, str]) -> dict[str, Any]:
    return {"type": "text", "text": _words(part, tokens)} if isinstance(part, str) else {"type": "image"}


def _words(text: str, tokens: Mapping[str, str]) -> str:
    """Words of a user or a document stay words where they spell what stands for a picture."""
    for token in tokens.values():
        text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def _published(opened: OpenedModel, messages: tuple[Message, ...]) -> str:
    """The family's published prompt, for checkpoints without a chat template."""
    template = picture_family(opened.model.config).template
    if template is None or len(messages) > 1:
        raise InputError(
            f"{opened.name!r} has no chat template: set backend.processor.chat_template"
            + (", or pass one message alone" if template else "")
        )
    tokens = _tokens_of(opened.processor)
    pictures = tokens.get("image_token", "") * len(messages[0].pictures)
    return template.format(pictures=pictures, question=_words(messages[0].text, tokens))


def _render(template_of: Any, messages: list[dict[str, Any]]) -> str | None:
    """The conversation through a chat template, None without one; templates that know no system role get it in front
    of the user's words."""
    if not getattr(template_of, "chat_template", None):
        return None
    try:
        text: str = template_of.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError) as error:
        merged = _system_into_user(messages)
        if merged is None:
            raise InputError(
                f"the model's chat template refuses the conversation ({error}): let user and assistant take turns, the "
                "user last, or set backend.processor.chat_template to one that takes pictures"
            ) from error
        return _render(template_of, merged)
    return text


def _system_into_user(messages: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    if [message["role"] for message in messages[:2]] != ["system", "user"]:
        return None
    system, user, *rest = messages
    both = system["content"], user["content"]
    paragraph = {"type": "text", "text": "\n\n"}
    content = "\n\n".join(both) if isinstance(both[1], str) else [*both[0], paragraph, *both[1]]
    return [{"role": "user", "content": content}, *rest]


def _adds_special(opened: OpenedModel, text: str) -> bool:
    """Whether the tokenizer must add what a text begins with: not where the template wrote it already."""
    begin = opened.tokenizer.bos_token
    return not (begin and text.startswith(begin))
