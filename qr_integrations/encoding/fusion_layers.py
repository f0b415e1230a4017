"""Which layers of the tower are fused, and where in the language model they arrive.

Source: Multi-Layer Visual Feature Fusion (arXiv 2503.06063) and its code,
github.com/EIT-NLP/Layer_Select_Fuse_for_MLLM at 7de7fc2. Layers are entries of the tower's hidden states: 0 is its
embeddings, v the output of its layer v.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qr_integrations.errors import InputError

SETS = ("none", "single", "double", "triple", "former", "latter", "all")
STRATEGIES = ("linear", "external_direct", "external_modular", "internal_direct", "internal_modular")
WIRINGS = ("pre", "post", "parallel")
_PUBLISHED_DEPTH = 24
_SIGLIP_DEPTH = 27
_SIGLIP = {"triple": (3, 20, 25), "latter": tuple(range(15, 27))}


@dataclass(frozen=True, slots=True)
class FusionSpec:
    """How layers of the tower are fused. Settings only; `fuse` makes the model.

    Attributes:
        layers: ``"single"`` (layer 18 of 24), ``"double"`` (3, 18), ``"triple"`` (3, 18 and the final one),
            ``"former"`` and ``"latter"`` (the halves), ``"all"``, ``"none"``, or layers of your own. Towers of other
            depths get the layers at the same share of their depth.
        strategy: ``"external_direct"`` concatenates layers before the projector, groups of many as their mean.
            ``"linear"`` does the same before one linear layer (arXiv 2504.21447). ``"external_modular"`` lets the final
            layer's patches look at the others with deformable attention. ``"internal_direct"`` adds each layer to the
            pictures' rows within the language model, ``"internal_modular"`` lets all rows attend to it there.
        wiring: where internal modular fusion stands: before the attention (``"pre"``, the published code), behind it
            (``"post"``) or beside it (``"parallel"``).
        final: the layer that the pictures' tokens are made of; None is the model's own ``vision_feature_layer``.
        siglip_layers: take the layers that were published for SigLIP-so400m, 27 layers: 3, 20 and 25, or 15 to 26, with
            25 as the final one.

    Raises:
        InputError: a name that is none of these, or settings that exclude each other.
    """

    layers: str | tuple[int, ...] = "triple"
    strategy: str = "external_direct"
    wiring: str = "pre"
    final: int | None = None
    siglip_layers: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.layers, list):
            object.__setattr__(self, "layers", tuple(self.layers))
        if isinstance(self.layers, str):
            _one_of("layers", self.layers, SETS)
        elif not (
            isinstance(self.layers, tuple) and self.layers and all(_is_number(v) and v >= 0 for v in self.layers)
        ):
            raise InputError(f"layers={self.layers!r} are no layers of a tower: pass whole numbers from 0, or a name")
        _one_of("strategy", self.strategy, STRATEGIES)
        _one_of("wiring", self.wiring, WIRINGS)
        if not (self.final is None or _is_number(self.final)):
            raise InputError(f"final={self.final!r} is no layer of a tower: pass a whole number, or leave it out")
        if self.wiring != "pre" and self.strategy != "internal_modular":
            raise InputError(f"wiring={self.wiring!r} is for strategy='internal_modular' only: leave it out")
        if self.layers == "none" and self.strategy not in ("linear", "external_direct"):
            raise InputError(f"strategy={self.strategy!r} has nothing to fuse: pass layers='triple' or another set")
        if self.siglip_layers and self.layers not in _SIGLIP:
            raise InputError(f"layers={self.layers!r} were not published for SigLIP: pass one of {sorted(_SIGLIP)}")

    @property
    def internal(self) -> bool:
        """Whether layers are fused within the language model."""
        return self.strategy.startswith("internal")

    def as_dict(self) -> dict[str, Any]:
        """The settings as JSON takes them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "FusionSpec":
        """The settings again.

        Raises:
            InputError: settings that there are not.
        """
        layers = settings.get("layers", "triple")
        try:
            return cls(**{**settings, "layers": layers if isinstance(layers, str) else tuple(layers)})
        except TypeError as error:
            raise InputError(
                f"these are no settings of a fusion ({error}): write them with FusionSpec.as_dict"
            ) from error


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise InputError(f"{name}={value!r} is not known: pass one of {', '.join(known)}")


@dataclass(frozen=True, slots=True)
class FusionLayers:
    """The layers of one fusion in one model.

    Attributes:
        read: the layers that are read, in the order in which their features are concatenated.
        groups: external direct fusion concatenates the mean of each group.
        levels: what external modular fusion looks at.
        arrivals: pairs of a layer of the tower and the layer of the language model, from 0, at whose input it arrives.
        final: what the pictures' tokens are made of.
    """

    read: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]
    levels: tuple[int, ...]
    arrivals: tuple[tuple[int, int], ...]
    final: int


def fusion_layers(spec: FusionSpec, tower_depth: int, decoder_depth: int, own_layer: int = -2) -> FusionLayers:
    """The layers that a fusion reads, and where they arrive.

    Args:
        spec: the fusion.
        tower_depth: layers of the tower.
        decoder_depth: layers of the language model.
        own_layer: the model's ``vision_feature_layer``, where the fusion states no final one.

    Raises:
        InputError: layers that the tower does not have, or SigLIP's of a tower that is not as deep.

    Example:
        >>> layers = fusion_layers(FusionSpec("triple"), tower_depth=24, decoder_depth=32)
        >>> layers.groups, layers.arrivals
        (((3,), (18,), (23,)), ((3, 3), (18, 23), (23, 29)))
    """
    final = _final_layer(spec, tower_depth, own_layer)
    fused = _fused_set(spec, tower_depth, final)
    beyond = [v for v in (*fused, final) if not 0 <= v <= tower_depth]
    if beyond:
        raise InputError(f"the tower has hidden states 0 to {tower_depth}, not {beyond}: pass other layers")
    half = tower_depth // 2
    if spec.layers in ("former", "latter"):
        groups = [fused]
    elif spec.layers == "all":
        groups = [fused[:half], fused[half:]]
    else:
        groups = [(v,) for v in fused if v != final]
    levels = tuple(v for v in fused if v != final) if spec.layers == "triple" else fused
    arrivals = tuple(zip(fused, _arrivals(spec, fused, tower_depth, decoder_depth), strict=True))
    needed = fused if spec.internal else levels if spec.strategy == "external_modular" else sum(groups, ())
    read = tuple(dict.fromkeys((*needed, final)))
    return FusionLayers(read, (*groups, (final,)), levels, arrivals, final)


def _final_layer(spec: FusionSpec, depth: int, own_layer: int) -> int:
    if spec.siglip_layers and depth != _SIGLIP_DEPTH:
        raise InputError(f"siglip_layers=True is for a tower of {_SIGLIP_DEPTH} layers, not {depth}: leave it out")
    final = _SIGLIP["triple"][-1] if spec.siglip_layers and spec.final is None else spec.final
    final = own_layer if final is None else final
    return final if final >= 0 else depth + 1 + final


def _fused_set(spec: FusionSpec, depth: int, final: int) -> tuple[int, ...]:
    if not isinstance(spec.layers, str):
        return spec.layers
    if spec.siglip_layers:
        return _SIGLIP[spec.layers]
    early, middle = (scaled(v, depth) for v in (3, 18))
    half = depth // 2
    former, latter = tuple(range(1, half + 1)), tuple(range(half + 1, depth + 1))
    return {
        "none": (),
        "single": (middle,),
        "double": (early, middle),
        "triple": (early, middle, final),
        "former": former,
        "latter": latter,
        "all": former + latter,
    }[spec.layers]


def scaled(layer: int, depth: int) -> int:
    """The layer of a tower of some depth that stands where `layer` does among 24.

    Example:
        >>> [scaled(3, depth) for depth in (12, 24, 27)], [scaled(18, depth) for depth in (12, 24, 27)]
        ([2, 3, 3], [9, 18, 20])
    """
    return math.floor(layer * depth / _PUBLISHED_DEPTH + 0.5)


def _arrivals(spec: FusionSpec, fused: tuple[int, ...], tower_depth: int, depth: int) -> list[int]:
    """As published, for 24 layers of the tower; more layers than the language model has room for share some."""
    half = tower_depth // 2
    if spec.layers == "all":
        return _beginning(half, depth) + _end(len(fused) - half, depth)
    if spec.layers == "former":
        return _beginning(len(fused), depth)
    if spec.layers == "latter":
        return _end(len(fused), depth)
    return [max(0, int(v * depth / tower_depth - 1)) for v in fused]


def _beginning(count: int, depth: int) -> list[int]:
    return list(range(count)) if 2 * count <= depth else [i * (depth // 2) // count for i in range(count)]


def _end(count: int, depth: int) -> list[int]:
    half = depth // 2
    if 2 * count <= depth:
        return list(range(depth - count, depth))
    return [depth - half + i * half // count for i in range(count)]
