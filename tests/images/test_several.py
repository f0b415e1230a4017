"""A list of pictures is told from one picture, and a broken one by its number."""

from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

ALONE: list[Any] = [
    "a.png",
    Path("a.png"),
    b"bytes",
    BytesIO(b"bytes"),
    Image.new("RGB", (8, 8)),
    np.zeros((8, 8, 3), np.uint8),
    np.zeros((8, 8), np.uint8),
    None,
    3,
]


def none_yet() -> Iterator[Any]:
    yield from ()


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("alone", ALONE, ids=lambda one: type(one).__name__)
def test_one_picture_is_no_list(alone: Any, once: bool) -> None:
    from qr_integrations.errors import InputError
    from qr_integrations.images import check_several

    with pytest.raises(InputError, match=rf"a {type(alone).__name__} is no list of pictures: put it into one, \["):
        check_several(alone, once=once)


def test_what_holds_several_is_welcome() -> None:
    from qr_integrations.errors import InputError
    from qr_integrations.images import check_several

    for several in ([], ["a.png"], (b"a", b"b"), np.zeros((2, 8, 8, 3), np.uint8)):
        check_several(several)
        check_several(several, once=True)
    check_several(none_yet(), once=True)
    with pytest.raises(InputError, match="a generator is no list"):
        check_several(none_yet())


def test_an_error_names_the_number(tmp_path: Path) -> None:
    from qr_integrations.errors import InputError
    from qr_integrations.images import open_numbered

    with pytest.raises(InputError, match=r"^picture #3: there is no file 'gone.png'"):
        open_numbered("gone.png", 3)
    big = Image.new("1", (12_000, 6_000))
    big.save(path := tmp_path / "big.png")
    with pytest.raises(InputError, match=r"^picture #0: .* 12000 x 6000 pixels"):
        open_numbered(path, 0)
    assert open_numbered(big, 0).size == (12_000, 6_000)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("alone", ALONE[:7], ids=lambda one: type(one).__name__)
def test_all_that_reads_pictures_asks_for_several(alone: Any) -> None:
    from qr_integrations.backend.tower_states import open_tower
    from qr_integrations.encoding import MQTEncoder, layer_similarity
    from qr_integrations.encoding.layer_probes import picture_features
    from qr_integrations.errors import InputError
    from tests.backend.seeing import backend

    opened = backend("mqt_llava")
    encoder, tower = MQTEncoder(opened), open_tower(opened)
    calls: list[Callable[[Any], Any]] = [
        encoder.encode,
        encoder.embed,
        encoder.embed_tokens,
        lambda pictures: next(tower.states(pictures)),
        lambda pictures: layer_similarity(tower, pictures),
        lambda pictures: picture_features(tower, pictures),
        lambda pictures: picture_features(tower, pictures, [(0.5, 0.5)]),
    ]
    for call in calls:
        with pytest.raises(InputError, match=r"is no list of pictures: put it into one, \[picture\]"):
            call(alone)


def test_a_broken_picture_is_named_by_its_number_in_states_and_features() -> None:
    from qr_integrations.backend.tower_states import open_tower
    from qr_integrations.encoding.layer_probes import picture_features
    from qr_integrations.errors import InputError
    from tests.backend.seeing import backend

    tower, good = open_tower(backend("mqt_llava")), Image.new("RGB", (60, 60))
    given = [good, good, good, b"no picture"]
    with pytest.raises(InputError, match=r"^picture #3: "):
        list(tower.states(given, batch_size=2))
    with pytest.raises(InputError, match=r"^picture #3: the picture is broken"):
        picture_features(tower, given, [(0.5, 0.5)] * 4)
    with pytest.raises(InputError, match=r"^picture #1: .*80 x 40 pixels"):
        picture_features(tower, [good, good.resize((80, 40))], [(0.5, 0.5)] * 2)
