"""Where a picture has edges and texture: what the gradient map of ViCrop is restricted to (arXiv 2502.17422)."""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from qr_integrations.errors import InputError

BLUR, MEDIAN = 3, 7  # pixels; the paper speaks of a median over 3, the authors' code takes it over 7


def high_pass(
    image: Image.Image, size: tuple[int, int], *, blur: int = BLUR, median: int = MEDIAN
) -> Float[np.ndarray, "height width"]:
    """How much each pixel differs from its surroundings, 0 in even areas.

    The picture less its Gaussian blur, as a length over the three colours in [0, 1], smoothed by a median filter. The
    steps and their order are those of the authors' code (saccharomycetes/mllms_know).

    Args:
        image: of any mode and size. It is squashed to `size`, whatever its sides.
        size: width and height of the result in pixels, as a rule those of what the vision tower reads.
        blur: side of the Gaussian window in pixels, odd.
        median: side of the median window in pixels, odd.

    Raises:
        InputError: a window that is even or below 1, or a size that is smaller than the Gaussian window.
    """
    if min(blur, median) < 1 or not blur % 2 or not median % 2:
        raise InputError(f"windows of {blur} and {median} pixels: pass odd numbers")
    if min(size) < blur:
        raise InputError(f"{size[0]} x {size[1]} pixels are too few: pass at least {blur} x {blur}")
    squashed = image.convert("RGB").resize(size, Image.Resampling.BILINEAR)
    colours = torch.from_numpy(np.array(squashed)).permute(2, 0, 1).contiguous().float() / 255
    edges = colours.numpy() - _gaussian_blur(colours, blur).numpy()
    return _median_filter(np.sqrt(np.square(edges).sum(axis=0)), median)


def high_pass_mask(image: Image.Image, size: tuple[int, int]) -> Bool[np.ndarray, "height width"]:
    """The pixels with more edges than the median pixel: half of them, fewer where the picture has large even areas.

    In an even area the differences are rounding errors: there the mask means nothing.

    Args:
        image: of any mode and size.
        size: width and height of the mask in pixels.
    """
    edges = high_pass(image, size)
    return edges > np.median(edges)


def _gaussian_blur(colours: Float[Tensor, "3 height width"], window: int) -> Float[Tensor, "3 height width"]:
    """With the spread that OpenCV and torchvision derive from a window; beyond the border the picture is mirrored."""
    half = window // 2
    sigma = 0.3 * (half - 1) + 0.8
    weights = torch.exp(-0.5 * (torch.linspace(-half, half, window) / sigma) ** 2)
    weights /= weights.sum()
    kernel = torch.outer(weights, weights).expand(3, 1, window, window)
    return F.conv2d(F.pad(colours[None], [half] * 4, mode="reflect"), kernel, groups=3)[0]


def _median_filter(values: Float[np.ndarray, "height width"], window: int) -> Float[np.ndarray, "height width"]:
    """Row by row, so that memory stays small; beyond the border the values are mirrored with the border itself."""
    padded = np.pad(values, window // 2, mode="symmetric")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (window, window))
    return np.stack([np.median(row.reshape(len(row), -1), axis=1) for row in windows])
