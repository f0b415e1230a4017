"""When memory runs out: an error that says what to pass, and giving back what the allocator keeps."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from qr_integrations.errors import MemoryLimitError

_CPU_MESSAGE = "can't allocate memory"  # torch raises a plain RuntimeError there


@contextmanager
def memory_advice(num_tokens: int, name: str) -> Iterator[None]:
    """Turn a pass that did not fit into an error with the cure."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and _CPU_MESSAGE not in str(error):
            raise
        raise MemoryLimitError(
            f"out of memory while {name!r} read {num_tokens} tokens: pass fewer documents, max_context_tokens=... or "
            "max_doc_tokens=..., or load with dtype='bfloat16'"
        ) from error


def free_memory() -> None:
    """Give back what the device's allocator keeps for later."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
