"""Torch's random numbers, which are the process's, whatever the number of models."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from qr_integrations.backend.interruptions import held

_drawn = threading.RLock()


@contextmanager
def drawing() -> Iterator[None]:
    """Nobody else draws meanwhile. Taken before a model is held, so that who waits here keeps no model waiting."""
    with held(_drawn):
        yield


@contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Random numbers from a seed, and the caller's own afterwards."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
