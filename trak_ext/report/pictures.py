"""Pictures as pixels and as PNG files in memory, by zlib alone: no imaging library is needed."""

from __future__ import annotations

import base64
import struct
import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _check

MAX_SIDE = 192  # pixels; a longer side is scaled down to it, so that a page stays small
_ROUNDING = 1e-3  # how far an intensity may lie outside [0, 1]
_PIL_MODES = {"1": "L", "L": "L", "RGBA": "RGBA", "LA": "RGBA", "PA": "RGBA"} | dict.fromkeys(
    ("RGB", "P", "CMYK", "YCbCr", "HSV", "LAB"), "RGB"
)
_COLOUR_TYPES = {1: 0, 3: 2, 4: 6}  # channels: grey, RGB, RGBA in the PNG specification


def pixels_of(image: Any) -> Tensor:
    """Return uint8 pixels [H, W, C], C = 1, 3 or 4, of a tensor or a PIL image.

    Raises:
        TypeError, ValueError: what is neither, or of another shape, range or number of bits.
    """
    if hasattr(image, "convert") and hasattr(image, "mode"):
        return _scaled_down(_pil_pixels(image))
    _check.instance("image", image, Tensor, "a tensor or a PIL image")
    planes = image.detach().cpu()
    planes = planes[None] if planes.dim() == 2 else planes
    if planes.dim() != 3 or planes.shape[0] not in _COLOUR_TYPES or planes.numel() == 0:
        raise ValueError(
            f"image: expected shape [H, W] or [C, H, W] with C = 1, 3 or 4, got {list(image.shape)}"
        )
    if planes.dtype != torch.uint8:
        if not planes.is_floating_point():
            raise ValueError(
                f"image: expected floating point in [0, 1] or uint8, got {planes.dtype}"
            )
        planes = planes.float()
        low, high = planes.aminmax()
        if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):  # NaN is refused as well
            raise ValueError(
                f"image: expected intensities in [0, 1], got {float(low):.4g} to {float(high):.4g}"
            )
        planes = (planes.clamp(0, 1) * 255).round().to(torch.uint8)
    return _scaled_down(planes.permute(1, 2, 0))


def _pil_pixels(image: Any) -> Tensor:
    mode = _PIL_MODES.get(image.mode)
    if mode == "RGB" and "transparency" in image.info:
        mode = "RGBA"
    if mode is None:
        raise ValueError(f"image: expected 8 bits a channel, got a PIL image of mode {image.mode}")
    pixels = torch.from_numpy(np.array(image.convert(mode)))
    if pixels.numel() == 0:
        raise ValueError(f"image: expected a picture, got one of size {list(image.size)}")
    return pixels[:, :, None] if pixels.dim() == 2 else pixels


def _scaled_down(pixels: Tensor) -> Tensor:
    longest = max(pixels.shape[:2])
    if longest > MAX_SIDE:
        size = [max(1, round(side * MAX_SIDE / longest)) for side in pixels.shape[:2]]
        planes = torch.nn.functional.interpolate(
            pixels.permute(2, 0, 1)[None].float(), size=size, mode="bilinear", antialias=True
        )
        pixels = planes[0].round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
    return pixels.contiguous()


def encode_png(pixels: Tensor) -> bytes:
    """Return a PNG file of uint8 pixels [H, W, C].

    Rows are filtered in one way for the whole picture, whichever of the specification's None, Sub
    and Up (section 9.2) gives the smallest file.
    """
    height, width, channels = pixels.shape
    rows = pixels.numpy()
    left, above = np.zeros_like(rows), np.zeros_like(rows)
    left[:, 1:], above[1:] = rows[:, :-1], rows[:-1]
    packed = []
    for kind, predicted in enumerate((np.zeros_like(rows), left, above)):
        filtered = (rows - predicted).reshape(height, width * channels)  # modulo 256, as it should
        lines = np.concatenate([np.full((height, 1), kind, np.uint8), filtered], 1)
        packed.append(zlib.compress(lines.tobytes(), 9))
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOUR_TYPES[channels], 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", min(packed, key=len)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def png_data_uri(pixels: Tensor) -> str:
    """Return the PNG as the address that an HTML page can hold."""
    return "data:image/png;base64," + base64.b64encode(encode_png(pixels)).decode()
