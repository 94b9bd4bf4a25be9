"""What a sample looks like to a reader: a picture, text, a label, a caption."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _check

MAX_SIDE = 192  # pixels; a longer side is scaled down to it, so that a page stays small
_ROUNDING = 1e-3  # how far an intensity may lie outside [0, 1]


@dataclass(frozen=True, eq=False)
class Item:
    """A training sample or target as a report shows it. Everything is optional.

    Args:
        image: Tensor [H, W] or [C, H, W] with C = 1, 3 or 4, floating point in [0, 1] or uint8; or
            a PIL image. Kept as uint8 [H, W, C], scaled down to 192 pixels on its longer side.
        text: Shown as it is, line breaks included.
        label: The true class or value.
        prediction: What the model said; for a target.
        caption: A line that goes with the picture or the text.
        id: The data set's name for the sample; None for its position.
        highlight: (start, stop) of the characters of `text` to mark, a token for example.

    Raises:
        TypeError, ValueError: an argument that is not of this kind.
    """

    image: Any = None
    text: str | None = None
    label: str | float | None = None
    prediction: str | float | None = None
    caption: str | None = None
    id: str | int | None = None
    highlight: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name in ("text", "caption"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise TypeError(f"{name}: expected a string or None, got {_check.describe(value)}")
        for name in ("label", "prediction", "id"):
            object.__setattr__(self, name, _plain(name, getattr(self, name)))
        if self.image is not None:
            object.__setattr__(self, "image", _pixels(self.image))
        if self.highlight is not None:
            start, stop = self.highlight
            if self.text is None or not 0 <= start <= stop <= len(self.text):
                length = "no text" if self.text is None else f"a text of {len(self.text)}"
                raise ValueError(
                    f"highlight: expected (start, stop) within the text, got {start}, {stop} "
                    f"for {length}"
                )
            object.__setattr__(self, "highlight", (int(start), int(stop)))


def _plain(name: str, value: Any) -> str | int | float | bool | None:
    """Return a label or an id as a plain Python value; tensors of one number are welcome."""
    single = value.numel() if isinstance(value, Tensor) else getattr(value, "size", None)
    if single == 1 and hasattr(value, "item"):
        value = value.item()
    if value is None or isinstance(value, (str, int, float)):
        return value
    raise TypeError(f"{name}: expected a string or a number, got {_check.describe(value)}")


def _pixels(image: Any) -> Tensor:
    """Return uint8 pixels [H, W, C] of a tensor or a PIL image."""
    if hasattr(image, "convert") and hasattr(image, "mode"):
        return _scaled_down(_pil_pixels(image))
    if not isinstance(image, Tensor):
        raise TypeError(f"image: expected a tensor or a PIL image, got {_check.describe(image)}")
    shape = list(image.shape)
    planes = image.detach().cpu()
    planes = planes[None] if planes.dim() == 2 else planes
    if planes.dim() != 3 or planes.shape[0] not in (1, 3, 4) or planes.numel() == 0:
        raise ValueError(
            f"image: expected shape [H, W] or [C, H, W] with C = 1, 3 or 4, got {shape}"
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
    if image.mode in ("1", "L"):
        image = image.convert("L")
    elif image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
    elif image.mode in ("RGB", "P", "CMYK", "YCbCr", "HSV", "LAB"):
        image = image.convert("RGB")
    else:
        raise ValueError(f"image: expected 8 bits a channel, got a PIL image of mode {image.mode}")
    pixels = torch.from_numpy(np.array(image))
    if pixels.numel() == 0:
        raise ValueError(f"image: expected a picture, got one of size {list(image.size)}")
    return pixels[:, :, None] if pixels.dim() == 2 else pixels


def _scaled_down(pixels: Tensor) -> Tensor:
    height, width = pixels.shape[:2]
    longest = max(height, width)
    if longest > MAX_SIDE:
        size = [max(1, round(side * MAX_SIDE / longest)) for side in (height, width)]
        planes = pixels.permute(2, 0, 1)[None].float()
        planes = torch.nn.functional.interpolate(
            planes, size=size, mode="bilinear", antialias=True, align_corners=False
        )
        pixels = planes[0].round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
    return pixels.contiguous()
