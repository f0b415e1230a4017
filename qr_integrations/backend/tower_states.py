"""What every layer of a vision tower makes of pictures, batch by batch: of a tower alone, or inside a larger model.

The states are read by hooks on the tower's layers. `hidden_states` of a vision-language model hold the layers that its
projector reads, and no others.

Legend: L layers and the embeddings before them, T tokens of a batch of pictures, d width of the tower.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from qr_integrations.backend.backend import Backend
from qr_integrations.backend.loading import explained, resolve_device, resolve_dtype, resolve_name
from qr_integrations.backend.opened import lock_of
from qr_integrations.errors import InputError, UnsupportedModelError
from qr_integrations.images import PictureSource, check_several, open_numbered

UNPLACED = -1


@dataclass(frozen=True, slots=True)
class TowerStates:
    """What every layer made of some pictures.

    Attributes:
        states: layer 0 is what the first layer reads (patches with their positions), layer l the output of the l-th
            layer; the last one as it is before the tower's final norm. In the tower's dtype.
        picture: which picture each token is from, counted from 0 over all batches; never falling.
        patch: False for class tokens, registers, and patches of padding.
        cell: which patch of its view (the picture, or a tile of it) a token shows, row by row. `UNPLACED` for tokens
            that show none, and where the tower reads patches in another order (Qwen).
    """

    states: Float[Tensor, "L T d"]
    picture: Int[Tensor, " T"]
    patch: Bool[Tensor, " T"]
    cell: Int[Tensor, " T"]


class VisionTower:
    """A vision tower of equal layers, with what prepares its pictures. Made by `open_tower`.

    Attributes:
        name: of the model it belongs to.
        feature_layers: whose states the model's projector reads, counted as in `TowerStates`; empty where the model
            does not say.
    """

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        processor: Any,
        run: Callable[..., Any],
        locked: Callable[[], AbstractContextManager[Any]],
        feature_layers: tuple[int, ...] = (),
    ) -> None:
        self.name, self.model = name, model
        self._processor, self._run, self._locked = processor, run, locked
        self._layers = _layers_of(name, model)
        self._accepted = _parameters(run) | _parameters(model.forward)
        self.feature_layers = tuple(number % (self.num_layers + 1) for number in feature_layers)

    def __repr__(self) -> str:
        return f"VisionTower({self.name!r}, {type(self.model).__name__}, {self.num_layers} layers)"

    @property
    def num_layers(self) -> int:
        """How many layers there are; their states are one more, the embeddings before them."""
        return len(self._layers)

    def states(self, pictures: Iterable[PictureSource], *, batch_size: int = 8) -> Iterator[TowerStates]:
        """The states of all layers, batch by batch in the order of the pictures.

        Pictures that the processor makes equal in shape are read together, up to `batch_size`; others one by one, and
        always so where a picture is cut into tiles in a nested batch or keeps its own size.

        Args:
            pictures: opened, or what `open_picture` opens. Only those of one batch are held.
            batch_size: pictures of one pass at most.

        Raises:
            InputError: one picture instead of several, no room for a picture in a batch, or a broken picture, with
                its number.
            UnsupportedModelError: the tower's layers are not of one width and length.
        """
        check_several(pictures, once=True)
        if batch_size < 1:
            raise InputError(f"batch_size={batch_size} holds no picture: pass at least 1")
        first, waiting = 0, iter(pictures)
        while some := list(islice(waiting, batch_size)):
            prepared = [self._prepared(picture, number) for number, picture in enumerate(some, first)]
            for inputs, views in _joined(prepared):
                yield self._read(inputs, views, first)
                first += len(views)

    def _prepared(self, picture: PictureSource, number: int) -> dict[str, Tensor]:
        made = self._processor(images=[open_numbered(picture, number)], return_tensors="pt")
        tensors = {name: value for name, value in made.items() if isinstance(value, Tensor)}
        return {name: value for name, value in tensors.items() if name in self._accepted}

    def _read(self, inputs: Mapping[str, Tensor], views: Sequence[int], first: int) -> TowerStates:
        """One pass; picture number ``first + i`` has ``views[i]`` views."""
        weight = next(self.model.parameters())
        given = {
            name: value.to(weight.device, weight.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
        }
        with self._locked(), torch.no_grad():
            kept = _run_to_the_end(self._layers, lambda: self._run(**given))
        if len({state.shape for state in kept}) > 1 or kept[0].dim() not in (2, 3):
            raise UnsupportedModelError(
                f"the layers of {self.name!r} differ in width or length ({tuple(kept[0].shape)} to "
                f"{tuple(kept[-1].shape)}) and cannot be compared: use a tower of equal layers, such as CLIP, SigLIP "
                "or DINOv2"
            )
        states = torch.stack(kept)
        patch, cell = _places(self.name, states, inputs, self.model.config)
        numbers = torch.arange(first, first + len(views), device=states.device)
        counts = torch.tensor(views, device=states.device) * (patch.numel() // sum(views))
        return TowerStates(states.flatten(1, -2), numbers.repeat_interleave(counts), patch.flatten(), cell.flatten())


def open_tower(
    source: VisionTower | Backend | str | Path,
    *,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    local_files_only: bool = False,
    trust_remote_code: bool = False,
) -> VisionTower:
    """The vision tower of a model: one that is loaded, or one by its name, its folder or its hub id.

    Args:
        source: a tower, a backend with a vision-language model, or what to load: a vision-language model, a model of
            pictures and texts (CLIP, SigLIP) or a vision model (DINOv2, ViT).
        device, dtype, revision, local_files_only, trust_remote_code: for loading, as in `Backend.load`.

    Raises:
        InputError: the model reads text only.
        LoadError: it cannot be loaded, or its image processor cannot.
        UnsupportedModelError: its tower is not a stack of equal layers.
    """
    if isinstance(source, VisionTower):
        return source
    if isinstance(source, Backend):
        return _tower_inside(source)
    hub: dict[str, Any] = {
        "revision": revision,
        "local_files_only": local_files_only,
        "trust_remote_code": trust_remote_code,
    }
    name = resolve_name(source)
    with _explained(str(source)):
        config = AutoConfig.from_pretrained(name, **hub)
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return _tower_inside(Backend.load(source, device=device, dtype=dtype, **hub))
    if not hasattr(_vision_config(config), "patch_size"):
        raise _reads_text_only(str(source))
    device = resolve_device(device)
    with _explained(str(source)):
        model = AutoModel.from_pretrained(name, use_safetensors=True, dtype=resolve_dtype(dtype, device), **hub)
        processor = AutoImageProcessor.from_pretrained(name, **hub)
    return tower_around(model.to(device), processor, name=str(source))


def tower_around(model: PreTrainedModel, processor: Any, *, name: str | None = None) -> VisionTower:
    """The tower of a vision model, or of a model of pictures and texts, that you loaded yourself.

    Args:
        model: as transformers' ``AutoModel`` loads it.
        processor: its image processor.
        name: for messages; None takes the model's own.

    Raises:
        UnsupportedModelError: it is not a stack of equal layers.
    """
    model = model.eval()
    tower = model.get_encoder(modality="image") if _vision_config(model.config) is not model.config else model
    lock, name = lock_of(model), name or model.config._name_or_path or type(model).__name__
    return VisionTower(name, tower, processor, tower, lambda: lock)


def _tower_inside(backend: Backend) -> VisionTower:
    if not backend.sees_pictures:
        raise _reads_text_only(backend.name)
    base: Any = backend.model.base_model
    processor: Any = backend.processor
    tower = base.get_encoder(modality="image")
    if not isinstance(tower, PreTrainedModel) or tower is base:
        raise UnsupportedModelError(
            f"{backend.name!r} has no vision tower that can be told from the rest of it: pass a model with one, such "
            "as a LLaVA, or the tower alone"
        )
    read: Callable[..., Any] = base.get_image_features
    needed = {name for name, one in inspect.signature(read).parameters.items() if _must_be_given(one)}
    if not needed <= {"pixel_values", "image_sizes", "image_grid_thw"}:
        read = tower  # the features need a question too, the tower does not
    named = getattr(backend.model.config, "vision_feature_layer", None)
    layers = () if named is None else (named,) if isinstance(named, int) else tuple(named)
    return VisionTower(
        backend.name,
        tower,
        processor.image_processor,
        read,
        backend.locked,
        layers,
    )


def _reads_text_only(name: str) -> InputError:
    return InputError(
        f"{name!r} reads text only: pass a vision-language model, or a vision model such as CLIP, SigLIP or DINOv2"
    )


def _vision_config(config: PreTrainedConfig) -> Any:
    return getattr(config, "vision_config", config)


def _explained(name: str) -> AbstractContextManager[None]:
    return explained(
        f"the vision tower {name!r} cannot be loaded",
        "it needs config.json, model.safetensors and preprocessor_config.json in a folder or behind a hub id, and for "
        "some families pip install torchvision",
    )


# ---- one pass


class _Done(Exception):
    """Not an error: the last layer has been read. Raised inside the pass, caught by `_run_to_the_end`."""


def _run_to_the_end(layers: nn.ModuleList, run: Callable[[], Any]) -> list[Tensor]:
    """What the first layer reads and what each layer makes of it; nothing behind the last layer runs."""
    kept: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kept.append(args[0] if args else kwargs["hidden_states"])

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)
        if module is layers[-1]:
            raise _Done

    with ExitStack() as stack:
        stack.callback(layers[0].register_forward_pre_hook(before, with_kwargs=True).remove)
        for layer in layers:
            stack.callback(layer.register_forward_hook(after).remove)
        with suppress(_Done):
            run()
    return kept


def _joined(prepared: Sequence[dict[str, Tensor]]) -> Iterator[tuple[dict[str, Tensor], list[int]]]:
    """Inputs of several pictures that can be read together, and how many views each has."""
    together: list[Tensor] = []
    for inputs in prepared:
        pixels = inputs["pixel_values"]
        plain = inputs.keys() == {"pixel_values"} and pixels.dim() == 4
        if together and not (plain and pixels.shape[1:] == together[0].shape[1:]):
            yield {"pixel_values": torch.cat(together)}, [len(one) for one in together]
            together = []
        if plain:
            together.append(pixels)
        else:
            yield inputs, [1]
    if together:
        yield {"pixel_values": torch.cat(together)}, [len(one) for one in together]


def _places(
    name: str, states: Tensor, inputs: Mapping[str, Tensor], config: Any
) -> tuple[Bool[Tensor, "*tokens"], Int[Tensor, "*tokens"]]:
    """Which tokens are patches, and of which place: `[views, tokens]`, or `[tokens]` where all stand in one row."""
    shape, device = states.shape[1:-1], states.device
    cell = torch.full(shape, UNPLACED, device=device)
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bool, device=device), cell
    patches, seen = _patches(inputs, config)
    first = shape[1] - patches
    if first < 0:
        raise UnsupportedModelError(
            f"{name!r} reads {shape[1]} tokens of {patches} patches, so which is which is not known: use a tower that "
            "reads all patches of a picture"
        )
    cell[:, first:] = torch.arange(patches, device=device)
    patch = cell != UNPLACED
    if seen is not None:
        patch[:, first:] &= seen.to(device)
        cell[~patch] = UNPLACED
    return patch, cell


def _patches(inputs: Mapping[str, Tensor], config: Any) -> tuple[int, Bool[Tensor, "views patches"] | None]:
    """How many patches a view has, and which of them are no padding."""
    pixels, mask = inputs["pixel_values"], inputs.get("pixel_attention_mask")
    if pixels.dim() == 3:  # cut into patches by the processor, [views, patches, colours of a patch]
        return pixels.shape[1], None if mask is None else mask.bool()
    side = config.patch_size
    height, width = (side, side) if isinstance(side, int) else side
    grid = pixels.shape[-2] // height, pixels.shape[-1] // width
    if mask is None:
        return grid[0] * grid[1], None
    cells = mask.flatten(0, -3)[:, : grid[0] * height, : grid[1] * width]
    return grid[0] * grid[1], cells.unflatten(2, (-1, width)).unflatten(1, (-1, height)).amax((2, 4)).flatten(1).bool()


# ---- what a model is made of


def _layers_of(name: str, tower: nn.Module) -> nn.ModuleList:
    config: Any = tower.config
    depth = getattr(config, "num_hidden_layers", None) or getattr(config, "depth", None)
    for module in tower.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise UnsupportedModelError(
        f"{name!r} has no stack of {depth or 'equal'} layers that look at pictures: use a tower of equal layers, such "
        "as CLIP, SigLIP or DINOv2"
    )


def _parameters(function: Callable[..., Any]) -> set[str]:
    called = function.forward if isinstance(function, nn.Module) else function
    return {name for name, one in inspect.signature(called).parameters.items() if one.kind is not one.VAR_KEYWORD}


def _must_be_given(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
