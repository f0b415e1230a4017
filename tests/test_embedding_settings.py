"""What every adapter that embeds pictures has in common: sources, batches, vectors, errors."""

from base64 import b64encode
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from math import hypot
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

MODEL = "qr-mini-vl-mqt"
MOST = 64  # tokens of a picture


@pytest.fixture(scope="module")
def mqt() -> Any:
    from qr_integrations.backend import Backend

    return Backend.load(MODEL)


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    from qr_integrations.evaluation.drawn_world import held_out_scene, render

    return [render(held_out_scene(number), scale=0.3) for number in range(5)]


@pytest.fixture(scope="module")
def settings(mqt: Any) -> Callable[..., Any]:
    from qr_integrations.embedding import EmbeddingSettings

    return lambda **given: EmbeddingSettings(backend=mqt, **given)


def png(picture: Image.Image) -> bytes:
    file = BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


# ---- vectors


def test_a_vector_is_a_list_of_floats_of_length_one(settings: Any, pictures: Any) -> None:
    vectors = settings(num_visual_tokens=4).picture_vectors(pictures)
    assert len(vectors) == len(pictures) and {len(vector) for vector in vectors} == {len(vectors[0])}
    assert all(type(value) is float for vector in vectors for value in vector)
    assert [hypot(*vector) for vector in vectors] == pytest.approx([1.0] * len(vectors), abs=1e-5)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_batches_of_any_size_give_the_same_vectors(settings: Any, pictures: Any, size: int) -> None:
    found = settings(embed_batch_size=size).picture_vectors(pictures)
    np.testing.assert_allclose(found, settings(embed_batch_size=5).picture_vectors(pictures), atol=1e-5)


def test_the_number_of_tokens_counts(settings: Any, pictures: Any) -> None:
    few, many, all_of_them = (settings(num_visual_tokens=m).picture_vectors(pictures[:2]) for m in (1, MOST, None))
    np.testing.assert_allclose(many, all_of_them, atol=1e-6)
    assert np.abs(np.array(few) - many).max() > 1e-2


def test_a_picture_may_have_a_vector_for_each_token(settings: Any, pictures: Any) -> None:
    own = settings(num_visual_tokens=4)
    tokens = np.array(own.picture_token_vectors(pictures))
    assert tokens.shape[:2] == (5, 4)
    np.testing.assert_allclose(np.linalg.norm(tokens, axis=-1), 1, atol=1e-5)
    more = np.array(own.picture_token_vectors(pictures, 9))
    assert more.shape[:2] == (5, 9)
    np.testing.assert_allclose(more[:, :4], tokens, atol=1e-5)  # the first tokens do not depend on how many follow


def test_nothing_to_embed_loads_no_model() -> None:
    from qr_integrations.embedding import EmbeddingSettings

    nowhere = EmbeddingSettings(model="/nowhere/at/all", texts_are_pictures=True)
    assert nowhere.picture_vectors([]) == nowhere.picture_token_vectors([]) == nowhere.text_vectors([], "") == []


def test_threads_share_one_model_and_are_not_mixed_up(settings: Any, pictures: Any) -> None:
    own = settings(num_visual_tokens=16)
    expected = [own.picture_vectors([picture])[0] for picture in pictures]
    files = [BytesIO(png(picture)) for picture in pictures]  # all threads read the same ones
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda n: own.picture_vectors([files[n % 5]])[0], range(32)))
    for number, vector in enumerate(found):
        np.testing.assert_allclose(vector, expected[number % 5], atol=1e-6)


def test_threads_that_come_first_load_one_model() -> None:
    from qr_integrations.embedding import EmbeddingSettings

    own = EmbeddingSettings(model=MODEL)
    with ThreadPoolExecutor(16) as pool:
        assert len(set(pool.map(lambda _: own.open(), range(16)))) == 1


# ---- sources


def test_whatever_holds_a_picture_gives_its_vector(settings: Any, pictures: Any, tmp_path: Path) -> None:
    picture = pictures[0]
    data = png(picture)
    (path := tmp_path / "scene.png").write_bytes(data)
    uri = f"data:image/png;base64,{b64encode(data).decode()}"
    sources = [path, str(path), data, bytearray(data), BytesIO(data), uri, np.asarray(picture), picture]
    vectors = settings().picture_vectors(sources)
    np.testing.assert_allclose(vectors, [vectors[0]] * len(sources), atol=1e-5)


def test_an_open_file_may_be_used_again(settings: Any, pictures: Any) -> None:
    file = BytesIO(png(pictures[0]))
    file.seek(7)
    assert settings().picture_vectors([file]) == settings().picture_vectors([file]) and file.tell() == 7


@pytest.fixture
def bad(tmp_path: Path, pictures: Any) -> dict[str, Any]:
    (text := tmp_path / "notes.txt").write_text("not a picture")
    return {
        "text": text,
        "missing": tmp_path / "gone.png",
        "cut": png(pictures[0])[:400],
        "huge": Image.new("1", (12_000, 6_000)),
        "narrow": Image.new("RGB", (3_000, 2)),
        "url": "https://example.org/a.png?key=secret",
        "words": "a red ball",
    }


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("text", "notes.txt' is broken, or in none of the formats"),
        ("missing", "there is no file .*gone.png"),
        ("cut", "the picture is cut short or broken"),
        ("huge", "12000 x 6000 pixels, 1 to 64000000 are allowed"),
        ("narrow", "too long or too narrow"),
        ("url", "allow_urls is off"),
        ("words", "there is no file 'a red ball'"),
    ],
)
def test_a_picture_that_cannot_be_opened_is_named_by_its_number(
    settings: Any, pictures: Any, bad: dict[str, Any], kind: str, message: str
) -> None:
    from qr_integrations.errors import InputError

    with pytest.raises(InputError, match=f"^picture #3: .*{message}") as raised:
        settings(embed_batch_size=2).picture_vectors([*pictures[:3], bad[kind], pictures[4]])
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    "one",
    ["a.png", Path("a.png"), b"...", BytesIO(), Image.new("RGB", (8, 8)), np.zeros((8, 8, 3), np.uint8), iter(())],
    ids=lambda one: type(one).__name__,
)
@pytest.mark.usefixtures("unchecked")
def test_one_picture_is_no_list_of_pictures(settings: Any, one: Any) -> None:
    with pytest.raises(ValueError, match=r"is no list of pictures: put it into one, \[picture\]"):
        settings().picture_vectors(one)


def test_paths_of_other_people_may_be_kept_out(settings: Any, tmp_path: Path, pictures: Any) -> None:
    pictures[0].save(path := tmp_path / "scene.png")
    with pytest.raises(ValueError, match=r"picture #0: .*allow_local_files is off"):
        settings(allow_local_files=False).picture_vectors([path])
    with pytest.raises(ValueError, match=r"picture #0: .*are allowed"):
        settings(max_picture_pixels=10).picture_vectors([path])
    with pytest.raises(ValueError, match=r"picture #0: .*more than 10 bytes"):
        settings(max_picture_bytes=10).picture_vectors([path])


# ---- texts


def test_texts_are_refused_with_the_cure(settings: Any) -> None:
    from qr_integrations.errors import InputError

    with pytest.raises(InputError, match=r"no vectors of texts .*: search with X, .*texts_are_pictures=True"):
        settings().text_vectors(["a red ball"], "search with X")


def test_texts_may_be_addresses_of_pictures(settings: Any, pictures: Any, tmp_path: Path) -> None:
    pictures[1].save(path := tmp_path / "scene.png")
    own = settings(texts_are_pictures=True)
    assert own.text_vectors([str(path)], "") == own.picture_vectors([path])
    with pytest.raises(ValueError, match="picture #1: there is no file 'a red ball'"):
        own.text_vectors([str(path), "a red ball"], "")


# ---- the model


@pytest.mark.parametrize("name", ["qr-mini-vl", "qr-mini"])
def test_another_model_is_refused_with_the_cure(name: str, pictures: Any) -> None:
    from qr_integrations.embedding import EmbeddingSettings
    from qr_integrations.errors import QRError

    with pytest.raises(QRError, match=name):
        EmbeddingSettings(model=name).picture_vectors(pictures[:1])


def test_more_tokens_than_the_model_makes_are_refused(settings: Any, pictures: Any) -> None:
    with pytest.raises(ValueError, match=f"{MOST + 1}.*pass 1 to {MOST}"):
        settings(num_visual_tokens=MOST + 1).picture_vectors(pictures[:1])


@pytest.mark.parametrize(
    "wrong",
    [{"num_visual_tokens": 0}, {"embed_batch_size": 0}, {"max_picture_bytes": 0}, {"num_tokens": 4}],
    ids=str,
)
def test_a_wrong_setting_is_an_error_at_once(wrong: dict[str, int]) -> None:
    from qr_integrations.embedding import EmbeddingSettings

    with pytest.raises(ValueError, match=next(iter(wrong))):
        EmbeddingSettings(model="a", **wrong)


def test_importing_it_loads_no_library_of_models(in_fresh_python: Callable[[str], str]) -> None:
    code = """
import sys
from qr_integrations.embedding import EmbeddingSettings
from qr_integrations.langchain import MQTEmbeddings
EmbeddingSettings(model="a/b").model_dump_json(), MQTEmbeddings(model="a/b")
print([name for name in ("torch", "transformers", "llama_index") if name in sys.modules])
"""
    assert in_fresh_python(code) == "[]"
