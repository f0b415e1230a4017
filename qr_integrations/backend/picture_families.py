"""Vision-language families as data: one row for each, with what the package must know to look at a picture again.

Answering needs no row. What a row tells: where a picture's tokens stand (picture_geometry.py), which inputs are whose,
and what is published for the family.

Legend: T tokens of the prompt, V words of the vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from qr_integrations.backend import picture_geometry, visual_places
from qr_integrations.backend.picture_geometry import PictureTokens, Size
from qr_integrations.backend.visual_tokens import VisualPlaces
from qr_integrations.errors import InputError, UnsupportedModelError

_SIDE = 224  # published for Qwen2.5-VL; no other tower that takes pictures of any size has a side of its own either


def _stacked(inputs: Mapping[str, Any], pictures: Sequence[PictureTokens], first: int, stop: int) -> dict[str, Tensor]:
    """Tiles of all pictures one after the other."""
    start, end = (sum(picture.tiles for picture in pictures[:number]) for number in (first, stop))
    return {"pixel_values": inputs["pixel_values"][start:end]}


def _gridded(inputs: Mapping[str, Any], pictures: Sequence[PictureTokens], first: int, stop: int) -> dict[str, Tensor]:
    """Patches of all pictures one after the other, and how many rows and columns each has."""
    return _stacked(inputs, pictures, first, stop) | {"image_grid_thw": inputs["image_grid_thw"][first:stop]}


def _nested(inputs: Mapping[str, Any], pictures: Sequence[PictureTokens], first: int, stop: int) -> dict[str, Tensor]:
    """Tiles within pictures, filled up to the same number: the filling goes where no picture needs it."""
    tiles = max(picture.tiles for picture in pictures[first:stop])
    chosen = {"pixel_values": inputs["pixel_values"][first:stop, :tiles]}
    chosen["image_sizes"] = inputs["image_sizes"][first:stop]
    if "batch_num_images" in inputs:
        # [2] is one prompt with two pictures. It stays [2] when one of them is read: [1] would ask for tiles.
        counts = inputs["batch_num_images"]
        chosen["batch_num_images"] = counts[first:stop] if int(counts[0]) == 1 else counts
    return chosen


def _lined(inputs: Mapping[str, Any], pictures: Sequence[PictureTokens], first: int, stop: int) -> dict[str, Tensor]:
    """One view of each picture; views of different sizes are padded, at the right and at the bottom, to the largest."""
    if "image_sizes" not in inputs:
        return _stacked(inputs, pictures, first, stop)
    seen = inputs["image_sizes"][first:stop]
    height, width = seen.amax(0).tolist()
    return {"pixel_values": inputs["pixel_values"][first:stop, :, :height, :width], "image_sizes": seen}


def _batched(inputs: Mapping[str, Any], pictures: Sequence[PictureTokens], first: int, stop: int) -> dict[str, Tensor]:
    """Tiles of all pictures of a prompt on the second axis, with a mask where tiles are padded."""
    start, end = (sum(picture.tiles for picture in pictures[:number]) for number in (first, stop))
    names = [name for name in ("pixel_values", "pixel_attention_mask") if name in inputs]
    return {name: inputs[name][:, start:end] for name in names}


def _asked(inputs: Mapping[str, Any], pictures: Sequence[PictureTokens], first: int, stop: int) -> dict[str, Tensor]:
    """One view of each picture, and the question that its queries read: one row, repeated for each picture."""
    question = {name: inputs[name][:1].expand(stop - first, -1) for name in inputs if name.startswith("qformer_")}
    return _stacked(inputs, pictures, first, stop) | question


def _as_made(config: PreTrainedConfig, inputs: Mapping[str, Any], num_pictures: int) -> dict[str, Any]:
    return dict(inputs)


def _slotted(config: PreTrainedConfig, inputs: Mapping[str, Any], num_pictures: int) -> dict[str, Any]:
    """InstructBLIP's processor makes slots and a question for one picture, however many it is given."""
    finished = dict(inputs)
    if int((inputs["input_ids"] == config.image_token_id).sum()) == config.num_query_tokens:
        for name in ("input_ids", "attention_mask"):
            slots = inputs[name][:, : config.num_query_tokens]
            finished[name] = torch.cat([slots] * (num_pictures - 1) + [inputs[name]], dim=1)
        for name in ("qformer_input_ids", "qformer_attention_mask"):
            finished[name] = inputs[name].expand(num_pictures, -1)
    return finished


def _counted(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Int[Tensor, "1 T"]:
    ids = inputs["input_ids"]
    return torch.arange(ids.shape[1], device=ids.device)[None]


def _counted_from_one(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Int[Tensor, "1 T"]:
    return _counted(model, inputs) + 1


def _in_three_directions(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Int[Tensor, "3 1 T"]:
    """Time, height and width. Found over the whole prompt: a picture moves all tokens behind it."""
    ids = inputs["input_ids"]
    kinds = inputs.get("mm_token_type_ids")
    if kinds is None:
        kinds = (ids == model.config.image_token_id).int()
    locate: Callable[..., tuple[Tensor, Tensor]] = model.base_model.get_rope_index
    return locate(ids, mm_token_type_ids=kinds, image_grid_thw=inputs.get("image_grid_thw"))[0]


@dataclass(frozen=True, slots=True)
class PictureFamily:
    """A row.

    Attributes:
        model_types: of the configs that it is for.
        layout: finds the pictures in a prompt, see `locate`.
        choose: finds what the vision tower reads of some pictures, see `select`.
        finish: makes up for what the processor leaves undone, see `complete`.
        positions: the position ids of a whole prompt.
        shares_prefix: whether a picture's tokens are the same whatever stands behind them. False where the question
            is read together with the picture.
        has_places: whether a cell of the grid is a place in the picture. False where queries look at all of it.
        by_position: inputs that the model looks up by a token's place in the prompt, so that they begin with it.
        base: the published side of a crop in pixels; None is the side that the vision tower takes.
        layers: depth of the language model -> the layer whose attention was published as the best, counted from 0.
        template: the published prompt with ``{pictures}`` and ``{question}``, for checkpoints without a chat template.
            Without ``{pictures}`` where the processor puts them there itself.
        shown: finds what each placeholder shows, see `places`. None where tokens of pictures cannot be dropped: they
            see each other in both directions, or are added to the states of several layers.
    """

    model_types: tuple[str, ...]
    layout: Callable[..., list[PictureTokens]]
    choose: Callable[..., dict[str, Tensor]]
    finish: Callable[..., dict[str, Any]] = _as_made
    positions: Callable[..., Tensor] = _counted
    shares_prefix: bool = True
    has_places: bool = True
    by_position: tuple[str, ...] = ()
    base: int | None = None
    layers: Mapping[int, int] = field(default_factory=dict)
    template: str | None = None
    shown: Callable[..., VisualPlaces] | None = None

    def locate(
        self, config: PreTrainedConfig, processor: Any, inputs: Mapping[str, Any], sizes: Sequence[Size]
    ) -> list[PictureTokens]:
        """Where each picture of one prompt stands in it.

        Args:
            config: the model's, not that of its text half.
            processor: the model's.
            inputs: what the processor made of one prompt, as tensors, completed.
            sizes: (width, height) of each picture as it was given to the processor.

        Raises:
            InputError: the prompt holds other pictures than those of `sizes`.
            UnsupportedModelError: the image processor works in a way that is not known here.
        """
        return self.layout(config, processor, inputs, sizes) if sizes else []

    def complete(self, config: PreTrainedConfig, inputs: Mapping[str, Any], num_pictures: int) -> dict[str, Any]:
        """What a processor made of one prompt, with what it forgets about more than one picture."""
        return self.finish(config, inputs, num_pictures) if num_pictures > 1 else dict(inputs)

    def select(
        self, inputs: Mapping[str, Any], pictures: Sequence[PictureTokens], first: int, stop: int
    ) -> dict[str, Tensor]:
        """What the vision tower reads of pictures first..stop-1, as the processor makes it for them alone.

        Two prompts show a picture in the same way if their selections of it are equal.
        """
        return self.choose(inputs, pictures, first, stop) if first < stop else {}

    def places(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> VisualPlaces:
        """What each placeholder of one or more prompts shows, in the order in which they are read.

        Raises:
            UnsupportedModelError: tokens of this family's pictures cannot be dropped.
        """
        if self.shown is None:
            known = ", ".join(name for family in _FAMILIES if family.shown for name in family.model_types)
            raise UnsupportedModelError(
                f"tokens of pictures cannot be dropped in {model.config.model_type!r}: use a model of type {known}, or "
                "ask without prune"
            )
        return self.shown(model, inputs)

    def side(self, config: PreTrainedConfig) -> int:
        """The side of a crop in pixels: the published one, or that of the vision tower."""
        given = config.vision_config.image_size if self.base is None else self.base
        return int(given if isinstance(given, int) else given[0])


_PICTURE_FIRST = "{pictures}\nUSER: {question}\nASSISTANT:"

_IN_PATCHES = PictureFamily(
    ("llava",),
    picture_geometry.locate_patches,
    _lined,
    layers={32: 14},
    template=_PICTURE_FIRST,
    shown=visual_places.places_of_equals,
)
_IN_TILES = PictureFamily(("llava_onevision",), picture_geometry.locate_base, _nested, template=_PICTURE_FIRST)
_NEAR_THEIR_SIZE = PictureFamily(
    ("qwen3_vl",),
    picture_geometry.locate_merged,
    _gridded,
    positions=_in_three_directions,
    base=_SIDE,
)

# Sides, layers and prompts: saccharomycetes/mllms_know, commit a64c5d5. The sides for LLaVA-1.5 (336) and InstructBLIP
# (224) are those of their towers. It has nothing for the other families; PaliGemma's prompt is its authors' own.
_FAMILIES = (
    _IN_PATCHES,
    replace(_IN_PATCHES, model_types=("mqt_llava",), layout=picture_geometry.locate_pooled, has_places=False),
    _IN_TILES,
    replace(_IN_TILES, model_types=("llava_next",), shown=visual_places.places_of_anyres),
    _NEAR_THEIR_SIZE,
    replace(_NEAR_THEIR_SIZE, model_types=("qwen2_vl",), shown=visual_places.places_of_merged),
    replace(_NEAR_THEIR_SIZE, model_types=("qwen2_5_vl",), layers={36: 22}, shown=visual_places.places_of_merged),
    PictureFamily(
        ("instructblip",),
        picture_geometry.locate_queries,
        _asked,
        finish=_slotted,
        shares_prefix=False,
        has_places=False,
        layers={32: 15},
        template="Question: {question} Short answer:",
    ),
    PictureFamily(("gemma3",), picture_geometry.locate_squashed, _stacked, by_position=("token_type_ids",)),
    PictureFamily(
        ("paligemma",),
        picture_geometry.locate_squashed,
        _stacked,
        positions=_counted_from_one,
        shares_prefix=False,
        by_position=("token_type_ids",),
        template="{pictures}answer en {question}",
    ),
    PictureFamily(
        ("idefics3", "smolvlm"), picture_geometry.locate_global_tile, _batched, shown=visual_places.places_of_equals
    ),
    PictureFamily(("internvl",), picture_geometry.locate_thumbnail, _stacked, shown=visual_places.places_of_equals),
    PictureFamily(
        ("mistral3",), picture_geometry.locate_lines, _lined, base=_SIDE, shown=visual_places.places_of_lines
    ),
)


def picture_family(config: PreTrainedConfig) -> PictureFamily:
    """The row for a model, by its config.

    Raises:
        UnsupportedModelError: there is none.
    """
    for family in _FAMILIES:
        if config.model_type in family.model_types:
            return family
    known = ", ".join(name for family in _FAMILIES for name in family.model_types)
    raise UnsupportedModelError(
        f"where pictures stand in the prompts of {config.model_type!r} is not known: use a model of type {known}, or "
        "ask without looking at the picture again"
    )


def rest_inputs(
    model: PreTrainedModel,
    family: PictureFamily,
    inputs: Mapping[str, Any],
    pictures: Sequence[PictureTokens],
    start: int,
    stop: int | None = None,
) -> dict[str, Tensor]:
    """What ``model(...)`` must be given to read tokens start..stop-1 of a prompt as if it read all of it at once.

    Those tokens, the pixels of their pictures only, and position ids found over the whole prompt. The cache is the
    caller's. What comes behind the prompt continues at ``position_ids.max() + 1`` in all directions.

    Args:
        model: the model.
        family: its row.
        inputs: what the processor made of one prompt without padding, completed, on the model's device.
        pictures: what `PictureFamily.locate` found in it.
        start: the tokens before it are in the cache.
        stop: the tokens from it on are not read; None reads to the end.

    Raises:
        InputError: a picture would be cut in two.
        UnsupportedModelError: the family reads pictures together with what stands behind them.
    """
    ids = inputs["input_ids"]
    stop = ids.shape[1] if stop is None else stop
    if not family.shares_prefix and (start, stop) != (0, ids.shape[1]):
        raise UnsupportedModelError(
            f"{model.config.model_type!r} reads a picture together with the question behind it: read the prompt whole"
        )
    for number, picture in enumerate(pictures):
        if any(picture.start < cut < picture.stop for cut in (start, stop)):
            raise InputError(
                f"picture #{number} is tokens {picture.start} to {picture.stop}, and a cut at {start} or {stop} goes "
                "through it: cut where a picture ends"
            )
    first, last = (sum(picture.start < cut for picture in pictures) for cut in (start, stop))
    return {
        "input_ids": ids[:, start:stop],
        "position_ids": family.positions(model, inputs)[..., start:stop],
        **{name: inputs[name][:, :stop] for name in family.by_position if name in inputs},
        **family.select(inputs, pictures, first, last),
    }


@torch.no_grad()
def read_rest(
    model: PreTrainedModel,
    family: PictureFamily,
    inputs: Mapping[str, Any],
    pictures: Sequence[PictureTokens],
    start: int,
    cache: DynamicCache,
    stop: int | None = None,
) -> Float[Tensor, "1 1 V"]:
    """Read tokens start..stop-1 of a prompt behind the ones that `cache` holds, which grows by them.

    Arguments and errors are those of `rest_inputs`. Returns the logits of the last token read.
    """
    given = rest_inputs(model, family, inputs, pictures, start, stop)
    logits: Tensor = model(**given, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return logits
