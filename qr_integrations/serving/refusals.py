"""Why a request is refused though nothing is wrong with what it says; `http_errors` has their statuses."""

from qr_integrations.errors import InputError, QRError


class Refused(QRError):
    """The server does not do it, or not now.

    Attributes:
        retry_after: seconds after which it is worth asking again; None: never.
    """

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[object, ...]:
        return _made, (type(self), str(self), self.retry_after)


class Overloaded(Refused):
    """The queue is full."""


class NotReady(Refused):
    """Models are being loaded, or the server is shutting down."""


class OutOfTime(Refused):
    """The request's time is over."""


class WorkerLost(Refused):
    """The process that did the work is gone, and no other one took it over."""


class TooLarge(InputError):
    """More than the server takes: bytes, documents, tokens, pictures."""


class UnknownModel(InputError):
    """No such model is served."""


def _made(kind: type[Refused], message: str, retry_after: float | None) -> Refused:
    return kind(message, retry_after=retry_after)
