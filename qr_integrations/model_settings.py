"""Which model an adapter reads with, and how it is loaded: on first use, once per process, never into a pickle.

It stands between the rooms and the roof; `langchain` and `llama_index` build on it. Importing it loads pydantic, which
both frameworks bring; the model's libraries are loaded on first use.
"""

from collections.abc import Iterator
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator

from qr_integrations.errors import InputError

if TYPE_CHECKING:
    from qr_integrations.backend import Backend

LOADING = (
    "device",
    "dtype",
    "device_map",
    "revision",
    "quantization",
    "attn_implementation",
    "local_files_only",
    "trust_remote_code",
    "model_kwargs",
)


class OpenedModels:
    """The backends that an adapter opened by name, by their settings. Its copies share them, a pickle leaves them out.

    Attributes:
        backends: by name and how they were loaded.
        lock: held while anything here is read or changed.
    """

    def __init__(self) -> None:
        self.backends: dict[str, Backend] = {}
        self.lock = Lock()

    def forget(self) -> "list[Backend]":
        """Keep nothing any more; returns the backends."""
        with self.lock:
            opened = list(self.backends.values())
            self.backends.clear()
            return opened

    def __deepcopy__(self, memo: dict[int, Any]) -> "OpenedModels":
        return self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OpenedModels)  # of two adapters the settings are compared

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


class LoadSettings(BaseModel):
    """Which model, and how to load it; all of it but `backend` can be JSON. Subclasses say what `open` makes of it.

    Attributes:
        model: a bundled name, a folder, or a hub id. It is loaded on first use, once per process.
        backend: a loaded `Backend`, instead of `model`.
        device, dtype, device_map, revision, quantization, attn_implementation, local_files_only, trust_remote_code,
            model_kwargs: for loading `model`, see `Backend.load`.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, validate_assignment=True, protected_namespaces=())

    model: str | None = None
    backend: Any = Field(default=None, exclude=True, repr=False)
    device: str = "auto"
    dtype: str = "auto"
    device_map: Any = None
    revision: str | None = None
    quantization: Any = None
    attn_implementation: str | None = None
    local_files_only: bool = False
    trust_remote_code: bool = False
    model_kwargs: dict[str, Any] | None = None

    _opened: OpenedModels = PrivateAttr(default_factory=OpenedModels)

    @field_validator("model", mode="before")
    @classmethod
    def _model_is_a_name(cls, model: Any) -> Any:
        return str(model) if isinstance(model, Path) else model

    @field_validator("dtype", mode="before")
    @classmethod
    def _dtype_is_a_name(cls, dtype: Any) -> Any:
        return str(dtype).removeprefix("torch.")

    @model_validator(mode="after")
    def _one_model(self) -> "LoadSettings":
        if self.backend is None:
            if self.model is None:
                raise InputError(
                    "no model: pass model='qr-mini' or 'qr-mini-vl' (bundled), a folder or a hub id, "
                    "or backend=Backend.load(...)"
                )
            return self
        self._check_backend()
        defaults = {name: type(self).model_fields[name].default for name in LOADING}
        loaded = {name: (self.backend.load_arguments or defaults)[name] for name in LOADING}
        other = [name for name in LOADING if name in self.model_fields_set and getattr(self, name) != loaded[name]]
        if other:
            raise InputError(f"the backend is loaded already: leave out {', '.join(other)}, or pass model=... instead")
        self.__dict__.update(loaded, model=self.backend.name)  # past the validators, of which this is one
        return self

    def _check_backend(self) -> None:
        from qr_integrations.backend import Backend

        if not isinstance(self.backend, Backend):
            raise InputError(
                f"the backend is a {type(self.backend).__name__}: pass what Backend.load(...) returns, or model='name'"
            )
        if self.model not in (None, self.backend.name):
            raise InputError(f"model={self.model!r} and a backend of {self.backend.name!r}: pass one of the two")

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """What differs from the defaults."""
        fields = type(self).model_fields
        return ((n, v) for n, v in super().__repr_args__() if n not in fields or v != fields[n].default)

    def __getstate__(self) -> dict[str, Any]:
        """Without the backend: what is needed to load it again stands in the settings."""
        if self.backend is not None and self.backend.load_arguments is None:
            self.backend.__reduce__()  # says why it cannot be
        state: dict[str, Any] = super().__getstate__()
        return {**state, "__dict__": {**state["__dict__"], "backend": None}}

    def _open_backend(self) -> "Backend":
        from qr_integrations.backend import Backend

        if self.backend is not None:
            self._check_backend()  # a copy may have been given another model
            return self.backend
        arguments = {name: getattr(self, name) for name in LOADING}
        with self._opened.lock:
            backend = self._opened.backends.get(key := repr((self.model, arguments)))
        if backend is None or backend.closed:
            assert self.model is not None
            backend = Backend.load(self.model, **arguments)
            with self._opened.lock:
                self._opened.backends[key] = backend
        return backend

    def close(self) -> None:
        """Let go of the weights, if they were loaded; other adapters with the same model let go of them too.

        A model given by name is loaded again when it is next used.
        """
        opened = self._opened.forget()
        for backend in opened if self.backend is None else [self.backend]:
            backend.close()


class ModelSettings(LoadSettings):
    """The settings of an adapter that uses the model itself; attributes are those of `LoadSettings`."""

    def open(self) -> "Backend":
        """The model behind the adapter; the first call loads it.

        Raises:
            LoadError: it cannot be loaded.
            ClosedError: the backend that was given is closed.
        """
        return self._open_backend()
