"""trak_ext.report.Item: what a picture becomes, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from trak_ext.report import Item
from trak_ext.report.pictures import MAX_SIDE


@pytest.mark.parametrize(
    ("image", "shape"),
    [
        (torch.rand(5, 7), [5, 7, 1]),
        (torch.rand(1, 5, 7), [5, 7, 1]),
        (torch.rand(3, 5, 7).double(), [5, 7, 3]),
        (torch.randint(256, (4, 5, 7), dtype=torch.uint8), [5, 7, 4]),
        (Image.new("L", (7, 5)), [5, 7, 1]),
        (Image.new("1", (7, 5)), [5, 7, 1]),
        (Image.new("RGB", (7, 5)), [5, 7, 3]),
        (Image.new("P", (7, 5)), [5, 7, 3]),
        (Image.new("RGBA", (7, 5)), [5, 7, 4]),
        (Image.new("LA", (7, 5)), [5, 7, 4]),
    ],
)
def test_pictures_become_bytes_with_channels_last(image, shape):
    pixels = Item(image).image
    assert pixels.dtype == torch.uint8
    assert list(pixels.shape) == shape
    assert pixels.is_contiguous()


def test_intensities_are_rounded_to_255_steps():
    image = torch.tensor([[0.0, 1.0, 0.5, 100 / 255, -1e-4, 1 + 1e-4]])
    assert Item(image).image.flatten().tolist() == [0, 255, 128, 100, 0, 255]
    colour = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(2, 2, 3))
    assert Item(colour).image.flatten().tolist() == list(range(12))


def test_large_pictures_are_scaled_down_and_small_ones_kept():
    wide = torch.zeros(3, 100, 800)
    wide[:, :, 400:] = 1.0
    pixels = Item(wide).image
    assert list(pixels.shape) == [round(100 * MAX_SIDE / 800), MAX_SIDE, 3]
    assert pixels[:, : MAX_SIDE // 2 - 2].max() == 0
    assert pixels[:, MAX_SIDE // 2 + 2 :].min() == 255
    assert list(Item(torch.zeros(MAX_SIDE, 9)).image.shape) == [MAX_SIDE, 9, 1]
    assert list(Item(torch.zeros(2000, 1)).image.shape) == [MAX_SIDE, 1, 1]


def test_labels_and_ids_may_be_numbers_of_any_kind():
    item = Item(label=torch.tensor(3), prediction=np.int64(4), id=np.array([7]), caption="c")
    assert (item.label, item.prediction, item.id) == (3, 4, 7)
    assert all(type(value) is int for value in (item.label, item.prediction, item.id))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"image": torch.rand(2, 5, 7)}, ValueError, r"image: expected shape .* got \[2, 5, 7\]"),
        ({"image": torch.rand(5)}, ValueError, r"image: expected shape .* got \[5\]"),
        ({"image": torch.rand(3, 0, 7)}, ValueError, r"image: expected shape .* got \[3, 0, 7\]"),
        ({"image": torch.ones(5, 7).int()}, ValueError, "image: expected floating .*int32"),
        ({"image": torch.rand(5, 7) + 1}, ValueError, r"image: expected intensities in \[0, 1\]"),
        ({"image": torch.full((5, 7), torch.nan)}, ValueError, "expected intensities .* got nan"),
        ({"image": np.zeros((5, 7))}, TypeError, "image: expected a tensor or a PIL image, got"),
        ({"image": Image.new("I", (2, 2))}, ValueError, "image: expected 8 bits .* mode I"),
        ({"text": 3}, TypeError, "text: expected a string, got 3"),
        ({"caption": b"c"}, TypeError, "caption: expected a string, got a bytes"),
        ({"label": torch.zeros(2)}, TypeError, "label: expected a string or a number, got a torch"),
        ({"id": [1]}, TypeError, "id: expected a string or a number, got a list"),
        (
            {"text": "abc", "highlight": (1, 4)},
            ValueError,
            "highlight: .* got 1, 4 for a text of 3",
        ),
        ({"highlight": (0, 0)}, ValueError, "highlight: .* for no text"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        Item(**arguments)
