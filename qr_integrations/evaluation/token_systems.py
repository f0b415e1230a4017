"""Ways to read pictures in fewer tokens that can be measured side by side.

One is asked for by a line. ``mqt:tokens=16`` (the first tokens of a matryoshka model), or what drops tokens:
``cdpruner``, ``sparsevlm``, and to compare with ``random_tokens``, ``uniform_grid``, ``class_attention`` and
``last_token``. These need a budget, tokens of a view or a share of them: ``sparsevlm:version=2.0,keep=0.33``.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from zlib import crc32

from qr_integrations.backend import Backend
from qr_integrations.backend.visual_tokens import Pruner
from qr_integrations.errors import InputError
from qr_integrations.evaluation.picture_questions import PictureQuestion
from qr_integrations.evaluation.specs import read_count_or_share, read_layers, read_spec
from qr_integrations.pruning import (
    CDPruner,
    ClassAttention,
    LastTokenAttention,
    RandomTokens,
    SparseVLM,
    UniformGrid,
)
from qr_integrations.types import Answer, Message

StepsFor = Callable[[Backend, PictureQuestion, tuple[int, int]], Mapping[str, Any]]
"""What `Backend.answer` is passed for a model, a question and the size of its picture."""

MQT, RANDOM_TOKENS = "mqt", "random_tokens"
PRUNING_METHODS = (
    "cdpruner",
    "sparsevlm:version=1.5",
    "sparsevlm:version=2.0",
    RANDOM_TOKENS,
    "uniform_grid",
    "class_attention",
    "last_token",
)
_PRUNERS: Mapping[str, Callable[..., Pruner]] = {
    "cdpruner": CDPruner,
    "sparsevlm": SparseVLM,
    RANDOM_TOKENS: RandomTokens,
    "uniform_grid": UniformGrid,
    "class_attention": ClassAttention,
    "last_token": LastTokenAttention,
}


def _none_or_word(text: str) -> str | None:
    return None if text == "none" else text


_KEEP: Mapping[str, Callable[[str], Any]] = {"keep": read_count_or_share}
TOKEN_SETTINGS: Mapping[str, Mapping[str, Callable[[str], Any]]] = {
    MQT: {"tokens": int},
    "cdpruner": {**_KEEP, "relevance": _none_or_word, "text_encoder": str, "sign": int, "theta": float},
    "sparsevlm": {**_KEEP, "version": str, "layers": read_layers},
    RANDOM_TOKENS: _KEEP,
    "uniform_grid": _KEEP,
    "class_attention": _KEEP,
    "last_token": {**_KEEP, "layer": int},
}
"""Name -> its settings, and what reads each."""


def token_steps(name: str, settings: Mapping[str, Any], seed: int) -> StepsFor:
    """What is passed to `Backend.answer`.

    Args:
        name: one of `TOKEN_SETTINGS`.
        settings: of these.
        seed: of ``random_tokens``; every question draws its own tokens, and always the same.

    Raises:
        InputError: no budget, or a setting that cannot be.
    """
    if name == MQT:
        return lambda backend, question, size: {"num_visual_tokens": settings.get("tokens")}
    if "keep" not in settings:
        raise InputError(
            f"{name} must know how many tokens stay: write {name}:keep=0.33, a share, or keep=64, a number"
        )
    pruner = _PRUNERS[name](**settings)
    if name != RANDOM_TOKENS:
        return lambda backend, question, size: {"prune": pruner}
    return lambda backend, question, size: {
        "prune": RandomTokens(settings["keep"], seed=crc32(f"{seed}-{question.id}-{question.question}".encode()))
    }


def pruning_specs(method: str, keeps: Sequence[str]) -> tuple[str, ...]:
    """The lines for a method, which may have settings, with each of some budgets.

    Raises:
        InputError: no such method, one that drops no tokens, or one that has its budget already.

    Example:
        >>> pruning_specs("sparsevlm:version=2.0", ["0.5", "16"])
        ('sparsevlm:version=2.0,keep=0.5', 'sparsevlm:version=2.0,keep=16')
    """
    droppers = {name: known for name, known in TOKEN_SETTINGS.items() if name != MQT}
    _, settings = read_spec(method, droppers)
    if "keep" in settings:
        raise InputError(f"{method!r} has its budget already: leave keep out, all budgets are measured")
    return tuple(f"{method}{',' if settings else ':'}keep={keep}" for keep in keeps)


def num_words(backend: Backend, message: Message) -> int | None:
    """Tokens of a prompt that show nothing of a picture; None where the model does not say which show something."""
    visual = getattr(backend.model.config, "image_token_id", None)
    if visual is None:
        return None
    token_ids = backend.lay_out([message]).token_ids
    return len(token_ids) - token_ids.count(visual)


def mean_visual_tokens(answer: Answer, num_words: int | None, num_layers: int) -> float | None:
    """Tokens of pictures that a layer read before the answer, the mean over all layers.

    A layer after which tokens go has read them. None where the words are not counted.
    """
    if num_words is None:
        return None
    visual = float(answer.usage.prompt_tokens - num_words)
    for stage in answer.steps["prune"].stages if "prune" in answer.steps else ():
        if stage.layer is not None:
            gone = stage.of - stage.kept - stage.merged
            visual -= gone * (num_layers - 1 - stage.layer) / num_layers
    return visual
