"""The chat models in LangChain's hands: calls of all kinds, settings, metadata, caches, copies."""

import copy
import json
import logging
import pickle
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage, trim_messages
from langchain_core.runnables import ConfigurableField
from PIL import Image

QUESTION = "what color is the box ?"
DESCRIBE = "describe the image ."  # the answer has several words


@pytest.fixture
def picture() -> Image.Image:
    drawn = Image.new("RGB", (320, 240), "white")
    drawn.paste((200, 0, 0), (200, 100, 280, 180))
    return drawn


@pytest.fixture
def asked(picture: Image.Image) -> list[HumanMessage]:
    return [HumanMessage([{"type": "image", "image": picture}, {"type": "text", "text": DESCRIBE}])]


@pytest.fixture
def vicrop(qr_mini_vl: Any) -> Any:
    from qr_integrations.langchain import ChatViCrop

    return ChatViCrop(backend=qr_mini_vl, max_tokens=6)


@pytest.fixture
def deco(qr_mini_vl: Any) -> Any:
    from qr_integrations.langchain import ChatDeCo

    return ChatDeCo(backend=qr_mini_vl, max_tokens=6)


# ---- answers


def test_answers_are_those_of_the_model(qr_mini_vl: Any, vicrop: Any, deco: Any, asked: Any, picture: Any) -> None:
    from qr_integrations.cropping.vicrop import ViCrop
    from qr_integrations.decoding import DeCo
    from qr_integrations.types import Message

    for chat, steps in ((vicrop, {"crop": ViCrop()}), (deco, {"deco": DeCo()})):
        expected = qr_mini_vl.answer([Message.user(picture, DESCRIBE)], max_new_tokens=6, **steps)
        answer = chat.invoke(asked)
        assert answer.text == expected.text
        assert answer.usage_metadata == {
            "input_tokens": expected.usage.prompt_tokens,
            "output_tokens": expected.usage.completion_tokens,
            "total_tokens": expected.usage.total_tokens,
        }
        assert answer.response_metadata["finish_reason"] == expected.finish_reason


def test_each_model_does_its_step_and_both_do_both(qr_mini_vl: Any, vicrop: Any, deco: Any, asked: Any) -> None:
    from qr_integrations.decoding import DeCo
    from qr_integrations.langchain import ChatViCrop

    both = ChatViCrop(backend=qr_mini_vl, deco=DeCo(alpha=0.3), max_tokens=3)
    for chat, method, steps in ((vicrop, "vicrop", ["crop"]), (deco, "deco", ["deco"]), (both, "vicrop+deco", None)):
        told = chat.invoke(asked).response_metadata
        assert told["qr_method"] == method
        assert list(told["qr_steps"]) == list(told["qr_params"]) == (steps or ["crop", "deco"])
        assert told["model_name"] == qr_mini_vl.name
        json.dumps(told)
    assert vicrop.invoke(asked, crop=False, deco=True).response_metadata["qr_method"] == "deco"


def test_deco_takes_a_model_that_reads_text_only(qr_mini: Any) -> None:
    from qr_integrations.langchain import ChatDeCo

    answer = ChatDeCo(backend=qr_mini, max_tokens=3).invoke("dracula was written by")
    assert answer.response_metadata["qr_steps"]["deco"]["num_steps"] == answer.usage_metadata["output_tokens"] == 3


# ---- streams


def test_a_stream_is_the_answer_in_pieces(vicrop: Any, asked: Any) -> None:
    whole, chunks = vicrop.invoke(asked), list(vicrop.stream(asked))
    assert len(chunks) > 2
    assert [chunk.chunk_position for chunk in chunks] == [None] * (len(chunks) - 1) + ["last"]
    assert [chunk.usage_metadata is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    merged = chunks[0]
    for chunk in chunks[1:]:
        merged += chunk
    assert isinstance(merged, AIMessageChunk) and merged.content == whole.content
    assert merged.usage_metadata == whole.usage_metadata
    one, other = (dict(message.response_metadata) for message in (merged, whole))
    assert set(one.pop("qr_seconds")) == set(other.pop("qr_seconds"))
    assert one == other


def test_who_stops_listening_can_ask_again(vicrop: Any, asked: Any) -> None:
    long = vicrop.model_copy(update={"max_new_tokens": 500, "repetition_penalty": 1.5})
    pieces = long.stream(asked)
    next(pieces)
    pieces.close()
    assert vicrop.invoke(asked).text == vicrop.invoke(asked).text != ""


class Tokens(BaseCallbackHandler):
    def __init__(self) -> None:
        self.tokens: list[Any] = []

    def on_llm_new_token(self, token: Any, **kwargs: Any) -> None:
        self.tokens.append(token)


def test_callbacks_hear_the_tokens_once(qr_mini_vl: Any, vicrop: Any, asked: Any) -> None:
    from qr_integrations.langchain import ChatViCrop

    streaming = ChatViCrop(backend=qr_mini_vl, max_tokens=6, streaming=True)
    for ask in (lambda config: streaming.invoke(asked, config), lambda config: list(vicrop.stream(asked, config))):
        heard = Tokens()
        ask({"callbacks": [heard]})
        assert "".join(heard.tokens) == vicrop.invoke(asked).text and len(heard.tokens) > 2
    silent = Tokens()
    vicrop.invoke(asked, {"callbacks": [silent]})
    assert silent.tokens == []


def test_a_failing_stream_says_why(vicrop: Any, picture: Image.Image) -> None:
    from qr_integrations.errors import WindowError

    long = [HumanMessage([{"type": "image", "image": picture}] * 12 + [QUESTION])]
    with pytest.raises(WindowError, match="pass fewer or shorter messages, or fewer pictures"):
        list(vicrop.stream(long))


# ---- async, batches, threads


async def test_async_answers_alike_and_leaves_the_loop_free(vicrop: Any, asked: Any, with_heartbeat: Any) -> None:
    answer, ticks = await with_heartbeat(vicrop.ainvoke(asked))
    assert answer.text == vicrop.invoke(asked).text
    assert ticks > 3

    async def streamed() -> str:
        return "".join([chunk.text async for chunk in vicrop.astream(asked)])

    text, ticks = await with_heartbeat(streamed())
    assert text == answer.text
    assert ticks > 3


def test_a_batch_answers_as_one_by_one(vicrop: Any, asked: Any) -> None:
    questions = [asked, QUESTION, [HumanMessage("what shape is red ?")], asked]
    assert [answer.text for answer in vicrop.batch(questions)] == [vicrop.invoke(one).text for one in questions]


# ---- settings


def test_settings_of_a_call_count_for_that_call(deco: Any, asked: Any) -> None:
    assert deco.invoke(asked, max_tokens=2).usage_metadata["output_tokens"] == 2
    assert deco.bind(max_new_tokens=3).invoke(asked).usage_metadata["output_tokens"] == 3
    sampled = [deco.invoke(asked, temperature=5.0, seed=seed, deco=False).text for seed in (1, 1, 2, 3, 4)]
    assert sampled[0] == sampled[1] and len(set(sampled)) > 1
    for unknown in ("max_token", "tools", "model"):
        with pytest.raises(ValueError, match=f"an answer has no setting '{unknown}': leave it out, or pass one of"):
            deco.invoke(asked, **{unknown: 3})


def test_stop_sequences_of_chat_and_call_both_end_the_answer(deco: Any, asked: Any) -> None:
    words = deco.invoke(asked).text.split()
    first, second = words[1], words[2]
    assert len({words[0], first, second}) == 3  # otherwise the test proves nothing
    own = deco.model_copy(update={"stop": (second,)})
    assert own.invoke(asked).text.split() == words[:2]
    found = own.invoke(asked, stop=[first])
    assert found.text.split() == words[:1] and found.response_metadata["finish_reason"] == "stop"
    assert own.invoke(asked, stop=["zebra"]).text.split() == words[:2]


def test_settings_of_remote_models_are_ignored_and_typos_noted(caplog: pytest.LogCaptureFixture) -> None:
    from qr_integrations.langchain import ChatViCrop

    with caplog.at_level(logging.WARNING):
        remote = ChatViCrop(model="m", timeout=3, max_retries=2, api_key="k", base_url="u", stop=[], temperature=0)
        assert remote == ChatViCrop(model="m") and caplog.messages == []
        ChatViCrop(model="m", temprature=1)
    assert caplog.messages == ["ChatViCrop has no setting 'temprature': it is ignored"]


def test_a_setting_can_be_left_to_the_call(deco: Any, asked: Any) -> None:
    open_ended = deco.configurable_fields(max_new_tokens=ConfigurableField(id="length"))
    answer = open_ended.invoke(asked, config={"configurable": {"length": 2}})
    assert answer.usage_metadata["output_tokens"] == 2


# ---- what LangChain is told


def test_traces_name_provider_model_and_limits(deco: Any) -> None:
    params = deco._get_ls_params(stop=["a"])
    assert params["ls_provider"] == "qr_integrations" and params["ls_model_name"] == deco.model
    assert (params["ls_temperature"], params["ls_max_tokens"], params["ls_stop"]) == (0.0, 6, ["a"])
    changed = deco._get_ls_params(model="other", max_tokens=3, temperature=0.5)
    assert (changed["ls_model_name"], changed["ls_max_tokens"], changed["ls_temperature"]) == ("other", 3, 0.5)
    assert "ls_stop" not in changed


def test_the_profile_says_what_the_model_takes(qr_mini: Any, vicrop: Any) -> None:
    from qr_integrations.langchain import ChatDeCo

    assert vicrop.profile["image_inputs"] and not vicrop.profile["image_url_inputs"]
    assert (vicrop.profile["max_input_tokens"], vicrop.profile["max_output_tokens"]) == (1024, 6)
    assert not vicrop.profile["tool_calling"] and not vicrop.profile["structured_output"]
    text_only = ChatDeCo(backend=qr_mini).profile
    assert not text_only["image_inputs"] and text_only["max_input_tokens"] == qr_mini.max_tokens
    assert ChatDeCo(model="m", allow_urls=True).profile["image_url_inputs"]


def test_tokens_are_counted_pictures_included(deco: Any, picture: Image.Image, asked: Any) -> None:
    assert deco.get_num_tokens_from_messages(asked) == deco.invoke(asked).usage_metadata["input_tokens"] > 100
    assert deco.get_num_tokens("red box") == 2
    assert deco.model_copy(update={"custom_get_token_ids": lambda text: [1, 2, 3]}).get_num_tokens("red") == 3
    history = [SystemMessage("a"), *[*asked, AIMessage("red")] * 12, *asked]
    kept = trim_messages(history, max_tokens=500, token_counter=deco, strategy="last", start_on="human")
    assert 3 <= len(kept) < len(history) and kept[-1] == history[-1]
    assert deco.get_num_tokens_from_messages(kept) <= 500


def test_tools_and_structured_output_are_not_pretended(deco: Any) -> None:
    with pytest.raises(NotImplementedError):
        deco.bind_tools([])
    with pytest.raises(NotImplementedError):
        deco.with_structured_output({"title": "A", "type": "object", "properties": {}})


def test_an_agent_without_tools_answers(deco: Any) -> None:
    agents = pytest.importorskip("langchain.agents", reason="no langchain for this langchain-core")
    found = agents.create_agent(deco, tools=[]).invoke({"messages": [HumanMessage(QUESTION)]})
    assert found["messages"][-1].text == deco.invoke(QUESTION).text


# ---- caches and copies


def test_a_cache_tells_apart_what_answers_differently(qr_mini_vl: Any, asked: Any) -> None:
    from qr_integrations.langchain import ChatDeCo, ChatViCrop

    cache = InMemoryCache()

    def chat(kind: Any = ChatDeCo, **given: Any) -> Any:
        return kind(**{"backend": qr_mini_vl, "max_tokens": 3, "cache": cache, **given})

    different = [
        chat(deco={"alpha": 0.6}),
        chat(deco={"alpha": 0.3}),
        chat(deco={"layers": [2]}),
        chat(max_tokens=2),
        chat(stop=["a"]),
        chat(repetition_penalty=1.5),
        chat(system_prompt="a"),
        chat(ChatViCrop),
        chat(ChatViCrop, crop={"method": "gradient"}),
        chat(ChatViCrop, deco=True),
    ]
    for one in different:
        told = one.invoke(asked).response_metadata
        assert told["qr_params"] == one.strategy().params
    assert len(cache._cache) == len(different)
    again = chat(deco=True, allow_urls=True).invoke(asked)
    assert len(cache._cache) == len(different) and "total_cost" in again.usage_metadata  # as LangChain marks a hit
    chat().invoke(asked, max_tokens=1)
    assert len(cache._cache) == len(different) + 1


def test_copies_and_pickles_answer_alike(vicrop: Any, asked: Any) -> None:
    text = vicrop.invoke(asked).text
    for other in (copy.copy(vicrop), copy.deepcopy(vicrop), vicrop.model_copy(), pickle.loads(pickle.dumps(vicrop))):
        assert type(other) is type(vicrop) and other.invoke(asked).text == text
    assert len(pickle.dumps(vicrop)) < 10_000


def test_importing_and_making_a_chat_loads_no_model_library(in_fresh_python: Any) -> None:
    code = """
import sys
from qr_integrations.langchain import ChatDeCo, ChatViCrop
chats = [ChatViCrop(model="no/such-model"), ChatDeCo(model_name="no/such-model")]
print([chat._llm_type for chat in chats], "torch" in sys.modules)
"""
    assert in_fresh_python(code) == "['qr-vicrop', 'qr-deco'] False"
