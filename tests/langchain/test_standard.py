"""LangChain's standard tests for integrations: all of them, none skipped, none expected to fail."""

from typing import Any

from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.tools import BaseTool
from langchain_tests.integration_tests import RetrieversIntegrationTests, ToolsIntegrationTests
from langchain_tests.unit_tests import ToolsUnitTests

TEXTS = [
    "Cats sleep most of the day.",
    "Dracula is an 1897 Gothic novel by the Irish author Bram Stoker.",
    "The Danube flows through Vienna and Budapest.",
    "Frankenstein was written by Mary Shelley.",
]


class TestQRRetriever(RetrieversIntegrationTests):
    @property
    def retriever_constructor(self) -> type[BaseRetriever]:
        from qr_integrations.langchain import QRRetriever

        return QRRetriever

    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return {"documents": [Document(text) for text in TEXTS], "model": "qr-mini"}

    @property
    def retriever_query_example(self) -> str:
        return "who wrote dracula"


class SearchTool:
    """What the suites ask of the retriever tool; a test class takes the suite's own tests unchanged."""

    @property
    def tool_constructor(self) -> BaseTool:
        from qr_integrations.langchain import QRRetriever, create_qr_retriever_tool

        return create_qr_retriever_tool(QRRetriever.from_texts(TEXTS, model="qr-mini"))

    @property
    def tool_invoke_params_example(self) -> dict[str, Any]:
        return {"query": "who wrote dracula"}


class RerankTool:
    """What the suites ask of the rerank tool."""

    @property
    def tool_constructor(self) -> BaseTool:
        from qr_integrations.langchain import create_qr_rerank_tool

        return create_qr_rerank_tool(model="qr-mini")

    @property
    def tool_invoke_params_example(self) -> dict[str, Any]:
        return {"query": "who wrote dracula", "passages": TEXTS, "top_n": 2}


class TestSearchToolUnit(SearchTool, ToolsUnitTests):
    pass


class TestSearchToolIntegration(SearchTool, ToolsIntegrationTests):
    pass


class TestRerankToolUnit(RerankTool, ToolsUnitTests):
    pass


class TestRerankToolIntegration(RerankTool, ToolsIntegrationTests):
    pass
