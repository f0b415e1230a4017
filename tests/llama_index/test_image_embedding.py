"""`MQTImageEmbedding`: pictures of all kinds, events, indexes that find pictures by picture, settings."""

import copy
import json
import pickle
from base64 import b64encode
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_index.core import MockEmbedding, VectorStoreIndex
from llama_index.core.callbacks import (
    CallbackManager,
    CBEventType,
    EventPayload,
    LlamaDebugHandler,
    TokenCountingHandler,
)
from llama_index.core.embeddings import MultiModalEmbedding
from llama_index.core.indices import MultiModalVectorStoreIndex
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events import BaseEvent
from llama_index.core.schema import Document, ImageDocument, ImageNode, MediaResource, Node, TextNode
from PIL import Image

MODEL = "qr-mini-vl-mqt"
SCENES = 16
FOUND = 0.85  # of the crops find their scene; measured: 31 of 32, by chance one of sixteen


class Recorder(BaseEventHandler):
    """Keeps the events of embedding."""

    seen: list[Any]

    def handle(self, event: BaseEvent, **_: Any) -> None:
        if "Embedding" in event.class_name():
            self.seen.append(event)


@pytest.fixture
def told() -> Iterator[list[Any]]:
    """The instrumentation events of embedding that this test made."""
    handlers = get_dispatcher().event_handlers
    recorder = Recorder(seen=[])
    handlers.append(recorder)
    yield recorder.seen
    handlers.remove(recorder)


@pytest.fixture(scope="module")
def make() -> Callable[..., Any]:
    from qr_integrations.backend import Backend
    from qr_integrations.llama_index import MQTImageEmbedding

    backend = Backend.load(MODEL)
    return lambda **settings: MQTImageEmbedding(backend=backend, **{"num_visual_tokens": 16, **settings})


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Paths of drawn scenes."""
    from qr_integrations.evaluation.drawn_world import held_out_scene, render

    folder = tmp_path_factory.mktemp("scenes")
    for number in range(SCENES):
        render(held_out_scene(number), scale=0.5).save(folder / f"{number}.png")
    return [str(folder / f"{number}.png") for number in range(SCENES)]


@pytest.fixture(scope="module")
def crops(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Paths of the same scenes, smaller and without their margins: 0.7 of the width and of the height."""
    from qr_integrations.evaluation.drawn_world import held_out_scene, render

    folder = tmp_path_factory.mktemp("crops")
    for number in range(SCENES):
        scene = held_out_scene(number)
        across, down = scene.width * 3 // 20, scene.height * 3 // 20
        part = (across, down, scene.width - across, scene.height - down)
        render(scene, part, 0.3).save(folder / f"{number}.png")
    return [str(folder / f"{number}.png") for number in range(SCENES)]


def in_base64(path: str) -> str:
    return b64encode(Path(path).read_bytes()).decode()


# ---- pictures


def test_it_is_an_embedding_of_llama_index_with_nothing_missing(make: Any) -> None:
    embed = make()
    assert isinstance(embed, MultiModalEmbedding) and not type(embed).__abstractmethods__
    assert embed.class_name() == "MQTImageEmbedding" and embed.model_name == embed.model


def test_one_and_many_are_the_same(make: Any, scenes: list[str]) -> None:
    embed = make(embed_batch_size=2)
    vectors = embed.get_image_embedding_batch(scenes[:5])
    np.testing.assert_allclose(vectors, [embed.get_image_embedding(path) for path in scenes[:5]], atol=1e-5)
    np.testing.assert_allclose(vectors, embed.encoder().embed([Image.open(p) for p in scenes[:5]], 16), atol=1e-5)
    assert embed.similarity(vectors[0], vectors[0]) == pytest.approx(1)
    assert embed.get_image_embedding_batch([]) == []


@pytest.mark.usefixtures("unchecked")
def test_one_picture_is_no_list_of_pictures(make: Any, scenes: list[str]) -> None:
    for one in (scenes[0], Path(scenes[0]), Image.new("RGB", (8, 8))):
        with pytest.raises(ValueError, match=r"is no list of pictures: put it into one, \[picture\]"):
            make().get_image_embedding_batch(one)


async def test_async_is_the_same(make: Any, scenes: list[str]) -> None:
    embed = make(embed_batch_size=2)
    assert await embed.aget_image_embedding_batch(scenes[:5]) == embed.get_image_embedding_batch(scenes[:5])
    assert await embed.aget_image_embedding(scenes[1]) == embed.get_image_embedding(scenes[1])
    assert await embed._aget_image_embedding(scenes[1]) == embed._get_image_embedding(scenes[1])
    assert await embed._aget_image_embeddings(scenes[:2]) == embed._get_image_embeddings(scenes[:2])
    assert await embed.aget_image_embedding_batch([]) == []


def test_the_event_loop_goes_on_meanwhile(make: Any, scenes: list[str], heartbeat: Any) -> None:
    found, ticks, seconds, longest = heartbeat(make().aget_image_embedding_batch(scenes))
    assert len(found) == SCENES and ticks > 5 and longest < seconds / 2, (ticks, seconds, longest)


def test_threads_are_not_mixed_up(make: Any, scenes: list[str]) -> None:
    embed = make()
    expected = [embed.get_image_embedding(path) for path in scenes[:4]]
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda n: embed.get_image_embedding(scenes[n % 4]), range(32)))
    assert found == [expected[n % 4] for n in range(32)]


def test_whatever_holds_a_picture_gives_its_vector(make: Any, scenes: list[str]) -> None:
    path, data, coded = scenes[0], Path(scenes[0]).read_bytes(), in_base64(scenes[0])
    sources = [
        path,
        Path(path),
        data,
        BytesIO(data),
        f"data:image/png;base64,{coded}",
        Image.open(path),
        ImageNode(image=coded),
        ImageNode(image_path=path),
        ImageNode(image_url=f"data:image/png;base64,{coded}"),
        ImageNode(text="a scene", metadata={"file_path": path}),
        ImageDocument(image=coded),
        ImageDocument(image_path=path),
        Node(image_resource=MediaResource(data=data)),
        Node(image_resource=MediaResource(path=Path(path))),
        Document(text="a scene", image_resource=MediaResource(url=f"data:image/png;base64,{coded}")),
    ]
    vectors = make().get_image_embedding_batch(sources)
    np.testing.assert_allclose(vectors, [vectors[0]] * len(sources), atol=1e-5)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("a red ball", "there is no file 'a red ball'"),
        (b"not a picture", "in none of the formats"),
        (BytesIO(b""), "in none of the formats"),
        (ImageNode(id_="empty"), "there is none in node 'empty'"),
        (ImageNode(image="%%%"), "is no base64"),
        (Node(id_="bare"), "there is none in node 'bare'"),
        (ImageNode(image_url="https://example.org/a.png"), "allow_urls is off"),
        (Image.new("1", (12_000, 6_000)), "12000 x 6000 pixels"),
    ],
    ids=["words", "bytes", "empty", "node", "base64", "bare", "url", "huge"],
)
async def test_a_broken_picture_is_named_by_its_number(make: Any, scenes: list[str], bad: Any, message: str) -> None:
    from qr_integrations.errors import InputError

    embed, given = make(embed_batch_size=2), [*scenes[:3], bad, scenes[3]]
    with pytest.raises(InputError, match=f"^picture #3: .*{message}"):
        embed.get_image_embedding_batch(given)
    with pytest.raises(InputError, match=f"^picture #3: .*{message}"):
        await embed.aget_image_embedding_batch(given)


async def test_texts_are_refused_with_the_cure(make: Any) -> None:
    from qr_integrations.errors import InputError

    embed, cure = make(), "search with get_image_embedding or image_to_image_retrieve"
    for call in (embed.get_text_embedding, embed.get_query_embedding):
        with pytest.raises(InputError, match=cure):
            call("a red ball")
    with pytest.raises(InputError, match=cure):
        embed.get_text_embedding_batch(["a red ball"])
    for acall in (embed.aget_text_embedding, embed.aget_query_embedding):
        with pytest.raises(InputError, match=cure):
            await acall("a red ball")


async def test_texts_may_be_addresses_of_pictures(make: Any, scenes: list[str]) -> None:
    embed = make(texts_are_pictures=True)
    vector = embed.get_image_embedding(scenes[0])
    assert vector == embed.get_text_embedding(scenes[0]) == await embed.aget_query_embedding(scenes[0])
    assert await embed.aget_text_embedding_batch(scenes[:2]) == embed.get_text_embedding_batch(scenes[:2])


# ---- events


def test_events_of_both_kinds_tell_of_each_batch(make: Any, scenes: list[str], told: list[Any]) -> None:
    debug = LlamaDebugHandler(print_trace_on_end=False)
    embed = make(embed_batch_size=2, callback_manager=CallbackManager([debug]))
    vectors = embed.get_image_embedding_batch(scenes[:3])
    pairs = debug.get_event_pairs(CBEventType.EMBEDDING)
    assert [pair[0].payload for pair in pairs] == [{EventPayload.SERIALIZED: embed.to_payload()}] * 2
    ends = [pair[1].payload for pair in pairs]
    assert [chunk for end in ends for chunk in end[EventPayload.CHUNKS]] == [repr(path) for path in scenes[:3]]
    assert [one for end in ends for one in end[EventPayload.EMBEDDINGS]] == vectors
    assert [event.class_name() for event in told] == ["EmbeddingStartEvent", "EmbeddingEndEvent"] * 2
    assert told[0].model_dict == embed.to_payload() and told[3].embeddings == vectors[2:]


def test_what_was_announced_ends_also_when_it_fails(make: Any, told: list[Any]) -> None:
    debug = LlamaDebugHandler(print_trace_on_end=False)
    with pytest.raises(ValueError, match="there is no file"):
        make(callback_manager=CallbackManager([debug])).get_image_embedding("gone.png")
    assert [event.class_name() for event in told] == ["EmbeddingStartEvent", "EmbeddingEndEvent"]
    assert told[1].embeddings == []
    [(_, end)] = debug.get_event_pairs(CBEventType.EMBEDDING)
    assert isinstance(end.payload[EventPayload.EXCEPTION], ValueError)


async def test_handlers_that_count_words_can_read_what_is_told(make: Any, scenes: list[str]) -> None:
    counter = TokenCountingHandler(tokenizer=str.split)
    embed = make(callback_manager=CallbackManager([counter]))
    data = Path(scenes[0]).read_bytes()
    embed.get_image_embedding_batch([BytesIO(data), Image.open(scenes[0]), ImageNode(image=in_base64(scenes[0]))])
    await embed.aget_image_embedding(f"data:image/png;base64,{in_base64(scenes[0])}")
    assert [type(event.prompt) for event in counter.embedding_token_counts] == [str] * 4
    assert max(len(event.prompt) for event in counter.embedding_token_counts) < 100


def test_payloads_hold_no_secrets() -> None:
    from qr_integrations.llama_index import MQTImageEmbedding

    embed = MQTImageEmbedding(model="a/b", model_kwargs={"token": "hf_secret"})
    assert embed.to_payload()["model_name"] == "a/b" and "hf_secret" not in json.dumps(embed.to_payload())


def test_a_bar_shows_the_progress(make: Any, scenes: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    make(embed_batch_size=2).get_image_embedding_batch(scenes[:4], show_progress=True)
    assert "Generating image embeddings" in capsys.readouterr().err


# ---- indexes


def picture_index(make: Any, scenes: list[str], **options: Any) -> MultiModalVectorStoreIndex:
    nodes = [ImageNode(image_path=path, metadata={"number": number}) for number, path in enumerate(scenes)]
    texts = [TextNode(text="Cats sleep most of the day.")]
    return MultiModalVectorStoreIndex(
        nodes=[*nodes, *texts], image_embed_model=make(), embed_model=MockEmbedding(embed_dim=4), **options
    )


@pytest.mark.parametrize("use_async", [False, True])
def test_an_index_finds_pictures_by_picture(make: Any, scenes: list[str], crops: list[str], use_async: bool) -> None:
    retriever = picture_index(make, scenes, use_async=use_async).as_retriever(image_similarity_top_k=1)
    found = [retriever.image_to_image_retrieve(path)[0].node.metadata["number"] for path in crops]
    assert np.mean([best == number for number, best in enumerate(found)]) >= FOUND


async def test_an_index_searches_without_blocking(make: Any, scenes: list[str]) -> None:
    retriever = picture_index(make, scenes[:4]).as_retriever(image_similarity_top_k=2)
    [best, second] = await retriever.aimage_to_image_retrieve(scenes[2])
    assert best.node.metadata["number"] == 2 and best.score == pytest.approx(1, abs=1e-4) and second.score < 0.99


def test_texts_of_an_index_are_searched_by_text_and_its_pictures_are_not(make: Any, scenes: list[str]) -> None:
    retriever = picture_index(make, scenes[:2]).as_retriever()
    assert [node.text for node in retriever.text_retrieve("what do cats do")] == ["Cats sleep most of the day."]
    with pytest.raises(ValueError, match="image_to_image_retrieve"):
        retriever.retrieve("what do cats do")


def test_an_index_of_texts_holds_addresses_of_pictures(make: Any, scenes: list[str], crops: list[str]) -> None:
    embed = make(texts_are_pictures=True)
    index = VectorStoreIndex([TextNode(text=path) for path in scenes], embed_model=embed)
    retriever = index.as_retriever(similarity_top_k=1)
    found = [retriever.retrieve(path)[0].text for path in crops]
    assert np.mean([best == path for best, path in zip(found, scenes, strict=True)]) >= FOUND


async def test_a_pipeline_embeds_image_nodes_by_their_pictures(make: Any, scenes: list[str]) -> None:
    embed = make()
    nodes = [ImageNode(image_path=path, text="words beside it") for path in scenes[:3]]
    expected = embed.get_image_embedding_batch(scenes[:3])
    assert [node.embedding for node in IngestionPipeline(transformations=[embed]).run(nodes=nodes)] == expected
    again = [ImageNode(image_path=path) for path in scenes[:3]]
    assert [node.embedding for node in await embed.acall(again)] == expected
    with pytest.raises(ValueError, match="no vectors of texts"):
        embed([Document(text="Cats sleep.")])


async def test_nodes_with_a_picture_are_embedded_by_it_whatever_else_is_passed(make: Any, scenes: list[str]) -> None:
    embed = make(texts_are_pictures=True)
    given = {"show_progress": False, "num_workers": 4, "in_place": True}
    expected = embed.get_image_embedding_batch(scenes[:3])

    def nodes() -> list[Any]:
        beside = Node(image_resource=MediaResource(path=Path(scenes[0])), text_resource=MediaResource(text="words"))
        return [beside, ImageNode(image_path=scenes[1]), Document(text=scenes[2], image_resource=MediaResource())]

    for found in (embed(nodes(), **given), await embed.acall(nodes(), **given)):
        np.testing.assert_allclose([node.embedding for node in found], expected, atol=1e-5)


# ---- settings


@pytest.mark.parametrize("settings", [{}, {"num_visual_tokens": 4, "embed_batch_size": 3, "allow_urls": True}], ids=str)
def test_a_dictionary_and_json_hold_all_settings(make: Any, scenes: list[str], settings: dict[str, Any]) -> None:
    from qr_integrations.llama_index import MQTImageEmbedding

    embed = make(**settings)
    told = embed.to_dict()
    assert told["class_name"] == "MQTImageEmbedding" and told["model"] == embed.model and "backend" not in told
    assert {name: json.loads(embed.to_json())[name] for name in settings} == settings
    for again in (MQTImageEmbedding.from_dict(told), MQTImageEmbedding.from_json(embed.to_json())):
        assert again.to_dict() == told
        assert again.get_image_embedding(scenes[0]) == embed.get_image_embedding(scenes[0])


@pytest.mark.parametrize("used", [False, True])
def test_a_pickle_is_small_and_embeds_the_same(make: Any, scenes: list[str], used: bool) -> None:
    embed = make()
    expected = make().get_image_embedding(scenes[0])
    if used:
        embed.get_image_embedding(scenes[0])
    data = pickle.dumps(embed)
    again = pickle.loads(data)
    assert len(data) < 10_000 and again.to_dict() == embed.to_dict()
    assert again.get_image_embedding(scenes[0]) == expected


def test_a_copy_shares_the_weights_and_keeps_its_own_settings(make: Any, scenes: list[str]) -> None:
    embed = make()
    deep, changed = copy.deepcopy(embed), embed.model_copy(update={"num_visual_tokens": 1})
    assert deep.open() is embed.open() and deep.to_dict() == embed.to_dict()
    assert changed.get_image_embedding(scenes[0]) != embed.get_image_embedding(scenes[0])
    assert embed.num_visual_tokens == 16


def test_the_model_has_two_names_and_they_stay_one() -> None:
    from qr_integrations.llama_index import MQTImageEmbedding

    embed = MQTImageEmbedding(model_name="a/b")
    assert (embed.model, embed.model_name) == ("a/b", "a/b")
    embed.model = "c/d"
    assert embed.model_name == embed.to_payload()["model_name"] == "c/d"
    with pytest.raises(ValueError, match="frozen"):
        embed.model_name = "e/f"


@pytest.mark.parametrize(
    "wrong", [{"num_visual_tokens": 0}, {"embed_batch_size": 4096}, {"num_tokens": 1}, {"backend": "b"}], ids=str
)
@pytest.mark.usefixtures("unchecked")
def test_a_wrong_setting_is_an_error_at_once(wrong: dict[str, Any]) -> None:
    from qr_integrations.llama_index import MQTImageEmbedding

    with pytest.raises(ValueError, match=next(iter(wrong))):
        MQTImageEmbedding(**{"model": "a", **wrong})


def test_what_needs_no_model_loads_none(in_fresh_python: Callable[[str], str]) -> None:
    code = """
import pickle, sys
from qr_integrations.llama_index import MQTImageEmbedding
embed = MQTImageEmbedding(model="nowhere/at-all")
again = MQTImageEmbedding.from_dict(embed.to_dict())
assert pickle.loads(pickle.dumps(embed)).to_dict() == embed.to_dict() == again.to_dict()
assert embed.get_image_embedding_batch([]) == []
print([name for name in ("torch", "transformers", "langchain_core") if name in sys.modules])
"""
    assert in_fresh_python(code) == "[]"
