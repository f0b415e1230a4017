"""Edges and texture: the authors' filter, computed without their libraries."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

GOLDEN = Path(__file__).parents[1] / "golden" / "vision"
CASES = [
    case
    for case in json.loads((GOLDEN / "vicrop_highpass.json").read_text(encoding="utf-8"))["cases"]
    if case["mode"] == "RGB"
]


@pytest.fixture(scope="module")
def arrays() -> Any:
    return np.load(GOLDEN / "vicrop_highpass.npz")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_the_published_filter(case: dict[str, Any], arrays: Any) -> None:
    from qr_integrations.cropping import high_pass

    image, side = Image.fromarray(arrays[case["image"]]), case["resolution"]
    found, expected = high_pass(image, (side, side), blur=case["kh"], median=case["km"]), arrays[case["output"]]
    if case["reduce"]:
        missing = -side % 14
        padded = np.pad(found, ((0, missing), (0, missing)))
        found = padded.reshape(len(padded) // 14, 14, -1, 14).sum((1, 3))
    if case["image_kind"] == "flat":
        assert high_pass(image, (side, side)).max() < 1e-6
    else:
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * expected.max())


@pytest.mark.parametrize("name", ["a", "b"])
def test_the_published_mask(name: str) -> None:
    from qr_integrations.cropping import high_pass_mask

    image = Image.fromarray(np.load(GOLDEN / "tiny_llava" / "inputs.npz")[f"image_{name}"])
    bits = np.load(GOLDEN / "tiny_llava" / "expected.npz")[f"highpass_mask_bits_{name}"]
    assert (high_pass_mask(image, (336, 336)) == np.unpackbits(bits).reshape(336, 336).astype(bool)).all()


def test_the_median_is_that_of_the_window_mirrored_at_the_border() -> None:
    from scipy.ndimage import median_filter

    from qr_integrations.cropping import high_pass

    noise = np.random.default_rng(1).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    plain = high_pass(Image.fromarray(noise), (13, 9), median=1)
    for window in (3, 7, 11):
        smooth = high_pass(Image.fromarray(noise), (13, 9), median=window)
        assert (smooth == median_filter(plain, size=window, mode="reflect")).all()


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_pictures_of_every_mode(mode: str) -> None:
    from qr_integrations.cropping import high_pass

    image = Image.fromarray(np.random.default_rng(2).integers(0, 256, (20, 30), dtype=np.uint8)).convert(mode)
    assert (high_pass(image, (28, 14)) == high_pass(image.convert("RGB"), (28, 14))).all()


def test_the_mask_marks_the_textured_half() -> None:
    from qr_integrations.cropping import high_pass_mask

    pixels = np.full((60, 80, 3), 100, dtype=np.uint8)
    pixels[:, 40:] = np.random.default_rng(3).integers(0, 256, (60, 40, 3))
    mask = high_pass_mask(Image.fromarray(pixels), (80, 60))
    assert mask.shape == (60, 80) and mask.dtype == bool
    assert mask[:, 44:].mean() > 0.95 and mask[:, :36].mean() < 0.1


@pytest.mark.parametrize(
    ("size", "windows", "says"),
    [
        ((28, 28), {"blur": 4}, "odd"),
        ((28, 28), {"median": 6}, "odd"),
        ((28, 28), {"median": -1}, "odd"),
        ((28, 2), {}, "at least 3 x 3"),
        ((4, 28), {"blur": 5}, "at least 5 x 5"),
    ],
)
def test_settings_that_have_no_result(size: tuple[int, int], windows: dict[str, int], says: str) -> None:
    from qr_integrations.cropping import high_pass
    from qr_integrations.errors import InputError

    with pytest.raises(InputError, match=says):
        high_pass(Image.new("RGB", (30, 30)), size, **windows)
