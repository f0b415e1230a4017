"""A Ray of our own on this machine, without dashboard, statistics and chatter, or the cluster of ``RAY_ADDRESS``."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qr_integrations.errors import InputError

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # as Ray will do; it warns otherwise
    "RAY_DEDUP_LOGS": "0",
    "RAY_worker_niceness": "0",  # Ray's 15 lets everything else on the machine go first
}


def start_ray(num_cpus: float, *, object_store: int, **options: Any) -> bool:
    """Join the cluster of ``RAY_ADDRESS``, or start a Ray that takes so much on; True: it is this process's own.

    Args:
        num_cpus: that its workers ask for; there may be fewer.
        object_store: bytes of memory for what goes from process to process.
        options: of ``ray.init``.

    Raises:
        InputError: it cannot be started, or the cluster cannot be reached.
    """
    import ray

    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    is_ours = not os.environ.get("RAY_ADDRESS")
    if is_ours:
        options |= {
            "address": "local",
            "include_dashboard": False,
            "num_cpus": max(os.cpu_count() or 1, math.ceil(num_cpus)),
            "object_store_memory": object_store,
            "_node_ip_address": "127.0.0.1",
        }
    try:
        with _silence():
            ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InputError(f"Ray cannot be started ({error}): check RAY_ADDRESS, and RAY_AUTH_TOKEN") from error
    return is_ours


@contextmanager
def _silence() -> Iterator[None]:
    """Standard error goes nowhere: Ray's part in C++ tells there how it was told to be quiet."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
