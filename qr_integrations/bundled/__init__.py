"""The small models that ship with the package: weights, cards, and the sample of questions of the demo."""

from pathlib import Path

BUNDLED = frozenset({"qr-mini"})


def bundled_path(name: str) -> Path:
    """The folder of a bundled model."""
    return Path(__file__).parent / name
