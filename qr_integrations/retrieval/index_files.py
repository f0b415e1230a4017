"""A `DocumentIndex` on disk: a folder that holds the old index or the new one, whatever happens meanwhile.

``index.json``            what the index is, which files belong to it, and digests of all of them and of itself
``documents-*.jsonl``     the documents, one a line
``window-*.safetensors``  keys and values of one window, read where they lie on the disk when they are needed

Files are named after what they hold and never written to again. New ones come first, then the manifest takes the place
of the old one in one step, then what it does not name is removed.
"""

import json
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from safetensors import SafetensorError

from qr_integrations.backend import Backend, KeptDtype, ModelIdentity, Prefix, cut, join
from qr_integrations.backend.mapped_pieces import piece_chunks, read_piece
from qr_integrations.errors import InputError, LoadError
from qr_integrations.files import locked_folder, sync_folder, write_by_content, write_whole
from qr_integrations.retrieval.document_lines import as_lines, from_lines
from qr_integrations.retrieval.heads import HeadSet
from qr_integrations.retrieval.icr import ICRReranker
from qr_integrations.retrieval.kept_windows import Window
from qr_integrations.retrieval.layout import PromptStyle
from qr_integrations.retrieval.qrhead import QRHeadReranker
from qr_integrations.retrieval.reranker import AttentionReranker
from qr_integrations.retrieval.windows import Candidate
from qr_integrations.types import Document, Span
from qr_integrations.version import __version__

FORMAT, VERSION = "qr-integrations document index", 1
MANIFEST = "index.json"
_NAME = re.compile(r"window-[0-9a-f]{32}\.safetensors|documents-[0-9a-f]{32}\.jsonl")
_UNFINISHED = re.compile(rf"(\.writing-|{re.escape(MANIFEST)})[a-z0-9_]{{8}}")
_RERANKERS = {kind.__name__: kind for kind in (AttentionReranker, ICRReranker, QRHeadReranker)}
_ATTEMPTS = 5
_REBUILD = "restore the folder from a copy, or build the index again"


@dataclass(frozen=True, slots=True)
class IndexContents:
    """What a `DocumentIndex` is made of.

    Attributes:
        reranker, kept, whole, documents, windows: as there.
    """

    reranker: AttentionReranker
    kept: KeptDtype
    whole: bool
    documents: tuple[Document, ...]
    windows: tuple[Window, ...]


@dataclass(frozen=True, slots=True)
class _File:
    """A file of an index; `stamp` tells whether it is still the one that was written or read."""

    name: str
    size: int
    sha256: str
    stamp: tuple[int, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {"name": self.name, "size": self.size, "sha256": self.sha256}

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> "_File":
        name, size, digest = (entry[key] for key in ("name", "size", "sha256"))
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise LoadError(f"the manifest names {name!r}, which is no file of an index: {_REBUILD}")
        return cls(name, size, digest)


_places: WeakKeyDictionary[Any, dict[Path, _File]] = WeakKeyDictionary()  # where the cache of a window is on disk
_placing = threading.Lock()


# ---- writing


def write_index(folder: str | Path, contents: IndexContents) -> None:
    """Write an index, or what is new of it, into a folder of its own.

    Of two that write into one folder at the same time, the last one stays.

    Raises:
        InputError: a folder that holds something else, a document that JSON cannot hold, or a reranker of a class of
            your own; nothing is written then.
        OSError: the disk refuses; what was there before stays.
    """
    folder = Path(folder).resolve()
    lines = list(as_lines(contents.documents))
    settings = _settings(contents)
    _make(folder)
    with locked_folder(folder):
        _check_own(folder)
        documents = _File(*write_by_content(folder, lines, "documents-{}.jsonl"))
        files = [_written(folder, window.prefix) for window in contents.windows]
        windows = [
            {"file": file.as_dict(), **_window_entry(window)}
            for file, window in zip(files, contents.windows, strict=True)
        ]
        sync_folder(folder)
        manifest = {**settings, "documents": documents.as_dict(), "windows": windows}
        write_whole(folder / MANIFEST, json.dumps({**manifest, "digest": _own_digest(manifest)}), durable=True)
        sync_folder(folder)
        _tidy(folder, {documents.name, *(file.name for file in files)})


def _settings(contents: IndexContents) -> dict[str, Any]:
    """All that the reranker is rebuilt from."""
    reranker, scorer = contents.reranker, contents.reranker.scorer
    kind = type(reranker).__name__
    if _RERANKERS.get(kind) is not type(reranker):
        raise InputError(f"an index with a {kind} cannot be saved: build it with one of {', '.join(_RERANKERS)}")
    return {
        "format": FORMAT,
        "version": VERSION,
        "written_by": __version__,
        "model": ModelIdentity.of(reranker.backend).as_dict(),
        "reranker": {
            "kind": kind,
            "heads": reranker.heads.as_dict(),
            "style": asdict(scorer.style),
            "calibrated": scorer.calibrated,
            "instruction": reranker.instruction,
            "null_instruction": scorer.null_instruction,
            "limits": asdict(reranker.limits),
            "refinements": asdict(reranker.refinements),
        },
        "kept": contents.kept,
        "whole": contents.whole,
    }


def _make(folder: Path) -> None:
    if folder.is_dir():
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"{str(folder)!r} is no folder: pass one, or a path where nothing is yet") from error
    sync_folder(folder.parent)


def _check_own(folder: Path) -> None:
    """Nothing of others is here: an index, or what a first save left that was stopped."""
    with suppress(OSError, ValueError, RecursionError):
        manifest = json.loads((folder / MANIFEST).read_bytes())
        if isinstance(manifest, dict) and manifest.get("format") == FORMAT:
            return
    others = sorted(path.name for path in folder.iterdir() if not _is_ours(path.name))
    if others:
        raise InputError(
            f"{str(folder)!r} holds {others[0]!r} and no index: pass an empty folder, or one that DocumentIndex.save "
            "made"
        )


def _is_ours(name: str) -> bool:
    return bool(_NAME.fullmatch(name) or _UNFINISHED.fullmatch(name))


def _written(folder: Path, prefix: Prefix) -> _File:
    """The file of a window; one that is there already is not written again."""
    with _placing:
        known = _places.get(prefix.cache, {}).get(folder)
    if known is not None and known.stamp and known.stamp == _stamp(folder / known.name):
        return known
    whole = cut(prefix, [Span(0, len(prefix))])[0]
    file = _File(*write_by_content(folder, piece_chunks(whole), "window-{}.safetensors"))
    _note(folder, prefix, file)
    return file


def _note(folder: Path, prefix: Prefix, file: _File) -> None:
    """Remember that a window is on disk, for as long as it is in memory."""
    with _placing:
        _places.setdefault(prefix.cache, {})[folder] = replace(file, stamp=_stamp(folder / file.name))


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError:  # removed meanwhile
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _window_entry(window: Window) -> dict[str, Any]:
    prefix = window.prefix
    assert prefix.cache is not None
    top: Any = prefix.cache.layers[-1]
    return {
        "tokens": _digest(prefix.token_ids),
        "blocks": [[block.start, block.stop] for block in prefix.blocks],
        "block_positions": prefix.block_positions,
        "next_position": prefix.next_position,
        "top_heads": top.heads,
        "num_top_heads": top.num_heads,
        "candidates": [_candidate_entry(candidate) for candidate in window.candidates],
    }


def _candidate_entry(candidate: Candidate) -> dict[str, Any]:
    given, read, start = candidate.given, candidate.read, candidate.start
    assert given.text.startswith(read.text, start) and (given.title or "").startswith(read.title or "")
    numbers = ("index", "num_tokens", "cost", "document_tokens", "num_tokens_cut", "start")
    title = None if read.title is None else len(read.title)
    return {**{name: getattr(candidate, name) for name in numbers}, "text": len(read.text), "title": title}


def _digest(token_ids: Sequence[int]) -> str:
    return sha256(np.asarray(token_ids, dtype="<i8").tobytes()).hexdigest()


def _own_digest(manifest: Mapping[str, Any]) -> str:
    own = {name: value for name, value in manifest.items() if name != "digest"}
    return sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()


def _tidy(folder: Path, named: set[str]) -> None:
    """Remove what no index needs; who has it mapped keeps it."""
    for path in folder.iterdir():
        if path.name not in named and _is_ours(path.name):
            with suppress(OSError):  # Windows keeps files that are mapped; the next save removes them
                os.unlink(path)


# ---- reading


def read_index(folder: str | Path, model: Backend | str | Path | None, *, verify: bool) -> IndexContents:
    """What `write_index` wrote last. Keys and values stay on the disk until they are needed, where they lie on a CPU.

    Args:
        folder: where.
        model: the one it was built with, or its name; None loads it by the name in the manifest.
        verify: read all files once and compare their digests; else their sizes only.

    Raises:
        LoadError: there is no index, it is damaged, or of another model, tokenizer or version.
    """
    folder = Path(folder).resolve()
    manifest = _read_manifest(folder)
    for _ in range(_ATTEMPTS):
        try:
            with _explained(folder):
                return _read(folder, manifest, model, verify=verify)
        except FileNotFoundError as error:
            before, manifest = manifest, _read_manifest(folder)
            if before == manifest:
                raise LoadError(f"{str(error.filename or error)!r} is missing: {_REBUILD}") from error
    raise LoadError(f"the index in {str(folder)!r} is being written again and again: load it when that is over")


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise LoadError(f"there is no index at {str(folder)!r}: pass a folder that DocumentIndex.save made") from error
    except OSError as error:
        raise LoadError(f"{str(path)!r} cannot be read ({error}): see to its rights and its disk") from error
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{str(path)!r} is no JSON ({error}): {_REBUILD}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise LoadError(f"{str(path)!r} is of something else: pass a folder that DocumentIndex.save made")
    version = manifest.get("version")
    if isinstance(version, int) and version > VERSION:
        raise LoadError(
            f"{str(folder)!r} has format {version}, this version of qr-integrations reads {VERSION}: upgrade "
            f"qr-integrations, it was written by {manifest.get('written_by')}"
        )
    if version != VERSION or manifest.get("digest") != _own_digest(manifest):
        raise LoadError(f"{str(path)!r} was changed after it was written: {_REBUILD}")
    return manifest


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """What goes wrong in a file that was written by something else, in our words."""
    try:
        yield
    except (FileNotFoundError, LoadError):
        raise
    except (OSError, SafetensorError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise LoadError(f"the index in {str(folder)!r} cannot be read ({error}): {_REBUILD}") from error


def _read(
    folder: Path, manifest: Mapping[str, Any], model: Backend | str | Path | None, *, verify: bool
) -> IndexContents:
    name = manifest["model"]["name"] if model is None else model
    backend = name if isinstance(name, Backend) else Backend.load(name)
    ModelIdentity.of(backend).check(manifest["model"], f"the index in {str(folder)!r}")
    reranker = _reranker(backend, manifest["reranker"])
    documents = tuple(from_lines(_checked(folder, manifest["documents"], verify=verify).read_bytes()))
    windows = [_window(folder, entry, reranker, documents, verify=verify) for entry in manifest["windows"]]
    return IndexContents(reranker, manifest["kept"], manifest["whole"], documents, tuple(windows))


def _reranker(backend: Backend, entry: Mapping[str, Any]) -> AttentionReranker:
    heads = dict(entry["heads"])
    settings = {name: entry[name] for name in ("calibrated", "instruction", "null_instruction", "refinements")}
    kind = _RERANKERS[entry["kind"]]
    reranker = kind.__new__(kind)  # their own constructors choose heads and style, which are known here
    chosen, style = HeadSet.of(heads.pop("heads"), **heads), PromptStyle(**entry["style"])
    AttentionReranker.__init__(reranker, backend, chosen, style, **settings, **entry["limits"])
    return reranker


def _checked(folder: Path, entry: Mapping[str, Any], *, verify: bool) -> Path:
    """The path of a file that is as long as it was, and holds what it did."""
    file = _File.of(entry)
    path = folder / file.name
    with path.open("rb") as handle:
        size = os.fstat(handle.fileno()).st_size
        if size != file.size:
            raise LoadError(f"{str(path)!r} has {size:,} bytes, {file.size:,} were written: {_REBUILD}")
        if verify and file_digest(handle, "sha256").hexdigest() != file.sha256:
            raise LoadError(f"{str(path)!r} does not hold what was written: {_REBUILD}")
    return path


def _window(
    folder: Path, entry: Mapping[str, Any], reranker: AttentionReranker, documents: Sequence[Document], *, verify: bool
) -> Window:
    candidates = tuple(_candidate(one, documents) for one in entry["candidates"])
    reading = reranker.scorer.lay_out([candidate.read for candidate in candidates])
    if _digest(reading.shared_ids) != entry["tokens"]:
        raise LoadError(
            f"the index in {str(folder)!r} was built of other tokens than the tokenizer of {reranker.backend.name!r} "
            "makes of the same documents: load the tokenizer and chat template it was built with, or build it again"
        )
    path = _checked(folder, entry["file"], verify=verify)
    piece = read_piece(path, reading.shared_ids, reranker.backend.device)
    heads = None if entry["top_heads"] is None else tuple(entry["top_heads"])
    dtype = reranker.backend.model.dtype
    reading.prefix = replace(
        join([piece], dtype=dtype, top_heads=heads, num_top_heads=entry["num_top_heads"]),
        blocks=tuple(Span(*block) for block in entry["blocks"]),
        block_positions=tuple(entry["block_positions"]),
        next_position=entry["next_position"],
    )
    _note(folder, reading.prefix, _File.of(entry["file"]))
    return Window(candidates, reading)


def _candidate(entry: Mapping[str, Any], documents: Sequence[Document]) -> Candidate:
    numbers = dict(entry)
    length, title = numbers.pop("text"), numbers.pop("title")
    given = documents[numbers["index"]]
    text = given.text[numbers["start"] : numbers["start"] + length]
    shown = None if given.title is None or title is None else given.title[:title]
    read = given if (text, shown) == (given.text, given.title) else replace(given, text=text, title=shown)
    return Candidate(given=given, read=read, **numbers)
