"""What the command line of `qr-integrations serve` takes; nothing heavy is imported here."""

import argparse
from typing import Any

_NOTES = """\
Clients of Cohere, Jina (/v1/rerank, /v2/rerank), text-embeddings-inference (/rerank) and OpenAI (/v1/chat/completions)
work by base URL; the schema is at /openapi.json, counters are at /metrics. Keys that let clients in come from the
environment, QR_API_KEYS=KEY,KEY, or from --api-keys-file, never from the command line. The log is JSON on standard
error. SIGTERM and Ctrl-C let running requests finish. Exit codes: 0 told to stop, 2 error.
"""
_LIMITS = (
    ("--max-context-tokens", "longest prompt; longer lists are ranked in several (default: the model's window)"),
    ("--max-batch", "queries over the same documents that go through the model together (default: 16)"),
    ("--max-body-bytes", "of a request (default: 32 MiB)"),
    ("--max-documents", "of a request (default: 1000)"),
    ("--max-request-tokens", "of all documents of a request (default: 500000)"),
    ("--max-new-tokens", "longest answer that may be asked for (default: 4096)"),
    ("--default-new-tokens", "longest answer where the request does not say (default: 256)"),
    ("--max-pictures", "of a conversation (default: 8)"),
    ("--max-picture-bytes", "of each (default: 20 MiB)"),
    ("--max-picture-pixels", "of each (default: 25 million)"),
)


def add_serve(commands: Any) -> argparse.ArgumentParser:
    """Adds the command; what is left out is as `ServerSettings` has it."""
    serve: argparse.ArgumentParser = commands.add_parser(
        "serve",
        help="serve models over HTTP to existing clients",
        description="Rank and answer over HTTP, for clients of Cohere, Jina, text-embeddings-inference and OpenAI.",
        epilog=_NOTES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    _add_models(serve)
    _add_access(serve)
    _add_amounts(serve)
    serve.add_argument("--ray", action="store_true", default=False, help="replicas on a Ray cluster do the work")
    serve.add_argument("--replicas", type=int, default=1, metavar="N", help="with --ray: how many (default: 1)")
    serve.add_argument("--debug", action="store_true", default=False, help="show the traceback of an error")
    return serve


def _add_models(serve: argparse.ArgumentParser) -> None:
    serve.add_argument(
        "--model", default="qr-mini", help="a bundled name, a folder, or a hub id (default: qr-mini, bundled)"
    )
    serve.add_argument("--vision-model", metavar="MODEL", help="a second one, for chats with pictures: qr-mini-vl")
    serve.add_argument("--model-id", metavar="NAME", help="what clients call the first (default: its name)")
    serve.add_argument("--vision-model-id", metavar="NAME", help="what clients call the second (default: its name)")
    serve.add_argument("--device", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    serve.add_argument("--dtype", help="auto, float32, bfloat16, float16 (default: auto)")
    serve.add_argument("--device-map", metavar="MAP", help="auto: over several GPUs")
    serve.add_argument("--heads", help='auto, all, a JSON file, or layer-head pairs from 0: "1-3,2-5" (default: auto)')
    serve.add_argument("--icr", dest="method", action="store_const", const="icr", help="ICR: all heads")
    serve.add_argument(
        "--layout", choices=["joint", "block"], help="block finds a known document in any list (default: joint)"
    )
    serve.add_argument(
        "--normalize",
        choices=["share", "sigmoid", "none"],
        help="scale of scores: share of the list (default), or attention as it is",
    )
    serve.add_argument(
        "--truncation", choices=["error", "head", "chunk"], help="of documents that do not fit (default: head)"
    )


def _add_access(serve: argparse.ArgumentParser) -> None:
    serve.add_argument("--host", help="address to listen at (default: 127.0.0.1, this machine only; 0.0.0.0: all)")
    serve.add_argument("--port", type=int, metavar="N", help="0: any that is free (default: 8000)")
    serve.add_argument("--api-keys-file", metavar="FILE", help="a key a line; besides those of QR_API_KEYS")
    serve.add_argument(
        "--allowed-host",
        dest="allowed_hosts",
        action="append",
        metavar="NAME",
        help="a name of the server besides localhost, or *: any (default: none while --host is this machine, else *)",
    )
    serve.add_argument("--allow-urls", action="store_true", help="fetch pictures from public http(s) addresses")
    serve.add_argument("--log-text", action="store_true", help="write what is asked into the log, too")


def _add_amounts(serve: argparse.ArgumentParser) -> None:
    serve.add_argument("--cache-mib", type=int, metavar="N", help="memory for documents read before (default: 1024)")
    serve.add_argument("--cache-folder", metavar="FOLDER", help="where they go when that is full (default: nowhere)")
    serve.add_argument("--cache-disk-mib", type=int, metavar="N", help="of the files there (default: no limit)")
    serve.add_argument(
        "--cache-dtype",
        choices=["auto", "float32", "float16", "bfloat16", "int8"],
        help="how they are kept (default: as the model computes them)",
    )
    serve.add_argument("--queue-size", type=int, metavar="N", help="requests that wait for a model (default: 64)")
    serve.add_argument("--deadline", type=float, metavar="S", help="seconds that a request has (default: 120)")
    serve.add_argument("--grace", type=float, metavar="S", help="seconds to finish when told to stop (default: 30)")
    serve.add_argument("--picture-timeout", type=float, metavar="S", help="seconds to fetch one (default: 10)")
    for name, told in _LIMITS:
        serve.add_argument(name, type=int, metavar="N", help=told)
