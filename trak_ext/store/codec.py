"""Tensors and JSON as the bytes of a safetensors file, always the same bytes, and their digest.

The header is written sorted, its metadata as one JSON text (a library that writes several entries
may put them in any order). That text begins with the digest of all other bytes of the file, so
that no bit of it can change unseen.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..inputs.batches import can_be_cut, tensor_bytes

_DIGITS = 32  # of a digest, in hexadecimal: 128 bits of SHA-256
_KEY = "trak_ext"
_PREFIX = ('{"__metadata__":{"' + _KEY + '":"{\\"digest\\":\\"').encode()

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def can_keep(tensor: Tensor) -> bool:
    """Whether a tensor can be written: dense, with values, of a dtype that safetensors has."""
    return can_be_cut(tensor) and tensor.dtype in _NAMES


def encode(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> tuple[list[Any], str]:
    """Return the bytes of a file in pieces, and their digest.

    Args:
        tensors: By name; "__metadata__" is none.
        metadata: JSON by name, without "digest".

    Raises:
        TypeError: a tensor that safetensors cannot hold.
    """
    for name, tensor in tensors.items():
        if not can_keep(tensor):
            raise TypeError(
                f"{name}: expected a dense tensor of a dtype that safetensors has, got a "
                f"{tensor.layout} tensor of {tensor.dtype}"
            )
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    said = json.dumps(
        {"digest": "0" * _DIGITS, **{key: metadata[key] for key in sorted(metadata)}},
        separators=(",", ":"),
    )
    header: dict[str, Any] = {"__metadata__": {_KEY: said}}
    end = 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    pieces = [len(text).to_bytes(8, "little"), text, *(tensor_bytes(tensors[n]) for n in order)]
    digest = _digest(pieces)
    at = len(_PREFIX)
    pieces[1] = text[:at] + digest.encode() + text[at + _DIGITS :]
    return pieces, digest


def decode(data: bytearray) -> tuple[dict[str, Tensor], dict[str, Any], str, str]:
    """Return tensors that lie in `data`, metadata, the digest that is said and the one that is so.

    Raises:
        ValueError: what `encode` has not written, with the reason. Where the two digests differ,
            nothing else was looked at: tensors and metadata are empty.
    """
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > len(data) - 8 or data[8 : 8 + len(_PREFIX)] != _PREFIX:
        raise ValueError(f"{len(data)} bytes that do not begin as one")
    at = 8 + len(_PREFIX)
    view = memoryview(data)
    said = bytes(data[at : at + _DIGITS])
    found = _digest([view[:at], b"0" * _DIGITS, view[at + _DIGITS :]])
    if said != found.encode():
        return {}, {}, said.decode("latin-1"), found
    header = json.loads(bytes(view[8 : 8 + size]))
    metadata = json.loads(header.pop("__metadata__")[_KEY])
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        dtype = _DTYPES[entry["dtype"]]
        count = (end - begin) // dtype.itemsize
        flat = torch.zeros(0, dtype=dtype, device="cpu")
        if count:
            flat = torch.frombuffer(data, dtype=dtype, count=count, offset=8 + size + begin)
        tensors[name] = flat.reshape(entry["shape"])
    return tensors, metadata, metadata.pop("digest"), found


def _digest(pieces: list[Any]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()[:_DIGITS]
