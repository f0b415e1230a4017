"""One door to the readers: what a path holds is seen from its name."""

from pathlib import Path

from qr_integrations.errors import InputError
from qr_integrations.evaluation.beir import read_beir
from qr_integrations.evaluation.lists import read_lists
from qr_integrations.evaluation.official import read_official
from qr_integrations.types import JudgedList

_CURE = "pass a BEIR folder, a .jsonl file of lists, or a .json file of the QRHead authors' scripts"


def read_data(
    path: str | Path,
    *,
    split: str = "test",
    run: str | Path | None = None,
    depth: int = 100,
    skip_unknown: bool = False,
) -> list[JudgedList]:
    """The judged lists of a folder (`read_beir`), of a ``.jsonl`` (`read_lists`) or of a ``.json`` (`read_official`).

    Files may be packed as ``.gz``. Their lists come whole: the other arguments are for folders, see `read_beir`.

    Raises:
        InputError: the path is none of these, a run is given for a file, or what the readers say.
        MissingExtra: a folder, no run, and bm25s is not installed.
    """
    path = Path(path)
    if path.is_dir():
        return read_beir(path, split=split, run=run, depth=depth, skip_unknown=skip_unknown)
    if not path.exists():
        raise InputError(f"there is no {str(path)!r}: {_CURE}")
    if run is not None:
        raise InputError(f"{str(path)!r} brings its own candidates: pass a run with a BEIR folder only")
    kind = Path(path.name.removesuffix(".gz")).suffix
    if kind == ".json":
        return read_official(path)
    if kind not in (".jsonl", ".ndjson"):
        raise InputError(f"what {str(path)!r} holds cannot be seen from its name: {_CURE}")
    if not (lists := list(read_lists(path))):
        raise InputError(f"{str(path)!r} is empty: {_CURE}")
    return lists
