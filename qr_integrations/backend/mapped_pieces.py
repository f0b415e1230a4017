"""A piece of a prefix as a safetensors file, whose numbers are read where they lie: on a CPU nothing is copied.

Legend: G key/value heads, T tokens, D head width.
"""

import json
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from qr_integrations.backend.pieces import Piece
from qr_integrations.backend.stored import Stored

_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int8: "I8"}
_ALIGNMENT = 64  # bytes: as torch allocates, so that products come out the same to the last bit


def piece_chunks(piece: Piece) -> Iterator[bytes | memoryview]:
    """The bytes of the file, a tensor at a time, so that no second piece is held in memory."""
    tensors = _named(piece)
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    yield struct.pack("<Q", len(text)) + text
    for tensor in tensors.values():
        yield tensor.contiguous().cpu().view(torch.uint8).numpy().reshape(-1).data


def read_piece(path: str | Path, token_ids: Sequence[int], device: torch.device) -> Piece:
    """What was written, as keys and values of `token_ids` from position 0 on; on a CPU in the mapped file.

    Raises:
        OSError, SafetensorError: no such file, or none of this format.
        ValueError: it holds something else, or another number of tokens.
    """
    with safe_open(path, "pt", device=str(device)) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if wrong := [name for name, tensor in tensors.items() if tensor.dim() != 4 or tensor.shape[2] != len(token_ids)]:
        raise ValueError(f"{wrong[0]!r} has the shape {tuple(tensors[wrong[0]].shape)} for {len(token_ids):,} tokens")
    layers = range(sum(name.endswith(".keys") for name in tensors))
    keys, values = ([_stored(tensors, f"{layer}.{kind}") for layer in layers] for kind in ("keys", "values"))
    whole = tuple(stored for stored in keys if stored is not None)
    if not whole or len(whole) < len(keys) or None in values[:-1]:
        raise ValueError("the keys or values of a layer are missing")
    return Piece(tuple(token_ids), 0, whole, tuple(values))


def _named(piece: Piece) -> dict[str, Tensor]:
    """All tensors by name; those of the widest numbers first, so that each is aligned to its own."""
    tensors = {}
    for kind, layers in (("keys", piece.keys), ("values", piece.values)):
        for layer, stored in enumerate(layers):
            if stored is not None:
                tensors[f"{layer}.{kind}"] = stored.steps
                if stored.scale is not None:
                    tensors[f"{layer}.{kind}.scale"] = stored.scale
    return dict(sorted(tensors.items(), key=lambda entry: -entry[1].element_size()))


def _stored(tensors: dict[str, Tensor], name: str) -> Stored | None:
    return Stored(tensors[name], tensors.get(f"{name}.scale")) if name in tensors else None
