"""Speak carefully: what a model's middle layers believe corrects what its last one says."""

from qr_integrations.decoding.deco import DeCo
from qr_integrations.decoding.dola import DoLa
from qr_integrations.decoding.probe import LayerProbe, probe_layers
from qr_integrations.decoding.record import DeCoRecord, DeCoStep, DoLaRecord, DoLaStep

__all__ = ["DeCo", "DeCoRecord", "DeCoStep", "DoLa", "DoLaRecord", "DoLaStep", "LayerProbe", "probe_layers"]
