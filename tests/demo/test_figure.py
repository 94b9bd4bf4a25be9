"""trak_ext.demo.figure: the picture has the stated size and layout, and bad input is refused."""

from __future__ import annotations

import builtins

import pytest
import torch

from trak_ext import report
from trak_ext.demo.figure import PITCH, ROW, choose_targets
from trak_ext.demo.figure import plot_attributions as plot

image = pytest.importorskip("matplotlib.image")

NUM_TRAIN = 30
BLUE, ORANGE = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)


def make_attributions(rows=3, count=4, *, colour=False, name=str, wrong=False, change=None):
    """Random pictures of digits with scores; `change` gives a training sample another picture."""
    g = torch.Generator().manual_seed(0)
    shape = (3, 8, 8) if colour else (8, 8)
    scores = torch.randn(rows, NUM_TRAIN, generator=g)
    labels = torch.randint(10, (rows,), generator=g).tolist()
    pictures = torch.rand(NUM_TRAIN, *shape, generator=g)
    if change is not None:
        pictures[change] = 1 - pictures[change]
    return report.Attributions(
        [
            report.Item(
                torch.rand(shape, generator=g), label=name(label),
                prediction=name((label + wrong) % 10),
            )
            for label in labels
        ],
        tuple(scores.topk(count)),
        tuple(scores.topk(count, largest=False)),
        [report.Item(picture, label=name(i % 10)) for i, picture in enumerate(pictures)],
    )  # fmt: skip


def draw(path, attributions, **arguments):
    plot(path, attributions, **arguments)
    pixels = torch.from_numpy(image.imread(path))[..., :3]  # [height, width, 3] in [0, 1]
    return (pixels * 255).round().int()


def count_colour(pixels, colour):
    """Columns [width] with how many pixels have exactly this colour."""
    return (pixels == torch.tensor(colour)).all(-1).sum(0)


def test_picture_shows_proponents_left_and_opponents_right(tmp_path):
    pixels = draw(tmp_path / "a.png", make_attributions())
    height, width = pixels.shape[:2]
    assert width > height > 3 * ROW * 200
    assert (pixels.float().mean(-1) < 128).float().mean() > 0.1  # images, not a blank page
    blue, orange = (count_colour(pixels, c).nonzero()[:, 0] for c in (BLUE, ORANGE))
    assert blue.max() < orange.min()
    assert blue.max() - blue.min() == pytest.approx(orange.max() - orange.min(), abs=3)


def test_size_grows_by_a_row_for_a_test_image_and_by_a_pitch_for_a_rank(tmp_path):
    small = draw(tmp_path / "a.png", make_attributions(2, 3), dpi=100).shape
    tall = draw(tmp_path / "b.png", make_attributions(5, 3), dpi=100).shape
    wide = draw(tmp_path / "c.png", make_attributions(2, 5), dpi=100).shape
    assert tall[0] - small[0] == pytest.approx(3 * ROW * 100, abs=2)
    assert tall[1] == small[1]
    assert wide[1] - small[1] == pytest.approx(2 * 2 * PITCH * 100, abs=2)
    assert wide[0] == small[0]


def test_the_images_of_the_given_indices_are_drawn(tmp_path):
    before = draw(tmp_path / "a.png", make_attributions(1, 1))
    chosen = int(make_attributions(1, 1).proponents.indices[0, 0])
    after = draw(tmp_path / "b.png", make_attributions(1, 1, change=chosen))
    changed = (before != after).any(-1).any(0).nonzero()[:, 0]
    blue = count_colour(before, BLUE).nonzero()[:, 0]
    assert len(changed) > 100
    assert blue.min() < changed.min()
    assert changed.max() < blue.max()


def test_a_wrong_prediction_is_marked_and_a_right_one_is_not(tmp_path):
    right = draw(tmp_path / "a.png", make_attributions(1, 2))
    wrong = draw(tmp_path / "b.png", make_attributions(1, 2, wrong=True))
    first_panel = int(count_colour(right, BLUE).nonzero()[0])
    assert count_colour(right, ORANGE)[:first_panel].sum() == 0
    assert count_colour(wrong, ORANGE)[:first_panel].sum() > 20


@pytest.mark.parametrize("count", [0, 1])
def test_colour_images_names_and_few_ranks(tmp_path, count):
    named = make_attributions(2, count, colour=True, name=lambda i: f"a long $name {i}")
    named = draw(tmp_path / "a.png", named)
    plain = draw(tmp_path / "b.png", make_attributions(2, count, colour=True))
    assert named.shape[0] > plain.shape[0]  # names take a line of their own
    assert named.shape[1] == plain.shape[1]


def test_pyplot_is_left_alone_and_other_endings_work(tmp_path):
    import sys

    had_pyplot = "matplotlib.pyplot" in sys.modules
    plot(tmp_path / "a.pdf", make_attributions(1, 1))
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


def test_rows_are_the_first_targets(tmp_path):
    few = draw(tmp_path / "a.png", make_attributions(5), rows=2)
    assert few.shape[0] < draw(tmp_path / "b.png", make_attributions(5)).shape[0]
    assert few.shape == draw(tmp_path / "c.png", make_attributions(2)).shape


def test_bad_arguments_are_refused_and_nothing_is_written(tmp_path):
    without = report.Attributions(
        [report.Item(label=1)], (torch.ones(1, 1), torch.zeros(1, 1).long()), None, [report.Item()]
    )
    for attributions, rows, message in (
        ("a", 1, "attributions: expected a trak_ext.report.Attributions, got 'a'"),
        (without, 1, "attributions: expected items with pictures, got one without"),
        (make_attributions(), 0, "rows: expected an integer of at least 1, got 0"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            plot(tmp_path / "a.png", attributions, rows=rows)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_matplotlib_is_named_with_the_extra(tmp_path, monkeypatch):
    real_import = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(f"No module named {name!r}")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"expected matplotlib.*trak-ext\[demo\]"):
        plot(tmp_path / "a.png", make_attributions())
