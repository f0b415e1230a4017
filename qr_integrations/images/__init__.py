"""Pictures come in here: whatever holds one becomes an upright RGB picture, or an `InputError`."""

from qr_integrations.images.fetching import PictureFetcher, addresses_of, is_public_address
from qr_integrations.images.opening import PictureSource, decode_base64, open_picture
from qr_integrations.images.policy import DECODED, PicturePolicy

__all__ = [
    "DECODED",
    "PictureFetcher",
    "PicturePolicy",
    "PictureSource",
    "addresses_of",
    "decode_base64",
    "is_public_address",
    "open_picture",
]
