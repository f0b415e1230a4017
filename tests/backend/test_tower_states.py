"""States of vision towers: against the hidden states that transformers gives, over families, batches and tiles."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from tests.backend.tiny_vlms import FAMILIES, image_processor, square, tiny

if TYPE_CHECKING:
    from qr_integrations.backend import Backend
    from qr_integrations.backend.tower_states import VisionTower

SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2)
EYES = dict(**SIZES, image_size=56, patch_size=14)
ALONE = ["Dinov2", "Dinov2WithRegisters", "ViT", "CLIPVision", "SiglipVision", "CLIP", "Siglip"]
LEADING = {"Dinov2": 1, "Dinov2WithRegisters": 5, "ViT": 1, "CLIPVision": 1, "SiglipVision": 0, "CLIP": 1, "Siglip": 0}
TILED = {"llava_next": (5, 5, 4), "llava_onevision": (7, 7, 7), "idefics3": (5, 5, 3), "smolvlm": (5, 5, 3)}


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


PICTURES = [noise(130, 90), noise(130, 90, 1), noise(90, 200, 2)]


def eyes() -> Any:
    return image_processor("clip", "CLIPImageProcessorPil", size={"shortest_edge": 56}, crop_size=square(56))


def random_eyes(name: str) -> Any:
    parts: dict[str, Any] = EYES
    if name in ("CLIP", "Siglip"):
        words = dict(**SIZES, vocab_size=99, bos_token_id=1, eos_token_id=2, pad_token_id=0)
        parts = dict(vision_config=EYES, text_config=words)
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**parts)
    return getattr(transformers, f"{name}Model")(config).eval()


def around(name: str) -> "VisionTower":
    from qr_integrations.backend.tower_states import tower_around

    return tower_around(random_eyes(name), eyes(), name=f"tiny {name}")


def seeing(family: str) -> "Backend":
    from qr_integrations.backend import Backend

    model, processor = tiny(family)
    return Backend(model, processor.tokenizer, processor=processor, name=f"tiny {family}")


def opened(source: Any, **options: Any) -> "VisionTower":
    from qr_integrations.backend.tower_states import open_tower

    return open_tower(source, **options)


def read(tower: "VisionTower", pictures: Any = PICTURES, batch_size: int = 8) -> tuple[torch.Tensor, ...]:
    """States, pictures, patches and cells of all batches."""
    batches = list(tower.states(pictures, batch_size=batch_size))
    rest = (torch.cat([getattr(one, name) for one in batches]) for name in ("picture", "patch", "cell"))
    return torch.cat([one.states for one in batches], 1), *rest


# ---- what is read


@pytest.mark.parametrize("name", ALONE)
def test_states_of_a_tower_alone_are_its_hidden_states(name: str) -> None:
    tower = around(name)
    pixels = eyes()(images=PICTURES, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = tower.model(pixels, output_hidden_states=True).hidden_states
    states, picture, patch, cell = read(tower)
    assert len(expected) == len(states) == tower.num_layers + 1 == 4
    torch.testing.assert_close(states, torch.stack(expected).flatten(1, 2), rtol=0, atol=1e-6)
    leading = LEADING[name]
    assert picture.tolist() == [number for number in range(3) for _ in range(16 + leading)]
    assert patch.tolist() == ([False] * leading + [True] * 16) * 3
    assert cell.tolist() == ([-1] * leading + list(range(16))) * 3


@pytest.mark.parametrize("family", FAMILIES)
def test_states_of_a_tower_inside_a_model_do_not_depend_on_the_batch(family: str) -> None:
    tower = opened(seeing(family))
    whole, picture, patch, _ = read(tower)
    assert whole.shape[0] == 3 and bool(torch.isfinite(whole).all())
    assert picture.unique().tolist() == [0, 1, 2] and bool((picture.diff() >= 0).all())
    assert [int((picture == number)[patch].sum()) for number in range(3)] == [
        int(one[2].sum()) for one in (read(tower, [picture]) for picture in PICTURES)
    ]
    for number, one in enumerate(PICTURES):
        alone, where, *_ = read(tower, [one])
        assert where.unique().tolist() == [0]
        torch.testing.assert_close(whole[:, picture == number], alone, rtol=1e-4, atol=1e-4)


def test_states_inside_a_llava_are_all_hidden_states_of_its_tower() -> None:
    backend = seeing("llava")
    tower = opened(backend)
    pixels = backend.processor.image_processor(images=PICTURES, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = backend.model.base_model.vision_tower(pixels, output_hidden_states=True).hidden_states
    torch.testing.assert_close(read(tower)[0], torch.stack(expected).flatten(1, 2), rtol=0, atol=1e-5)
    assert tower.feature_layers == (1,)  # -2 of layers 0, 1, 2


@pytest.mark.parametrize("family", list(TILED))
def test_tiles_belong_to_their_picture(family: str) -> None:
    _, picture, patch, cell = read(opened(seeing(family)))
    views = [int((cell[picture == number] == 0).sum()) for number in range(3)]
    assert tuple(views) == TILED[family]
    assert int(patch.sum()) % sum(views) == 0


def test_cells_count_row_by_row() -> None:
    tower = around("ViT")
    torch.nn.init.zeros_(tower.model.embeddings.position_embeddings)
    pixels = np.zeros((56, 56, 3), np.uint8)
    pixels[14:28, 42:56] = 255  # row 1, column 3
    states, _, patch, cell = read(tower, [Image.fromarray(pixels)])
    embedded, cells = states[0, patch], cell[patch]
    unusual = (embedded - embedded[0]).abs().amax(1) > 1e-3
    assert cells[unusual].tolist() == [1 * 4 + 3]


def test_where_the_order_of_patches_is_the_towers_own_it_is_not_told() -> None:
    _, _, patch, cell = read(opened(seeing("qwen2_5_vl")))
    assert bool(patch.all()) and cell.unique().tolist() == [-1]


def test_patches_of_padding_are_none() -> None:
    backend = seeing("idefics3")
    processor = backend.processor.image_processor

    def padded(images: Any, return_tensors: str) -> dict[str, Any]:
        made = processor(images=images, return_tensors=return_tensors, do_image_splitting=False)
        made["pixel_attention_mask"][..., 56:, :] = 0
        return dict(made)

    tower = opened(backend)
    tower._processor = padded
    _, _, patch, cell = read(tower, PICTURES[:1])
    assert len(patch) == 64 and cell[patch].tolist() == list(range(32)) and cell[~patch].unique().tolist() == [-1]


def test_pictures_are_opened_one_batch_at_a_time() -> None:
    taken = []

    def coming() -> Any:
        for number, one in enumerate(PICTURES * 2):
            taken.append(number)
            yield one

    batches = around("ViT").states(coming(), batch_size=2)
    next(batches)
    assert taken == [0, 1]
    assert [one.picture.unique().tolist() for one in batches] == [[2, 3], [4, 5]]


# ---- the model stays as it is


def test_nothing_is_left_behind_on_the_model() -> None:
    tower = around("CLIPVision")
    next(tower.states(PICTURES))
    hooked = [one for one in tower.model.modules() if one._forward_hooks or one._forward_pre_hooks]
    assert not hooked
    layer = tower.model.encoder.layers[1]

    def fail(*_: object) -> None:
        raise ZeroDivisionError("the hardware is on fire")

    broken = layer.register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        next(tower.states(PICTURES))
    broken.remove()
    assert not [one for one in tower.model.modules() if one._forward_hooks or one._forward_pre_hooks]


def test_nothing_behind_the_last_layer_runs(qr_mini_vl: "Backend") -> None:
    def fail(*_: object) -> None:
        raise AssertionError("the projector ran")

    projector = qr_mini_vl.model.base_model.multi_modal_projector
    hook = projector.register_forward_pre_hook(fail)
    try:
        (batch,) = opened(qr_mini_vl).states(PICTURES)
    finally:
        hook.remove()
    assert batch.states.shape == (13, 303, 192)
    assert not batch.states.requires_grad


# ---- opening


def test_a_folder_a_name_and_what_is_open(tmp_path: Path, qr_mini_vl: "Backend") -> None:
    model = random_eyes("Dinov2")
    model.save_pretrained(tmp_path)
    eyes().save_pretrained(tmp_path)
    tower = opened(tmp_path, device="cpu")
    assert opened(tower) is tower and tower.num_layers == 3 and tower.feature_layers == ()
    torch.testing.assert_close(read(tower)[0], read(around("Dinov2"))[0])
    inside = opened("qr-mini-vl")
    assert inside.num_layers == 12 and inside.feature_layers == (11,) and inside.model is opened(qr_mini_vl).model
    assert "12 layers" in repr(inside)


def without_processor(folder: Path) -> Path:
    random_eyes("ViT").save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("source", "error", "told"),
    [
        (lambda folder: "qr-mini", "InputError", "reads text only"),
        (lambda folder: "./nowhere", "LoadError", "no model folder"),
        (lambda folder: folder, "LoadError", "preprocessor_config.json"),
        (without_processor, "LoadError", "preprocessor_config.json"),
    ],
)
def test_what_cannot_be_opened(tmp_path: Path, source: Callable[[Path], Any], error: str, told: str) -> None:
    from qr_integrations import errors

    with pytest.raises(getattr(errors, error), match=told):
        opened(source(tmp_path), device="cpu")


def test_a_text_model_has_no_tower(qr_mini: "Backend") -> None:
    from qr_integrations.errors import InputError

    with pytest.raises(InputError, match="reads text only"):
        opened(qr_mini)


def test_towers_of_unequal_layers_are_refused() -> None:
    from qr_integrations.backend.tower_states import tower_around
    from qr_integrations.errors import UnsupportedModelError

    config = transformers.SwinConfig(
        image_size=56, patch_size=7, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=2
    )
    tower = tower_around(transformers.SwinModel(config), eyes())
    with pytest.raises(UnsupportedModelError, match="differ in width or length"):
        next(tower.states(PICTURES))
    convolutions = transformers.ResNetModel(
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])
    )
    with pytest.raises(UnsupportedModelError, match="no stack of equal layers"):
        tower_around(convolutions, eyes())


def test_towers_around_one_model_wait_for_each_other() -> None:
    from concurrent.futures import ThreadPoolExecutor

    from qr_integrations.backend.tower_states import tower_around

    model, processor = random_eyes("ViT"), eyes()
    expected = read(tower_around(model, processor))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: read(tower_around(model, processor)), range(32)))
    assert all(torch.equal(one, other) for several in found for one, other in zip(several, expected, strict=True))


def test_files_are_not_opened_beyond_the_usual_limit(tmp_path: Path) -> None:
    from qr_integrations.errors import InputError

    Image.new("1", (12_000, 6_000)).save(path := tmp_path / "huge.png")
    with pytest.raises(InputError, match="12000 x 6000 pixels, 1 to 64000000 are allowed"):
        next(around("ViT").states([path]))


def test_a_batch_must_hold_a_picture() -> None:
    from qr_integrations.errors import InputError

    with pytest.raises(InputError, match="batch_size=0"):
        next(around("ViT").states(PICTURES, batch_size=0))
