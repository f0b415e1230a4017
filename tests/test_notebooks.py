"""The notebooks run on what ships with the package, and their stored outputs are what they give.

`python tests/test_notebooks.py notebooks/*.ipynb` runs them and stores their outputs anew.
"""

import os
import re
import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LIMIT_BYTES = 600_000
SECONDS_PER_CELL = 600  # a guard against hanging, not a promise
WITHOUT_MARKED_TEXT = {"04_look_again", "06_fewer_tokens", "07_which_layers"}  # they mark places in pictures
NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:\.\d+)?(?![\w])")
PATH = re.compile(r"(?<![\w.:/<*])/(?:[\w.-]+/)+[\w.-]+|\b[A-Za-z]:\\\w")
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


class ThisInterpreter(AsyncKernelManager):
    """Whatever kernels are installed: the interpreter that runs the tests runs the notebooks."""

    @property
    def kernel_spec(self) -> KernelSpec:
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=ERROR"]
        return KernelSpec(argv=argv, display_name="Python 3", language="python")


class Output(NamedTuple):
    """What one cell shows, of one kind."""

    cell: int
    kind: str  # stdout, stderr, or a MIME type
    content: str


def environment() -> dict[str, str]:
    """For the kernel: the package that the tests see, which is the tree's or the installed one."""
    import qr_integrations

    known = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    known.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait crawl on a busy machine
    house = Path(qr_integrations.__file__).parents[1]
    if (house / "pyproject.toml").is_file():
        known["PYTHONPATH"] = os.pathsep.join(filter(None, [str(house), known.get("PYTHONPATH")]))
    return known


def execute(path: Path) -> Any:
    """The notebook with the outputs of a fresh kernel.

    Raises:
        CellExecutionError: a cell failed.
    """
    notebook = deepcopy(read(path))
    client = NotebookClient(
        notebook,
        kernel_manager_class=ThisInterpreter,
        timeout=SECONDS_PER_CELL,
        resources={"metadata": {"path": str(path.parent)}},
        record_timing=False,
        coalesce_streams=True,
    )
    client.execute(env=environment())
    return notebook


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def outputs(notebook: Any) -> list[Output]:
    """What a notebook shows, by cell and kind; what a cell shows of one kind is one text."""
    found: dict[tuple[int, str], str] = {}
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", ()):
            shown = {output.name: output.text} if output.output_type == "stream" else output.get("data", {})
            for kind, content in shown.items():
                found[number, kind] = found.get((number, kind), "") + content
    return [Output(*where, content) for where, content in sorted(found.items())]


def texts(notebook: Any) -> Iterator[Output]:
    """What can be compared: pictures depend on fonts, and stderr on the machine."""
    return (output for output in outputs(notebook) if output.kind in ("stdout", "text/plain", "text/html"))


def close(stored: str, fresh: str) -> bool:
    """Equal but for white space and one unit in the last place of decimal numbers, as another machine may round."""
    if NUMBER.sub("#", stored).split() != NUMBER.sub("#", fresh).split():
        return False
    for one, other in zip(NUMBER.findall(stored), NUMBER.findall(fresh), strict=True):
        places = len(one.partition(".")[2])
        if abs(float(one) - float(other)) > (1.01 * 10**-places if places else 0):
            return False
    return True


@pytest.fixture(scope="module", params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request: pytest.FixtureRequest) -> tuple[Path, Any, Any]:
    """Path, as stored, as it comes out now."""
    path: Path = request.param
    return path, read(path), execute(path)


def test_all_notebooks_are_here() -> None:
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05", "06", "07", "08"]


def test_it_shows_a_picture_and_marked_text(notebook: tuple[Path, Any, Any]) -> None:
    path, *versions = notebook
    for version in versions:
        shown = outputs(version)
        assert any(output.kind == "image/png" for output in shown)
        marked = any(output.kind == "text/html" and "<mark" in output.content for output in shown)
        assert marked is (path.stem not in WITHOUT_MARKED_TEXT)


def test_stored_outputs_are_what_comes_out(notebook: tuple[Path, Any, Any]) -> None:
    _, stored, fresh = notebook
    for one, other in zip(texts(stored), texts(fresh), strict=True):
        assert one[:2] == other[:2]
        assert close(one.content, other.content), f"cell {one.cell}: stored\n{one.content}\nnow\n{other.content}"


def test_nothing_is_warned_about(notebook: tuple[Path, Any, Any]) -> None:
    _, stored, fresh = notebook
    assert not [output for output in outputs(stored) if output.kind == "stderr"]
    assert not [output for output in outputs(fresh) if output.kind == "stderr" and "Warning" in output.content]


def test_it_is_stored_clean(notebook: tuple[Path, Any, Any]) -> None:
    path, stored, _ = notebook
    nbformat.validate(stored)
    assert path.stat().st_size < LIMIT_BYTES
    assert stored.metadata == METADATA
    code = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not any(cell.metadata for cell in stored.cells)
    assert all(max(map(len, cell.source.splitlines())) <= 120 for cell in stored.cells)
    for output in outputs(stored):
        assert output.kind == "image/png" or not PATH.search(output.content), f"a path in cell {output.cell}"


def test_comparing_sees_what_differs() -> None:
    assert close("MRR 0.951 of 40", "MRR 0.952 of 40") and close("  0.000", " -0.001")
    assert not close("MRR 0.951 of 40", "MRR 0.953 of 40")
    assert not close("rank 2", "rank 3") and not close("a 0.1", "b 0.1") and not close("0.1", "0.1 0.2")


def test_paths_are_seen() -> None:
    assert PATH.search("File /home/me/model.py") and PATH.search(r"C:\Users\me")
    assert not PATH.search("<p><b>either/or</b></p> https://example.org/a/b 40° N / 30° W")


def store(path: Path) -> None:
    """Run a notebook and keep its outputs, without what is of this machine or this day."""
    fresh = execute(path)
    fresh.metadata = nbformat.from_dict(METADATA)
    for number, cell in enumerate(fresh.cells):
        cell.id, cell.metadata = f"cell-{number:02}", nbformat.from_dict({})
        if cell.cell_type == "code":
            shown = [output for output in cell.outputs if output.get("name") != "stderr"]
            cell.outputs = [nbformat.from_dict({**o, "metadata": {}}) if "metadata" in o else o for o in shown]
    nbformat.write(fresh, path)


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        store(path)
