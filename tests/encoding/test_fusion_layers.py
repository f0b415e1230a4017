"""Which layers are fused, and where they arrive: as published, and for towers and language models of other depths."""

import json
from pathlib import Path
from typing import Any

import pytest

GOLDEN = Path(__file__).parents[1] / "golden/vision/fusion.json"
CASES = json.loads(GOLDEN.read_text())


def resolved(*settings: Any, tower: int = 24, depth: int = 24, own: int = -2, **more: Any) -> Any:
    from qr_integrations.encoding.fusion_layers import FusionSpec, fusion_layers

    return fusion_layers(FusionSpec(*settings, **more), tower, depth, own)


@pytest.mark.parametrize("case", CASES["internal_direct_map"], ids=lambda case: case["id"])
def test_layers_arrive_where_they_arrive_in_the_published_code(case: dict[str, Any]) -> None:
    layers = resolved(case["set_name"], "internal_direct", depth=case["llm_layers"])
    assert {str(number): layer for layer, number in layers.arrivals} == case["llm_layer_to_vit"]
    assert [layer for layer, _ in layers.arrivals] == case["vit_hidden_states_fused"]


def test_the_published_sets_have_their_sizes() -> None:
    sizes = [len(resolved(name).arrivals) for name in ("single", "double", "triple", "former", "latter", "all")]
    assert sizes == [1, 2, 3, 12, 12, 24]
    levels = [len(resolved(name).levels) for name in ("single", "triple", "former", "latter", "all")]
    assert levels == [1, 2, 12, 12, 24]


def test_layers_stand_at_the_same_share_of_another_tower() -> None:
    assert resolved("triple", tower=12).groups == ((2,), (9,), (11,))
    assert resolved("triple", tower=27).groups == ((3,), (20,), (26,))
    assert resolved("triple", tower=27, siglip_layers=True).groups == ((3,), (20,), (25,))
    assert resolved("latter", tower=27, siglip_layers=True).groups == (tuple(range(15, 27)), (25,))
    assert resolved("all", tower=12).groups == (tuple(range(1, 7)), tuple(range(7, 13)), (11,))
    assert resolved("triple", own=-1).groups == ((3,), (18,), (24,))
    assert resolved("single", final=20).groups == ((18,), (20,))
    assert resolved("none", final=5).read == (5,)


@pytest.mark.parametrize("name", ["single", "double", "triple", "former", "latter", "all", (1, 6, 11)])
@pytest.mark.parametrize("tower", [4, 12, 27, 40])
@pytest.mark.parametrize("depth", [2, 8, 24, 33])
def test_everything_fits_into_any_model(name: Any, tower: int, depth: int) -> None:
    name = tuple(min(v, tower) for v in name) if isinstance(name, tuple) else name
    layers = resolved(name, "internal_modular", tower=tower, depth=depth)
    arriving = [number for _, number in layers.arrivals]
    assert all(0 <= v <= tower for v in layers.read) and all(0 <= number < depth for number in arriving)
    assert arriving == sorted(arriving)
    assert set(layers.read) == {v for v, _ in layers.arrivals} | {layers.final}
    if name in ("former", "latter"):
        assert all((number < (depth + 1) // 2) == (name == "former") for number in arriving) or depth > tower


def test_settings_go_through_json() -> None:
    from qr_integrations.encoding.fusion_layers import FusionSpec

    for spec in (FusionSpec(), FusionSpec((1, 5), "linear", final=7), FusionSpec("all", "internal_modular", "post")):
        assert FusionSpec.from_dict(json.loads(json.dumps(spec.as_dict()))) == spec


def test_layers_may_be_given_as_a_list(unchecked: None) -> None:
    from qr_integrations.encoding.fusion_layers import FusionSpec

    given: Any = [3, 9]
    assert FusionSpec(given) == FusionSpec((3, 9)) and hash(FusionSpec(given)) == hash(FusionSpec((3, 9)))


@pytest.mark.parametrize(
    ("settings", "cure"),
    [
        ({"layers": "most"}, "single"),
        ({"layers": ()}, "whole numbers"),
        ({"layers": (-1,)}, "whole numbers"),
        ({"layers": 5}, "whole numbers"),
        ({"layers": [3, "9"]}, "whole numbers"),
        ({"final": "23"}, "whole number"),
        ({"layers": [3, 9], "siglip_layers": True}, "triple"),
        ({"strategy": "internal"}, "internal_direct"),
        ({"wiring": "post"}, "leave it out"),
        ({"strategy": "internal_modular", "wiring": "beside"}, "parallel"),
        ({"layers": "none", "strategy": "internal_direct"}, "another set"),
        ({"layers": "former", "siglip_layers": True}, "triple"),
    ],
)
def test_wrong_settings_are_refused_where_they_are_made(unchecked: None, settings: dict[str, Any], cure: str) -> None:
    from qr_integrations.encoding.fusion_layers import FusionSpec
    from qr_integrations.errors import InputError

    with pytest.raises(InputError, match=cure):
        FusionSpec(**settings)


def test_layers_that_are_not_there_are_refused() -> None:
    from qr_integrations.errors import InputError

    with pytest.raises(InputError, match="0 to 24"):
        resolved((3, 25))
    with pytest.raises(InputError, match="27 layers"):
        resolved("triple", siglip_layers=True)
