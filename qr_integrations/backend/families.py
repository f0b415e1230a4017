"""Model families as data: one row where a family's published prompt differs from its chat template.

Reading attention needs no row. Nothing else in the package asks for a family's name.
"""

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

_SENTINEL = "\ue000CONTENT\ue000"  # private-use characters: no template rewrites them


@dataclass(frozen=True, slots=True)
class ChatPieces:
    """What stands around a user's message, and how paragraphs are set in it.

    Attributes:
        opening: text before the content, up to and including the user header.
        closing: text after the content, up to and including the assistant header.
        separator: between paragraphs.
        add_special_tokens: whether the tokenizer must add its own (where `opening` lacks the beginning-of-text token).
    """

    opening: str
    closing: str
    separator: str = "\n\n"
    add_special_tokens: bool = False


@dataclass(frozen=True, slots=True)
class _PublishedPrompt:
    """A row: which models it is for (the token must be in the vocabulary), and the pieces as published."""

    model_type: str
    token: str
    pieces: ChatPieces


# princeton-pli/QRHead, commit 7a668e7: no newline after the headers, and Llama's separator has a space in front.
_PUBLISHED = (
    _PublishedPrompt(
        "llama",
        "<|start_header_id|>",
        ChatPieces(
            "<|start_header_id|>user<|end_header_id|> ",
            "<|eot_id|><|start_header_id|>assistant<|end_header_id|>",
            separator=" \n\n",
            add_special_tokens=True,
        ),
    ),
    _PublishedPrompt(
        "qwen2",
        "<|im_start|>",
        ChatPieces("<|im_start|>user ", "<|im_end|>\n<|im_start|>assistant", add_special_tokens=True),
    ),
)


def published_pieces(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> ChatPieces | None:
    """The pieces of the paper's own prompt, for the families it was published for; None for all others."""
    for row in _PUBLISHED:
        if config.model_type == row.model_type and row.token in tokenizer.get_vocab():
            return row.pieces
    return None


def template_pieces(tokenizer: PreTrainedTokenizerBase) -> ChatPieces:
    """The pieces of the model's own chat template; a base model without one gets a plain text prompt."""
    if not getattr(tokenizer, "chat_template", None):
        return ChatPieces("", "\n", add_special_tokens=True)
    render: Callable[..., str] = tokenizer.apply_chat_template
    text = render([{"role": "user", "content": _SENTINEL}], tokenize=False, add_generation_prompt=True)
    opening, closing = text.split(_SENTINEL)
    return ChatPieces(opening, closing)
