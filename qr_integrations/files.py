"""Files that are whole or not there."""

import os
from pathlib import Path
from tempfile import NamedTemporaryFile


def write_whole(path: str | Path, text: str) -> None:
    """Write `text` so that whoever looks finds the old file or the new one, never half of it."""
    path = Path(path)
    with NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, prefix=path.name, delete=False) as handle:
        try:
            handle.write(text)
            handle.close()
            os.replace(handle.name, path)
        except BaseException:
            os.unlink(handle.name)
            raise
