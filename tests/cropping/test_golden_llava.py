"""The maps and boxes that the authors' code computes for a tiny LLaVA (tests/golden/vision/README.md).

Their token ids and pixels are what our methods read; all that comes after the processor is ours.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from qr_integrations.backend import Backend
from qr_integrations.backend.picture_reading import find_pictures
from qr_integrations.backend.prompts import Prompt, as_messages
from qr_integrations.cropping.asking import GENERIC, as_map
from qr_integrations.cropping.boxes import find_box
from qr_integrations.cropping.importance import ImportanceMap
from qr_integrations.cropping.relative_attention import relative_attention
from qr_integrations.cropping.vicrop import ViCrop
from qr_integrations.types import Message
from tests.backend.tiny_vlms import image_processor, template, tokenizer

FOLDER = Path(__file__).parents[1] / "golden" / "vision" / "tiny_llava"
EXPECTED: Any = json.loads((FOLDER / "expected.json").read_text())
CASES: Any = {case["id"]: case for case in EXPECTED["cases"]}
LAYER, SIDE, TOLERANCE = EXPECTED["attention_layer"], 336, 2e-5
METHODS = {"rel": "relative", "grad": "gradient", "pure": "input_gradient"}


class Told(Backend):
    """A backend whose tokenizer and image processor are a table: what it makes of pictures and words is stored."""

    case: Any = None

    def lay_out(self, messages: Any) -> Prompt:
        opened, stored = as_messages(messages), inputs()
        ids = stored[self.case["general_input_ids" if opened[-1].text == GENERIC else "input_ids"]]
        tensors = {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.ones(ids.shape, dtype=torch.long),
            "pixel_values": torch.from_numpy(stored[self.case["pixel_values"]].astype(np.float32)),
        }
        return Prompt(opened, tensors, tuple(ids[0].tolist()))


@cache
def inputs() -> dict[str, np.ndarray]:
    with np.load(FOLDER / "inputs.npz") as file:
        return dict(file)


@cache
def maps() -> dict[str, np.ndarray]:
    with np.load(FOLDER / "expected.npz") as file:
        return dict(file)


@cache
def opened() -> Told:
    model = LlavaForConditionalGeneration.from_pretrained(FOLDER / "model").eval()
    words = tokenizer(image_token="<image>")
    images = image_processor("llava", "LlavaImageProcessorPil")  # as published: 336 pixels, the centre square
    processor = LlavaProcessor(
        images,
        words,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>"),
    )
    return Told(model, words, processor=processor, name="the authors' tiny LLaVA")


def asked(case: str) -> tuple[Told, Image.Image]:
    backend = opened()
    backend.case = CASES[case]
    return backend, Image.fromarray(inputs()[CASES[case]["image"]])


def seen(image: Image.Image, text: str) -> tuple[Message, ...]:
    return (Message.user(image, text),)


def check(found: np.ndarray, kind: str, case: str) -> None:
    expected = maps()[CASES[case]["maps"][kind]]
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("case", CASES)
def test_map_and_box(case: str, kind: str) -> None:
    backend, image = asked(case)
    vicrop = ViCrop(method=METHODS[kind], layers=None if kind == "pure" else LAYER, geometry="published")
    look = vicrop.look(backend, image, "what is in the picture ?")
    check(look.importance.values, kind, case)
    assert look.box is not None
    assert list(look.box.as_tuple()) == CASES[case]["boxes_bbox_size_336"][kind]


@pytest.mark.parametrize("case", CASES)
def test_quotients_without_a_shared_beginning(case: str) -> None:
    backend, image = asked(case)
    question, generic = (backend.lay_out(seen(image, text)) for text in ("what is in the picture ?", GENERIC))
    (found,) = relative_attention(backend, question, generic, (LAYER,))
    check(found[0].numpy(), "rel", case)


@pytest.mark.parametrize("case", CASES)
def test_true_geometry_searches_the_same_map_in_the_centre_square(case: str) -> None:
    """The authors stretch the 24 x 24 cells over the whole picture; the model saw its centre square."""
    backend, image = asked(case)
    prompt = backend.lay_out(seen(image, "what is in the picture ?"))
    (picture,) = find_pictures(backend, prompt)
    assert picture.start == CASES[case]["image_start"]
    values = torch.from_numpy(maps()[CASES[case]["maps"]["rel"]])
    importance = as_map(values, picture, image.size, "relative")
    side, excess = min(image.size), abs(image.width - image.height)
    left, top, right, bottom = importance.covers
    assert (right - left, bottom - top) == pytest.approx((side, side), abs=1)
    assert left + top == pytest.approx(excess / 2, abs=2)
    whole = ImportanceMap(importance.values, (0.0, 0.0, *map(float, image.size)), image.size, "relative")
    assert find_box(importance, SIDE, geometry="published").box == find_box(whole, SIDE).box
    assert find_box(importance, SIDE).box != find_box(whole, SIDE).box
