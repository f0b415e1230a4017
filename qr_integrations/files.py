"""Files that are whole or not there."""

import os
import shutil
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from tempfile import NamedTemporaryFile, mkdtemp
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_asking = threading.Lock()


def write_whole(path: str | Path, content: str | bytes | Iterable[str], *, durable: bool = False) -> None:
    """Write `content` so that whoever looks finds the old file or the new one, never half of it.

    Pieces of text are written one after the other; if making one fails, the old file stays. `durable`: it is on the
    disk when this returns; its name is after `sync_folder`.
    """
    path = Path(path)
    with _unnamed(path.parent, path.name) as handle:
        for piece in [content] if isinstance(content, str | bytes) else content:
            handle.write(piece.encode("utf-8") if isinstance(piece, str) else piece)
        _take_name(handle, path, durable=durable)


def write_by_content(folder: str | Path, chunks: Iterable[bytes | memoryview], name: str) -> tuple[str, int, str]:
    """Write a file that is named after what it holds; it is on the disk when this returns.

    Args:
        folder: where; until the file has its name, it has one that begins with ``.writing-``.
        chunks: its bytes.
        name: with ``{}`` in the place of 32 digits of the digest.

    Returns:
        Its name, its size in bytes and its SHA-256.
    """
    digest, size = sha256(), 0
    with _unnamed(Path(folder), ".writing-") as handle:
        for chunk in chunks:
            handle.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        name = name.format(digest.hexdigest()[:32])
        _take_name(handle, Path(folder) / name, durable=True)
    return name, size, digest.hexdigest()


def sync_folder(folder: str | Path) -> None:
    """Which files a folder holds is on the disk when this returns, where the system can be asked to."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def locked_folder(folder: str | Path, *, wait: bool = True) -> Iterator[None]:
    """One thread of one process at a time, where the system has such locks; they end with the process.

    Raises:
        BlockingIOError: another one has it, and `wait` is false.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:  # some file systems of networks have none
            pass
        yield
    finally:
        os.close(handle)


@contextmanager
def _unnamed(folder: Path, prefix: str) -> Iterator[IO[bytes]]:
    """A file to fill, for `_take_name`; gone if the block fails."""
    with NamedTemporaryFile("wb", dir=folder, prefix=prefix, delete=False) as handle:
        try:
            yield handle
        except BaseException:
            with suppress(OSError):  # whatever went wrong is what is told
                os.unlink(handle.name)
            raise


def _take_name(handle: IO[bytes], path: Path, *, durable: bool) -> None:
    handle.flush()
    if durable:
        os.fsync(handle.fileno())
    handle.close()
    os.chmod(handle.name, 0o666 & ~_umask())  # a temporary file is the owner's alone
    os.replace(handle.name, path)


@contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `path` when the block ends; if it fails, nothing is left of it.

    What was at `path` is gone then, or, if anything fails, still there. A link is followed.
    """
    path = Path(path).resolve()
    filling = _beside(path)
    try:
        yield filling
        filling.chmod(0o777 & ~_umask())
        _take_place(filling, path)
    except BaseException:
        shutil.rmtree(filling, ignore_errors=True)
        raise


def _take_place(filling: Path, path: Path) -> None:
    if not path.exists():
        filling.rename(path)
        return
    holder = _beside(path)
    old = holder / path.name
    try:
        path.rename(old)
        filling.rename(path)
    except BaseException:
        if old.exists():
            old.rename(path)
        holder.rmdir()
        raise
    shutil.rmtree(holder, ignore_errors=True)


def _beside(path: Path) -> Path:
    return Path(mkdtemp(dir=path.parent, prefix=f".{path.name}-"))


def _umask() -> int:
    with _asking:  # it can only be asked by setting it
        mask = os.umask(0)
        os.umask(mask)
    return mask
