"""Speak carefully: what a model's middle layers believe corrects what its last one says."""

from qr_integrations.decoding.deco import DeCo

__all__ = ["DeCo"]
