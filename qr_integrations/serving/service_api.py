"""What is asked about the server itself: whether it lives, whether it is ready, what it serves, how it fares."""

from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Path, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from qr_integrations.serving.http_errors import UNKNOWN_KEY
from qr_integrations.serving.metrics import Metrics
from qr_integrations.serving.openai_shapes import ChatError
from qr_integrations.serving.refusals import UnknownModel
from qr_integrations.serving.work import Engine, ModelCard, State

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])
_ERRORS: dict[int | str, dict[str, Any]] = {
    401: {"description": UNKNOWN_KEY, "model": ChatError},
    "default": {"description": "Another error.", "model": ChatError},
}
_NO_MODEL: dict[int | str, dict[str, Any]] = {404: {"description": "It is not served.", "model": ChatError}}
_NUMBERS = {200: {"description": "All of them.", "content": {"text/plain": {"schema": {"type": "string"}}}}}


class Health(BaseModel):
    """How the server is."""

    status: str = Field(description="`ok`, or what it is doing: loading, draining, failed.")


class Model(BaseModel):
    """A model, as OpenAI's clients know it, and what it does."""

    id: str
    object: str = "model"
    created: int = 0
    owned_by: str = "qr-integrations"
    ranks: bool = Field(description="It ranks documents.")
    chats: bool = Field(description="It answers conversations.")
    sees_pictures: bool = Field(description="Conversations may hold pictures.")
    max_tokens: int | None = Field(description="Its window; null: not known.")

    @classmethod
    def of(cls, card: ModelCard) -> "Model":
        """From what an engine tells."""
        return cls(
            id=card.id,
            ranks=card.ranks,
            chats=card.chats,
            sees_pictures=card.sees_pictures,
            max_tokens=card.max_tokens,
        )


class Models(BaseModel):
    """All of them."""

    object: str = "list"
    data: list[Model]


def probe_routes(engine: Engine) -> APIRouter:
    """``/health`` and ``/ready``, for everybody."""
    router = APIRouter(tags=["service"])

    @_read(router, "/health", summary="The process lives")
    async def health() -> Health:
        return Health(status="ok")

    @_read(router, "/ready", summary="There is work to be had", responses={503: {"model": Health}})
    async def ready() -> Response:
        state: State = engine.state
        told = Health(status="ok" if state == "ready" else state)
        return JSONResponse(told.model_dump(), 200 if state == "ready" else 503)

    return router


def service_routes(engine: Engine, metrics: Metrics) -> APIRouter:
    """``/v1/models`` and ``/metrics``, for those who have a key."""
    router = APIRouter(tags=["service"], responses=_ERRORS)

    @_read(router, "/v1/models", summary="What is served; empty while it is loading")
    async def models() -> Models:
        return Models(data=[Model.of(card) for card in await engine.models()])

    @_read(router, "/v1/models/{model:path}", summary="One of them", responses=_NO_MODEL)
    async def model(model: Annotated[str, Path(description="Its id.")]) -> Model:
        cards = await engine.models()
        for card in cards:
            if card.id == model:
                return Model.of(card)
        served = ", ".join(card.id for card in cards) or "nothing yet"
        raise UnknownModel(f"no such model is served: ask for one of these: {served}")

    @_read(router, "/metrics", summary="Counters for Prometheus", responses=_NUMBERS, response_class=Response)
    async def measured() -> Response:
        return Response(metrics.page(), media_type=metrics.content_type)

    return router


def _read(router: APIRouter, path: str, **told: Any) -> Callable[[Endpoint], Endpoint]:
    """A route for GET, and for HEAD, of which the schema says nothing."""

    def add(endpoint: Endpoint) -> Endpoint:
        router.get(path, **told)(endpoint)
        router.head(path, include_in_schema=False)(endpoint)
        return endpoint

    return add
