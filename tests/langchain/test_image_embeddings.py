"""`MQTEmbeddings`: what LangChain's stores of pictures call, and stores of texts that hold pictures."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import InMemoryVectorStore
from PIL import Image

MODEL = "qr-mini-vl-mqt"
SCENES = 16
FOUND = 0.85  # of the crops find their scene; measured: 31 of 32, by chance one of sixteen


@pytest.fixture(scope="module")
def embeddings() -> Any:
    from qr_integrations.backend import Backend
    from qr_integrations.langchain import MQTEmbeddings

    return MQTEmbeddings(backend=Backend.load(MODEL), num_visual_tokens=16)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Paths of drawn scenes."""
    from qr_integrations.evaluation.drawn_world import held_out_scene, render

    folder = tmp_path_factory.mktemp("scenes")
    for number in range(SCENES):
        render(held_out_scene(number), scale=0.5).save(folder / f"{number}.png")
    return [str(folder / f"{number}.png") for number in range(SCENES)]


@pytest.fixture(scope="module")
def crops() -> list[Image.Image]:
    """The same scenes, smaller and without their margins: 0.7 of the width and of the height."""
    from qr_integrations.evaluation.drawn_world import held_out_scene, render

    found = []
    for number in range(SCENES):
        scene = held_out_scene(number)
        across, down = scene.width * 3 // 20, scene.height * 3 // 20
        found.append(render(scene, (across, down, scene.width - across, scene.height - down), 0.3))
    return found


def test_it_is_what_langchain_calls_embeddings(embeddings: Any) -> None:
    from qr_integrations.langchain import MQTEmbeddings

    assert isinstance(embeddings, Embeddings) and not MQTEmbeddings.__abstractmethods__


def test_pictures_by_keyword_as_stores_pass_them(embeddings: Any, scenes: list[str]) -> None:
    vectors = embeddings.embed_image(uris=scenes[:3])
    np.testing.assert_allclose(vectors, embeddings.encoder().embed([Image.open(s) for s in scenes[:3]], 16), atol=1e-5)
    assert embeddings.embed_image([]) == embeddings.embed_image_tokens([]) == embeddings.embed_documents([]) == []


def test_one_vector_for_each_token(embeddings: Any, scenes: list[str]) -> None:
    assert np.array(embeddings.embed_image_tokens(scenes[:2])).shape[:2] == (2, 16)
    assert np.array(embeddings.embed_image_tokens(scenes[:2], num_visual_tokens=4)).shape[:2] == (2, 4)


async def test_async_is_the_same_and_the_event_loop_goes_on(
    embeddings: Any, scenes: list[str], with_heartbeat: Any
) -> None:
    expected = embeddings.embed_image(scenes)
    found, ticks = await with_heartbeat(embeddings.aembed_image(scenes))
    assert found == expected and ticks >= 3
    assert await embeddings.aembed_image_tokens(scenes[:1], 4) == embeddings.embed_image_tokens(scenes[:1], 4)


async def test_texts_are_refused_with_the_cure(embeddings: Any) -> None:
    from qr_integrations.errors import InputError

    for embed in (embeddings.embed_query, lambda text: embeddings.embed_documents([text])):
        with pytest.raises(InputError, match="search with embed_image and similarity_search_by_vector"):
            embed("a red ball")
    with pytest.raises(InputError, match="embed_image"):
        await embeddings.aembed_query("a red ball")


def test_a_store_of_texts_finds_pictures_by_picture(
    embeddings: Any, scenes: list[str], crops: list[Image.Image], tmp_path: Path
) -> None:
    store = InMemoryVectorStore(embeddings.model_copy(update={"texts_are_pictures": True}))
    store.add_documents([Document(path, metadata={"number": n}) for n, path in enumerate(scenes)])
    found = []
    for number, crop in enumerate(crops):
        crop.save(path := tmp_path / f"crop {number}.png")
        [document] = store.similarity_search(str(path), k=1)
        found.append(document.metadata["number"] == number)
    assert np.mean(found) >= FOUND


def test_vectors_of_pictures_search_a_store(embeddings: Any, scenes: list[str], crops: list[Image.Image]) -> None:
    store = InMemoryVectorStore(embeddings.model_copy(update={"texts_are_pictures": True}))
    store.add_texts(scenes)
    best = [store.similarity_search_by_vector(v, k=1)[0].page_content for v in embeddings.embed_image(crops)]
    assert np.mean([found == path for found, path in zip(best, scenes, strict=True)]) >= FOUND


def test_a_broken_picture_is_named_by_its_number(embeddings: Any, scenes: list[str], tmp_path: Path) -> None:
    (text := tmp_path / "notes.txt").write_text("not a picture")
    with pytest.raises(ValueError, match=r"picture #9: '.*notes.txt' is broken"):
        embeddings.embed_image([*scenes[:9], str(text)])


def test_settings_are_json_and_a_pickle_is_small(embeddings: Any, scenes: list[str]) -> None:
    from qr_integrations.langchain import MQTEmbeddings

    told = json.loads(embeddings.model_dump_json())
    assert told["num_visual_tokens"] == 16 and "backend" not in told
    assert MQTEmbeddings(**told).embed_image(scenes[:1]) == embeddings.embed_image(scenes[:1])
    data = pickle.dumps(embeddings)
    assert len(data) < 10_000 and pickle.loads(data).embed_image(scenes[:1]) == embeddings.embed_image(scenes[:1])


def test_the_model_has_two_names() -> None:
    from qr_integrations.langchain import MQTEmbeddings

    assert MQTEmbeddings(model_name="a/b").model == "a/b"
    with pytest.raises(ValueError, match="num_token"):
        MQTEmbeddings(model="a/b", num_token=4)
