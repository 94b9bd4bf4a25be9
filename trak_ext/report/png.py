"""Pictures as PNG files in memory, by zlib alone, so that a report needs no imaging library."""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np
from torch import Tensor

_COLOUR_TYPES = {1: 0, 3: 2, 4: 6}  # channels: grey, RGB, RGBA in the PNG specification


def encode_png(pixels: Tensor) -> bytes:
    """Return a PNG file of uint8 pixels [H, W, channels], channels being 1, 3 or 4.

    Rows are filtered in one way for the whole picture, whichever of the specification's None, Sub
    and Up (section 9.2) gives the smallest file.
    """
    height, width, channels = pixels.shape
    rows = pixels.numpy()
    left = np.zeros_like(rows)
    left[:, 1:] = rows[:, :-1]
    above = np.zeros_like(rows)
    above[1:] = rows[:-1]
    packed = []
    for kind, predicted in enumerate((np.zeros_like(rows), left, above)):
        filtered = (rows - predicted).reshape(height, width * channels)  # modulo 256, as it should
        lines = np.concatenate([np.full((height, 1), kind, np.uint8), filtered], 1)
        packed.append(zlib.compress(lines.tobytes(), 9))
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOUR_TYPES[channels], 0, 0, 0)
    smallest = min(packed, key=len)
    chunks = [_chunk(b"IHDR", header), _chunk(b"IDAT", smallest), _chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def png_data_uri(pixels: Tensor) -> str:
    """Return the PNG as the address that an HTML page can hold."""
    return "data:image/png;base64," + base64.b64encode(encode_png(pixels)).decode()


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
