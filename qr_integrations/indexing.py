"""What retrievers have in common that keep the keys and values of their documents, in memory and in a folder.

A retriever's list of documents is what counts. The index is made of it when it is first needed, and brought up to date
when the list was changed: what is there already is not read again.

``retriever.jsonl``  the settings, then the documents, one a line
``index/``           a `DocumentIndex`

It stands between the rooms and the roof, like `reranking`.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from copy import copy
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import PrivateAttr, model_validator
from pydantic_core import PydanticSerializationError

from qr_integrations.errors import InputError, LoadError
from qr_integrations.files import sync_folder, write_whole
from qr_integrations.model_settings import LOADING
from qr_integrations.reranking import Relevance, RerankSettings, shown_progress
from qr_integrations.types import Document, GroundedAnswer
from qr_integrations.version import __version__

if TYPE_CHECKING:
    from qr_integrations.retrieval import DocumentIndex
    from qr_integrations.retrieval.reranker import AttentionReranker

FORMAT, VERSION = "qr-integrations retriever", 1
RETRIEVER, INDEX = "retriever.jsonl", "index"
OF_THE_NODE = "_node"  # metadata key in the file: what a framework needs to make its own kind of document again
_REBUILD = "restore the folder from a copy, or make the retriever again"
# What belongs to the machine or to the process that loads, or would let a folder run code there.
_NOT_SAVED = {"backend", "cache", "device", "device_map", "trust_remote_code", "model_kwargs", "indexed"}
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class _Kept:
    """The index of a retriever, and with which reranker it was made; or the folder to load it from.

    Never changed, so that copies share it until one of them goes on. A pickle has the folder only.
    """

    index: "DocumentIndex | None" = None
    reranker: "AttentionReranker | None" = None
    folder: Path | None = None
    verify: bool = True

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Kept":
        return self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Kept)  # of two retrievers the settings are compared

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return _Kept, (None, None, self.folder, self.verify)


class IndexSettings(RerankSettings):
    """How to rank documents that stay the same over many questions. All of it but a function can be JSON.

    Attributes:
        indexed: keep the keys and values of all documents in a `DocumentIndex`, so that a question costs its own words
            only, several questions go through the model together, and all of it can be saved. Without it, those of the
            last `keep_prefixes` prompts are kept. With ``refinements={"layout": "block"}`` any document can be taken
            out without reading others again.
        kv_dtype, answers: see `DocumentIndex.build`.
        cache: of no use beside an index.

    All other attributes are those of `RerankSettings`.
    """

    indexed: bool = False
    kv_dtype: Literal["auto", "float32", "float16", "bfloat16", "int8"] = "auto"
    answers: bool = False

    _kept: _Kept = PrivateAttr(default_factory=_Kept)

    @model_validator(mode="after")
    def _an_index_is_kept(self) -> "IndexSettings":
        given = [
            name for name in ("kv_dtype", "answers") if getattr(self, name) != type(self).model_fields[name].default
        ]
        if given and not self.indexed:
            raise InputError(f"{given[0]} says how an index is kept: pass indexed=True too")
        return self

    def relevances(self, query: str, documents: Sequence[Document], top_n: int | None) -> list[Relevance]:
        """As `RerankSettings.relevances`, from the index if there is one."""
        if not self.indexed or not documents or top_n == 0:
            return super().relevances(query, documents, top_n)
        explained = self.num_explained(len(documents), top_n)
        ranking = self.index_over(documents).rank(query, explain=explained, max_spans=self.max_spans)
        return self.relevances_of(ranking, top_n)

    def relevances_together(
        self, queries: Sequence[str], documents: Sequence[Document], top_n: int | None
    ) -> list[list[Relevance]]:
        """`relevances` of several queries, in one pass where there is an index and nothing is to be explained."""
        if not self.indexed or self.explain or not documents or top_n == 0:
            return [self.relevances(query, documents, top_n) for query in queries]
        return [self.relevances_of(found, top_n) for found in self.index_over(documents).rank_batch(queries)]

    def relevances_used(self, grounded: GroundedAnswer) -> list[Relevance]:
        """What is said about the documents that an answer comes from; `score_threshold` and `explain` do not count."""
        whole = self.model_copy(update={"score_threshold": None, "explain": False})
        by_index = {found.index: found for found in whole.relevances_of(grounded.ranking, None)}
        return [by_index[index] for index in grounded.used]

    def index_over(self, documents: Sequence[Document]) -> "DocumentIndex":
        """The index, with exactly these documents in it. What it holds already is not read again.

        Raises:
            InputError, WindowError: documents that cannot be indexed; the index stays as it was.
            LoadError: a folder that is damaged, or of another model.
        """
        if (known := self._known(documents)) is not None:
            return known
        with self.changing():
            if (known := self._known(documents)) is not None:
                return known
            reranker = self.open()
            with shown_progress("Reading", "token", self.show_progress) as progress:
                made = _brought_up_to_date(self._begun(reranker), documents, progress)
            self._kept = replace(self._kept, index=made, reranker=reranker)
            return made

    def changing(self) -> AbstractContextManager[Any]:
        """Held while documents are read, and by those who change which documents there are."""
        return self._opened.reading

    @property
    def is_index_there(self) -> bool:
        """The documents have been read."""
        return self._kept.index is not None

    def load_index_from(self, folder: str | Path, *, verify: bool) -> None:
        """Load the index from a folder when it is first needed."""
        self._kept = _Kept(folder=Path(folder).absolute(), verify=verify)

    def without_index(self) -> RerankSettings:
        """The same settings for other documents, which shall not take the place of those in the index."""
        if not self.indexed:
            return self
        other = self.model_copy(update={"indexed": False, "kv_dtype": "auto", "answers": False})
        other._kept = _Kept()
        return other

    def close(self) -> None:
        """Let go of the index, and of the weights as `RerankSettings.close` does; both come back when they are used."""
        self._kept = replace(self._kept, index=None, reranker=None)
        super().close()

    def _known(self, documents: Sequence[Document]) -> "DocumentIndex | None":
        """The index as it is, if it holds these documents."""
        kept = self._kept
        if kept.index is None or not self._is_mine(kept.index) or kept.reranker is not self.open():
            return None
        from qr_integrations.retrieval.token_scores import contents

        return kept.index if contents(kept.index.documents) == contents(documents) else None

    def _begun(self, reranker: "AttentionReranker") -> "DocumentIndex":
        """What to go on from: a copy of the index, the one in the folder, or an empty one."""
        from qr_integrations.retrieval import DocumentIndex

        kept = self._kept
        if kept.index is not None and self._is_mine(kept.index) and kept.reranker is reranker:
            return copy(kept.index)
        if kept.folder is not None:
            loaded = DocumentIndex.load(kept.folder, reranker.backend, verify=kept.verify)
            if self._is_mine(loaded) and _reads_alike(loaded.reranker, reranker):
                return loaded
            _log.warning("the documents in %s were read with other settings: they are read again", kept.folder)
        return DocumentIndex(reranker, self.kv_dtype, whole=self.answers)

    def _is_mine(self, index: "DocumentIndex") -> bool:
        return (index.kept, index.whole) == (self.kv_dtype, self.answers)


def _brought_up_to_date(index: "DocumentIndex", documents: Sequence[Document], progress: Any) -> "DocumentIndex":
    """The same index, without what is not among `documents` any more, with what is new; a new one if all is new."""
    from qr_integrations.retrieval import DocumentIndex
    from qr_integrations.retrieval.token_scores import contents

    wanted, gone, stays = contents(documents), [], 0
    for place, known in enumerate(contents(index.documents)):
        if stays < len(wanted) and wanted[stays] == known:
            stays += 1
        else:
            gone.append(place)
    if not stays:
        index = DocumentIndex(index.reranker, index.kept, whole=index.whole)
    elif gone:
        index.remove(gone)
    index.add(documents[stays:], progress=progress)
    return index


def _reads_alike(one: "AttentionReranker", other: "AttentionReranker") -> bool:
    """Both would read documents, and ask about them, in the same way."""

    def settings(reranker: "AttentionReranker") -> tuple[Any, ...]:
        scorer = reranker.scorer
        asked = (reranker.instruction, scorer.calibrated, scorer.null_instruction)
        return tuple(reranker.heads.heads), reranker.limits, reranker.refinements, scorer.style, *asked

    return settings(one) == settings(other)


# ---- folders


@dataclass(frozen=True, slots=True)
class SavedRetriever:
    """What a retriever is made of.

    Attributes:
        settings: fields of `IndexSettings` that differ from the defaults.
        top_k: how many documents it returns.
        documents: what it searches.
        more: what one of the frameworks has of its own.
    """

    settings: Mapping[str, Any]
    top_k: int | None
    documents: Sequence[Document]
    more: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, settings: IndexSettings, top_k: int | None, documents: Sequence[Document], **more: Any
    ) -> "SavedRetriever":
        """Its settings as JSON.

        Raises:
            InputError: `normalize` is a function, or a setting is something else that JSON cannot hold.
        """
        if callable(settings.normalize):
            raise InputError("normalize is a function, which no file holds: set it to None, and pass it when you load")
        names = set(IndexSettings.model_fields) - _NOT_SAVED
        try:
            written = settings.model_dump(mode="json", include=names, exclude_defaults=True)
        except PydanticSerializationError as error:
            raise InputError(
                f"the settings cannot be kept as JSON ({error}): pass strings, numbers, lists and dicts, such as "
                "quantization='4bit'"
            ) from error
        return cls(written, top_k, documents, more)

    def settings_with(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The settings, and what the caller says otherwise; a backend comes with its own way of loading."""
        left_out = {"model", *LOADING} if given.get("backend") is not None else set()
        if given.get("indexed") is False:
            left_out |= {"kv_dtype", "answers"}
        saved = {name: value for name, value in self.settings.items() if name not in left_out}
        return {**saved, "indexed": True, **given}


def save_retriever(
    folder: str | Path, settings: IndexSettings, saved: SavedRetriever, read: Sequence[Document]
) -> None:
    """Write a retriever and its index into a folder of their own. A process that is killed leaves a whole one.

    Args:
        folder: made if it is not there.
        settings: they hold the index, or make it now.
        saved: what the retriever is made of.
        read: its documents, as they are ranked.

    Raises:
        InputError: there is no index, a folder that holds something else, or what JSON cannot hold.
    """
    if not settings.indexed:
        raise InputError("the retriever keeps no index that could be saved: make it with indexed=True")
    lines = _lines(saved)
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"{str(folder)!r} is no folder: pass one, or a path where nothing is yet") from error
    names = {path.name for path in folder.iterdir()} - {INDEX}
    if names and RETRIEVER not in names and not all(name.startswith(RETRIEVER) for name in names):
        raise InputError(f"{str(folder)!r} holds something else ({sorted(names)[0]!r}): pass a folder of its own")
    settings.index_over(read).save(folder / INDEX)
    write_whole(folder / RETRIEVER, lines, durable=True)
    sync_folder(folder)


def load_retriever(folder: str | Path) -> SavedRetriever:
    """What `save_retriever` wrote, without the index.

    Raises:
        LoadError: there is none, or it is damaged, or newer than this version.
    """
    path = Path(folder) / RETRIEVER
    try:
        head, _, lines = path.read_bytes().partition(b"\n")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise LoadError(
            f"there is no retriever at {str(folder)!r}: pass a folder that a retriever was saved in; what "
            "DocumentIndex.save made, DocumentIndex.load reads"
        ) from error
    except OSError as error:
        raise LoadError(f"{str(path)!r} cannot be read ({error}): see to its rights and its disk") from error
    try:
        return _saved(path, json.loads(head), lines)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise LoadError(f"{str(path)!r} is damaged ({error}): {_REBUILD}") from error


def _lines(saved: SavedRetriever) -> bytes:
    from qr_integrations.retrieval.document_lines import as_lines

    lines = b"".join(as_lines(saved.documents))
    head = {"format": FORMAT, "version": VERSION, "written_by": __version__, "settings": saved.settings}
    head |= {"top_k": saved.top_k, "more": saved.more}
    return json.dumps({**head, "digest": _digest(head, lines)}).encode() + b"\n" + lines


def _saved(path: Path, head: Any, lines: bytes) -> SavedRetriever:
    from qr_integrations.retrieval.document_lines import from_lines

    if not isinstance(head, dict) or head.get("format") != FORMAT:
        raise LoadError(f"{str(path)!r} is of something else: pass a folder that a retriever was saved in")
    if isinstance(head["version"], int) and head["version"] > VERSION:
        raise LoadError(
            f"{str(path)!r} has format {head['version']}, this version of qr-integrations reads {VERSION}: upgrade "
            f"qr-integrations, it was written by {head.get('written_by')}"
        )
    if head.pop("digest") != _digest(head, lines):
        raise LoadError(f"{str(path)!r} was changed after it was written: {_REBUILD}")
    return SavedRetriever(head["settings"], head["top_k"], tuple(from_lines(lines)), head["more"])


def _digest(head: Mapping[str, Any], lines: bytes) -> str:
    return sha256(json.dumps(head, sort_keys=True).encode() + b"\n" + lines).hexdigest()
