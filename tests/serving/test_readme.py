"""The README's examples of clients run against a real server."""

import gc
import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
# The examples leave their clients open, as most programs do.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore:unclosed")
BLOCKS = re.findall(r"^```py\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_examples_of_clients_run(number: int, server_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    block = BLOCKS[number].replace("http://127.0.0.1:8000", server_url)
    assert server_url in block
    names: dict[str, object] = {}
    exec(compile(block, f"README.md, client {number + 1}", "exec"), names)
    names.clear()
    gc.collect()  # what is left open is said here, not in another test
    assert capsys.readouterr().out.strip()


def test_there_are_such_examples() -> None:
    assert len(BLOCKS) >= 2
