"""Files that are whole or not there."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile, mkdtemp


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Write `content` so that whoever looks finds the old file or the new one, never half of it."""
    path = Path(path)
    with NamedTemporaryFile("wb", dir=path.parent, prefix=path.name, delete=False) as handle:
        try:
            handle.write(content.encode("utf-8") if isinstance(content, str) else content)
            handle.close()
            os.chmod(handle.name, 0o666 & ~_umask())  # a temporary file is the owner's alone
            os.replace(handle.name, path)
        except BaseException:
            os.unlink(handle.name)
            raise


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
    mask = os.umask(0)
    os.umask(mask)
    return mask
