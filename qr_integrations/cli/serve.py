"""`qr-integrations serve`: the models over HTTP."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from qr_integrations.errors import InputError
from qr_integrations.serving import ServerSettings

KEYS_VARIABLE = "QR_API_KEYS"
_NOT_SETTINGS = frozenset(
    {"command", "ray", "replicas", "debug", "cache_mib", "cache_disk_mib", "api_keys_file", "normalize"}
)
_MIB = 2**20


def run(args: argparse.Namespace) -> int:
    """Serve until told to stop."""
    settings = settings_of(args)
    if args.replicas != 1 and not args.ray:
        raise InputError("--replicas are for Ray: pass --ray, too")
    from qr_integrations.serving.run import serve, warnings_about

    for warning in warnings_about(settings):
        print(f"warning: {warning}", file=sys.stderr)

    def announce(url: str) -> None:
        names = " and ".join(filter(None, [settings.name, settings.vision_name]))
        print(
            f"serving {names} at {url} (page: /, API: /v1/rerank, /v1/chat/completions, all of it: /openapi.json)",
            flush=True,
        )

    if args.ray:
        from qr_integrations.serving import ray_app

        ray_app.run(settings, replicas=args.replicas, announce=announce)
    else:
        serve(settings, announce=announce)
    return 0


def settings_of(args: argparse.Namespace) -> ServerSettings:
    """What the command line and the environment say.

    Raises:
        InputError: a value is none, or the keys cannot be read.
    """
    given: dict[str, Any] = {name: value for name, value in vars(args).items() if name not in _NOT_SETTINGS}
    if "cache_mib" in args:
        given["cache_bytes"] = args.cache_mib * _MIB
    if "cache_disk_mib" in args:
        given["cache_disk_bytes"] = args.cache_disk_mib * _MIB
    if "normalize" in args:
        given["normalize"] = None if args.normalize == "none" else args.normalize
    from qr_integrations.serving.run import read_settings

    return read_settings({**given, "api_keys": _keys(getattr(args, "api_keys_file", None))})


def _keys(file: str | None) -> list[str]:
    lines = os.environ.get(KEYS_VARIABLE, "").split(",")
    if file is not None:
        try:
            lines += Path(file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the keys in {file} ({error}): pass a text file, a key a line") from error
    keys = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    if file is not None and not keys:
        raise InputError(f"there is no key in {file}: write one a line")
    return keys
