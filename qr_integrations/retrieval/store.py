"""A store for documents that come back in other lists: the keys and values of each are kept, in memory and on disk.

What the model computes of a document depends on what it sees before it. With ``layout="block"`` that is the beginning
of the prompt only, and a document is found again in any list, at any place. With ``"joint"`` it is all documents before
it too, and a list is found as far as it begins like an earlier one.
"""

import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from qr_integrations.backend import Backend, KeptDtype, ModelIdentity, Piece, Prefix, check_kept_dtype, cut, join
from qr_integrations.backend.blocks import check_reach
from qr_integrations.errors import InputError
from qr_integrations.retrieval.layout import PromptLayout
from qr_integrations.retrieval.piece_files import PieceFiles
from qr_integrations.types import Span

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CacheStats:
    """What a `DocumentCache` did and holds.

    Attributes:
        hits, misses: documents that were there, and that were read.
        num_bytes, disk_bytes: of the keys and values in memory, and of the files.
    """

    hits: int
    misses: int
    num_bytes: int
    disk_bytes: int


@dataclass(frozen=True, slots=True)
class _Entry:
    piece: Piece
    on_disk: bool


@dataclass(frozen=True, slots=True)
class _Parts:
    """A prompt before its query in parts: the beginning, then each document with what stands behind it.

    `keys` say of each what was read, what it saw, and by which model.
    """

    spans: tuple[Span, ...]
    texts: tuple[tuple[int, ...], ...]
    keys: tuple[str, ...]
    are_blocks: bool

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(token for text in self.texts for token in text)


@dataclass(frozen=True, slots=True)
class _Asked:
    """For whom, how deep, and whether the top layer's values are wanted."""

    backend: Backend
    top_layer: int
    values: bool


class DocumentCache:
    """Keys and values of documents, for any number of rerankers, models and threads.

    Example:
        >>> from qr_integrations import QRHeadReranker
        >>> from qr_integrations.retrieval.store import DocumentCache
        >>> cache = DocumentCache()
        >>> reranker = QRHeadReranker("qr-mini", cache=cache, refinements={"layout": "block"})
        >>> cats, dracula = "Cats sleep.", "Dracula was written by Bram Stoker."
        >>> reranker.rank("who wrote dracula", [cats, dracula])[0].index
        1
        >>> reranker.rank("what do cats do", [dracula, cats, "Danube: a river."])[0].index
        1
        >>> cache.stats().hits, cache.stats().misses
        (2, 3)

    What is used least goes first: from memory to the folder, if there is one, and from there for good. A piece that
    was kept through all layers serves those who need fewer, not the other way round. Models whose layers keep more
    than keys and values of single tokens are read every time.

    Copies share the store. A pickled one is empty when it comes back, but for its folder.
    """

    def __init__(
        self,
        max_bytes: int = 2**30,
        *,
        folder: str | Path | None = None,
        max_disk_bytes: int | None = None,
        kv_dtype: KeptDtype = "auto",
    ) -> None:
        """Args:
        max_bytes: memory for keys and values, on the models' devices. A document that needs more is not kept there.
        folder: where they go when there is no more room in memory, and come back from, also in a later process; None
            drops them.
        max_disk_bytes: of the files in the folder; None sets no limit.
        kv_dtype: how keys and values are kept: as the model computes them, as ``"float32"``, ``"float16"``,
            ``"bfloat16"`` or ``"int8"``.

        Raises:
            InputError: a negative size, an unknown `kv_dtype`, a folder that cannot be used.
        """
        check_kept_dtype(kv_dtype)
        if max_bytes < 0 or (max_disk_bytes or 0) < 0:
            raise InputError(f"there is no room of {min(max_bytes, max_disk_bytes or 0)} bytes: pass 0 or more")
        if max_disk_bytes is not None and folder is None:
            raise InputError("max_disk_bytes limits a folder: pass folder too")
        self.max_bytes, self.kv_dtype, self.max_disk_bytes = max_bytes, kv_dtype, max_disk_bytes
        self.folder = None if folder is None else Path(folder)
        self._files = None if self.folder is None else PieceFiles(self.folder, max_disk_bytes)
        self._memory: OrderedDict[str, _Entry] = OrderedDict()  # least recently used first
        self._num_bytes = self._hits = self._misses = 0
        self._unable: set[str] = set()
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return (
            f"DocumentCache({self._num_bytes / 2**20:.1f} of {self.max_bytes / 2**20:.1f} MiB, "
            f"folder={self.folder and str(self.folder)!r}, kv_dtype={self.kv_dtype!r})"
        )

    def __copy__(self) -> "DocumentCache":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "DocumentCache":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _made, (self.max_bytes, self.folder, self.max_disk_bytes, self.kv_dtype)

    def __len__(self) -> int:
        """Pieces in memory: documents, and what prompts begin with."""
        return len(self._memory)

    def stats(self) -> CacheStats:
        """What was found and read so far, and what is held now."""
        with self._lock:
            disk_bytes = 0 if self._files is None else self._files.num_bytes
            return CacheStats(self._hits, self._misses, self._num_bytes, disk_bytes)

    def clear(self) -> None:
        """Drop everything, the folder's files too."""
        with self._lock:
            self._memory.clear()
            self._num_bytes = 0
        if self._files is not None:
            self._files.clear()

    def flush(self) -> None:
        """Write what is in memory only to the folder, so that a later process finds it."""
        with self._lock:
            held = list(self._memory.items())
        for key, entry in held:
            self._write(key, entry)
            with self._lock:
                if self._memory.get(key) is entry:
                    self._memory[key] = replace(entry, on_disk=self._files is not None)

    def read(self, backend: Backend, layout: PromptLayout, *, top_layer: int, values: bool = False) -> Prefix:
        """Keys and values of everything before the query; only the documents that are not there go through the model.

        Args:
            backend: the model.
            layout: the prompt.
            top_layer: the deepest layer that will be tapped.
            values: the top layer's values too, for passes through the layers above.

        Raises:
            UnsupportedModelError: the documents are blocks, and the model's layers are recurrent or do not see that
                far.
        """
        asked, parts = _Asked(backend, top_layer, values), _parts_of(backend, layout, self.kv_dtype)
        pieces = self._find(parts, asked)
        if None in pieces:
            with backend.locked():  # of several threads that lack a document, one reads it
                pieces = self._find(parts, asked)
                if None in pieces:
                    return self._filled(parts, asked, pieces)
        self._count(hits=len(pieces) - 1, misses=0)
        self._touch(parts.keys)
        return _joined(pieces, asked)

    def _find(self, parts: _Parts, asked: _Asked) -> list[Piece | None]:
        """What is there; None for the others, and for all that stands behind a missing one, unless they are blocks."""
        pieces: list[Piece | None] = [None] * len(parts.keys)
        for number, (key, text) in enumerate(zip(parts.keys, parts.texts, strict=True)):
            pieces[number] = self._get(key, text, asked)
            if pieces[number] is None and not parts.are_blocks:
                break
        return pieces

    def _get(self, key: str, text: tuple[int, ...], asked: _Asked) -> Piece | None:
        with self._lock:
            entry = self._memory.get(key)
        piece = None if entry is None else entry.piece
        if piece is None and self._files is not None:
            piece = self._files.load(key)
        if piece is None or piece.token_ids != text or not _reaches(piece, asked):
            return None
        piece = _beside_its_layers(piece, asked.backend)
        if entry is None:
            self._keep(key, _Entry(piece, on_disk=True))
        return _without_upper_layers(piece, asked.top_layer)

    def _filled(self, parts: _Parts, asked: _Asked, pieces: Sequence[Piece | None]) -> Prefix:
        """Read the missing pieces, and keep them: all or none."""
        hits = sum(piece is not None for piece in pieces[1:])
        prefix, spans = _read(parts, asked, pieces)
        self._count(hits, len(pieces) - 1 - hits)
        if not _is_plain(prefix, asked.top_layer):
            self._say_unable(asked.backend.name)
            return prefix
        new = iter([piece.own() for piece in cut(prefix, spans, dtype=self.kv_dtype)])
        del prefix
        all_pieces = [next(new) if piece is None else piece for piece in pieces]
        for number in reversed(range(len(pieces))):  # what others stand on goes last
            self._keep(parts.keys[number], _Entry(all_pieces[number], on_disk=pieces[number] is not None))
        return _joined(all_pieces, asked)

    def _keep(self, key: str, entry: _Entry) -> None:
        """Into memory, or, if it has no room there, to the folder. The deeper one of two is kept, or the older one."""
        out: list[tuple[str, _Entry]] = []
        with self._lock:
            known = self._memory.get(key)
            if known is not None and _depth(known.piece) >= _depth(entry.piece):
                self._memory.move_to_end(key)
            elif entry.piece.num_bytes > self.max_bytes:
                out.append((key, entry))
            else:
                self._num_bytes += entry.piece.num_bytes - (known.piece.num_bytes if known else 0)
                self._memory[key] = entry
                self._memory.move_to_end(key)
            while self._num_bytes > self.max_bytes:
                out.append(self._memory.popitem(last=False))
                self._num_bytes -= out[-1][1].piece.num_bytes
        for oldest in out:
            self._write(*oldest)

    def _touch(self, keys: Sequence[str]) -> None:
        """They were used; what others stand on goes last."""
        with self._lock:
            for key in reversed(keys):
                if key in self._memory:
                    self._memory.move_to_end(key)

    def _write(self, key: str, entry: _Entry) -> None:
        if self._files is not None and not (entry.on_disk and key in self._files):
            self._files.save(key, entry.piece)

    def _count(self, hits: int, misses: int) -> None:
        with self._lock:
            self._hits += hits
            self._misses += misses

    def _say_unable(self, name: str) -> None:
        with self._lock:
            is_known = name in self._unable
            self._unable.add(name)
        if not is_known:
            _log.warning("%s keeps more than keys and values of single tokens: its documents are read every time", name)


def _made(max_bytes: int, folder: Path | None, max_disk_bytes: int | None, kv_dtype: KeptDtype) -> DocumentCache:
    return DocumentCache(max_bytes, folder=folder, max_disk_bytes=max_disk_bytes, kv_dtype=kv_dtype)


def _parts_of(backend: Backend, layout: PromptLayout, kv_dtype: KeptDtype) -> _Parts:
    """A piece's key is that of what it saw, hashed with its own tokens: the beginning, or the document before it."""
    starts = [block.start for block in layout.blocks] or sorted({span.start for span in layout.documents})
    spans = tuple(Span(*span) for span in pairwise([0, *starts, layout.shared.stop]))
    texts = tuple(layout.token_ids[span.slice()] for span in spans)
    keys: list[str] = []
    seen = _origin(backend, kv_dtype)
    for text in texts:
        keys.append(sha256(seen.encode() + np.asarray(text, "<i8").tobytes()).hexdigest())
        seen = keys[0] if layout.blocks else keys[-1]
    return _Parts(spans, texts, tuple(keys), bool(layout.blocks))


def _origin(backend: Backend, kv_dtype: KeptDtype) -> str:
    """Which model computes, and how it is kept. Its config counts: the same weights may turn keys by other angles."""
    identity = ModelIdentity.of(backend)
    config = {name: value for name, value in backend.config.to_dict().items() if not name.startswith("_")}
    described = json.dumps([identity.weights, identity.dtype, kv_dtype, config], sort_keys=True, default=str)
    return sha256(described.encode()).hexdigest()


def _read(parts: _Parts, asked: _Asked, pieces: Sequence[Piece | None]) -> tuple[Prefix, list[Span]]:
    """A prefix with the missing pieces in it, and where they stand in it."""
    read = partial(asked.backend.prefill, top_layer=asked.top_layer, values=asked.values)
    missing = [number for number, piece in enumerate(pieces) if piece is None]
    if not parts.are_blocks:
        known = [piece for piece in pieces if piece is not None]
        prefix = read(parts.token_ids, reuse=_joined(known, asked) if known else None)
        return prefix, [parts.spans[number] for number in missing]
    texts = [parts.texts[0], *(parts.texts[number] for number in missing if number)]
    spans = [Span(*span) for span in pairwise(accumulate(map(len, texts), initial=0))]
    token_ids = [token for text in texts for token in text]
    if len(texts) == 1:
        return read(token_ids), spans
    prefix = asked.backend.prefill_blocks(token_ids, spans[1:], top_layer=asked.top_layer, values=asked.values)
    return prefix, spans if missing[0] == 0 else spans[1:]


def _joined(pieces: Sequence[Piece | None], asked: _Asked) -> Prefix:
    whole = [piece for piece in pieces if piece is not None]
    if any(piece.values[-1] is None for piece in whole):  # some come from a deeper pass
        whole = [replace(piece, values=(*piece.values[:-1], None)) for piece in whole]
    prefix = join(whole, dtype=asked.backend.model.dtype)
    if prefix.blocks:
        check_reach(len(prefix), asked.backend.config)
    return prefix


def _is_plain(prefix: Prefix, top_layer: int) -> bool:
    return prefix.is_plain and prefix.cache is not None and len(prefix.cache.layers) == top_layer + 1


def _depth(piece: Piece) -> tuple[int, bool]:
    return piece.top_layer, piece.values[-1] is not None


def _reaches(piece: Piece, asked: _Asked) -> bool:
    return _depth(piece) >= (asked.top_layer, asked.values)


def _without_upper_layers(piece: Piece, top_layer: int) -> Piece:
    return replace(piece, keys=piece.keys[: top_layer + 1], values=piece.values[: top_layer + 1])


def _beside_its_layers(piece: Piece, backend: Backend) -> Piece:
    """On the devices where the layers compute."""
    weights = [next(backend.attention_layers[layer].module.parameters()) for layer in range(len(piece.keys))]
    devices = [backend.device if weight.is_meta else weight.device for weight in weights]  # meta: offloaded
    values = zip(piece.values, devices, strict=True)
    return replace(
        piece,
        keys=tuple(stored.to(device) for stored, device in zip(piece.keys, devices, strict=True)),
        values=tuple(None if stored is None else stored.to(device) for stored, device in values),
    )
