"""trak_ext.report.pictures: PNG files that another reader takes for the same pixels."""

from __future__ import annotations

import base64
import io

import pytest
import torch
from PIL import Image

from trak_ext.report.pictures import encode_png, png_data_uri


def decode(data):
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        pixels = torch.tensor(list(image.tobytes()), dtype=torch.uint8)
        return pixels.view(image.height, image.width, -1), image.mode


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
@pytest.mark.parametrize("size", [(1, 1), (8, 8), (5, 33), (40, 2)])
def test_random_pixels_come_back(size, channels, mode):
    pixels = torch.randint(256, (*size, channels), dtype=torch.uint8)
    read, read_mode = decode(encode_png(pixels))
    assert read_mode == mode
    assert torch.equal(read, pixels)


def test_smooth_pictures_come_back_and_are_filtered():
    ramp = (torch.arange(96)[:, None] + 2 * torch.arange(96)).remainder(256).to(torch.uint8)
    for pixels in (ramp[..., None], ramp.T[..., None].contiguous()):
        data = encode_png(pixels)
        assert torch.equal(decode(data)[0], pixels)
        assert len(data) < 500  # unfiltered it takes several thousand


def test_data_uri_holds_the_file():
    pixels = torch.zeros(8, 8, 1, dtype=torch.uint8)
    kind, data = png_data_uri(pixels).split(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(data) == encode_png(pixels)
