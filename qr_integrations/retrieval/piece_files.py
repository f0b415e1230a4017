"""Keys and values of single documents in a folder: a file each, named by its key, checked whenever it is read."""

import json
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from qr_integrations.backend import Piece, Stored
from qr_integrations.errors import InputError
from qr_integrations.files import write_whole

_log = logging.getLogger(__name__)
_ENDING = ".safetensors"
_ABANDONED = 3600  # seconds after which a half-written file belongs to nobody


class PieceFiles:
    """Pieces in a folder, the ones that were used last: so many bytes of them.

    Several processes may use one folder: a file is whole or not there, and one that vanished is read anew. What goes
    wrong with a file is logged, and costs only that it is read again.

    Raises:
        InputError: the folder cannot be made or read.
    """

    def __init__(self, folder: Path, max_bytes: int | None) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self._sizes: OrderedDict[str, int] = OrderedDict()  # least recently used first
        self._num_bytes = 0  # of all of them
        self._lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            found = sorted(_files(folder), key=lambda entry: entry[0])
        except OSError as error:
            raise InputError(f"{str(folder)!r} cannot hold documents ({error}): pass a folder to write to") from error
        for used, path, size in found:
            if path.suffix == _ENDING:
                self._note(path.stem, size)
            elif used < time.time() - _ABANDONED:
                _unlink(path)
        self._trim()

    def __len__(self) -> int:
        return len(self._sizes)

    def __contains__(self, key: str) -> bool:
        return key in self._sizes

    @property
    def num_bytes(self) -> int:
        """Of the files that this object knows."""
        return self._num_bytes

    def load(self, key: str) -> Piece | None:
        """A piece, in main memory; None where there is none, or none that is whole."""
        path = self._path(key)
        try:
            content = path.read_bytes()
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                _log.warning("%s cannot be read (%s): the document is read again", path, error)
            with self._lock:
                self._forget(key)
            return None
        try:
            piece = _unpacked(key, content)
        except (SafetensorError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
            _log.warning("%s is damaged (%s): it is removed, and the document is read again", path, error)
            self._remove(key)
            return None
        with suppress(OSError):
            os.utime(path)
        with self._lock:
            self._note(key, len(content))
        return piece

    def save(self, key: str, piece: Piece) -> None:
        """Keep a piece, in the place of an older one of that key."""
        content = _packed(key, piece)
        if self.max_bytes is not None and len(content) > self.max_bytes:
            return
        try:
            write_whole(self._path(key), content)
        except OSError as error:
            _log.warning("%s cannot be written (%s): the document is not kept on disk", self._path(key), error)
            return
        with self._lock:
            self._note(key, len(content))
        self._trim()

    def clear(self) -> None:
        """Remove all files."""
        with suppress(OSError):
            for _, path, _ in list(_files(self.folder)):
                _unlink(path)
        with self._lock:
            self._sizes.clear()
            self._num_bytes = 0

    def _trim(self) -> None:
        while True:
            with self._lock:
                if self.max_bytes is None or self._num_bytes <= self.max_bytes:
                    return
                key = next(iter(self._sizes))
                self._forget(key)
            _unlink(self._path(key))

    def _note(self, key: str, size: int) -> None:
        """It was used last."""
        self._forget(key)
        self._sizes[key] = size
        self._num_bytes += size

    def _forget(self, key: str) -> None:
        self._num_bytes -= self._sizes.pop(key, 0)

    def _remove(self, key: str) -> None:
        with self._lock:
            self._forget(key)
        _unlink(self._path(key))

    def _path(self, key: str) -> Path:
        return self.folder / (key + _ENDING)


def _files(folder: Path) -> Iterator[tuple[float, Path, int]]:
    """When each was last used, and its size; half-written ones too, and nothing that is somebody else's."""
    for entry in os.scandir(folder):
        stem, ending, _ = entry.name.partition(_ENDING)
        if ending and len(stem) == sha256().digest_size * 2 and set(stem) <= set("0123456789abcdef"):
            with suppress(FileNotFoundError):
                found = entry.stat()
                yield found.st_mtime, Path(entry.path), found.st_size


def _unlink(path: Path) -> None:
    with suppress(OSError):  # another process was faster, or has it open
        path.unlink()


def _packed(key: str, piece: Piece) -> bytes:
    tensors = {}
    for kind, layers in (("keys", piece.keys), ("values", piece.values)):
        for number, stored in enumerate(layers):
            if stored is not None:
                tensors[f"{number}.{kind}"] = stored.steps.cpu().contiguous()
                if stored.scale is not None:
                    tensors[f"{number}.{kind}.scale"] = stored.scale.cpu().contiguous()
    about = {"token_ids": json.dumps(piece.token_ids), "position": str(piece.position)}
    return save(tensors, {**about, "sha256": _digest(key, about, tensors)})


def _unpacked(key: str, content: bytes) -> Piece:
    """What `_packed` gave.

    Raises:
        ValueError: it is not what was written under this key.
        SafetensorError, LookupError, TypeError, AttributeError, RuntimeError: it is nothing of the kind.
    """
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    about, tensors = dict(header["__metadata__"]), load(content)
    if about.pop("sha256") != _digest(key, about, tensors):
        raise ValueError("its sum does not match")
    num_layers = sum(name.endswith(".keys") for name in tensors)

    def stored(name: str) -> Stored:
        return Stored(tensors[name], tensors.get(f"{name}.scale"))

    return Piece(
        tuple(json.loads(about["token_ids"])),
        int(about["position"]),
        tuple(stored(f"{i}.keys") for i in range(num_layers)),
        tuple(stored(f"{i}.values") if f"{i}.values" in tensors else None for i in range(num_layers)),
    )


def _digest(key: str, about: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    digest = sha256(json.dumps([key, sorted(about.items())]).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
