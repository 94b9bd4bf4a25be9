"""trak_ext.demo.figure: the picture has the stated size and layout, and bad input is refused."""

from __future__ import annotations

import builtins

import pytest
import torch

from trak_ext.demo.figure import PITCH, ROW, choose_targets
from trak_ext.demo.figure import plot_attributions as plot

image = pytest.importorskip("matplotlib.image")

NUM_TRAIN = 30
BLUE, ORANGE = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)


def make_arguments(rows=3, count=4, *, colour=False, scale=1.0):
    g = torch.Generator().manual_seed(0)
    tail = (8, 8, 3) if colour else (8, 8)
    scores = scale * torch.randn(rows, NUM_TRAIN, generator=g)
    return {
        "test_images": torch.rand(rows, *tail, generator=g),
        "test_labels": torch.randint(10, (rows,), generator=g),
        "train_images": torch.rand(NUM_TRAIN, *tail, generator=g),
        "train_labels": torch.randint(10, (NUM_TRAIN,), generator=g),
        "proponents": scores.topk(count),
        "opponents": scores.topk(count, largest=False),
    }


def draw(path, **arguments):
    plot(path, **arguments)
    pixels = torch.from_numpy(image.imread(path))[..., :3]  # [height, width, 3] in [0, 1]
    return (pixels * 255).round().int()


def count_colour(pixels, colour):
    """Columns [width] with how many pixels have exactly this colour."""
    return (pixels == torch.tensor(colour)).all(-1).sum(0)


def test_picture_shows_proponents_left_and_opponents_right(tmp_path):
    pixels = draw(tmp_path / "a.png", **make_arguments())
    height, width = pixels.shape[:2]
    assert width > height > 3 * ROW * 200
    assert (pixels.float().mean(-1) < 128).float().mean() > 0.1  # images, not a blank page
    blue, orange = (count_colour(pixels, c).nonzero()[:, 0] for c in (BLUE, ORANGE))
    assert blue.max() < orange.min()
    assert blue.max() - blue.min() == pytest.approx(orange.max() - orange.min(), abs=3)


def test_size_grows_by_a_row_for_a_test_image_and_by_a_pitch_for_a_rank(tmp_path):
    small = draw(tmp_path / "a.png", **make_arguments(2, 3), dpi=100).shape
    tall = draw(tmp_path / "b.png", **make_arguments(5, 3), dpi=100).shape
    wide = draw(tmp_path / "c.png", **make_arguments(2, 5), dpi=100).shape
    assert tall[0] - small[0] == pytest.approx(3 * ROW * 100, abs=2)
    assert tall[1] == small[1]
    assert wide[1] - small[1] == pytest.approx(2 * 2 * PITCH * 100, abs=2)
    assert wide[0] == small[0]


def test_the_images_of_the_given_indices_are_drawn(tmp_path):
    arguments = make_arguments(1, 1)
    before = draw(tmp_path / "a.png", **arguments)
    chosen = int(arguments["proponents"][1][0, 0])
    arguments["train_images"][chosen] = 1 - arguments["train_images"][chosen]
    after = draw(tmp_path / "b.png", **arguments)
    changed = (before != after).any(-1).any(0).nonzero()[:, 0]
    blue = count_colour(before, BLUE).nonzero()[:, 0]
    assert len(changed) > 100
    assert blue.min() < changed.min()
    assert changed.max() < blue.max()


def test_a_wrong_prediction_is_marked_and_a_right_one_is_not(tmp_path):
    arguments = make_arguments(1, 2)
    truth = arguments["test_labels"]
    right = draw(tmp_path / "a.png", **arguments, test_predictions=truth)
    wrong = draw(tmp_path / "b.png", **arguments, test_predictions=(truth + 1) % 10)
    first_panel = int(count_colour(right, BLUE).nonzero()[0])
    assert count_colour(right, ORANGE)[:first_panel].sum() == 0
    assert count_colour(wrong, ORANGE)[:first_panel].sum() > 20


@pytest.mark.parametrize("count", [0, 1])
def test_colour_images_names_and_few_ranks(tmp_path, count):
    arguments = make_arguments(2, count, colour=True)
    arguments |= {"class_names": [f"a long name {i}" for i in range(10)]}
    arguments |= {"test_predictions": arguments["test_labels"] + 0}
    named = draw(tmp_path / "a.png", **arguments)
    plain = draw(tmp_path / "b.png", **(arguments | {"class_names": None}))
    assert named.shape[0] > plain.shape[0]  # names take a line of their own
    assert named.shape[1] == plain.shape[1]


def test_pyplot_is_left_alone_and_other_endings_work(tmp_path):
    import sys

    had_pyplot = "matplotlib.pyplot" in sys.modules
    plot(tmp_path / "a.pdf", **make_arguments(1, 1))
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
    assert ("matplotlib.pyplot" in sys.modules) == had_pyplot


def test_chosen_targets_are_two_wrong_ones_then_one_a_class():
    labels = torch.tensor([3, 3, 1, 1, 0, 2, 2])
    predictions = torch.tensor([3, 3, 9, 1, 9, 9, 2])  # 2, 4 and 5 are wrong
    assert choose_targets(labels, predictions, 4).tolist() == [2, 4, 6, 0]
    assert choose_targets(labels, predictions, 1).tolist() == [2]
    assert choose_targets(labels, count=4).tolist() == [4, 2, 5, 0]
    assert sorted(choose_targets(labels, predictions, 99).tolist()) == list(range(7))
    assert choose_targets(labels[:0], None, 3).tolist() == []


def test_choice_refuses_what_does_not_fit():
    with pytest.raises(
        ValueError, match=r"predictions: expected one per label = \[3\], got .*\[2\]"
    ):
        choose_targets(torch.zeros(3), torch.zeros(2))
    with pytest.raises(ValueError, match="count: expected an integer of at least 0, got -1"):
        choose_targets(torch.zeros(3), count=-1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test_images": torch.rand(3, 64)}, r"test_images: expected shape .*got \[3, 64\]"),
        ({"train_images": torch.rand(30, 8, 8, 4)}, r"train_images: expected shape .*8, 8, 4\]"),
        ({"train_images": torch.ones(30, 8, 8).byte()}, "train_images: expected a floating.*uint8"),
        ({"test_images": torch.rand(0, 8, 8)}, "test_images: expected at least one image"),
        (
            {"test_labels": torch.zeros(2)},
            r"test_labels: expected one per image = \[3\], got .*\[2\]",
        ),
        (
            {"train_labels": torch.zeros(2)},
            r"train_labels: expected one per image = \[30\], got .*\[2\]",
        ),
        ({"test_predictions": torch.zeros(4)}, r"test_predictions: expected one per image = \[3\]"),
        (
            {"proponents": (torch.zeros(3, 2), torch.zeros(3, 1))},
            r"proponents: expected values and indices of one shape \[3, p\], got \[3, 2\] and",
        ),
        (
            {"opponents": (torch.zeros(3, 1), torch.full((3, 1), 30))},
            r"opponents: expected indices in 0\.\.29, got 30\.\.30",
        ),
    ],
)
def test_bad_arguments_are_refused_and_nothing_is_written(tmp_path, change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        plot(tmp_path / "a.png", **(make_arguments() | change))
    assert list(tmp_path.iterdir()) == []


def test_a_missing_matplotlib_is_named_with_the_extra(tmp_path, monkeypatch):
    real_import = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(f"No module named {name!r}")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"expected matplotlib.*trak-ext\[demo\]"):
        plot(tmp_path / "a.png", **make_arguments())
