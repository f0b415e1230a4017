"""What the command line of `qr-integrations layers` takes; nothing heavy is imported here."""

import argparse
from typing import Any

_NOTES = """\
Layer 0 are the embeddings, layer l is the output of the l-th layer, as vision_feature_layer of transformers counts.
Candidates are for training: a projector that was trained on one layer cannot read another. Pictures are the files of
FOLDER by name. Exit codes: 0 done, 2 error, 130 interrupted.
"""


def add_layers(commands: Any) -> argparse.ArgumentParser:
    """Adds the command, all but what every command knows about the model."""
    layers: argparse.ArgumentParser = commands.add_parser(
        "layers",
        help="compare the layers of a vision tower",
        description="How alike the layers of a vision tower see pictures, which form groups, and one out of each.",
        epilog=_NOTES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    layers.add_argument("--images", metavar="FOLDER", help="with pictures; 64 to 256 are enough for most towers")
    layers.add_argument("--example", action="store_true", help="compare on 64 drawn pictures")
    layers.add_argument("--limit", type=int, metavar="N", help="the first N pictures only, or N drawn ones")
    layers.add_argument("--groups", type=int, default=3, metavar="N", help="how many groups (default: 3)")
    layers.add_argument(
        "--rule",
        choices=["novelty", "adjacent"],
        default="novelty",
        help="where groups are cut: where the layers of both sides are alike among themselves (default), or where two "
        "neighbours are least alike",
    )
    layers.add_argument(
        "--compare",
        choices=["tokens", "mean", "flat"],
        default="tokens",
        help="states of each token (default), their means, or all states of a picture as one vector",
    )
    layers.add_argument(
        "--tokens", choices=["patches", "all"], default="patches", help="without class tokens (default), or with them"
    )
    layers.add_argument("--out", metavar="FILE", help="a heat map, for instance map.png")
    layers.add_argument("--json", action="store_true", help="one JSON object, with the whole matrix")
    return layers
