"""The server on Ray: the models in as many processes as wanted, on this machine or on many.

With one command on this machine: `run`. On a cluster: ``serve run qr_integrations.serving.ray_app:app model=qr-mini``,
or a RayService whose ``import_path`` is ``qr_integrations.serving.ray_app:app``.
"""

import asyncio
import logging
import math
import os
import platform
import random
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI
from pydantic import Field, SecretStr

from qr_integrations.errors import InputError, MissingExtra, ModelError, QRError
from qr_integrations.serving.app import create_app
from qr_integrations.serving.ray_start import start_ray
from qr_integrations.serving.run import serve as serve_http
from qr_integrations.serving.settings import ServerSettings
from qr_integrations.serving.work import ChatWork, Ranked, RankWork, Said

try:
    import ray
    from ray import serve
    from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter
    from ray.serve.request_router import PendingRequest, RunningReplica

    from qr_integrations.serving.ray_engine import RayEngine, Told, start_failure
except ImportError as error:  # Ray, or what its Serve needs, or a version that has these
    raise MissingExtra("qr_integrations.serving.ray_app", "ray") from error

NAME = "qr-integrations"  # of the application in its cluster
Replicas = int | tuple[int, int]
_QUIET = {"log_level": "WARNING", "enable_access_log": False}
_OBJECT_STORE = 2**29  # bytes, for requests and answers on their way
_BUSY = 4  # requests at a time, from which on a replica should have company
_FRONT = "Front"


class ClusterSettings(ServerSettings):
    """`ServerSettings` for a cluster, with how much of it is used.

    Attributes:
        host, port: Ray's proxies listen, wherever they are told to; every name is let in, unless `allowed_hosts` are
            given.
        replicas: processes that hold the models; two numbers are the fewest and the most, between which the load
            decides.
        fronts: processes that speak HTTP.
        num_cpus, num_gpus: of each replica, see `run`.
    """

    host: str = "0.0.0.0"
    replicas: Replicas = 1
    fronts: int = Field(default=1, ge=1)
    num_cpus: float = Field(default=1.0, gt=0.0)
    num_gpus: float | None = Field(default=None, ge=0.0)


class DocumentsRouter(ConsistentHashRouter):
    """Requests about the same documents go to the same replica, or the next one while it is full.

    All others go to the one of two that has less to do, the two being drawn by chance.
    """

    queue_len_response_deadline_s = 0.5  # a replica that computes on all cores answers late, Ray's 0.1 is too short

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Groups of replicas to be tried one after the other; the least busy of a group gets the request."""
        if pending_request is None or pending_request.metadata.session_id:
            return await super().choose_replicas(candidate_replicas, pending_request)
        pending_request.routing_context.should_backoff = True
        return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]


class ModelReplica:
    """The models of the settings in a process of its own; `RayEngine` calls it.

    Errors of the package are returned: Ray would log whatever is raised as a fault of the server.

    Raises:
        QRError: the models cannot be loaded.
    """

    async def __init__(self, settings: ServerSettings) -> None:  # type: ignore[misc]  # Ray awaits it
        from qr_integrations.serving.engine import LocalEngine

        self.engine = LocalEngine(settings)
        await self.engine.start()
        while self.engine.state == "loading":
            await asyncio.sleep(0.05)
        if self.engine.failure is not None:
            raise self.engine.failure

    def check_health(self) -> None:
        """Ray replaces the replica when this raises."""
        if self.engine.state == "failed":
            raise ModelError("the models cannot be used: see the replica's log")

    async def tell(self) -> Told:
        """What it has and what it has done."""
        return Told(f"{platform.node()}:{os.getpid()}", await self.engine.models(), self.engine.stats())

    async def rank(self, work: RankWork) -> Ranked | QRError:
        """See `Engine`."""
        try:
            return await self.engine.rank(work)
        except QRError as error:
            return error

    async def chat(self, work: ChatWork) -> Said | QRError:
        """See `Engine`."""
        try:
            return await self.engine.chat(work)
        except QRError as error:
            return error

    async def stream(self, work: ChatWork) -> AsyncIterator[str | Said | QRError]:
        """See `Engine`."""
        pieces: Any = self.engine.stream(work)
        try:
            async with aclosing(pieces):
                async for piece in pieces:
                    yield piece
        except QRError as error:
            yield error

    async def __del__(self) -> None:
        if hasattr(self, "engine"):
            await self.engine.stop(0.0)  # Ray has waited for what had begun


def run(
    settings: ServerSettings,
    *,
    replicas: Replicas = 1,
    num_cpus: float | None = None,
    num_gpus: float | None = None,
    announce: Callable[[str], None] | None = None,
) -> None:
    """Serve until the process is told to stop (SIGTERM or SIGINT): HTTP in this process, models in replicas.

    Ray is started on this machine, unless ``RAY_ADDRESS`` names a cluster that this machine belongs to. It listens on
    ports of its own, which ask for the token in ``~/.ray/auth_token``.

    Args:
        settings: what is served, and where.
        replicas: processes that hold the models; two numbers are the fewest and the most, between which the load
            decides.
        num_cpus: cores of each; None: an even share of this machine's, or one where the models are on GPUs.
        num_gpus: GPUs of each; None: one, or an even share where there are fewer, or none where there are none. A model
            over several GPUs needs their number here and ``device_map="auto"`` in the settings.
        announce: called with the address as soon as there is work to be had.

    Raises:
        ModelError: no replica can be started.
        InputError: the address cannot be listened at, or `replicas` is not positive.
    """
    if _most(replicas) < 1:
        raise InputError(f"replicas={replicas}: pass 1 or more")
    asked = _most(replicas) * (num_cpus or 1)
    is_ours = not ray.is_initialized() and start_ray(asked, object_store=_OBJECT_STORE, logging_level="WARNING")
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        serve.start(proxy_location="Disabled", logging_config=_QUIET)
        models = _models(settings, replicas, num_cpus, num_gpus)
        try:
            handle = serve.run(models, name=NAME, route_prefix=None, logging_config=_QUIET)
        except RuntimeError:
            deployments = serve.status().applications[NAME].deployments.values()
            raise start_failure("\n".join(one.message for one in deployments)) from None
        serve_http(settings, engine=RayEngine(handle, settings), announce=announce)
    finally:
        if is_ours:
            serve.shutdown()
            ray.shutdown()
        else:
            serve.delete(NAME)


def app(args: ClusterSettings) -> Any:
    """The application as Ray Serve runs it on a cluster, from the arguments of its configuration.

    API keys are read where HTTP is spoken, from the environment variable ``QR_API_KEYS``, separated by commas.
    """
    models = _models(args, args.replicas, args.num_cpus, args.num_gpus)
    front = serve.ingress(_front_of(args))()
    options: dict[str, Any] = {"num_replicas": args.fronts, "max_ongoing_requests": 100 * args.queue_size}
    options |= {"ray_actor_options": {"num_cpus": 0}, "graceful_shutdown_timeout_s": args.grace}
    deployment: Any = serve.deployment(front, name=_FRONT, **options)
    return deployment.bind(models)


def _front_of(settings: ServerSettings) -> Callable[[], FastAPI]:
    def build() -> FastAPI:
        given = os.environ.get("QR_API_KEYS", "").split(",")
        keys = [*settings.api_keys, *(SecretStr(key.strip()) for key in given if key.strip())]
        told = settings.model_copy(update={"api_keys": tuple(keys)})
        handle = serve.get_deployment_handle(ModelReplica.__name__, serve.get_replica_context().app_name)
        return create_app(told, RayEngine(handle, told))

    return build


def _models(settings: ServerSettings, replicas: Replicas, num_cpus: float | None, num_gpus: float | None) -> Any:
    """The replicas as part of an application, not yet deployed."""
    most = _most(replicas)
    gpus = _gpus_of_each(settings, most) if num_gpus is None else num_gpus
    cpus = num_cpus or (1 if gpus else max(1, _cores() // most))
    options: dict[str, Any] = {"num_replicas": replicas}
    if not isinstance(replicas, int):
        few, many = replicas
        scaling = {"min_replicas": few, "max_replicas": many, "target_ongoing_requests": _BUSY}
        options = {"autoscaling_config": scaling}
    deployment: Any = serve.deployment(
        ModelReplica,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        max_ongoing_requests=max(2, min(settings.queue_size, 2 * settings.max_batch)),  # below what it can queue itself
        max_queued_requests=settings.queue_size,
        graceful_shutdown_timeout_s=settings.grace,
        health_check_period_s=2.0,
        max_constructor_retry_count=2,
        request_router_config={"request_router_class": DocumentsRouter, "max_backoff_s": 0.1},
        **options,
    )
    return deployment.bind(settings.model_copy(update={"api_keys": ()}))


def _gpus_of_each(settings: ServerSettings, most: int) -> float:
    if settings.device != "auto" and not settings.device.startswith("cuda"):
        return 0.0
    there = ray.cluster_resources().get("GPU", 0.0) if ray.is_initialized() else 0.0
    return min(1.0, math.floor(1000 * there / most) / 1000)


def _most(replicas: Replicas) -> int:
    return replicas if isinstance(replicas, int) else replicas[1]


def _cores() -> int:
    return os.cpu_count() or 1
