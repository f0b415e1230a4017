"""The bundled matryoshka model: two tokens of a picture say what is large, 64 nearly what 100 say."""

from pathlib import Path
from statistics import mean
from typing import Any

import pytest

LIMIT_BYTES = 16 * 2**20
SCENES = 12


@pytest.fixture(scope="module")
def folder() -> Path:
    from qr_integrations.bundled import bundled_path

    return bundled_path("qr-mini-vl-mqt")


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    from qr_integrations import Backend

    return Backend.load("qr-mini-vl-mqt")


@pytest.fixture(scope="module")
def accuracy(model: Any, qr_mini_vl: Any) -> dict[int, dict[str, float]]:
    """Tokens of a picture -> size -> share of right answers; 100 is qr-mini-vl."""
    from qr_integrations.evaluation.drawn_world.data import drawn_questions
    from qr_integrations.evaluation.pictures import ask_pictures, make_picture_systems, size_name

    skills = ("color", "shape", "letter", "number", "word")
    questions = [question for question in drawn_questions(SCENES, (0.6, 0.1)) if question.skill in skills]
    systems = ["mqt:tokens=2", "mqt:tokens=16", "mqt:tokens=64"]
    runs = ask_pictures(model, make_picture_systems(systems), questions)
    runs += ask_pictures(qr_mini_vl, make_picture_systems(["none"]), questions)
    found: dict[int, dict[str, list[bool]]] = {}
    for run in runs:
        number = 100 if run.system == "none" else int(run.system.split("=")[1])
        share = questions[run.number].share
        assert share is not None
        found.setdefault(number, {}).setdefault(size_name(share), []).append(run.right)
    return {number: {size: mean(right) for size, right in sizes.items()} for number, sizes in found.items()}


def test_two_tokens_tell_what_is_large(accuracy: dict[int, dict[str, float]]) -> None:
    assert accuracy[2]["0.60"] >= 0.9


def test_all_tokens_lose_little_against_the_model_it_was_made_of(accuracy: dict[int, dict[str, float]]) -> None:
    assert accuracy[64]["0.60"] >= accuracy[100]["0.60"] - 0.05
    assert accuracy[64]["0.10"] >= accuracy[100]["0.10"] - 0.12


def test_small_things_need_more_tokens(accuracy: dict[int, dict[str, float]]) -> None:
    assert accuracy[64]["0.10"] > accuracy[2]["0.10"]


def test_transformers_loads_it_once_the_package_is_imported(folder: Path) -> None:
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import qr_integrations.backend  # noqa: F401

    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is there a ball?"}]}]
    text = processor.apply_chat_template(said, add_generation_prompt=True)
    inputs = processor(text=text, images=Image.new("RGB", (300, 200), "red"), return_tensors="pt")
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == model.config.num_queries == 64
    tokens = model.generate(**inputs.to(model.dtype), max_new_tokens=4, do_sample=False)
    answer = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer.strip() in ("yes", "no")


def test_it_is_small_readable_and_safe(folder: Path) -> None:
    files = list(folder.iterdir())
    assert sum(file.stat().st_size for file in files) <= LIMIT_BYTES
    assert {file.suffix for file in files} <= {".json", ".safetensors", ".jinja", ".md"}
    assert all(file.stat().st_mode & 0o444 == 0o444 for file in files)


def test_its_tower_is_that_of_qr_mini_vl(model: Any, qr_mini_vl: Any) -> None:
    import torch

    own, other = (one.model.model.vision_tower.state_dict() for one in (model, qr_mini_vl))
    assert all(torch.equal(own[name], other[name]) for name in other)
