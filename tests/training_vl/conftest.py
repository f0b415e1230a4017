"""The recipes are no part of the installed package: they are taken from the repository."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "training"


@pytest.fixture(scope="session", autouse=True)
def training_package() -> None:
    """Makes ``import training`` work wherever the tests are started, without a change of the search path."""
    if "training" not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            "training", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
        )
        assert spec and spec.loader
        sys.modules["training"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["training"])


@pytest.fixture(scope="session")
def lists() -> list[Any]:
    """Real questions, each with its passage and three others."""
    from qr_integrations.bundled import read_detection_lists

    return [replace(judged, documents=judged.documents[:4]) for judged in read_detection_lists()[:4]]
