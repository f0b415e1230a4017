"""Which pictures an adapter opens; beside `model_settings`, so that adapters of texts load nothing for pictures."""

from PIL import Image
from pydantic import Field

from qr_integrations.errors import InputError
from qr_integrations.images import PicturePolicy, PictureSource, open_picture
from qr_integrations.model_settings import ModelSettings


class PictureSettings(ModelSettings):
    """The settings of an adapter that opens pictures.

    Attributes:
        allow_urls: fetch pictures from public http and https addresses.
        allow_local_files: open pictures from paths. Off where the paths come from other people.
        max_picture_bytes, max_picture_pixels, picture_timeout: see `PicturePolicy`.
    """

    allow_urls: bool = False
    allow_local_files: bool = False
    max_picture_bytes: int = Field(default=20 * 2**20, gt=0)
    max_picture_pixels: int = Field(default=64_000_000, gt=0)
    picture_timeout: float = Field(default=10.0, gt=0.0)

    @property
    def picture_policy(self) -> PicturePolicy:
        """Which pictures are opened."""
        return PicturePolicy(
            allow_local_files=self.allow_local_files,
            allow_urls=self.allow_urls,
            max_bytes=self.max_picture_bytes,
            max_pixels=self.max_picture_pixels,
            timeout=self.picture_timeout,
        )

    def picture(self, source: PictureSource, place: str) -> Image.Image:
        """Open a picture as far as the settings allow it; `place` says in errors where it stood.

        Raises:
            InputError: not allowed, not found, not a picture, broken, or too large.
        """
        try:
            return open_picture(source, policy=self.picture_policy)
        except InputError as error:
            raise InputError(f"{place}: {error}") from error
