"""`ViCropLLM` and `DeCoLLM` inside LlamaIndex: agents, query engines, chat engines, structured answers.

The bundled model knows little; what is tested is that each of them reaches the model and comes back.
"""

import json
from contextlib import suppress
from typing import Any

import pytest
from llama_index.core.agent.react.formatter import ReActChatFormatter
from llama_index.core.agent.workflow import AgentOutput, ReActAgent
from llama_index.core.base.llms.types import ChatMessage, ImageBlock, TextBlock
from llama_index.core.chat_engine import ContextChatEngine, SimpleChatEngine
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.prompts import PromptTemplate
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.tools import FunctionTool
from pydantic import BaseModel
from workflows.errors import WorkflowRuntimeError

QUESTION = "what is the color of the box ?"


class Colour(BaseModel):
    """A colour."""

    name: str


@pytest.fixture
def heard(qr_mini_vl: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The conversations that the model was given, from here on."""
    given: list[Any] = []
    for name in ("answer", "stream"):
        method = getattr(type(qr_mini_vl), name)

        def noted(self: Any, messages: Any, method: Any = method, **settings: Any) -> Any:
            given.append(messages)
            return method(self, messages, **settings)

        monkeypatch.setattr(type(qr_mini_vl), name, noted)
    return given


@pytest.fixture
def retriever() -> Any:
    from qr_integrations.llama_index import QRRetriever

    return QRRetriever.from_text(["the box is red .", "the moon is blue ."], model="qr-mini", similarity_top_k=1)


@pytest.fixture
def memory() -> ChatMemoryBuffer:
    """Without a database, which the default leaves open."""
    return ChatMemoryBuffer.from_defaults(token_limit=700)


@pytest.fixture
def agent(make_llm: Any) -> ReActAgent:
    """With a header that fits into the bundled model's small window, and one try."""

    def color_of(thing: str) -> str:
        """The color of a thing."""
        return f"the {thing} is red"

    header = "say Thought and Answer {tool_desc} {tool_names}"
    return ReActAgent(
        tools=[FunctionTool.from_defaults(color_of)],
        llm=make_llm("DeCoLLM"),
        formatter=ReActChatFormatter.from_defaults(system_header=header),
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of pydantic and workflows, in LlamaIndex's agents
async def test_an_agent_takes_a_step(agent: ReActAgent, memory: ChatMemoryBuffer, heard: list[Any]) -> None:
    handler = agent.run(QUESTION, max_iterations=1, memory=memory)
    events = [event async for event in handler.stream_events()]
    with suppress(WorkflowRuntimeError):  # what is said may be no answer to an agent, which then has had its tries
        assert (await handler).response.role == "assistant"
    outputs = [event for event in events if isinstance(event, AgentOutput)]
    assert outputs and outputs[0].response.role == "assistant" and outputs[0].raw["usage"]["total_tokens"] > 0
    assert heard[0][0].role == "system" and "color_of" in heard[0][0].text and heard[0][-1].text == QUESTION


@pytest.mark.parametrize("streaming", [False, True])
async def test_a_query_engine_answers_from_what_was_retrieved(
    make_llm: Any, retriever: Any, heard: list[Any], streaming: bool
) -> None:
    engine = RetrieverQueryEngine.from_args(retriever, llm=make_llm(), streaming=streaming)
    response = engine.query(QUESTION)
    text = "".join(response.response_gen) if streaming else response.response
    assert "the box is red ." in heard[0][-1].text and QUESTION in heard[0][-1].text
    found = await engine.aquery(QUESTION)
    again = "".join([piece async for piece in found.response_gen]) if streaming else found.response
    assert text == again and response.source_nodes[0].text == "the box is red ."


def test_a_chat_engine_keeps_its_turns(
    make_llm: Any, retriever: Any, memory: ChatMemoryBuffer, heard: list[Any]
) -> None:
    engine = ContextChatEngine.from_defaults(
        retriever=retriever, llm=make_llm(), memory=memory, system_prompt="be brief"
    )
    first = engine.chat(QUESTION)
    second = "".join(engine.stream_chat("is it red ?").response_gen)
    assert "be brief" in heard[0][0].text and "the box is red ." in heard[0][0].text
    assert [message.role for message in engine.chat_history] == ["user", "assistant"] * 2
    assert engine.chat_history[1].content == first.response and engine.chat_history[3].content == second
    assert [turn.text for turn in heard[1] if turn.role == "assistant"] == ([first.response] if first.response else [])


def test_a_history_with_pictures_is_read_again(
    make_llm: Any, png: bytes, memory: ChatMemoryBuffer, heard: list[Any]
) -> None:
    history = [
        ChatMessage(role="user", blocks=[ImageBlock(image=png), TextBlock(text="what is it ?")]),
        ChatMessage(role="assistant", content="a box"),
    ]
    memory.set(history)
    SimpleChatEngine.from_defaults(llm=make_llm("DeCoLLM"), memory=memory).chat(QUESTION)
    assert [len(turn.pictures) for turn in heard[0]] == [1, 0, 0]


async def test_structured_answers_come_from_the_text(make_llm: Any, heard: list[Any]) -> None:
    llm, prompt = make_llm(), PromptTemplate("what is the {what} ?")
    with pytest.raises(ValueError, match="Could not extract json string"):
        llm.structured_predict(Colour, prompt, what="color")
    with pytest.raises(ValueError, match="Could not extract json string"):
        await llm.astructured_predict(Colour, prompt, what="color", llm_kwargs={"max_tokens": 2})
    assert len(heard) == 2 and json.dumps(Colour.model_json_schema()["properties"])[:8] in heard[0][-1].text


async def test_predictions_of_all_kinds_are_the_same(make_llm: Any) -> None:
    llm, prompt = make_llm(system_prompt="be brief"), PromptTemplate("what is the {what} ?")
    said = llm.predict(prompt, what="color")
    assert await llm.apredict(prompt, what="color") == said
    assert "".join(llm.stream(prompt, what="color")) == said
    assert "".join([piece async for piece in await llm.astream(prompt, what="color")]) == said
