"""LangChain's standard tests for chat models, all of them, on the small model that sees pictures.

None is overridden. Those for tools, structured output, audio, video and PDF skip themselves: the models have none of
these. The sample image that the suite fetches is answered with a drawn one.
"""

import io
from typing import Any

import httpx
import pytest
from langchain_core.language_models import BaseChatModel
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests
from PIL import Image

MODEL = "qr-mini-vl"


class SeesPictures:
    """What the suites ask of both chat models."""

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": MODEL}

    @property
    def supports_image_inputs(self) -> bool:
        return True

    @property
    def supports_image_urls(self) -> bool:
        return False  # they are off unless allow_urls is on, and the tests have no network

    @property
    def supports_image_tool_message(self) -> bool:
        return False  # the suite asks for it through bind_tools

    @property
    def supports_model_override(self) -> bool:
        return False  # one chat, one model

    @property
    def enable_vcr_tests(self) -> bool:
        return False

    @pytest.fixture(autouse=True)
    def drawn_sample_image(self, monkeypatch: pytest.MonkeyPatch) -> None:
        picture, file = Image.new("RGB", (320, 240), "white"), io.BytesIO()
        picture.paste((200, 0, 0), (40, 40, 120, 120))
        picture.save(file, "PNG")
        monkeypatch.setattr("httpx.get", lambda *args, **kwargs: httpx.Response(200, content=file.getvalue()))


class ShortAnswers:
    """The unit tests pass a limit of their own."""

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": MODEL, "max_tokens": 8}


class ViCropSuite(SeesPictures):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        from qr_integrations.langchain import ChatViCrop

        return ChatViCrop


class DeCoSuite(SeesPictures):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        from qr_integrations.langchain import ChatDeCo

        return ChatDeCo


class TestChatViCropUnit(ViCropSuite, ChatModelUnitTests):
    pass


class TestChatViCropIntegration(ShortAnswers, ViCropSuite, ChatModelIntegrationTests):
    pass


class TestChatDeCoUnit(DeCoSuite, ChatModelUnitTests):
    pass


class TestChatDeCoIntegration(ShortAnswers, DeCoSuite, ChatModelIntegrationTests):
    pass
