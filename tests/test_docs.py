"""Documentation that runs: the README's python blocks in order, and every docstring example."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def modules() -> list[str]:
    import qr_integrations

    found = pkgutil.walk_packages(qr_integrations.__path__, "qr_integrations.")
    return [module.name for module in found if not module.name.endswith("__main__")]


def test_readme_blocks_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(BLOCKS) >= 3
    names: dict[str, object] = {}
    for number, block in enumerate(BLOCKS, start=1):
        code = compile(block, f"README.md, python block {number}", "exec")
        exec(code, names)


def test_docstring_examples() -> None:
    attempted = 0
    for name in modules():
        result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
        assert not result.failed, f"{name}: {result.failed} of {result.attempted} examples"
        attempted += result.attempted
    assert attempted >= 4
