"""The bundled vision-language model sees large things, misses small ones, and finds them when it looks again."""

from pathlib import Path
from statistics import mean
from typing import Any

import pytest

LIMIT_BYTES = 16 * 2**20
SCENES = 16


@pytest.fixture(scope="module")
def folder() -> Path:
    from qr_integrations.bundled import bundled_path

    return bundled_path("qr-mini-vl")


@pytest.fixture(scope="module")
def accuracy(qr_mini_vl: Any) -> dict[str, dict[str, float]]:
    """System -> size -> share of right answers about what is drawn on things, and what they are."""
    from qr_integrations.evaluation.drawn_world.data import drawn_questions
    from qr_integrations.evaluation.pictures import ask_pictures, make_picture_systems, size_name

    questions = [
        question
        for question in drawn_questions(SCENES, (0.6, 0.1, 0.05))
        if question.skill in ("color", "shape", "letter", "number", "word")
    ]
    runs = ask_pictures(qr_mini_vl, make_picture_systems(["none", "relative", "random"]), questions)
    found: dict[str, dict[str, list[bool]]] = {}
    for run in runs:
        share = questions[run.number].share
        assert share is not None
        found.setdefault(run.system, {}).setdefault(size_name(share), []).append(run.right)
    return {system: {size: mean(right) for size, right in sizes.items()} for system, sizes in found.items()}


def test_large_things_are_seen_and_small_ones_are_not(accuracy: dict[str, dict[str, float]]) -> None:
    assert accuracy["none"]["0.60"] >= 0.9
    assert accuracy["none"]["0.05"] <= 0.6


def test_a_second_look_finds_small_things_and_loses_no_large_ones(accuracy: dict[str, dict[str, float]]) -> None:
    for size in ("0.10", "0.05"):
        assert accuracy["relative"][size] > accuracy["none"][size] + 0.1
        assert accuracy["relative"][size] > accuracy["random"][size] + 0.1
    assert accuracy["relative"]["0.60"] >= accuracy["none"]["0.60"] - 0.05


def test_it_loads_with_stock_transformers(folder: Path) -> None:
    from PIL import Image
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model, processor = LlavaForConditionalGeneration.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is there a ball?"}]}]
    text = processor.apply_chat_template(said, add_generation_prompt=True)
    inputs = processor(text=text, images=Image.new("RGB", (300, 200), "red"), return_tensors="pt")
    tokens = model.generate(**inputs.to(model.dtype), max_new_tokens=4, do_sample=False)
    answer = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer.strip() in ("yes", "no")


def test_it_is_small_readable_and_safe(folder: Path) -> None:
    files = list(folder.iterdir())
    assert sum(file.stat().st_size for file in files) <= LIMIT_BYTES
    assert {file.suffix for file in files} <= {".json", ".safetensors", ".jinja", ".md"}
    assert all(file.stat().st_mode & 0o444 == 0o444 for file in files)


def test_towers_and_language_model_are_deep_enough_to_choose_layers(qr_mini_vl: Any) -> None:
    config = qr_mini_vl.model.config
    assert config.vision_config.num_hidden_layers >= 12 and config.text_config.num_hidden_layers >= 8
