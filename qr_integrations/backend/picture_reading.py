"""Reads prompts with pictures: once up to the last picture, then as often as there are questions, then for the answer.

Legend: L layers, H heads, K = L x H, T tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from qr_integrations.backend.attention_tap import AttentionTap, run_tapped, run_weighed, scaled_gradients
from qr_integrations.backend.memory import memory_advice
from qr_integrations.backend.picture_families import picture_family, read_rest, rest_inputs
from qr_integrations.backend.picture_geometry import PictureTokens
from qr_integrations.backend.prefix import Prefix, new_cache
from qr_integrations.backend.prompts import Prompt
from qr_integrations.backend.qformer import composed, watched_queries
from qr_integrations.backend.query_transformer import QueryTransformer
from qr_integrations.backend.reader import Reader
from qr_integrations.errors import HeadError, InputError
from qr_integrations.types import Grid, Span

_WHOLE_PROMPT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "image_grid_thw")
"""What `generate` needs of a prompt whose pixels were read before."""


@dataclass(frozen=True, slots=True)
class ReadPictures:
    """The beginning of a prompt up to the end of its last picture, read through all layers.

    Attributes:
        prompt: the whole prompt that it is the beginning of.
        pictures: where its pictures stand.
        prefix: keys and values. Never changed; later passes branch from it.
    """

    prompt: Prompt
    pictures: tuple[PictureTokens, ...]
    prefix: Prefix

    def begins(self, prompt: Prompt, pictures: Sequence[PictureTokens], family: Any) -> bool:
        """Whether another prompt begins with the same tokens and shows the same pictures in the same way.

        Placeholders alone do not tell: some processors cut a picture into tiles only where it stands alone.
        """
        count, length = len(self.pictures), len(self.prefix)
        if prompt.token_ids[:length] != self.prefix.token_ids or len(prompt) <= length:
            return False
        if tuple(pictures[:count]) != self.pictures:
            return False
        mine = family.select(self.prompt.inputs, self.pictures, 0, count)
        its = family.select(prompt.inputs, pictures, 0, count)
        return mine.keys() == its.keys() and all(torch.equal(mine[name], its[name]) for name in mine)


def find_pictures(backend: Reader, prompt: Prompt) -> tuple[PictureTokens, ...]:
    """Where the prompt's pictures stand.

    Raises:
        UnsupportedModelError: for this family that is not known.
    """
    config = backend.model.config
    sizes = [picture.size for picture in prompt.pictures]
    return tuple(picture_family(config).locate(config, backend.processor, prompt.inputs, sizes))


def read_pictures(backend: Reader, prompt: Prompt) -> ReadPictures | None:
    """Read a prompt up to the end of its last picture; None where pictures are read together with what follows."""
    family, pictures = picture_family(backend.model.config), find_pictures(backend, prompt)
    top = backend.config.num_hidden_layers - 1
    cache = new_cache(backend.config, top, "values")
    if not pictures or not family.shares_prefix or cache is None:
        return None
    stop = pictures[-1].stop
    with backend.locked(), memory_advice(stop, backend.name):
        read_rest(backend.model, family, prompt.inputs, pictures, 0, cache, stop)
    return ReadPictures(prompt, pictures, Prefix(prompt.token_ids[:stop], top, cache))


def attention_to_pictures(
    backend: Reader,
    prompt: Prompt,
    layers: Sequence[int],
    *,
    weighed: bool = False,
    read: ReadPictures | None = None,
) -> tuple[Float[Tensor, "L rows columns"], ...]:
    """How much the token before the answer attends to each cell of each picture, the mean over the heads of a layer.

    Only the last row of attention is computed, and nothing above the deepest layer. Where queries look at the picture
    for the language model (InstructBLIP, MQT-LLaVA), the attention to the queries is composed with theirs to the
    picture.

    Args:
        backend: the model.
        prompt: the conversation with the question.
        layers: of the language model, counted from 0.
        weighed: multiply each weight by the part of its gradient above 0, taken of the log probability of the most
            probable answer token (all layers run).
        read: a beginning that was read before. Used where this prompt begins with it.

    Raises:
        HeadError: a layer that the model does not have.
        UnsupportedModelError: where pictures stand in this family's prompts is not known.
    """
    family, pictures = picture_family(backend.model.config), find_pictures(backend, prompt)
    usable = read is not None and read.begins(prompt, pictures, family)
    prefix = read.prefix if read is not None and usable else None
    start = len(prefix) if prefix else 0
    given = rest_inputs(backend.model, family, prompt.inputs, pictures, start)
    pooled_MN = pooling_of(backend.model)
    if pictures and pooled_MN is not None:
        rows_LT = last_row(backend, given, layers, len(prompt), prefix=prefix, weighed=weighed)
        shares = pooled_MN[: len(pictures[0].positions)].to(rows_LT)
        return composed(rows_LT, pictures, shares.expand(len(pictures), -1, -1), map_grid(backend, prompt, pictures[0]))
    if pictures and not family.has_places:
        with backend.locked(), watched_queries(backend.model) as looks:
            rows_LT = last_row(backend, given, layers, len(prompt), weighed=weighed, answered=looks.differentiate)
        return composed(rows_LT, pictures, looks.shares(), map_grid(backend, prompt, pictures[0]))
    rows_LT = last_row(backend, given, layers, len(prompt), prefix=prefix, weighed=weighed)
    places = [torch.tensor(picture.positions, device=rows_LT.device) for picture in pictures]
    shapes = [(picture.grid.rows, picture.grid.columns) for picture in pictures]
    return tuple(rows_LT[:, some].unflatten(1, shape) for some, shape in zip(places, shapes, strict=True))


def pooling_of(model: Any) -> Float[Tensor, "M N"] | None:
    """How much each query takes from each patch, the mean over heads, where that is the same for all pictures."""
    projector = getattr(model.base_model, "multi_modal_projector", None)
    if not isinstance(projector, QueryTransformer):
        return None
    with torch.no_grad():
        return projector.attention().mean(0)


def map_grid(backend: Reader, prompt: Prompt, picture: PictureTokens) -> Grid:
    """The cells of a picture's map: those of its tokens, or the tower's patches where queries look at all of it."""
    if picture_family(backend.model.config).has_places:
        return picture.grid
    side = int(backend.model.config.vision_config.patch_size)
    height, width = prompt.inputs["pixel_values"].shape[-2:]
    return Grid(height // side, width // side)


def last_row(
    backend: Reader,
    given: Mapping[str, Tensor],
    layers: Sequence[int],
    length: int,
    *,
    prefix: Prefix | None = None,
    weighed: bool = False,
    answered: Callable[[Tensor], None] | None = None,
) -> Float[Tensor, "L T"]:
    """The mean over heads of the last token's attention, or of its products with the gradient, in one pass.

    `answered` is told the log probability that a weighed pass differentiates, while its graph is there.
    """
    if wrong := [layer for layer in layers if layer not in backend.attention_layers]:
        raise HeadError(
            f"{backend.name!r} has no attention in layer {wrong[0]}: pass layers among {list(backend.attention_layers)}"
        )
    heads = tuple((layer, head) for layer in layers for head in range(backend.attention_layers[layer].num_heads))
    tap = AttentionTap(heads, Span(length - 1, length))
    cache = prefix.branch() if prefix is not None else None
    past = len(prefix) if prefix is not None else 0

    def run() -> Tensor:
        output = backend.model(**given, past_key_values=cache, use_cache=cache is not None, logits_to_keep=1)
        best: Tensor = output.logits[0, -1].float().log_softmax(-1).amax()
        if answered is not None:
            answered(best)
        return best

    with backend.locked(), memory_advice(length, backend.name):
        modules = [backend.attention_layers[layer].module for layer in backend.attention_layers if layer <= max(layers)]
        if weighed:
            rows, gradients = run_weighed(run, modules, tap=tap, past=past)
            shares = rows * gradients.relu()
        else:
            with torch.no_grad():
                found = run_tapped(run, modules, tap=tap, stop_after=max(layers), past=past)
            assert found is not None
            shares = found
    counts = [backend.attention_layers[layer].num_heads for layer in layers]
    return torch.stack([part.mean(0) for part in shares[0].split(counts)])


def pixel_gradients(backend: Reader, prompt: Prompt) -> tuple[Float[Tensor, "height width"], ...]:
    """The length over the colours of the gradient of the answer's log probability at each pixel, for each picture.

    The log probability is that of the most probable first token. One pass forward and one back through all of the
    model, its vision tower included.

    Raises:
        InputError: the family shows a picture as tiles or patches, which form no picture of their own.
    """
    pixels = prompt.inputs.get("pixel_values")
    if pixels is None or pixels.dim() != 4 or len(pixels) != len(prompt.pictures):
        raise InputError(
            f"{backend.name!r} does not read a picture as one square of pixels: use the relative or gradient method"
        )
    with backend.locked(), memory_advice(len(prompt), backend.name), torch.enable_grad():
        leaf = pixels.detach().clone().to(backend.model.dtype).requires_grad_()
        output = backend.model(**{**prompt.inputs, "pixel_values": leaf}, use_cache=False)
        best = output.logits[0, -1].float().log_softmax(-1).amax()
        (gradient,) = scaled_gradients(best, [leaf])
    lengths = gradient.norm(dim=1)
    return tuple(
        lengths[number, :height, :width] for number, (height, width) in enumerate(_sides_in_patches(backend, prompt))
    )


def _sides_in_patches(backend: Reader, prompt: Prompt) -> list[tuple[int, int]]:
    """Height and width of each picture's pixels, without what pads it and what fills no patch, in one view of each."""
    pixels, patch = prompt.inputs["pixel_values"], backend.model.config.vision_config.patch_size
    side = int(patch if isinstance(patch, int) else patch[0])
    seen = prompt.inputs.get("image_sizes", torch.tensor([pixels.shape[-2:]] * len(pixels))).tolist()
    return [(height // side * side, width // side * side) for height, width in seen]


def continued_inputs(backend: Reader, prompt: Prompt, read: ReadPictures | None) -> dict[str, Any]:
    """What `generate` is given: the prompt, or a cache of all of it but the last token where its beginning was read."""
    model: Any = backend.model
    if hasattr(model.base_model, "rope_deltas"):
        model.base_model.rope_deltas = None  # of an earlier prompt, whose positions are not ours
    if read is None:
        return dict(prompt.inputs)
    family, pictures = picture_family(model.config), find_pictures(backend, prompt)
    if not read.begins(prompt, pictures, family):
        return dict(prompt.inputs)
    cache = read.prefix.growing()
    read_rest(model, family, prompt.inputs, pictures, len(read.prefix), cache, len(prompt) - 1)
    kept = {name: prompt.inputs[name] for name in _WHOLE_PROMPT if name in prompt.inputs}
    return {**kept, "past_key_values": cache}
