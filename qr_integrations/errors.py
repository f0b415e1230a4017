"""What can go wrong, drawn, then written. Every message ends with the cure.

QRError
├── InputError (ValueError)          the caller's arguments
│   ├── WindowError                  more tokens than the model holds
│   └── HeadError                    heads that the model does not have
├── ModelError (RuntimeError)        the model or its files
│   ├── LoadError                    wrong id, missing file, no space, no device
│   ├── UnsupportedModelError        a family whose attention cannot be read
│   ├── ClosedError                  used after close()
│   ├── MemoryLimitError             a pass does not fit into memory
│   └── ScoreError                   the model computed NaN
├── MissingExtra (ImportError)       an optional dependency is not installed
└── Cancelled                        the caller called it off
"""


class QRError(Exception):
    """Everything this package raises on purpose."""


class InputError(QRError, ValueError):
    """The caller's arguments cannot be used."""


class WindowError(InputError):
    """The prompt needs more tokens than the model holds."""


class HeadError(InputError):
    """Heads that the model does not have, or no heads known for the model."""


class ModelError(QRError, RuntimeError):
    """The model or its files cannot be used."""


class LoadError(ModelError):
    """The model could not be loaded: wrong id, missing file, no space, no such device."""


class UnsupportedModelError(ModelError):
    """The attention of this model family cannot be read."""


class ClosedError(ModelError):
    """The backend was used after `close()`."""


class MemoryLimitError(ModelError):
    """A pass through the model did not fit into the device's memory."""


class ScoreError(ModelError):
    """The model computed NaN or infinite attention."""


class Cancelled(QRError):
    """The caller called the work off."""


class MissingExtra(QRError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} needs an optional dependency: pip install 'qr-integrations[{extra}]'")
        self._given = (what, extra)

    def __reduce__(self) -> tuple[type["MissingExtra"], tuple[str, str]]:
        return MissingExtra, self._given
