"""The agent tools: what the model is told of them, what it gets back, and an agent that uses them."""

from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, BaseMessage, ToolMessage
from langchain_core.outputs import ChatResult
from langchain_core.prompts import PromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import Field, ValidationError


class ScriptedModel(GenericFakeChatModel):
    """Says what `messages` say, one after the other, and keeps what it was shown."""

    tools: list[Any] = Field(default_factory=list)
    shown: list[list[BaseMessage]] = Field(default_factory=list)

    def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
        self.tools.extend(tools)
        return self

    def _generate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> ChatResult:
        self.shown.append(list(messages))
        return super()._generate(messages, *args, **kwargs)


@pytest.fixture
def search(qr_mini: Any, documents: list[Document]) -> BaseTool:
    from qr_integrations.langchain import QRRetriever, create_qr_retriever_tool

    return create_qr_retriever_tool(QRRetriever.from_documents(documents, backend=qr_mini, k=2))


@pytest.fixture
def rerank(qr_mini: Any) -> BaseTool:
    from qr_integrations.langchain import create_qr_rerank_tool

    return create_qr_rerank_tool(backend=qr_mini)


def call(tool: BaseTool, **args: Any) -> dict[str, Any]:
    return {"name": tool.name, "args": args, "id": "7", "type": "tool_call"}


# ---- what the model is told


def test_the_model_is_told_what_each_tool_does_and_takes(search: BaseTool, rerank: BaseTool) -> None:
    assert (search.name, rerank.name) == ("search_documents", "rerank_passages")
    assert set(search.args) == {"query"} and set(rerank.args) == {"query", "passages", "top_n"}
    for tool in (search, rerank):
        assert 0 < len(tool.description) <= 1024 and all(field.get("description") for field in tool.args.values())
    function = convert_to_openai_tool(rerank)["function"]
    assert function["name"] == "rerank_passages" and len(function["description"]) <= 1024
    parameters = function["parameters"]
    assert parameters["required"] == ["query", "passages"]
    assert parameters["properties"]["passages"]["items"] == {"type": "string"}
    assert list(convert_to_openai_tool(search)["function"]["parameters"]["properties"]) == ["query"]


def test_name_and_description_are_yours(reranker: Any, qr_mini: Any, texts: list[str]) -> None:
    from qr_integrations.langchain import QRRetriever, create_qr_rerank_tool, create_qr_retriever_tool

    own = QRRetriever.from_texts(texts, backend=qr_mini)
    for tool in (
        create_qr_retriever_tool(own, "books", "About books."),
        create_qr_rerank_tool(reranker, "books", "About books."),
    ):
        assert (tool.name, tool.description) == ("books", "About books.")


# ---- searching


async def test_the_answer_shows_scores_and_carries_the_documents(search: BaseTool, documents: list[Document]) -> None:
    message = search.invoke(call(search, query="who wrote dracula"))
    assert isinstance(message, ToolMessage) and message.tool_call_id == "7"
    found = message.artifact
    assert isinstance(found, list) and [type(document) for document in found] == [Document] * 2
    assert found[0].id == "b" and found[0].metadata["source"] == "1.txt"
    lines = [f"[score {d.metadata['relevance_score']:.3f}] {d.page_content}" for d in found]
    assert message.content == "\n\n".join(lines) and documents[1].page_content in message.content
    again = await search.ainvoke(call(search, query="who wrote dracula"))
    assert (again.content, again.artifact) == (message.content, found)
    assert search.invoke({"query": "who wrote dracula"}) == message.content == search.invoke("who wrote dracula")


def test_a_prompt_and_a_separator_of_your_own(qr_mini: Any, documents: list[Document]) -> None:
    from qr_integrations.langchain import QRRetriever, create_qr_retriever_tool

    tool = create_qr_retriever_tool(
        QRRetriever.from_documents(documents, backend=qr_mini, k=2),
        document_prompt=PromptTemplate.from_template("{qr_rank}. {source}: {page_content}"),
        document_separator=" | ",
        response_format="content",
    )
    message = tool.invoke(call(tool, query="who wrote dracula"))
    assert message.content.startswith(f"1. 1.txt: {documents[1].page_content} | 2. ") and message.artifact is None


async def test_any_retriever_with_scores_will_do(reranker: Any, documents: list[Document], recorder: Any) -> None:
    from qr_integrations.langchain import create_qr_retriever_tool

    class Everything(BaseRetriever):
        def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
            return documents

    tool = create_qr_retriever_tool(
        ContextualCompressionRetriever(base_compressor=reranker, base_retriever=Everything())
    )
    message = await tool.ainvoke(call(tool, query="who wrote dracula"), config={"callbacks": [recorder]})
    assert message.artifact[0].id == "b" and "[score " in message.content
    names = [run.name for run in recorder.runs]
    assert names == ["search_documents", "ContextualCompressionRetriever", "Everything", "QRRerank"]


# ---- ordering passages


async def test_passages_come_back_best_first_with_their_numbers_and_scores(
    rerank: BaseTool, ranked: Any, texts: list[str]
) -> None:
    message = rerank.invoke(call(rerank, query="who wrote dracula", passages=texts))
    expected = ranked("who wrote dracula", texts)[:3]
    lines = [
        f"{rank}. [passage {index + 1}, score {score:.3f}] {texts[index]}"
        for rank, (index, score) in enumerate(expected, start=1)
    ]
    assert isinstance(message, ToolMessage) and message.content == "\n\n".join(lines)
    assert [document.page_content for document in message.artifact] == [texts[index] for index, _ in expected]
    assert all(isinstance(document, Document) for document in message.artifact)
    again = await rerank.ainvoke(call(rerank, query="who wrote dracula", passages=texts))
    assert (again.content, again.artifact) == (message.content, message.artifact)
    assert await rerank.ainvoke({"query": "who wrote dracula", "passages": texts}) == message.content


def test_the_agent_may_say_how_many(rerank: BaseTool, texts: list[str]) -> None:
    for top_n, count in ((1, 1), (4, 4), (99, 4), (None, 3)):
        message = rerank.invoke(call(rerank, query="who wrote dracula", passages=texts, top_n=top_n))
        assert len(message.artifact) == count == message.content.count("[passage ")
    with pytest.raises(ValidationError, match="top_n"):
        rerank.invoke({"query": "q", "passages": texts, "top_n": 0})


def test_a_reranker_of_its_own_keeps_its_settings(qr_mini: Any, texts: list[str]) -> None:
    from qr_integrations.langchain import QRRerank, create_qr_rerank_tool

    own = QRRerank(backend=qr_mini, top_n=1, normalize="share", explain=True)
    tool = create_qr_rerank_tool(own)
    for top_n, count in ((None, 1), (2, 2)):
        artifact = tool.invoke(call(tool, query="who wrote dracula", passages=texts, top_n=top_n)).artifact
        assert len(artifact) == count and artifact[0].metadata["qr_score_type"] == "share"
        assert artifact[0].metadata["qr_spans"]
    assert own.top_n == 1


def test_a_reranker_and_settings_are_an_error(reranker: Any) -> None:
    from qr_integrations.errors import InputError
    from qr_integrations.langchain import create_qr_rerank_tool

    with pytest.raises(InputError, match="leave out model, top_n"):
        create_qr_rerank_tool(reranker, model="qr-mini", top_n=2)
    with pytest.raises(ValueError, match="no model"):
        create_qr_rerank_tool()


def test_nothing_to_order_or_nothing_good_enough_is_said_in_words(qr_mini: Any, texts: list[str]) -> None:
    from qr_integrations.langchain import create_qr_rerank_tool

    strict = create_qr_rerank_tool(backend=qr_mini, score_threshold=9.0)
    for passages in ([], texts):
        message = strict.invoke(call(strict, query="who wrote dracula", passages=passages))
        assert message.content == "Nothing found." and message.artifact == []


def test_a_search_that_finds_nothing_says_so_too(qr_mini: Any, texts: list[str]) -> None:
    from qr_integrations.langchain import QRRetriever, create_qr_retriever_tool

    tool = create_qr_retriever_tool(QRRetriever.from_texts(texts, backend=qr_mini, score_threshold=9.0))
    message = tool.invoke(call(tool, query="who wrote dracula"))
    assert message.content == "Nothing found." and message.artifact == []


async def test_the_rerank_run_stands_under_the_run_of_the_tool(
    rerank: BaseTool, texts: list[str], recorder: Any
) -> None:
    args = {"query": "who wrote dracula", "passages": texts}
    rerank.invoke(args, config={"callbacks": [recorder]})
    await rerank.ainvoke(args, config={"callbacks": [recorder]})
    assert [run.name for run in recorder.runs] == ["rerank_passages", "QRRerank"] * 2
    for tool, own in (recorder.runs[:2], recorder.runs[2:]):
        assert own.parent_run_id == tool.id and tool.run_type == "tool" and own.end_time and tool.end_time


async def test_async_lets_the_event_loop_go_on(qr_mini: Any, texts: list[str], with_heartbeat: Any) -> None:
    from qr_integrations.langchain import create_qr_rerank_tool

    tool = create_qr_rerank_tool(backend=qr_mini, keep_prefixes=0)
    content, ticks = await with_heartbeat(tool.ainvoke({"query": "who wrote dracula", "passages": texts * 30}))
    assert ticks > 20 and texts[1] in content.splitlines()[0]


# ---- in an agent


async def test_an_agent_calls_them_and_sees_the_answers(search: BaseTool, rerank: BaseTool, texts: list[str]) -> None:
    for asynchronous in (False, True):
        said = [
            AIMessage("", tool_calls=[call(search, query="who wrote dracula")]),
            AIMessage("", tool_calls=[call(rerank, query="author of frankenstein", passages=texts, top_n=1)]),
            AIMessage("Bram Stoker and Mary Shelley."),
        ]
        model = ScriptedModel(messages=iter(said))
        agent = create_agent(model, tools=[search, rerank])
        given: Any = {"messages": [("user", "Who wrote Dracula, who Frankenstein?")]}
        state = await agent.ainvoke(given) if asynchronous else agent.invoke(given)
        assert state["messages"][-1].content == "Bram Stoker and Mary Shelley."
        first, second = model.shown[1][-1], model.shown[2][-1]
        assert isinstance(first, ToolMessage) and first.name == "search_documents" and first.status == "success"
        assert texts[1] in first.content.splitlines()[0] and first.content.startswith("[score 0.")
        assert isinstance(second, ToolMessage) and second.content.startswith("1. [passage 4, score 0.")
        assert first.artifact[0].id == "b" and second.artifact[0].page_content == texts[3]
        assert [tool.name for tool in model.tools[:2]] == ["search_documents", "rerank_passages"]
