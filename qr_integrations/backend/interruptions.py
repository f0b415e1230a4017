"""Long work that can be called off, and work that lets shorter work in: between passes, and between two tokens."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

_PATIENCE = 0.1  # seconds


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True)
class _Interruptions:
    check: Callable[[], None] = _nothing
    between_tokens: Callable[[], None] = _nothing


_current: ContextVar[_Interruptions] = ContextVar("interruptions", default=_Interruptions())  # noqa: B039 - frozen


@contextmanager
def interruptible(check: Callable[[], None], between_tokens: Callable[[], None] | None = None) -> Iterator[None]:
    """Within the block, passes through models can be called off.

    It holds for this thread and for what is started in a copy of its context, such as streams of which the first piece
    is asked for in the block.

    Args:
        check: called before every pass (a chunk of a long text is one, so is a picture), before every token of an
            answer, and while waiting for a model; what it raises, such as `Cancelled`, ends the work and leaves nothing
            behind.
        between_tokens: called after every token of an answer, where the model may be used for something else. Not where
            tokens were pruned: the layers then are not as they were.

    Example:
        >>> from qr_integrations import Backend, QRHeadReranker
        >>> from qr_integrations.backend import interruptible
        >>> from qr_integrations.errors import Cancelled
        >>> def check():
        ...     raise Cancelled("nobody waits for this any more")
        >>> with interruptible(check):
        ...     QRHeadReranker("qr-mini").rank("who?", ["a cat", "a dog"])
        Traceback (most recent call last):
        qr_integrations.errors.Cancelled: nobody waits for this any more
    """
    outer = _current.get()

    def check_all() -> None:
        outer.check()
        check()

    token = _current.set(_Interruptions(check_all, between_tokens or outer.between_tokens))
    try:
        yield
    finally:
        _current.reset(token)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Within the block nothing is called off: for a few tokens whose outcome is remembered."""
    token = _current.set(_Interruptions())
    try:
        yield
    finally:
        _current.reset(token)


@contextmanager
def held(lock: Any) -> Iterator[None]:
    """Hold a lock; waiting for it can be called off."""
    check_interruption()
    while not lock.acquire(timeout=-1 if _current.get().check is _nothing else _PATIENCE):
        check_interruption()
    try:
        yield
    finally:
        lock.release()


def check_interruption() -> None:
    """Whether to go on; raises what the caller's `check` raises."""
    _current.get().check()


def let_others_in() -> None:
    """The model may be used for something else before the next token."""
    _current.get().between_tokens()
