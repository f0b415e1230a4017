"""The engine that requests of all APIs end at: the numbers of the library, whoever else is asking meanwhile."""

import asyncio
import shutil
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
from PIL import Image, ImageDraw
from pydantic import ValidationError

from qr_integrations import QRHeadReranker
from qr_integrations.bundled import read_detection_lists
from qr_integrations.errors import InputError, LoadError, QRError, WindowError
from qr_integrations.serving.engine import LocalEngine
from qr_integrations.serving.refusals import NotReady, OutOfTime, Overloaded, TooLarge, UnknownModel
from qr_integrations.serving.settings import ServerSettings
from qr_integrations.serving.work import ChatWork, Engine, Ranked, RankWork, Said
from qr_integrations.types import Document, JudgedList, Message

if TYPE_CHECKING:
    from qr_integrations.backend import Backend

LISTS = read_detection_lists()[:6]
LONG = tuple(
    Document(f"Note {number}: " + "the river was calm and the boats were late. " * 120) for number in range(10)
)
BOTH: dict[str, Any] = {"model": "qr-mini", "vision_model": "qr-mini-vl", "device": "cpu"}


async def ready(**settings: Any) -> LocalEngine:
    engine = LocalEngine(ServerSettings(**{**BOTH, **settings}))
    await engine.start()
    while engine.state == "loading":
        await asyncio.sleep(0.01)
    assert engine.failure is None
    return engine


@pytest_asyncio.fixture
async def engine() -> AsyncIterator[LocalEngine]:
    made = await ready()
    yield made
    await made.stop(5.0)


def ask(judged: JudgedList, **options: Any) -> RankWork:
    return RankWork(judged.query, judged.documents, **options)


def scores(ranked: Ranked) -> dict[int, float]:
    return {relevance.index: relevance.qr_score for relevance in ranked.relevances}


def square(color: str = "red") -> Image.Image:
    picture = Image.new("RGB", (320, 240), "white")
    ImageDraw.Draw(picture).rectangle((60, 60, 180, 180), fill=color)
    return picture


async def test_it_is_an_engine_and_says_what_it_serves(engine: LocalEngine) -> None:
    assert isinstance(engine, Engine)
    ranks, sees = await engine.models()
    assert (ranks.id, ranks.ranks, ranks.chats, ranks.sees_pictures, ranks.max_tokens) == (
        "qr-mini", True, True, False, 32768,
    )  # fmt: skip
    assert (sees.id, sees.ranks, sees.sees_pictures) == ("qr-mini-vl", False, True)


async def test_rankings_are_those_of_the_library_however_many_ask(engine: LocalEngine, qr_mini: "Backend") -> None:
    reranker = QRHeadReranker(qr_mini)
    expected = [reranker.rank(judged.query, judged.documents) for judged in LISTS]
    found = await asyncio.gather(*(engine.rank(ask(judged)) for judged in LISTS * 5))
    for number, ranked in enumerate(found):
        own = expected[number % len(LISTS)]
        assert [relevance.index for relevance in ranked.relevances] == own.order
        assert scores(ranked) == pytest.approx({item.index: item.score for item in own}, abs=1e-6)
        assert [relevance.rank for relevance in ranked.relevances] == list(range(1, len(own) + 1))
        assert sum(relevance.score for relevance in ranked.relevances) == pytest.approx(1.0)
    assert found[0].num_tokens > sum(item.num_tokens for item in expected[0])


async def test_questions_about_the_same_documents_run_together(engine: LocalEngine, qr_mini: "Backend") -> None:
    documents = LISTS[0].documents
    first = asyncio.ensure_future(engine.rank(RankWork("boats", LONG)))
    await asyncio.sleep(0.05)
    works = [RankWork(judged.query, documents, top_n=1 + number) for number, judged in enumerate(LISTS)]
    found = await asyncio.gather(*(engine.rank(work) for work in works))
    assert (await first).relevances and engine.stats()["batches"][len(LISTS)] == 1
    for number, (judged, ranked) in enumerate(zip(LISTS, found, strict=True)):
        own = QRHeadReranker(qr_mini).rank(judged.query, documents, top_k=1 + number)
        assert [relevance.index for relevance in ranked.relevances] == own.order


async def test_what_one_request_asks_for(engine: LocalEngine) -> None:
    judged = LISTS[0]
    told = await engine.rank(ask(judged, top_n=2, explain=True, max_spans=1))
    assert [len(relevance.spans or ()) for relevance in told.relevances] == [1, 1]
    raw = await engine.rank(ask(judged, raw_scores=True))
    assert all(one.score == one.qr_score and one.spans is None for one in raw.relevances)
    cut = await engine.rank(ask(judged, max_doc_tokens=8))
    assert all(one.truncated for one in cut.relevances) and cut.num_tokens < raw.num_tokens
    pieces = await engine.rank(ask(judged, max_doc_tokens=40, truncate=False))
    assert not any(one.truncated for one in pieces.relevances)
    other = await engine.rank(ask(judged, instruction="Find what is not about it."))
    assert scores(other) != scores(raw)


async def test_known_documents_come_out_of_the_store(engine: LocalEngine) -> None:
    for judged in LISTS:
        await engine.rank(ask(judged))
    before = engine.stats()
    await engine.rank(ask(LISTS[0]))  # more than the two lists that are kept as they stand
    after = engine.stats()
    assert after["cache_hits"] - before["cache_hits"] == len(LISTS[0].documents)
    assert after["cache_misses"] == before["cache_misses"] and 0 < after["cache_bytes"] <= 2**30


async def test_too_much_is_refused_before_the_model_runs() -> None:
    engine = await ready(max_documents=3, max_request_tokens=50, vision_model=None)
    with pytest.raises(TooLarge, match="4 documents, at most 3"):
        await engine.rank(RankWork("who?", LONG[:4]))
    with pytest.raises(TooLarge, match="more than 50 tokens"):
        await engine.rank(RankWork("who?", LONG[:1]))
    with pytest.raises(InputError, match="query is empty"):
        await engine.rank(RankWork(" ", (Document("a"),)))
    await engine.stop(1.0)


async def test_who_stops_waiting_frees_the_model_within_a_chunk(engine: LocalEngine) -> None:
    started = time.perf_counter()
    await engine.rank(RankWork("boats", LONG))
    whole = time.perf_counter() - started
    long = asyncio.ensure_future(engine.rank(RankWork("boats", LONG[::-1])))
    await asyncio.sleep(whole / 10)
    long.cancel()
    started = time.perf_counter()
    await engine.rank(ask(LISTS[0]))
    assert time.perf_counter() - started < whole / 2
    assert engine.stats()["cancelled"]["qr-mini", "rank"] == 1
    assert (await engine.rank(RankWork("boats", LONG[::-1]))).relevances


async def test_time_is_limited_also_while_waiting() -> None:
    engine = await ready(deadline=0.15, vision_model=None)
    long = asyncio.ensure_future(engine.rank(RankWork("boats", LONG)))
    await asyncio.sleep(0.05)
    with pytest.raises(OutOfTime, match="raise --deadline"):
        await long
    started = time.perf_counter()
    found = await asyncio.gather(
        *(engine.rank(RankWork(f"boats {n}", LONG[n:])) for n in range(4)), return_exceptions=True
    )
    assert all(isinstance(one, OutOfTime) for one in found) and time.perf_counter() - started < 2
    await engine.stop(1.0)


async def test_more_than_may_wait_is_refused() -> None:
    engine = await ready(queue_size=2, max_batch=1, vision_model=None)
    found = await asyncio.gather(*(engine.rank(ask(LISTS[number % 6])) for number in range(12)), return_exceptions=True)
    refused = [one for one in found if isinstance(one, Overloaded)]
    assert refused and all(one.retry_after >= 1 for one in refused)
    assert len(refused) + sum(isinstance(one, Ranked) for one in found) == 12
    await engine.stop(1.0)


async def test_answers_are_those_of_the_library(engine: LocalEngine, qr_mini_vl: "Backend") -> None:
    turns = (Message.user("what color is the square", square()),)
    own = qr_mini_vl.answer(turns, max_new_tokens=5)
    said = await engine.chat(ChatWork("qr-mini-vl", turns, {"max_new_tokens": 5}))
    assert (said.text, said.usage, said.finish_reason) == (own.text, own.usage, own.finish_reason)
    assert said.metadata["model_name"] == "qr-mini-vl" and said.metadata["qr_method"] == "plain"
    *pieces, whole = [piece async for piece in engine.stream(ChatWork("qr-mini-vl", turns, {"max_new_tokens": 5}))]
    assert isinstance(whole, Said) and "".join(map(str, pieces)) == whole.text == own.text


async def test_a_look_tells_its_heat_map(engine: LocalEngine) -> None:
    work = ChatWork(
        "qr-mini-vl", (Message.user("what color is the square", square()),), {"crop": True, "max_new_tokens": 3}, True
    )
    said = await engine.chat(work)
    (heat,) = said.heat_maps
    assert heat.image_size == (320, 240) and said.metadata["qr_steps"]["crop"][0]["box"]
    assert min(map(min, heat.values)) == 0 and max(map(max, heat.values)) == 1
    assert len({len(row) for row in heat.values}) == 1 and len(heat.covers) == 4


async def test_rankings_and_answers_on_one_model_do_not_disturb_each_other(qr_mini_vl: "Backend") -> None:
    engine = await ready(model="qr-mini-vl", vision_model=None, heads="all")
    turns = (Message.user("what color is the square", square("blue")),)
    alone = qr_mini_vl.answer(turns, max_new_tokens=24, repetition_penalty=2.0)
    expected = await engine.rank(ask(LISTS[0]))
    work = ChatWork("qr-mini-vl", turns, {"max_new_tokens": 24, "repetition_penalty": 2.0})
    *said, ranked, again = await asyncio.gather(
        engine.chat(work), engine.chat(work), engine.rank(ask(LISTS[0])), engine.rank(ask(LISTS[0], top_n=1))
    )
    assert [one.text for one in said] == [alone.text] * 2
    assert scores(ranked) == pytest.approx(scores(expected), abs=1e-6)
    assert again.relevances[0].index == expected.relevances[0].index
    await engine.stop(1.0)


async def test_who_stops_listening_frees_the_model(engine: LocalEngine) -> None:
    work = ChatWork("qr-mini", (Message.user("Tell me about boats."),), {"max_new_tokens": 2000, "stop": ["\x00"]})
    pieces = engine.stream(work)
    async for _ in pieces:
        break
    await pieces.aclose()
    for _ in range(200):
        if not engine.stats()["running"]["qr-mini"]:
            break
        await asyncio.sleep(0.01)
    assert engine.stats()["running"]["qr-mini"] == 0 and engine.stats()["cancelled"]["qr-mini", "chat"] == 1
    assert (await engine.rank(ask(LISTS[0]))).relevances


async def test_what_goes_wrong_in_a_stream_arrives(engine: LocalEngine) -> None:
    turns = (Message.user("what is it", square()),)
    with pytest.raises(InputError, match="reads text only"):
        _ = [piece async for piece in engine.stream(ChatWork("qr-mini", turns))]
    with pytest.raises(UnknownModel, match="pass one of qr-mini, qr-mini-vl"):
        await engine.chat(ChatWork("gpt", turns))
    with pytest.raises(UnknownModel):
        _ = [piece async for piece in engine.stream(ChatWork("gpt", turns))]
    with pytest.raises(InputError, match="no setting"):
        await engine.chat(ChatWork("qr-mini", turns, {"temprature": 1}))


async def test_before_and_after(engine: LocalEngine) -> None:
    fresh = LocalEngine(ServerSettings(**BOTH))
    assert fresh.state == "loading" and await fresh.models() == ()
    with pytest.raises(NotReady, match="loading") as refused:
        await fresh.rank(ask(LISTS[0]))
    assert refused.value.retry_after
    running = asyncio.ensure_future(engine.rank(ask(LISTS[1])))
    await asyncio.sleep(0)
    await engine.stop(10.0)
    assert (await running).relevances and engine.state == "draining"
    with pytest.raises(NotReady, match="draining"):
        await engine.rank(ask(LISTS[0]))
    await engine.stop(0.0)


async def test_a_model_that_is_not_there_fails_without_a_crash() -> None:
    engine = LocalEngine(ServerSettings(model="/no/such/model"))
    await engine.start()
    while engine.state == "loading":
        await asyncio.sleep(0.01)
    assert engine.state == "failed" and isinstance(engine.failure, LoadError)
    with pytest.raises(NotReady, match="server's log"):
        await engine.rank(ask(LISTS[0]))
    await engine.stop(0.0)


def test_names_are_never_paths(tmp_path: Any) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    assert ServerSettings(model=str(folder)).name == "my-model"
    assert ServerSettings(model="org/model", model_id="mine").name == "mine"
    with pytest.raises(ValidationError, match="two models are called"):
        ServerSettings(model="qr-mini", vision_model="other", vision_model_id="qr-mini")
    with pytest.raises(ValidationError, match="API key is empty"):
        ServerSettings(model="qr-mini", api_keys=(" ",))


async def test_works_that_differ_are_not_told_alike_however_they_wait(engine: LocalEngine) -> None:
    judged, other = LISTS[0], tuple(replace(document, id="mine") for document in LISTS[0].documents)
    works = [
        ask(judged),
        ask(judged, instruction="Find what is not about it."),
        ask(judged, explain=True),
        ask(judged, explain=True, max_spans=1),
        ask(judged, top_n=2),
        ask(judged, raw_scores=True),
        ask(judged, max_doc_tokens=8),
        ask(judged, max_doc_tokens=40, truncate=False),
        RankWork("another question", judged.documents),
        RankWork("another question", other, top_n=1, explain=True),
    ]
    alone = [await engine.rank(work) for work in works]
    first = asyncio.ensure_future(engine.rank(RankWork("boats", LONG)))
    await asyncio.sleep(0.05)
    together = await asyncio.gather(*map(engine.rank, works))
    await first
    assert sum(size * count for size, count in engine.stats()["batches"].items() if size > 1) >= 6
    for one, other_one in zip(alone, together, strict=True):
        assert scores(other_one) == pytest.approx(scores(one), abs=1e-6) and other_one.num_tokens == one.num_tokens
        assert [told.spans and len(told.spans) for told in one.relevances] == [
            told.spans and len(told.spans) for told in other_one.relevances
        ]
        assert [told.score for told in other_one.relevances] == pytest.approx(
            [told.score for told in one.relevances], abs=1e-5
        )


async def test_a_place_in_the_queue_is_free_when_its_client_has_gone() -> None:
    engine = await ready(queue_size=2, max_batch=1, vision_model=None)
    long = asyncio.ensure_future(engine.rank(RankWork("boats", LONG)))
    await asyncio.sleep(0.05)
    waiting = [asyncio.ensure_future(engine.rank(ask(judged))) for judged in LISTS[:2]]
    await asyncio.sleep(0.01)
    with pytest.raises(Overloaded):
        await engine.rank(ask(LISTS[2]))
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert engine.stats()["queue_depth"]["qr-mini", "rank"] == 0
    assert engine.stats()["cancelled"]["qr-mini", "rank"] == 2
    assert (await engine.rank(ask(LISTS[2]))).relevances and (await long).relevances
    await engine.stop(1.0)


async def test_whoever_waits_when_the_server_stops_is_told_so() -> None:
    engine = await ready(vision_model=None)

    async def streamed() -> list[str | Said]:
        return [piece async for piece in engine.stream(ChatWork("qr-mini", (Message.user("Hello?"),)))]

    running = asyncio.ensure_future(engine.rank(RankWork("boats", LONG)))
    await asyncio.sleep(0.05)
    waiting = [asyncio.ensure_future(engine.rank(ask(LISTS[0]))), asyncio.ensure_future(streamed())]
    await asyncio.sleep(0.01)
    await engine.stop(0.0)
    for refused in await asyncio.gather(running, *waiting, return_exceptions=True):
        assert isinstance(refused, NotReady) and refused.retry_after


async def test_clients_never_see_where_a_model_lies(tmp_path: Any) -> None:
    from qr_integrations.bundled import bundled_path

    folder = tmp_path / "secret" / "acme"
    shutil.copytree(bundled_path("qr-mini"), folder)
    engine = await ready(model=str(folder), vision_model=None)
    assert [card.id for card in await engine.models()] == ["acme"]
    said = await engine.chat(ChatWork("acme", (Message.user("Hello?"),), {"max_new_tokens": 1}))
    assert said.metadata["model_name"] == "acme"
    for work in (
        ChatWork("acme", (Message.user("long " * 40_000),)),
        ChatWork("acme", (Message.user("Hello?"),), {"deco": {"layers": [99]}}),
    ):
        with pytest.raises(QRError) as told:
            await engine.chat(work)
        assert "secret" not in str(told.value)
    await engine.stop(1.0)


async def test_a_long_conversation_is_refused_before_it_is_made_tokens(engine: LocalEngine) -> None:
    started = time.perf_counter()
    with pytest.raises(WindowError, match="more tokens than the 32,768 that 'qr-mini' holds"):
        await engine.chat(ChatWork("qr-mini", (Message.user("word " * 2_000_000),)))
    assert time.perf_counter() - started < 5
