"""A picture of attributions: test images beside their top proponents and opponents.

matplotlib is imported where it is used and comes with ``pip install trak-ext[demo]``.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _check
from ..report.page import Scale

__all__ = ["choose_targets", "plot_attributions", "require_matplotlib"]

# Okabe and Ito's palette: told apart with any colour vision, and in grey by lightness.
PROPONENT_COLOUR = "#0072B2"
OPPONENT_COLOUR = "#D55E00"
TEXT_COLOUR = "#222222"
MUTED_COLOUR = "#595959"

# The page in inches. Seven rows of five and five are 9 inches wide, so that the smallest text is
# 12 pixels high on a screen that gives the picture 900.
CELL = 0.62  # side of an image
PITCH = 0.74  # from one image to the next in a row
ROW = 0.96  # from one row to the next: the image and one line below it
LINE = 0.16  # a second line below it, where class names need one
GAP = 0.36  # between groups
TEST_GAP = 0.62  # after the test image, whose caption is wider than it
GROUP = 2.0  # the least width of a group, so that its heading fits
MARGIN = 0.24
TITLE, HEADER, FOOTER = 0.46, 0.64, 0.36
PAD = 0.1  # of a group's tinted panel around its images
SMALL, NORMAL, LARGE = 8.5, 10.5, 14  # points
LONGEST_NAME = 11  # characters of a class name that fit below an image


def require_matplotlib() -> None:
    """Raise an ImportError that names the extra where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "attributions.png: expected matplotlib, which `pip install trak-ext[demo]` brings, "
            f"got {error}"
        ) from error


def choose_targets(labels: Tensor, predictions: Tensor | None = None, count: int = 7) -> Tensor:
    """Pick test samples worth a look: up to two wrong ones, then the classes in turn.

    Args:
        labels: true classes [t], integer.
        predictions: predicted classes [t]; None means that nothing is known to be wrong.
        count: how many to pick; fewer come back if there are fewer samples.

    Returns:
        Indices [min(count, t)], int64: first the misclassified, then correct ones of classes not
        shown yet, lowest index first within a class.

    Raises:
        ValueError: predictions of another length than labels, or a negative count.
    """
    count = _check.integer("count", count, 0)
    predictions = labels if predictions is None else predictions
    _check.shape_is("predictions", predictions, tuple(labels.shape), "one per label")
    wrong = (predictions != labels).nonzero()[:, 0].tolist()
    right = (predictions == labels).nonzero()[:, 0].tolist()
    chosen = wrong[: min(2, count)]
    times = Counter(int(labels[i]) for i in chosen)
    in_turn = []
    for i in right + wrong[2:]:
        label = int(labels[i])
        in_turn.append((times[label], label, i))
        times[label] += 1
    chosen += [i for *_, i in sorted(in_turn)[: count - len(chosen)]]
    return torch.tensor(chosen, dtype=torch.int64, device="cpu")


def plot_attributions(
    path: str | os.PathLike[str],
    test_images: Tensor,
    test_labels: Tensor,
    train_images: Tensor,
    train_labels: Tensor,
    proponents: tuple[Tensor, Tensor],
    opponents: tuple[Tensor, Tensor],
    *,
    test_predictions: Tensor | None = None,
    class_names: Sequence[str] | None = None,
    title: str = "Which training images made the model say this?",
    cmap: str = "gray_r",
    dpi: int = 200,
) -> None:
    """Draw a row for each test image: itself, its top proponents and its top opponents.

    Under each training image stand its label and its score; a label other than the test image's
    is bold, since those are the surprising ones. The file's type follows the path's ending.

    Args:
        path: where to write the picture; its folder must exist.
        test_images: [t, H, W] grey or [t, H, W, 3] colour, intensities in [0, 1]; t at least 1.
        test_labels: true classes [t], integer.
        train_images: [n, H, W] or [n, H, W, 3].
        train_labels: [n], integer.
        proponents: (values [t, p], indices [t, p]) with the highest scores, best first, as
            `trak_ext.top_k` returns them; indices into the n training images.
        opponents: the same with the lowest scores, most negative first (`largest=False`).
        test_predictions: predicted classes [t]; marks each test image as right or wrong.
        class_names: a name for each class; None writes the number.
        title: above everything.
        cmap: matplotlib's name for the colours of grey images; "gray_r" draws dark ink on white,
            "gray" suits photographs.
        dpi: pixels per inch; 7 rows of 5 + 5 are 1,848 x 1,636 pixels at 200.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: shapes that do not fit, no test image, or an index outside the n images.
    """
    if len(test_images) == 0:
        raise ValueError("test_images: expected at least one image, got none")
    _check_images("test_images", test_images, {"test_labels": test_labels})
    _check_images("train_images", train_images, {"train_labels": train_labels})
    if test_predictions is not None:
        _check_images("test_images", test_images, {"test_predictions": test_predictions})
    for name, ranked in (("proponents", proponents), ("opponents", opponents)):
        _check_ranked(name, ranked, len(test_images), len(train_images))
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    def name_of(label: Tensor) -> str:
        name = class_names[int(label)] if class_names is not None else str(int(label))
        return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"

    scores = [float(v.abs().max()) for v, _ in (proponents, opponents) if v.numel()]
    scale = Scale.of(max(scores, default=0.0))
    groups = (
        (proponents, "Proponents", "raise the true label's score", PROPONENT_COLOUR),
        (opponents, "Opponents", "lower the true label's score", OPPONENT_COLOUR),
    )
    # Numbers share a line with the score; names get a line of their own.
    long_names = max(map(len, class_names or "0")) > 3
    second_line = LINE if long_names else 0.0
    row_height = ROW + second_line
    widths = [max(GROUP, (v.shape[1] - 1) * PITCH + CELL) for (v, _), *_ in groups]
    lefts = [MARGIN + CELL + TEST_GAP]
    lefts.append(lefts[0] + widths[0] + GAP)
    width = lefts[1] + widths[1] + MARGIN
    height = TITLE + HEADER + row_height * len(test_images) + FOOTER

    # A Figure of its own with its own canvas: pyplot's global state and backend stay untouched.
    figure = Figure(figsize=(width, height), dpi=dpi, facecolor="white")
    FigureCanvasAgg(figure)

    def write(x: float, y: float, text: str, size: float, **style: Any) -> None:
        """Write text at x, y inches from the top left corner."""
        figure.text(
            x / width, 1 - y / height, text, fontsize=size, **{"color": TEXT_COLOUR} | style
        )

    def draw(x: float, y: float, image: Tensor, colour: str) -> None:
        axes = figure.add_axes((x / width, 1 - (y + CELL) / height, CELL / width, CELL / height))
        axes.imshow(image.detach().cpu().float().clamp(0, 1).numpy(), cmap=cmap, vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(edgecolor=colour, linewidth=1.3)

    def beside(x: float, y: float, text: str, colour: str) -> None:
        """Write at the right end of a caption, or below it where names take its line."""
        at, align = (x, "left") if long_names else (x + CELL, "right")
        write(at, y + second_line, text, SMALL, color=colour, ha=align)

    write(MARGIN, 0.32, title, LARGE, weight="bold")
    top, bottom = TITLE + HEADER, height - FOOTER
    write(MARGIN, TITLE + 0.24, "Test image", NORMAL, weight="bold")
    if test_predictions is not None:
        write(MARGIN, TITLE + 0.44, "✓ if predicted", SMALL, color=MUTED_COLOUR)
    for (_, heading, note, colour), x, wide in zip(groups, lefts, widths, strict=True):
        write(x, TITLE + 0.24, heading, NORMAL + 1, weight="bold", color=colour)
        write(x, TITLE + 0.44, note, SMALL, color=MUTED_COLOUR)
        corner = ((x - PAD) / width, 1 - bottom / height)
        size = ((wide + 2 * PAD) / width, (bottom - TITLE) / height)
        panel = Rectangle(
            corner, *size, transform=figure.transFigure, facecolor=colour, alpha=0.08, zorder=-1
        )
        figure.add_artist(panel)
    for row, truth in enumerate(test_labels):
        y = top + row * row_height
        below = y + CELL + 0.17
        draw(MARGIN, y, test_images[row], TEXT_COLOUR)
        verdict, colour = name_of(truth), TEXT_COLOUR
        if test_predictions is not None:
            right = bool(test_predictions[row] == truth)
            verdict += " ✓" if right else " ✗"
            if not right:
                colour = OPPONENT_COLOUR
                beside(MARGIN + 0.3, below, f"model: {name_of(test_predictions[row])}", colour)
        write(MARGIN, below, verdict, NORMAL, weight="bold", color=colour)
        for ((values, indices), _, _, colour), left in zip(groups, lefts, strict=True):
            for place, (value, index) in enumerate(zip(values[row], indices[row], strict=True)):
                x, label = left + place * PITCH, train_labels[index]
                draw(x, y, train_images[index], colour)
                weight = "normal" if label == truth else "bold"
                write(x, below, name_of(label), NORMAL, weight=weight)
                beside(x, below, scale.text(float(value)), colour)
    unit = f", in units of {scale.unit}" if scale.unit else ""
    note = f"Under each training image: its label (bold where it differs) and its score{unit}"
    write(MARGIN, height - 0.13, note, SMALL, color=MUTED_COLOUR)
    figure.savefig(path, dpi=dpi)


def _check_images(name: str, images: Tensor, labels: dict[str, Tensor]) -> None:
    if images.ndim != 3 and not (images.ndim == 4 and images.shape[3] == 3):
        raise ValueError(
            f"{name}: expected shape [count, H, W] or [count, H, W, 3], got {list(images.shape)}"
        )
    _check.tensor(name, images, images.ndim)
    for key, value in labels.items():
        _check.shape_is(key, value, (len(images),), "one per image")


def _check_ranked(name: str, ranked: tuple[Tensor, Tensor], num_test: int, num_train: int) -> None:
    values, indices = ranked
    if values.ndim != 2 or len(values) != num_test or indices.shape != values.shape:
        raise ValueError(
            f"{name}: expected values and indices of one shape [{num_test}, p], got "
            f"{list(values.shape)} and {list(indices.shape)}"
        )
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < num_train:
        raise ValueError(
            f"{name}: expected indices in 0..{num_train - 1}, got {int(indices.min())}.."
            f"{int(indices.max())}"
        )
