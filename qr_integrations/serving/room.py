"""Memory that all requests share: whoever finds none left comes back later."""

from collections.abc import Iterator
from contextlib import contextmanager

from qr_integrations.serving.refusals import Overloaded

_SOON = 2.0  # seconds


class Room:
    """So much of something, for all requests together; for one event loop.

    Args:
        size: how much there is.
        what: it is, in words: ``"bytes of requests"``.
    """

    def __init__(self, size: int, what: str) -> None:
        self.size, self.what = size, what
        self.taken = 0

    @contextmanager
    def shared(self) -> Iterator["Share"]:
        """What one request takes; given back at the end of the block."""
        share = Share(self)
        try:
            yield share
        finally:
            self.taken -= share.taken


class Share:
    """What one request has taken of a `Room`."""

    def __init__(self, room: Room) -> None:
        self.room = room
        self.taken = 0

    def take(self, amount: int) -> None:
        """Take more; one request alone may take all.

        Raises:
            Overloaded: there is not so much left.
        """
        others = self.room.taken - self.taken
        if others and self.room.taken + amount > self.room.size:
            raise Overloaded(
                f"other requests hold {others:,} {self.room.what}, there is room for {self.room.size:,}: ask again",
                retry_after=_SOON,
            )
        self.room.taken += amount
        self.taken += amount
