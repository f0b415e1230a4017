"""Memory that requests share."""

import pytest

from qr_integrations.serving.refusals import Overloaded
from qr_integrations.serving.room import Room


def test_one_may_take_all_and_two_may_not() -> None:
    room = Room(10, "bytes")
    with room.shared() as large:
        large.take(8)
        large.take(8)  # more than there is, but nobody else is there
        with room.shared() as small, pytest.raises(Overloaded, match="other requests hold 16 bytes") as refused:
            small.take(1)
        assert refused.value.retry_after
    assert room.taken == 0


def test_what_was_taken_comes_back_whatever_happens() -> None:
    room = Room(10, "bytes")
    with room.shared() as one, room.shared() as other:
        one.take(4)
        other.take(6)
        with pytest.raises(Overloaded):
            one.take(1)
    with pytest.raises(ZeroDivisionError), room.shared() as one:
        one.take(7)
        raise ZeroDivisionError
    assert room.taken == 0
