"""The table of architectures, printed at the end of a run that measured them."""

from typing import Any

import pytest

TABLE = pytest.StashKey[list[Any]]()


@pytest.fixture(scope="session")
def architecture_table(request: pytest.FixtureRequest) -> list[Any]:
    """Measured rows, shown at the end of the run."""
    return request.config.stash.setdefault(TABLE, [])


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    measured = config.stash.get(TABLE, [])
    if measured:
        from tests.backend.measure import as_text

        terminalreporter.section("largest difference from eager attention")
        terminalreporter.write_line(as_text(measured))
