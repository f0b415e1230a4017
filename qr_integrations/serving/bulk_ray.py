"""Ray Data as the engine of bulk work: workers on this machine, or on the cluster that ``RAY_ADDRESS`` names."""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from qr_integrations.errors import InputError, ModelError
from qr_integrations.serving.bulk_inputs import Shard
from qr_integrations.serving.bulk_workers import ShardReport, ShardWorker
from qr_integrations.serving.ray_start import start_ray

_STORE = 128 * 2**20  # bytes; shards and reports are small, lists never pass through it
_MOST_BLOCKS = 1000  # of Ray Data, each some shards one after the other: making a block takes milliseconds
_MOST_FAILURES = 10  # shards that fail before the rest is given up


@dataclass(frozen=True, slots=True)
class Workers:
    """How many actors work, and what each may use.

    Attributes:
        replicas: how many; each loads the model.
        threads: CPU cores of each. None: one, or, of a single worker on this machine, all.
        num_gpus: GPUs of each, such as 0.5; None: one if the device is a GPU, or "auto" where there are any.
        memory: bytes of main memory of each: Ray starts no more workers than fit, and no limit is enforced. None: not
            counted.
    """

    replicas: int = 1
    threads: int | None = None
    num_gpus: float | None = None
    memory: int | None = None

    def __post_init__(self) -> None:
        if self.replicas < 1 or (self.threads is not None and self.threads < 1):
            raise InputError("replicas and threads count from 1: pass at least 1")
        if (self.num_gpus is not None and self.num_gpus < 0) or (self.memory is not None and self.memory < 1):
            raise InputError("num_gpus and memory cannot be negative: pass numbers above 0, or leave them out")


ONE_WORKER = Workers()


@contextmanager
def ray_started(workers: Workers) -> Iterator[None]:
    """A Ray of our own, without dashboard, statistics and chatter, or the cluster of ``RAY_ADDRESS``; let go of after.

    Raises:
        InputError: there is a Ray in this process already, or the cluster cannot be reached.
    """
    import ray

    if ray.is_initialized():
        raise InputError("Ray runs in this process already: call ray.shutdown() first")
    asked = workers.replicas * (workers.threads or 1)
    start_ray(asked, object_store=_STORE, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


def work_through(
    shards: Sequence[Shard], workers: Workers, device: str, worker_arguments: Sequence[Any]
) -> Iterator[ShardReport]:
    """Let workers do shards; tells of each when it is done or a little later, in any order. Needs `ray_started`.

    Args:
        shards: those to be done.
        workers: how many, and what each may use.
        device: of the model, which decides about GPUs.
        worker_arguments: of `ShardWorker`.

    Raises:
        ModelError: no shard can be worked on, such as without the model, or more than a few failed; at the end, that
            any did.
    """
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    rows = [asdict(shard) for shard in shards]
    done = ray.data.from_items(rows, override_num_blocks=min(len(rows), _MOST_BLOCKS)).map_batches(
        ShardWorker,
        batch_size=1,
        fn_constructor_args=worker_arguments,
        compute=ray.data.ActorPoolStrategy(size=min(workers.replicas, len(rows)), max_tasks_in_flight_per_actor=2),
        **_resources(workers, device),
    )
    failures: list[str] = []
    for row in done.iter_rows():
        report = ShardReport(**{name: getattr(value, "item", lambda v=value: v)() for name, value in row.items()})
        if report.refused:
            raise ModelError(report.refused)
        failures += [report.failed] if report.failed else []
        if len(failures) > _MOST_FAILURES:
            break
        yield report
    if failures:
        raise ModelError(f"{len(failures)} shards failed; {failures[0]}. Start again: what is finished stays")


def _resources(workers: Workers, device: str) -> dict[str, Any]:
    """What Ray sets aside for each worker; it also tells torch how many threads to use.

    Raises:
        InputError: there is less on this machine; Ray would wait for more.
    """
    import ray

    local = not os.environ.get("RAY_ADDRESS")
    there = ray.cluster_resources()
    gpus = workers.num_gpus
    if gpus is None:
        gpus = 1.0 if device.startswith("cuda") or (device == "auto" and there.get("GPU", 0) > 0) else 0.0
    threads = workers.threads or (os.cpu_count() or 1 if local and workers.replicas == 1 else 1)
    wanted: dict[str, Any] = {"num_cpus": threads, "num_gpus": gpus, "memory": workers.memory or 0}
    for (name, each), kind in zip(wanted.items(), ("CPU", "GPU", "memory"), strict=True):
        if local and each * workers.replicas > (found := there.get(kind, 0)):
            raise InputError(
                f"{workers.replicas} workers with {name}={each:g} are too many, there is {found:g}: pass less"
            )
    return {name: value for name, value in wanted.items() if value}
