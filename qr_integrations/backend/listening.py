"""Listens to a generation while it runs: pieces of text, stop sequences, and what may interrupt it."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase, StoppingCriteria

from qr_integrations.backend.interruptions import check_interruption, let_others_in
from qr_integrations.errors import ScoreError

_UNFINISHED = "\ufffd"  # what a tokenizer writes for the first bytes of a character


class Finite(LogitsProcessor):
    """Refuses a model whose first token is not a number; afterwards it lets everything pass."""

    def __init__(self) -> None:
        self._checked = False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores as they are.

        Raises:
            ScoreError: one is NaN.
        """
        if not self._checked and bool(scores.isnan().any()):
            raise ScoreError("the model's logits are NaN: load it with dtype='float32' or 'bfloat16'")
        self._checked = True
        return scores


class Listener(StoppingCriteria):
    """Is called after each token; ends the generation at a stop sequence, or when it is called off.

    Args:
        tokenizer: the model's.
        start: where the answer begins, in tokens.
        stop: texts that end the answer and do not belong to it.
        emit: takes each new piece of the text; what may be the beginning of a stop sequence waits.
        shares_model: let others use the model between two tokens, see `interruptible`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        start: int,
        stop: Sequence[str],
        emit: Callable[[str], None] | None = None,
        *,
        shares_model: bool = True,
    ) -> None:
        self._tokenizer, self._start, self._stop, self._emit = tokenizer, start, tuple(stop), emit
        self._shares_model = shares_model
        self._sent = ""
        self.first_token_at: float | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Whether each row is over, ``[B]``; only a single row is sent piece by piece."""
        self.first_token_at = self.first_token_at or time.perf_counter()
        over = torch.zeros(len(input_ids), dtype=torch.bool)
        if self._emit is not None or self._stop:
            for row, tokens in enumerate(input_ids[:, self._start :]):
                text, stopped = self.read(tokens)
                over[row] |= stopped
                if len(input_ids) == 1:
                    self._send(text if stopped else text[: len(text) - self._held(text)])
        check_interruption()
        if self._shares_model and not bool(over.all()):
            let_others_in()
        return over.to(input_ids.device)

    def read(self, token_ids: Tensor) -> tuple[str, bool]:
        """The answer so far without its stop sequence, and whether it met one."""
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True).lstrip()
        ends = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        return (text[: min(ends)], True) if ends else (text, False)

    def finish(self, text: str) -> None:
        """Send what was held back."""
        self._send(text)

    def _send(self, text: str) -> None:
        if self._emit is not None and len(text) > len(self._sent) and text.startswith(self._sent):
            self._emit(text[len(self._sent) :])
            self._sent = text

    def _held(self, text: str) -> int:
        """Characters at the end that are not sent yet."""
        sure = text.rstrip(_UNFINISHED)
        unfinished = len(text) - len(sure)
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for length in range(min(longest, len(sure)), 0, -1):
            if any(stop.startswith(sure[-length:]) for stop in self._stop):
                return length + unfinished
        return unfinished
