"""Embeddings of pictures for LlamaIndex, from a local matryoshka model."""

import asyncio
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from llama_index.core.callbacks import CBEventType, EventPayload
from llama_index.core.embeddings import MultiModalEmbedding
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.events.embedding import EmbeddingEndEvent, EmbeddingStartEvent
from llama_index.core.schema import BaseNode, ImageDocument, ImageNode, MediaResource, Node
from llama_index.core.utils import get_tqdm_iterable
from pydantic import Field, model_validator

from qr_integrations.embedding import SETTINGS, EmbeddingSettings
from qr_integrations.errors import InputError
from qr_integrations.images import PictureSource, check_several
from qr_integrations.images.policy import shown

Picture: TypeAlias = PictureSource | ImageNode | Node

_INSTEAD = "search with get_image_embedding or image_to_image_retrieve"
_dispatcher = get_dispatcher(__name__)


class MQTImageEmbedding(EmbeddingSettings, MultiModalEmbedding):
    """Vectors of pictures, made of as many tokens of each as one likes (MQT, arXiv 2405.19315).

    Example:
        >>> from PIL import Image
        >>> from qr_integrations.llama_index import MQTImageEmbedding
        >>> embed_model = MQTImageEmbedding(model="qr-mini-vl-mqt", num_visual_tokens=16)  # loaded on first use
        >>> vector = embed_model.get_image_embedding(Image.new("RGB", (64, 64), "red"))
        >>> round(sum(x * x for x in vector), 3)
        1.0

    Pictures are paths, ``data:`` URIs, URLs if the settings allow it, bytes, open files, arrays, Pillow pictures,
    `ImageNode`, `ImageDocument` or a `Node` with an `image_resource`. The model compares pictures with pictures, not
    with words: as `image_embed_model` of a ``MultiModalVectorStoreIndex`` it serves ``image_to_image_retrieve``, while
    texts, and ``text_retrieve``, are the `embed_model`'s. In a pipeline it embeds nodes with a picture by it.

    All parameters are those of `EmbeddingSettings` and of LlamaIndex's embeddings.
    """

    model_config = SETTINGS

    model_name: str = Field(default="", frozen=True)

    @model_validator(mode="after")
    def _named_as_the_model(self) -> "MQTImageEmbedding":
        self.__dict__["model_name"] = self.model  # past the validators, of which this is one
        return self

    @classmethod
    def class_name(cls) -> str:
        """The name under which LlamaIndex serialises it."""
        return "MQTImageEmbedding"

    def to_payload(self) -> dict[str, Any]:
        """What events tell, without loading anything, and nothing that may hold a secret."""
        told = {"model_name", "num_visual_tokens", "embed_batch_size"}
        return {**self.model_dump(include=told), "class_name": self.class_name()}

    # ---- pictures

    def get_image_embedding(self, img_file_path: Picture) -> list[float]:
        """A vector of length 1 for a picture; see `get_image_embedding_batch`."""
        return self.get_image_embedding_batch([img_file_path])[0]

    def get_image_embedding_batch(
        self, img_file_paths: Sequence[Picture], show_progress: bool = False
    ) -> list[list[float]]:
        """A vector of length 1 for each picture, `embed_batch_size` of them at once.

        Raises:
            InputError: a picture cannot be opened, with its number; no matryoshka model, or one that does not make
                `num_visual_tokens`.
            LoadError: the model cannot be loaded.
        """
        check_several(img_file_paths)
        starts = range(0, len(img_file_paths), self.embed_batch_size)
        vectors: list[list[float]] = []
        for start in get_tqdm_iterable(starts, show_progress, "Generating image embeddings"):
            batch = list(img_file_paths[start : start + self.embed_batch_size])
            with self._announced(batch) as made:
                made += self._get_image_embeddings(batch, start)
            vectors += made
        return vectors

    async def aget_image_embedding(self, img_file_path: Picture) -> list[float]:
        """As `get_image_embedding`, in a thread."""
        return await asyncio.to_thread(self.get_image_embedding, img_file_path)

    async def aget_image_embedding_batch(
        self, img_file_paths: Sequence[Picture], show_progress: bool = False
    ) -> list[list[float]]:
        """As `get_image_embedding_batch`, in a thread."""
        return await asyncio.to_thread(self.get_image_embedding_batch, img_file_paths, show_progress)

    def _get_image_embedding(self, img_file_path: Picture) -> list[float]:
        return self._get_image_embeddings([img_file_path])[0]

    def _get_image_embeddings(self, img_file_paths: Sequence[Picture], first: int = 0) -> list[list[float]]:
        sources = [_source_of(picture, number) for number, picture in enumerate(img_file_paths, first)]
        return self.picture_vectors(sources, first)

    async def _aget_image_embedding(self, img_file_path: Picture) -> list[float]:
        return await asyncio.to_thread(self._get_image_embedding, img_file_path)

    async def _aget_image_embeddings(self, img_file_paths: Sequence[Picture]) -> list[list[float]]:
        return await asyncio.to_thread(self._get_image_embeddings, img_file_paths)

    @contextmanager
    def _announced(self, batch: list[Picture]) -> Iterator[list[list[float]]]:
        """Events of both kinds around the work, which LlamaIndex's own code has for texts only."""
        vectors: list[list[float]] = []
        chunks, told = [_name_of(picture) for picture in batch], self.to_payload()
        _dispatcher.event(EmbeddingStartEvent(model_dict=told))
        try:
            with self.callback_manager.event(CBEventType.EMBEDDING, {EventPayload.SERIALIZED: told}) as event:
                yield vectors
                event.on_end({EventPayload.CHUNKS: chunks, EventPayload.EMBEDDINGS: vectors})
        finally:
            _dispatcher.event(EmbeddingEndEvent(chunks=chunks, embeddings=vectors))

    # ---- texts

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return self.text_vectors(texts, _INSTEAD)

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return await asyncio.to_thread(self._get_text_embeddings, texts)

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return await asyncio.to_thread(self._get_text_embedding, text)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return await asyncio.to_thread(self._get_text_embedding, query)

    # ---- nodes

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Nodes with a picture get its vector, other nodes that of their text.

        Args:
            nodes: get their embeddings.
            kwargs: ``show_progress``; others are taken as by LlamaIndex's own embeddings, and mean nothing here.
        """
        pictures, others = _apart(nodes)
        vectors = self.get_image_embedding_batch(pictures, bool(kwargs.get("show_progress")))
        for node, vector in zip(pictures, vectors, strict=True):
            node.embedding = vector
        super().__call__(others, **kwargs)
        return nodes

    async def acall(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """As `__call__`, in threads."""
        pictures, others = _apart(nodes)
        vectors = await self.aget_image_embedding_batch(pictures, bool(kwargs.get("show_progress")))
        for node, vector in zip(pictures, vectors, strict=True):
            node.embedding = vector
        await super().acall(others, show_progress=bool(kwargs.get("show_progress")))
        return nodes


def _apart(nodes: Sequence[BaseNode]) -> tuple[list[ImageNode | Node], list[BaseNode]]:
    """Nodes with a picture, and others; image nodes always belong to the first."""
    pictures: list[ImageNode | Node] = []
    others: list[BaseNode] = []
    for node in nodes:
        if isinstance(node, ImageNode | ImageDocument) or (isinstance(node, Node) and any(_places_of(node))):
            pictures.append(node)
        else:
            others.append(node)
    return pictures, others


def _places_of(node: ImageNode | Node) -> tuple[str | None, str | Path | None, str | None]:
    """The picture in base64, its path and its URL, as far as the node has them."""
    if isinstance(node, ImageNode | ImageDocument):
        path, url = node.image_path or node.metadata.get("file_path"), node.image_url
        return node.image, path, str(url) if url else None
    kept = node.image_resource or MediaResource()
    return kept.data.decode() if kept.data else None, kept.path, str(kept.url) if kept.url else None


def _source_of(picture: Picture, number: int) -> PictureSource:
    if not isinstance(picture, ImageNode | Node):
        return picture
    coded, path, url = _places_of(picture)
    if coded:
        return f"data:;base64,{coded}"
    if path:
        return Path(path)
    if url:
        return url
    raise InputError(f"picture #{number}: there is none in node {picture.node_id!r}: give it image=, a path or a URL")


def _name_of(picture: Picture) -> str:
    """As events tell of it: they hold texts only."""
    if isinstance(picture, ImageNode | Node):
        return picture.node_id
    return shown(os.fspath(picture)) if isinstance(picture, str | os.PathLike) else type(picture).__name__
