"""The table of architectures, printed at the end of a run that measured them."""

from collections.abc import Iterator
from typing import Any

import pytest

TABLE = pytest.StashKey[list[Any]]()


@pytest.fixture(scope="session")
def architecture_table(request: pytest.FixtureRequest) -> list[Any]:
    """Measured rows, shown at the end of the run."""
    return request.config.stash.setdefault(TABLE, [])


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """The models are tiny: more threads only wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    measured = config.stash.get(TABLE, [])
    if measured:
        from tests.backend.measure import as_text

        terminalreporter.section("largest difference from eager attention")
        terminalreporter.write_line(as_text(measured))
