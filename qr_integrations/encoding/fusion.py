"""Fusion of several layers of the tower: a model that sees early, middle and late layers at once.

Source: Multi-Layer Visual Feature Fusion (arXiv 2503.06063) and its code,
github.com/EIT-NLP/Layer_Select_Fuse_for_MLLM at 7de7fc2. Fusion has to be trained; the paper's advice is external
direct fusion of a layer from the tower's beginning, one from its middle and the final one.

Where we differ from the authors' code, whose internal fusion does not run as released: any number of pictures, left
padding; a layer with gates at zero is the language model's own layer; nothing is changed in place.
"""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qr_integrations.backend import Backend
from qr_integrations.encoding.fusion_layers import FusionSpec, fusion_layers
from qr_integrations.encoding.fusion_modules import FusionProjector, FusionSizes
from qr_integrations.encoding.fusion_rows import Arrivals
from qr_integrations.errors import InputError, LoadError, UnsupportedModelError

_SETTINGS, _WEIGHTS, _LANGUAGE = "fusion.json", "fusion.safetensors", "language_model.safetensors"


def fuse(model: Any, spec: FusionSpec, *, seed: int = 0) -> Any:
    """A new model with fused layers; it shares the weights of the tower and the language model with the old one.

    What is new stands in the place of the old projector, is random and must be trained. Only
    ``config.vision_feature_layer`` changes; the model generates and is trained as before, and
    ``Backend(fused, tokenizer, processor=...)`` takes it. External direct fusion of single layers is plain
    transformers: its weights fit the projector of a model with the same list of layers.

    With internal fusion what follows a picture in a cache reads the pictures of earlier passes, but their own rows do
    not see pictures that come later. Internal modular fusion refuses to be trained with gradient checkpointing.

    Args:
        model: a `Backend` or a transformers model with ``vision_tower`` and ``multi_modal_projector`` (LLaVA).
        spec: how to fuse.
        seed: of the random weights.

    Raises:
        InputError: layers that the tower does not have, or a model that is fused already.
        UnsupportedModelError: no LLaVA.
    """
    model = model.model if isinstance(model, Backend) else model
    sizes = _sizes_of(model)
    own = model.config.vision_feature_layer
    if spec.final is None and not isinstance(own, int) and not spec.siglip_layers:
        raise InputError(f"the model reads the layers {own} itself: say which is the final one, FusionSpec(final=23)")
    layers = fusion_layers(spec, sizes.tower_depth, sizes.depth, own if isinstance(own, int) else -2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projector = FusionProjector(spec, layers, sizes)
    old = next(model.base_model.multi_modal_projector.parameters())
    made = _twin(model)
    made.base_model.multi_modal_projector = projector.to(old.device, old.dtype).train(model.training)
    made.config.vision_feature_layer = list(layers.read) if len(layers.read) > 1 else layers.final
    if spec.internal:
        projector.arrivals = Arrivals(projector, model.config.image_token_id)
        projector.arrivals.attach(made.base_model, made.get_decoder())
    return made


def _sizes_of(model: Any) -> FusionSizes:
    base, config = getattr(model, "base_model", None), model.config
    projector = getattr(base, "multi_modal_projector", None)
    if isinstance(projector, FusionProjector):
        raise InputError("the model is fused already: fuse the one that it was made of")
    if not hasattr(projector, "linear_1") or not hasattr(config, "vision_feature_layer"):
        raise UnsupportedModelError(
            f"{type(model).__name__} does not project its tower's layers as LLaVA does: pass a LLaVA model"
        )
    tower, text = config.vision_config, config.get_text_config(decoder=True)
    head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return FusionSizes(
        tower.num_hidden_layers,
        tower.hidden_size,
        text.num_hidden_layers,
        text.hidden_size,
        text.intermediate_size,
        text.num_attention_heads,
        head_width,
    )


def _twin(model: nn.Module) -> Any:
    """Modules of its own, the same parameters and buffers."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared)


@contextmanager
def pictures_at(
    model: Any, places: Bool[Tensor, "B T"], features: Float[Tensor, "*B N W"]
) -> Iterator[Float[Tensor, "*B N D"]]:
    """For who calls tower, projector and language model one by one: within the block, pictures stand at `places`.

    Yields the tokens to put there. For a model without internal fusion these are the features.

    Args:
        model: what `fuse` made, or any other model.
        places: of the pictures' tokens in the prompts that the language model reads.
        features: what the model's projector made of the pictures, in the order of their places.
    """
    arrivals = getattr(model.base_model.multi_modal_projector, "arrivals", None)
    if arrivals is None:
        yield features
        return
    with arrivals.at(places, features) as tokens:
        yield tokens


def save_fusion(model: Any, folder: str | Path, *, language_model: bool = False) -> None:
    """Write what is new in a fused model: its settings as JSON, its weights as safetensors.

    Args:
        model: what `fuse` made, trained.
        folder: made if it is not there.
        language_model: write the language model's weights too, where they were trained with it.

    Raises:
        InputError: the model is not fused.
    """
    model = model.model if isinstance(model, Backend) else model
    projector, folder = _projector_of(model), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {name: getattr(projector.sizes, name) for name in FusionSizes.__slots__}
    settings = {"spec": projector.spec.as_dict(), "read": list(projector.layers.read), "sizes": sizes}
    save_file(_weights({"": projector}), folder / _WEIGHTS)
    (folder / _LANGUAGE).unlink(missing_ok=True)
    if language_model:
        save_file(_weights(_language_parts(model)), folder / _LANGUAGE)
    (folder / _SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def load_fusion(model: Any, folder: str | Path) -> Any:
    """A new model with the fusion that `save_fusion` wrote, made of the model that the fusion was made of.

    Args:
        model: as for `fuse`; its own weights stay as they are, also where the folder holds a language model.
        folder: what was written.

    Raises:
        LoadError: no fusion there, of a model with other sizes, or with tensors too many or too few.
    """
    folder = Path(folder)
    try:
        settings = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
        spec, read = FusionSpec.from_dict(settings["spec"]), settings["read"]
        weights = load_file(folder / _WEIGHTS)
        language = load_file(folder / _LANGUAGE) if (folder / _LANGUAGE).exists() else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise LoadError(f"no fusion in {str(folder)!r} ({error}): write one with save_fusion") from error
    made = fuse(model, spec)
    projector = _projector_of(made)
    if list(projector.layers.read) != read:
        raise LoadError(
            f"the fusion in {str(folder)!r} reads layers {read}, here they would be {list(projector.layers.read)}: "
            "load it with the model that it was made of"
        )
    _take_over({"": projector}, weights, folder / _WEIGHTS)
    if language is not None:
        parts = _language_parts(made)
        for part in parts.values():
            _own_weights(part)
        made.tie_weights()
        _take_over(parts, language, folder / _LANGUAGE)
    return made


def _projector_of(model: Any) -> FusionProjector:
    projector = getattr(getattr(model, "base_model", None), "multi_modal_projector", None)
    if not isinstance(projector, FusionProjector):
        raise InputError(f"{type(model).__name__} is not fused: make it with fuse(model, FusionSpec(...))")
    return projector


def _language_parts(model: Any) -> dict[str, nn.Module]:
    """The decoder, and what turns its states into words where that has weights of its own, by prefix of their names."""
    words = model.get_output_embeddings()
    tied = words is None or words.weight is model.get_input_embeddings().weight
    return {"": model.get_decoder()} | ({} if tied else {"lm_head.": words})


def _weights(parts: dict[str, nn.Module]) -> dict[str, Tensor]:
    return {
        prefix + name: value.detach().cpu().clone().contiguous()
        for prefix, part in parts.items()
        for name, value in part.state_dict().items()
    }


def _own_weights(module: nn.Module) -> None:
    """Copies of the parameters that it shares with another model."""
    for part in module.modules():
        for name, value in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(value.detach().clone(), requires_grad=value.requires_grad))


def _take_over(parts: dict[str, nn.Module], weights: dict[str, Tensor], path: Path) -> None:
    states = {prefix: part.state_dict() for prefix, part in parts.items()}
    own = {prefix + name: tuple(value.shape) for prefix, state in states.items() for name, value in state.items()}
    given = {name: tuple(value.shape) for name, value in weights.items()}
    wrong = sorted(name for name in own.keys() | given.keys() if own.get(name) != given.get(name))
    if wrong:
        raise LoadError(
            f"{len(wrong)} tensors of {str(path)!r} are missing, foreign or of another shape, first {wrong[0]!r}: load "
            "it with the model that it was made of, or write it again with save_fusion"
        )
    for prefix, part in parts.items():
        part.load_state_dict({name: weights[prefix + name] for name in states[prefix]})
