"""The model that a command line asks for."""

import argparse
import sys
from typing import Any

from qr_integrations.backend import Backend
from qr_integrations.backend.loading import hide_progress_bars


def load(args: argparse.Namespace, **more: Any) -> Backend:
    """Load it; progress bars of the weights are for people who wait at a terminal."""
    if not sys.stderr.isatty():
        hide_progress_bars()
    return Backend.load(
        args.model, device=args.device, dtype=args.dtype, trust_remote_code=args.trust_remote_code, **more
    )
