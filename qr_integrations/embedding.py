"""What every adapter that embeds pictures has in common: its settings, its pictures opened, its vectors.

It stands between the rooms and the roof: `langchain` and `llama_index` add their frameworks' manners, nothing else.
Importing it loads pydantic, which both frameworks bring; the model's libraries are loaded on first use.
"""

from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

from PIL import Image
from pydantic import AliasChoices, ConfigDict, Field

from qr_integrations.errors import InputError
from qr_integrations.images import PictureSource, check_several
from qr_integrations.picture_settings import PictureSettings

if TYPE_CHECKING:
    from qr_integrations.encoding.matryoshka import MQTEncoder

SETTINGS = ConfigDict(
    extra="forbid", arbitrary_types_allowed=True, validate_assignment=True, protected_namespaces=()
)  # a typo is an error


class EmbeddingSettings(PictureSettings):
    """A matryoshka model, and how it embeds pictures. The same names in both frameworks; all of it can be JSON.

    Attributes:
        model, backend, device, dtype, device_map, revision, quantization, attn_implementation, local_files_only,
            trust_remote_code, model_kwargs: see `ModelSettings`; `model` also as `model_name`.
        num_visual_tokens: how many tokens of a picture its vector is made of; None for all that the model makes.
            Vectors of different numbers do not belong into one index.
        embed_batch_size: how many pictures are opened at once; up to 16 of them are read in one pass.
        texts_are_pictures: take texts as addresses of pictures (a path, a ``data:`` URI, a URL), so that stores and
            retrievers that know texts only hold pictures. Otherwise texts are refused: the model has no vectors of
            texts that could be compared with those of pictures.
        allow_urls, allow_local_files, max_picture_bytes, max_picture_pixels, picture_timeout: which pictures are
            opened, see `PictureSettings`. Paths are, here: pass allow_local_files=False where other people name them.
    """

    model_config = SETTINGS

    model: str | None = Field(default=None, validation_alias=AliasChoices("model", "model_name"))
    num_visual_tokens: int | None = Field(default=None, ge=1)
    embed_batch_size: int = Field(default=16, ge=1, le=2048)
    texts_are_pictures: bool = False
    allow_local_files: bool = True

    def encoder(self) -> "MQTEncoder":
        """What makes the vectors; the first call loads the model.

        Raises:
            LoadError: the model cannot be loaded.
            InputError: it is no matryoshka model.
        """
        from qr_integrations.encoding.matryoshka import MQTEncoder

        return MQTEncoder(self.open())

    def picture_vectors(self, sources: Sequence[PictureSource], first: int = 0) -> list[list[float]]:
        """A vector of length 1 for each picture; no pictures load no model.

        Args:
            sources: the pictures.
            first: the number of the first of them, as errors count.

        Raises:
            InputError: no list; a picture that is not allowed, not found, broken or too large, with its number; no
                matryoshka model, or one that does not make `num_visual_tokens`.
        """
        return [vector for batch in self._batches(sources, first, self._embed) for vector in batch]

    def picture_token_vectors(
        self, sources: Sequence[PictureSource], num_visual_tokens: int | None = None
    ) -> list[list[list[float]]]:
        """Several vectors of length 1 for each picture, one per token, as multi-vector search compares them.

        Args:
            sources: the pictures.
            num_visual_tokens: for this call; None is the setting's.

        Raises:
            InputError: as `picture_vectors`.
        """
        count = self.num_visual_tokens if num_visual_tokens is None else num_visual_tokens

        def embed(pictures: list[Image.Image]) -> list[Any]:
            return self.encoder().embed_tokens(pictures, count).tolist()

        return [vectors for batch in self._batches(sources, 0, embed) for vectors in batch]

    def text_vectors(self, texts: Sequence[str], instead: str) -> list[list[float]]:
        """Vectors of the pictures that the texts are addresses of, if `texts_are_pictures` says that they are.

        Args:
            texts: the addresses.
            instead: what searches by a picture in the framework, for the error.

        Raises:
            InputError: they are not said to be addresses, or as `picture_vectors`.
        """
        if texts and not self.texts_are_pictures:
            raise InputError(
                f"{self.model!r} embeds pictures, and has no vectors of texts to compare them with: {instead}, embed "
                "texts with a text embedding model, or pass texts_are_pictures=True if these are pictures' addresses"
            )
        return self.picture_vectors(texts)

    def _embed(self, pictures: list[Image.Image]) -> list[Any]:
        return self.encoder().embed(pictures, self.num_visual_tokens).tolist()

    def _batches(
        self, sources: Sequence[PictureSource], first: int, embed: Callable[[list[Image.Image]], list[Any]]
    ) -> Iterator[list[Any]]:
        check_several(sources)
        for start in range(0, len(sources), self.embed_batch_size):
            batch = sources[start : start + self.embed_batch_size]
            yield embed([self._numbered(source, number) for number, source in enumerate(batch, first + start)])

    def _numbered(self, source: PictureSource, number: int) -> Image.Image:
        whole = source.getvalue() if isinstance(source, BytesIO) else source  # other threads may read it too
        return self.picture(whole, f"picture #{number}")
