"""The HTTP application: routes, and what stands in front of all of them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Depends, FastAPI
from fastapi.security import HTTPBearer

from qr_integrations.serving.chat_api import chat_routes
from qr_integrations.serving.counting import CountingEngine
from qr_integrations.serving.guards import AllowedHosts, ApiKeys, Bodies, RequestIds, SecurityHeaders
from qr_integrations.serving.http_errors import SCHEMA_PATH, tell_errors
from qr_integrations.serving.metrics import Metrics
from qr_integrations.serving.page_api import page_routes
from qr_integrations.serving.request_log import Watched
from qr_integrations.serving.rerank_api import rerank_routes
from qr_integrations.serving.service_api import probe_routes, service_routes
from qr_integrations.serving.settings import ServerSettings
from qr_integrations.serving.work import Engine
from qr_integrations.version import __version__


def create_app(settings: ServerSettings, engine: Engine | None = None) -> FastAPI:
    """An application that answers for `engine`, which is its ``state.engine``.

    Args:
        settings: what is let in.
        engine: does the work; None loads the models of the settings in this process when the application starts.
    """
    if engine is None:
        # It loads torch, which a front to other processes does not need.
        from qr_integrations.serving.engine import LocalEngine

        engine = LocalEngine(settings)
    worker = engine

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await worker.start()
        grace = 0.0  # when the application is not ended but broken off
        try:
            yield
            grace = settings.grace
        finally:
            await worker.stop(grace)

    app = FastAPI(
        title="qr-integrations",
        version=__version__,
        openapi_url=SCHEMA_PATH,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.engine = worker
    metrics, counted = Metrics(worker), CountingEngine(worker, log_text=settings.log_text)
    # `ApiKeys` asks for the key; here the schema is told.
    locks = [Depends(HTTPBearer(auto_error=False))] if settings.api_keys else []
    app.include_router(rerank_routes(counted, settings), dependencies=locks)
    app.include_router(chat_routes(counted, settings), dependencies=locks)
    app.include_router(service_routes(counted, metrics), dependencies=locks)
    app.include_router(probe_routes(counted))
    app.include_router(page_routes(settings))
    tell_errors(app)
    _guard(app, settings, metrics)
    return app


def _guard(app: FastAPI, settings: ServerSettings, metrics: Metrics) -> None:
    """From the innermost, which a request meets last."""
    app.add_middleware(Bodies, settings=settings)
    app.add_middleware(ApiKeys, settings=settings)
    app.add_middleware(AllowedHosts, settings=settings)
    app.add_middleware(Watched, metrics=metrics, settings=settings)
    app.add_middleware(SecurityHeaders)
    app.add_middleware(RequestIds)
