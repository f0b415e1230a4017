"""Long work that can be called off, and work that lets shorter work in: between passes, and between two tokens."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


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

    It holds for this thread and for what is started in a copy of its context, such as streams.

    Args:
        check: called before every pass (a chunk of a long text is one), before every token of an answer, and while
            waiting for a model; what it raises, such as `Cancelled`, ends the work and leaves nothing behind.
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


def check_interruption() -> None:
    """Whether to go on; raises what the caller's `check` raises."""
    _current.get().check()


def let_others_in() -> None:
    """The model may be used for something else before the next token."""
    _current.get().between_tokens()


def may_be_interrupted() -> bool:
    """Whether anybody may call this off."""
    return _current.get().check is not _nothing
