"""Embeddings of pictures for LangChain, from a local matryoshka model."""

from collections.abc import Sequence

from langchain_core.embeddings import Embeddings
from langchain_core.runnables.config import run_in_executor

from qr_integrations.embedding import SETTINGS, EmbeddingSettings
from qr_integrations.images import PictureSource

_INSTEAD = "search with embed_image and similarity_search_by_vector"


class MQTEmbeddings(EmbeddingSettings, Embeddings):
    """Vectors of pictures, made of as many tokens of each as one likes (MQT, arXiv 2405.19315).

    Example:
        >>> from PIL import Image
        >>> from qr_integrations.langchain import MQTEmbeddings
        >>> embeddings = MQTEmbeddings(model="qr-mini-vl-mqt", num_visual_tokens=16)  # loaded on first use
        >>> [vector] = embeddings.embed_image([Image.new("RGB", (64, 64), "red")])
        >>> round(sum(x * x for x in vector), 3)
        1.0

    `embed_image` is what LangChain's stores of pictures call, such as Chroma's ``add_images``. Stores that know texts
    only hold pictures by their addresses with ``texts_are_pictures=True``: ``add_texts(["a.png"])`` and
    ``similarity_search("b.png")``. The model compares pictures with pictures, not with words.

    All parameters are those of `EmbeddingSettings`.
    """

    model_config = SETTINGS

    def embed_image(self, uris: Sequence[PictureSource]) -> list[list[float]]:
        """A vector of length 1 for each picture.

        Args:
            uris: paths, ``data:`` URIs and, if the settings allow it, URLs; also bytes, arrays and Pillow pictures.

        Raises:
            InputError: a picture cannot be opened, with its number; no matryoshka model, or one that does not make
                `num_visual_tokens`.
            LoadError: the model cannot be loaded.
        """
        return self.picture_vectors(uris)

    def embed_image_tokens(
        self, uris: Sequence[PictureSource], num_visual_tokens: int | None = None
    ) -> list[list[list[float]]]:
        """Several vectors of length 1 for each picture, one per token, for multi-vector search.

        Args:
            uris: as in `embed_image`.
            num_visual_tokens: for this call; None is the setting's.

        Raises:
            InputError, LoadError: as `embed_image`.
        """
        return self.picture_token_vectors(uris, num_visual_tokens)

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Vectors of the pictures that the texts are addresses of, with `texts_are_pictures`.

        Raises:
            InputError: without `texts_are_pictures`, or as `embed_image`.
        """
        return self.text_vectors(texts, _INSTEAD)

    def embed_query(self, text: str) -> list[float]:
        """The vector of the picture that the text is an address of; see `embed_documents`."""
        return self.embed_documents([text])[0]

    async def aembed_image(self, uris: Sequence[PictureSource]) -> list[list[float]]:
        """As `embed_image`, in a thread."""
        return await run_in_executor(None, self.embed_image, uris)

    async def aembed_image_tokens(
        self, uris: Sequence[PictureSource], num_visual_tokens: int | None = None
    ) -> list[list[list[float]]]:
        """As `embed_image_tokens`, in a thread."""
        return await run_in_executor(None, self.embed_image_tokens, uris, num_visual_tokens)
