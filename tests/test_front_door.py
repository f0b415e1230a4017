"""The front door: sorted names, resolved when first used, and everything behind it is really shipped."""

import inspect
import socket
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from jaxtyping import TypeCheckError

import qr_integrations
from qr_integrations import errors

PACKAGE = Path(qr_integrations.__file__).parent
TREE = Path(__file__).parents[1] / "qr_integrations"

NAMES = [
    "Answer",
    "Backend",
    "CDPruner",
    "ChatMemory",
    "DeCo",
    "Document",
    "DocumentCache",
    "DocumentIndex",
    "HeadDetector",
    "HeadSet",
    "ICRReranker",
    "JudgedList",
    "MQTEncoder",
    "Message",
    "PromptLayout",
    "QRCrossEncoder",
    "QRHeadReranker",
    "Ranking",
    "Refinements",
    "ScoredDocument",
    "Span",
    "SparseVLM",
    "ViCrop",
    "highlight_html",
]
HEAVY = ["torch", "transformers", "numpy", "rich", "langchain_core", "llama_index"]


def test_the_public_names_are_these() -> None:
    assert qr_integrations.__all__ == NAMES


def test_all_is_sorted_and_equals_the_export_table() -> None:
    assert list(qr_integrations.__all__) == sorted(qr_integrations._EXPORTS)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_what_its_module_exports(name: str) -> None:
    home = import_module(qr_integrations._EXPORTS[name])
    assert getattr(qr_integrations, name) is getattr(home, name)
    assert name in getattr(home, "__all__", [name])


@pytest.mark.parametrize("name", NAMES)
def test_a_public_class_has_a_docstring(name: str) -> None:
    assert inspect.getdoc(getattr(qr_integrations, name))


def test_dir_lists_the_names_before_they_are_used(in_fresh_python: Any) -> None:
    listed = in_fresh_python("import qr_integrations; print(*dir(qr_integrations))").split()
    assert set(NAMES) | {"__version__"} <= set(listed)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"qr_integrations.*Rerankerr"):
        qr_integrations.Rerankerr  # noqa: B018
    assert not hasattr(qr_integrations, "__wrapped__")


def test_the_version_is_that_of_the_project() -> None:
    project = tomllib.loads((TREE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert qr_integrations.__version__ == project["version"]


@pytest.mark.parametrize("module", ["qr_integrations", "qr_integrations.errors", "qr_integrations.types"])
def test_importing_it_loads_nothing_heavy(in_fresh_python: Any, module: str) -> None:
    loaded = in_fresh_python(f"import sys, {module}; print(*[m for m in {HEAVY} if m in sys.modules])")
    assert loaded == "", f"import {module} also loads {loaded}"


def test_import_star_resolves_every_name(in_fresh_python: Any) -> None:
    assert in_fresh_python(f"from qr_integrations import *; print(*[n for n in {NAMES} if n not in globals()])") == ""


def test_every_error_is_a_qr_error_and_stands_in_the_drawn_tree() -> None:
    classes = {name: cls for name, cls in vars(errors).items() if inspect.isclass(cls) and not name.startswith("_")}
    drawn = errors.__doc__ or ""
    for name, cls in classes.items():
        assert issubclass(cls, errors.QRError), name
        assert cls.__doc__, name
        assert name in drawn, f"{name} is missing in the tree at the top of errors.py"


def test_bad_arguments_are_value_errors_and_a_missing_extra_names_its_cure() -> None:
    assert issubclass(errors.InputError, ValueError)
    assert issubclass(errors.ModelError, RuntimeError)
    assert "pip install 'qr-integrations[langchain]'" in str(errors.MissingExtra("QRRerank", "langchain"))


def test_every_file_of_the_tree_is_installed() -> None:
    files = [p.relative_to(TREE) for p in TREE.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    missing = sorted(str(p) for p in files if not (PACKAGE / p).is_file())
    assert not missing, f"not in {PACKAGE}: {missing}"
    assert (PACKAGE / "py.typed").is_file()


def test_annotations_are_checked_in_this_run() -> None:
    # jaxtyping's import hook is on (see addopts in pyproject.toml): a wrong type or shape fails where it is passed.
    with pytest.raises(TypeCheckError):
        qr_integrations.Document(text=3)


def test_tests_cannot_reach_another_machine(network_attempts: list[str]) -> None:
    # 192.0.2.0/24 is set aside for documentation: nothing answers there, even where the guard is off.
    with socket.socket() as s, pytest.raises(RuntimeError, match=r"192\.0\.2\.1"):
        s.connect(("192.0.2.1", 80))
    with pytest.raises(RuntimeError, match=r"example\.invalid"):
        socket.getaddrinfo("example.invalid", 443)
    assert network_attempts == ["192.0.2.1", "example.invalid"]
    network_attempts.clear()


def test_tests_may_talk_to_themselves() -> None:
    with socket.socket() as server, socket.socket() as client:
        server.bind(("127.0.0.1", 0))
        server.listen()
        client.connect(server.getsockname())
