"""A picture of attributions: test images beside their top proponents and opponents.

matplotlib is imported where it is used and comes with ``pip install trak-ext[demo]``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..report.page import Scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["choose_targets", "plot_attributions", "require_matplotlib"]

# Okabe and Ito's palette: told apart with any colour vision, and in grey by lightness.
PROPONENT_COLOUR = "#0072B2"
OPPONENT_COLOUR = "#D55E00"
TEXT_COLOUR = "#222222"
MUTED_COLOUR = "#6B6B6B"

# The page in inches, measured from its top left corner.
CELL = 0.92  # side of an image
PITCH = 1.08  # from one image to the next in a row
ROW = 1.36  # from one row to the next: the image and one line below it
LINE = 0.19  # a second line below it, where class names need one
GAP = 0.44  # between the proponents and the opponents
TEST_GAP = 0.66  # the same after the test image, whose caption is wider than it
GROUP = 1.9  # the least width of a group, so that its heading fits
LONGEST_NAME = 11  # characters of a class name that fit below an image
MARGIN = 0.34
HEADER = 0.82  # below the title, for the group headings
TITLE = 0.52
FOOTER = 0.42
PANEL_PAD = 0.11  # of a group's tinted panel around its images


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
    if count < 0:
        raise ValueError(f"count: expected at least 0, got {count}")
    if predictions is not None and predictions.shape != labels.shape:
        raise ValueError(
            f"predictions: expected shape {list(labels.shape)} as labels, got "
            f"{list(predictions.shape)}"
        )
    wrong = torch.zeros(len(labels), dtype=torch.bool, device="cpu")
    if predictions is not None:
        wrong = (predictions != labels).cpu()
    chosen = wrong.nonzero()[:, 0].tolist()[: min(2, count)]
    seen = [int(labels[i]) for i in chosen]
    rest = (~wrong).nonzero()[:, 0].tolist() + wrong.nonzero()[:, 0].tolist()[2:]
    while len(chosen) < count and rest:
        times = [seen.count(int(labels[i])) for i in rest]
        lowest = min(range(len(rest)), key=lambda r: (times[r], int(labels[rest[r]]), r))
        chosen.append(rest.pop(lowest))
        seen.append(int(labels[chosen[-1]]))
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
    dpi: int = 150,
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
        dpi: pixels an inch; 7 rows of 5 + 5 are 1,977 x 1,692 pixels at 150.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: shapes that do not fit, no test image, or an index outside the n images.
    """
    _check_pictures(test_images, test_labels, train_images, train_labels, test_predictions)
    groups = (
        ("proponents", proponents, "Proponents", "raise the true label's score", PROPONENT_COLOUR),
        ("opponents", opponents, "Opponents", "lower the true label's score", OPPONENT_COLOUR),
    )
    for name, ranked, *_ in groups:
        _check_ranked(name, ranked, len(test_images), len(train_images))
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    def name_of(label: Tensor) -> str:
        name = class_names[int(label)] if class_names is not None else str(int(label))
        return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"

    # Numbers share a line with the score; names get a line of their own.
    second_line = LINE if max(map(len, class_names or "0")) > 3 else 0.0
    row_height = ROW + second_line
    largest = max(
        (float(v.abs().max()) for v, _ in (proponents, opponents) if v.numel()), default=0
    )
    scale = Scale.of(largest)
    lefts, widths = _group_edges([ranked[0].shape[1] for _, ranked, *_ in groups])
    width = lefts[-1] + widths[-1] + MARGIN
    height = TITLE + HEADER + row_height * len(test_images) + FOOTER

    # A Figure of its own with its own canvas: pyplot's global state and backend stay untouched.
    figure = Figure(figsize=(width, height), dpi=dpi, facecolor="white")
    FigureCanvasAgg(figure)

    def write(x: float, y: float, text: str, size: float, **style: Any) -> None:
        """Text at x, y inches from the top left corner."""
        style = {"color": TEXT_COLOUR, "ha": "left", "va": "baseline"} | style
        figure.text(x / width, 1 - y / height, text, fontsize=size, **style)

    def cell(x: float, y: float, image: Tensor, colour: str, line: float) -> Axes:
        axes = figure.add_axes((x / width, 1 - (y + CELL) / height, CELL / width, CELL / height))
        axes.imshow(image.detach().cpu().float().clamp(0, 1).numpy(), cmap=cmap, vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(edgecolor=colour, linewidth=line)
        return axes

    def panel(left: float, wide: float, colour: str) -> None:
        left, right = left - PANEL_PAD, left + wide + PANEL_PAD
        top, bottom = TITLE + 0.08, height - FOOTER + 0.02
        corner, size = (left / width, 1 - bottom / height), (right - left, bottom - top)
        figure.add_artist(
            Rectangle(
                corner, size[0] / width, size[1] / height, transform=figure.transFigure,
                facecolor=colour, alpha=0.08, linewidth=0, zorder=-1,
            )
        )  # fmt: skip

    write(MARGIN, 0.38, title, 15, weight="bold")
    write(lefts[0], TITLE + 0.36, "Test image", 12, weight="bold")
    if test_predictions is not None:
        write(lefts[0], TITLE + 0.58, "label, ✓ if predicted", 9, color=MUTED_COLOUR)
    for (_, _, heading, note, colour), x, wide in zip(groups, lefts[1:], widths[1:], strict=True):
        panel(x, wide, colour)
        write(x, TITLE + 0.36, heading, 12, weight="bold", color=colour)
        write(x, TITLE + 0.58, note, 9, color=MUTED_COLOUR)

    for row in range(len(test_images)):
        y = TITLE + HEADER + row * row_height
        below = y + CELL + 0.21
        truth = test_labels[row]
        cell(lefts[0], y, test_images[row], TEXT_COLOUR, 1.6)
        verdict, colour = name_of(truth), TEXT_COLOUR
        if test_predictions is not None:
            right = bool(test_predictions[row] == truth)
            verdict += " ✓" if right else " ✗"
            if not right:
                colour = OPPONENT_COLOUR
                said = f"model: {name_of(test_predictions[row])}"
                beside = CELL if not second_line else 0.0
                align = "right" if beside else "left"
                write(lefts[0] + beside, below + second_line, said, 9, color=colour, ha=align)
        write(lefts[0], below, verdict, 10, weight="bold", color=colour)
        for (_, (values, indices), _, _, colour), left in zip(groups, lefts[1:], strict=True):
            for place, (value, index) in enumerate(zip(values[row], indices[row], strict=True)):
                x, label = left + place * PITCH, train_labels[index]
                cell(x, y, train_images[index], colour, 1.6)
                weight = "normal" if label == truth else "bold"
                write(x, below, name_of(label), 10, weight=weight)
                score = scale.text(float(value))
                beside = CELL if not second_line else 0.0
                align = "right" if beside else "left"
                write(x + beside, below + second_line, score, 9, ha=align, color=colour)

    unit = f" in units of {scale.unit}" if scale.unit else ""
    note = f"Under each training image: its label (bold where it differs), its score{unit}"
    write(MARGIN, height - 0.15, note, 9, color=MUTED_COLOUR)
    figure.savefig(path, dpi=dpi)


def _group_edges(counts: Sequence[int]) -> tuple[list[float], list[float]]:
    """Left edges and widths, in inches, of the test image and of groups of `counts` images."""
    widths = [CELL, *(max(GROUP, (count - 1) * PITCH + CELL) for count in counts)]
    lefts = [MARGIN]
    for wide in widths[:-1]:
        lefts.append(lefts[-1] + wide + GAP)
    lefts[1:] = [x + TEST_GAP - GAP for x in lefts[1:]]
    return lefts, widths


def _check_pictures(
    test_images: Tensor,
    test_labels: Tensor,
    train_images: Tensor,
    train_labels: Tensor,
    test_predictions: Tensor | None,
) -> None:
    for name, images in (("test_images", test_images), ("train_images", train_images)):
        if images.ndim != 3 and not (images.ndim == 4 and images.shape[3] == 3):
            raise ValueError(
                f"{name}: expected shape [count, H, W] or [count, H, W, 3], got "
                f"{list(images.shape)}"
            )
        if not images.is_floating_point():
            raise ValueError(
                f"{name}: expected floating-point intensities in [0, 1], got {images.dtype}"
            )
    if len(test_images) == 0:
        raise ValueError("test_images: expected at least one image, got none")
    for name, labels, count in (
        ("test_labels", test_labels, len(test_images)),
        ("train_labels", train_labels, len(train_images)),
        ("test_predictions", test_predictions, len(test_images)),
    ):
        if labels is not None and labels.shape != (count,):
            raise ValueError(
                f"{name}: expected shape [{count}], one an image, got {list(labels.shape)}"
            )


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
