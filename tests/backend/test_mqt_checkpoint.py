"""Published checkpoints of MQT-LLaVA, made small: written anew they say the same, and no fault passes in silence."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.backend.found_pictures import noise
from tests.backend.tiny_vlms import tiny

GOLDEN = Path(__file__).parents[1] / "golden" / "vision"
QUERY = "model.query_abstractor.query"
THERE = {
    "model.multi_modal_projector.": "model.query_abstractor.",
    "model.vision_tower.": "model.vision_tower.vision_tower.vision_model.",
    "model.language_model.": "model.",
}


def convert(folder: Path, out: Path, **options: Any) -> Path:
    from qr_integrations.backend.mqt_checkpoint import convert_mqt_llava

    convert_mqt_llava(folder, out, **{"num_query_heads": 4, **options})
    return out


def published_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    named = {}
    for name, value in weights.items():
        here = next((place for place in THERE if name.startswith(place)), None)
        named[THERE[here] + name.removeprefix(here) if here else name] = value.clone()
    return named


def tower_config(model: Any, **more: Any) -> dict[str, Any]:
    return model.config.vision_config.to_dict() | more


@pytest.fixture
def original() -> Any:
    """The model that the checkpoint holds."""
    return tiny("mqt_llava")[0]


@pytest.fixture
def checkpoint(tmp_path: Path, original: Any) -> Path:
    """The published layout: two files, a vocabulary without ``<image>``, the tower's config elsewhere."""
    folder = tmp_path / "published"
    folder.mkdir()
    _, processor = tiny("mqt_llava")
    weights = published_names(original.state_dict())
    weights["model.vision_tower.vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    vision = {name: value for name, value in weights.items() if "vision_tower" in name}
    save_file(vision, folder / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    rest = {name: value for name, value in weights.items() if name not in vision}
    save_file(rest, folder / "model-00002-of-00002.safetensors", metadata={"format": "pt"})
    text = original.config.text_config.to_dict() | {
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"],
        "mm_vision_tower": "somewhere/clip",
        "mm_vision_select_layer": -2,
        "image_aspect_ratio": "pad",
        "num_visual_tokens": "second_stage",
    }
    (folder / "config.json").write_text(json.dumps(text), encoding="utf-8")
    processor.tokenizer.save_pretrained(folder)
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "config.json").write_text(
        json.dumps({"model_type": "clip", "vision_config": tower_config(original)}), encoding="utf-8"
    )
    return folder


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return tmp_path / "clip"


def test_what_is_written_says_what_was_published(checkpoint: Path, clip: Path, tmp_path: Path, original: Any) -> None:
    from qr_integrations.backend import Backend
    from qr_integrations.types import Message

    backend = Backend.load(convert(checkpoint, tmp_path / "out", vision_tower=clip))
    prompt = backend.lay_out([Message.user(noise((80, 60), 0), "what is in the picture ?")], num_visual_tokens=4)
    words = len(original.model.get_input_embeddings().weight)
    ids = prompt.inputs["input_ids"].clone()
    ids[ids == backend.model.config.image_token_id] = original.config.image_token_id
    with torch.no_grad():
        ours = backend.model(**prompt.inputs).logits[..., :words]
        theirs = original(**{**prompt.inputs, "input_ids": ids}).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    backend.close()


def test_how_the_checkpoint_rotates_is_kept(checkpoint: Path, clip: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig

    told = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    told.pop("rope_parameters", None)
    told |= {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}}
    (checkpoint / "config.json").write_text(json.dumps(told), encoding="utf-8")
    text = AutoConfig.from_pretrained(convert(checkpoint, tmp_path / "out", vision_tower=clip)).text_config
    rotation = {name: text.rope_parameters[name] for name in ("rope_type", "rope_theta", "factor")}
    assert rotation == {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}


def test_new_words_are_never_said(checkpoint: Path, clip: Path, tmp_path: Path, original: Any) -> None:
    from qr_integrations.backend import Backend

    words = len(original.model.get_input_embeddings().weight)
    backend = Backend.load(convert(checkpoint, tmp_path / "out", vision_tower=clip))
    with torch.no_grad():
        logits = backend.model(input_ids=torch.arange(words)[None]).logits[0]
    assert logits.shape[1] % 64 == 0 and logits.shape[1] > words
    assert (logits[:, words:].amax(1) < logits[:, :words].amax(1)).all()
    backend.close()


def test_pictures_are_padded_and_get_all_tokens(checkpoint: Path, clip: Path, tmp_path: Path) -> None:
    from qr_integrations.backend import Backend
    from qr_integrations.types import Message

    backend = Backend.load(convert(checkpoint, tmp_path / "out", vision_tower=clip))
    prompt = backend.lay_out([Message.user(Image.new("RGB", (80, 20), "white"), "what ?")])
    assert prompt.token_ids.count(backend.model.config.image_token_id) == 9
    pixels = prompt.inputs["pixel_values"][0]
    assert pixels.shape == (3, 56, 56)
    assert float(pixels[:, 0].abs().max()) < 0.02 < float(pixels[:, 28].min())  # the mean colour above, white within
    backend.close()


def test_the_prompt_is_the_published_one(checkpoint: Path, clip: Path, tmp_path: Path) -> None:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(convert(checkpoint, tmp_path / "out", vision_tower=clip))
    picture, question = {"type": "image"}, {"type": "text", "text": "What?"}
    messages = [
        {"role": "user", "content": [picture, question]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        {"role": "user", "content": "Sure?"},
    ]
    system = "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    system += "detailed, and polite answers to the user's questions."
    told = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert told == f"<s>{system} USER: <image>\nWhat? ASSISTANT: A cat.</s>USER: Sure? ASSISTANT:"
    led = processor.apply_chat_template([{"role": "system", "content": "Be brief."}, messages[2]])
    assert led == "<s>Be brief. USER: Sure? "


@pytest.mark.parametrize("prefix", ["vision_model.", ""])
def test_a_tower_from_its_own_folder(checkpoint: Path, clip: Path, tmp_path: Path, original: Any, prefix: str) -> None:
    (checkpoint / "model-00001-of-00002.safetensors").unlink()
    own = {prefix + name: 2 * value for name, value in original.model.vision_tower.state_dict().items()}
    save_file(own | {"logit_scale": torch.ones(1), "text_model.x": torch.ones(2)}, clip / "model.safetensors")
    out = convert(checkpoint, tmp_path / "out", vision_tower=clip)
    written = written_weights(out)
    for name, value in original.model.vision_tower.state_dict().items():
        assert torch.equal(written["model.vision_tower." + name], 2 * value)


def test_the_authors_query_transformer_comes_out_as_it_went_in(tmp_path: Path, checkpoint: Path, clip: Path) -> None:
    """Weights of the reference numbers, read by transformers from the folder that was written."""
    from qr_integrations.backend import Backend

    facts = json.loads((GOLDEN / "mqt.json").read_text(encoding="utf-8"))["cases"][1]
    arrays = np.load(GOLDEN / "mqt.npz")
    prefix, width, out = facts["weights_prefix"], facts["kv_dim"], facts["embed_dim"]
    weights = load_file(checkpoint / "model-00002-of-00002.safetensors")
    weights = {name: value for name, value in weights.items() if "query_abstractor" not in name}
    weights |= {
        f"model.query_abstractor.{name.removeprefix(prefix)}": torch.from_numpy(arrays[name]).float()
        for name in arrays
        if name.startswith(prefix)
    }
    weights["model.query_abstractor.proj"] = torch.zeros(width, 32)
    weights["model.query_abstractor.proj"][:, :out] = torch.from_numpy(arrays[prefix + "proj"]).float()
    save_file(weights, checkpoint / "model-00002-of-00002.safetensors")
    larger = load_file(checkpoint / "model-00001-of-00002.safetensors")
    larger["model.vision_tower.vision_tower.vision_model.embeddings.position_embedding.weight"] = torch.zeros(577, 32)
    save_file(larger, checkpoint / "model-00001-of-00002.safetensors")
    told = json.loads((clip / "config.json").read_text(encoding="utf-8"))
    told["vision_config"]["image_size"] = 336
    (clip / "config.json").write_text(json.dumps(told), encoding="utf-8")
    converted = convert(checkpoint, tmp_path / "out", vision_tower=clip, num_query_heads=facts["num_heads"])
    backend = Backend.load(converted)
    with torch.no_grad():
        tokens = backend.model.model.multi_modal_projector(torch.from_numpy(arrays[facts["x"]]).float(), 16)
    expected = arrays[facts["outputs"]["16"]]
    np.testing.assert_allclose(tokens[..., :out].numpy(), expected, atol=1e-5 * np.abs(expected).max())
    backend.close()


def written_weights(folder: Path) -> dict[str, Tensor]:
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
    weights = {name: value for file in sorted(set(index.values())) for name, value in load_file(folder / file).items()}
    assert weights.keys() == index.keys()
    return weights


def change(file: str, how: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        weights = load_file(folder / file)
        how(weights)
        save_file(weights, folder / file)

    return changed


def as_pickles(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        path.rename(path.with_name("pytorch_model.bin"))


def cut_short(folder: Path) -> None:
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:100])


VISION, REST = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (change(REST, lambda weights: weights.pop("model.norm.weight")), "1 weights are missing.*get it again"),
        (change(VISION, lambda weights: weights.popitem()), "missing.*pass vision_tower="),
        (change(REST, lambda weights: weights.update({"model.typo": torch.ones(1)})), "unknown.*typo"),
        (change(REST, lambda weights: weights.update({"head": torch.ones(1)})), "'head', which no MQT-LLaVA has"),
        (change(REST, lambda weights: weights.update({QUERY: torch.ones(9, 8)})), r"query' is \[9, 8\].*\[9, 32\]"),
        (change(REST, lambda weights: weights.pop(QUERY)), "no 'model.query_abstractor.query'"),
        (as_pickles, r"pytorch_model.bin, which may run code.*weights_only=True"),
        (cut_short, "cannot be read"),
        (lambda folder: (folder / "config.json").unlink(), "pass a folder with config.json"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "best tokenizer.json"),
    ],
)
def test_what_cannot_be_converted_leaves_nothing(
    checkpoint: Path, clip: Path, tmp_path: Path, damage: Callable[[Path], None], told: str
) -> None:
    from qr_integrations.errors import LoadError

    damage(checkpoint)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(LoadError, match=told):
        convert(checkpoint, tmp_path / "out", vision_tower=clip)
    assert sorted(tmp_path.iterdir()) == before


def test_an_unknown_tower_needs_its_config(checkpoint: Path, tmp_path: Path) -> None:
    from qr_integrations.errors import LoadError

    with pytest.raises(LoadError, match="'somewhere/clip' are not known: pass vision_tower="):
        convert(checkpoint, tmp_path / "out")
