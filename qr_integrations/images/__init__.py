"""Pictures come in here: whatever holds one becomes an upright RGB picture, or an `InputError`."""

from qr_integrations.images.fetching import PictureFetcher, addresses_of, is_public_address
from qr_integrations.images.opening import PictureSource, decode_base64, identify_picture, open_picture
from qr_integrations.images.policy import DECODED, PicturePolicy
from qr_integrations.images.several import check_several, open_numbered

__all__ = [
    "DECODED",
    "PictureFetcher",
    "PicturePolicy",
    "PictureSource",
    "addresses_of",
    "check_several",
    "decode_base64",
    "identify_picture",
    "is_public_address",
    "open_numbered",
    "open_picture",
]
