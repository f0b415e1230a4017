"""From the published checkpoints of MQT-LLaVA to a folder that `Backend.load` reads.

Source: github.com/gordonhu608/MQT-LLaVA at 92c35d0 (arXiv 2405.19315). Weights go from file to file, never all of them
are held at once. Other than the published loader, which skips names that it does not know, every weight must be there,
fit, and be known.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, CLIPVisionConfig, GenerationConfig, LlamaConfig, LlavaProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from qr_integrations.backend.loading import explained
from qr_integrations.backend.mqt_llava import MQTLlavaConfig, MQTLlavaForConditionalGeneration
from qr_integrations.errors import LoadError
from qr_integrations.files import whole_folder

_PUBLISHED_TOWER = "openai/clip-vit-large-patch14-336"
_PUBLISHED_TOWER_SIZES = dict(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
    projection_dim=768,
)
_VISION = "model.vision_tower."
_PLACES = {
    "model.query_abstractor.": "model.multi_modal_projector.",
    "model.vision_tower.vision_tower.vision_model.": _VISION,
    "model.vision_tower.vision_tower.": _VISION,
    "model.": "model.language_model.",
    "lm_head.": "lm_head.",
}
"""Where weights stand there, and here; the first that fits."""
_COMPUTED = (".position_ids", ".inv_freq")  # once stored, now computed
_ROTATION = {"rope_theta", "rope_scaling"}  # as configs of that time tell it; transformers reads it still
_ROWS = 64  # tables of words have a multiple of so many rows
_VICUNA = (
    "{{ bos_token }}{% if messages[0]['role'] != 'system' %}A chat between a curious user and an artificial "
    "intelligence assistant. The assistant gives helpful, detailed, and polite answers to the user's questions. "
    "{% endif %}{% for message in messages %}"
    "{{ {'user': 'USER: ', 'assistant': 'ASSISTANT: '}.get(message['role'], '') }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ eos_token if message['role'] == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""The prompt they were trained with, ``vicuna_v1``."""


def convert_mqt_llava(
    folder: str | Path, out: str | Path, vision_tower: str | Path | None = None, *, num_query_heads: int = 16
) -> None:
    """Write a published checkpoint anew, with its tokenizer and a processor, as a model of type ``mqt_llava``.

    The word ``<image>`` is added to the vocabulary: the published code has a number for it that is none of a word.

    Args:
        folder: config.json, ``*.safetensors`` and the tokenizer's files, as published.
        out: what was there is replaced once all is well.
        vision_tower: folder of the CLIP model (config.json, ``*.safetensors``), for checkpoints without its weights, or
            with those of another tower than the published one.
        num_query_heads: of the query transformer, which no file tells.

    Raises:
        LoadError: weights as pickles, missing, unknown or of another shape; or files that cannot be read.
    """
    folder = Path(folder)
    given = _read_json(folder / "config.json")
    found = _weights(folder)
    if vision_tower is not None and not any(name.startswith(_VISION) for name in found):
        found |= _tower_weights(Path(vision_tower))
    with _explained(folder):
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    config = _config(given, _tower_config(given, vision_tower), found, tokenizer, num_query_heads)
    _check(config, found)
    with whole_folder(out) as filling:
        _write_weights(filling, found, config.text_config.vocab_size)
        config.architectures = [MQTLlavaForConditionalGeneration.__name__]
        config.save_pretrained(filling)
        GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ).save_pretrained(filling)
        _processor(given, config, tokenizer).save_pretrained(filling)


class _Stored:
    """A weight in its file."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        with safe_open(path, framework="pt") as file:
            self.shape = tuple(file.get_slice(name).get_shape())

    def read(self) -> Tensor:
        """Its values."""
        with safe_open(self.path, framework="pt") as file:
            values: Tensor = file.get_tensor(self.name)
        return values


def _weights(folder: Path) -> dict[str, _Stored]:
    """By their names here, file by file."""
    return {_renamed(stored.name, folder): stored for stored in _stored(folder)}


def _tower_weights(folder: Path) -> dict[str, _Stored]:
    """Those of a CLIP model's eyes."""
    stored = {one.name.removeprefix("vision_model."): one for one in _stored(folder)}
    return {_VISION + name: one for name, one in stored.items() if not name.startswith(_NO_EYES)}


_NO_EYES = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")


def _stored(folder: Path) -> Iterator[_Stored]:
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        raise LoadError(
            f"{str(folder)!r} holds no *.safetensors"
            + (f" but {pickles[0]}, which may run code when it is read" if pickles else "")
            + ": pass a folder with the weights as safetensors; pickles are converted by torch.load(path, "
            "weights_only=True) and safetensors.torch.save_file"
        )
    for path in paths:
        with _explained(folder):
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
            yield from (_Stored(path, name) for name in names if not name.endswith(_COMPUTED))


def _renamed(name: str, folder: Path) -> str:
    for there, here in _PLACES.items():
        if name.startswith(there):
            return here + name.removeprefix(there)
    raise LoadError(f"{str(folder)!r} holds {name!r}, which no MQT-LLaVA has: pass a published checkpoint")


def _tower_config(given: Mapping[str, Any], vision_tower: str | Path | None) -> CLIPVisionConfig:
    if vision_tower is not None:
        told = _read_json(Path(vision_tower) / "config.json")
        told = told.get("vision_config", told)
        return CLIPVisionConfig(**{name: value for name, value in told.items() if name != "model_type"})
    if given.get("mm_vision_tower") != _PUBLISHED_TOWER:
        raise LoadError(
            f"the sizes of the vision tower {given.get('mm_vision_tower')!r} are not known: pass vision_tower=, a "
            "folder with its config.json"
        )
    return CLIPVisionConfig(**_PUBLISHED_TOWER_SIZES)


def _config(
    given: Mapping[str, Any],
    tower: CLIPVisionConfig,
    found: Mapping[str, _Stored],
    tokenizer: Any,
    num_query_heads: int,
) -> MQTLlavaConfig:
    queries = found.get("model.multi_modal_projector.query")
    if queries is None:
        raise LoadError("there is no 'model.query_abstractor.query' among the weights: pass an MQT-LLaVA checkpoint")
    image = tokenizer.convert_tokens_to_ids("<image>")
    known = LlamaConfig().to_dict().keys() - {"model_type"} | _ROTATION
    told = {name: value for name, value in given.items() if name in known}
    rows = max(given.get("vocab_size", 0), len(tokenizer))
    text = LlamaConfig(**{**told, "vocab_size": _ROWS * math.ceil(rows / _ROWS), "architectures": None})
    return MQTLlavaConfig(
        vision_config=tower.to_dict(),
        text_config=text.to_dict(),
        image_token_index=image,
        image_seq_length=queries.shape[0],
        vision_feature_layer=given.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy="default",
        num_queries=queries.shape[0],
        num_query_heads=num_query_heads,
        tie_word_embeddings=bool(given.get("tie_word_embeddings", False)),
        pad_token_id=tokenizer.pad_token_id,
        dtype=given.get("torch_dtype", given.get("dtype")),
    )


def _check(config: MQTLlavaConfig, found: Mapping[str, _Stored]) -> None:
    with torch.device("meta"):
        model = MQTLlavaForConditionalGeneration(config)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if config.tie_word_embeddings and "lm_head.weight" not in found:
        expected.pop("lm_head.weight")
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing:
        cure = "pass vision_tower=, the folder of its CLIP model" if missing[0].startswith(_VISION) else "get it again"
        raise LoadError(f"{len(missing)} weights are missing, such as {missing[0]!r}: {cure}")
    if unknown:
        raise LoadError(f"{len(unknown)} weights are unknown, such as {unknown[0]!r}: pass an MQT-LLaVA checkpoint")
    for name, stored in found.items():
        shape, wanted = stored.shape, expected[name]
        grown = name.endswith(_TABLES) and shape[1:] == wanted[1:] and shape[0] <= wanted[0]
        if shape != wanted and not grown:
            raise LoadError(
                f"{stored.name!r} is {list(shape)}, the config asks for {list(wanted)}: pass config.json and weights "
                "of one checkpoint"
            )


_TABLES = ("embed_tokens.weight", "lm_head.weight")


def _write_weights(filling: Path, found: Mapping[str, _Stored], vocab_size: int) -> None:
    paths = list(dict.fromkeys(stored.path for stored in found.values()))
    index: dict[str, str] = {}
    total = 0
    for number, path in enumerate(paths, 1):
        file = f"model-{number:05}-of-{len(paths):05}.safetensors"
        tensors = {name: one.read() for name, one in found.items() if one.path == path}
        tensors = {
            name: _with_rows(value, vocab_size) if name.endswith(_TABLES) else value.contiguous()
            for name, value in tensors.items()
        }
        save_file(tensors, filling / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
        total += sum(value.nbytes for value in tensors.values())
    written = {"metadata": {"total_size": total}, "weight_map": index}
    (filling / "model.safetensors.index.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


def _with_rows(table: Tensor, rows: int) -> Tensor:
    """Words that the model was not trained with get the mean of all, and so are never the most probable."""
    mean = table.float().mean(0, keepdim=True).to(table.dtype)
    return torch.cat([table, mean.expand(rows - len(table), -1)])


def _processor(given: Mapping[str, Any], config: MQTLlavaConfig, tokenizer: Any) -> LlavaProcessor:
    """Pictures are padded to a square as in training; to the processor, a query is a larger patch."""
    side = config.vision_config.image_size
    square = {"height": side, "width": side}
    tokenizer.padding_side = "left"
    return LlavaProcessor(
        LlavaImageProcessorPil(do_pad=given.get("image_aspect_ratio") == "pad", size=square, crop_size=square),
        tokenizer,
        patch_size=side // math.isqrt(config.num_queries),
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_VICUNA,
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoadError(f"{str(path)!r} cannot be read ({error}): pass a folder with config.json") from error
    return told


def _explained(folder: Path) -> AbstractContextManager[None]:
    return explained(
        f"{str(folder)!r} cannot be read",
        "it needs config.json, *.safetensors, and the tokenizer's files, best tokenizer.json",
    )
