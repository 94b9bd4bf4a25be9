"""A picture of attributions: test images beside their top proponents and opponents.

matplotlib is imported where it is used and comes with ``pip install trak-ext[demo]``.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from .. import _check
from ..report.attributions import Attributions, Item, label_text
from ..report.page import number_scale, ranked_samples

__all__ = ["choose_targets", "plot_attributions", "require_matplotlib"]

# Okabe and Ito's palette: told apart with any colour vision, and in grey by lightness.
PROPONENT_COLOUR, OPPONENT_COLOUR = "#0072B2", "#D55E00"
TEXT_COLOUR, MUTED_COLOUR = "#222222", "#595959"

# The page in inches. Seven rows of five and five are 9 inches wide, so that the smallest text is
# 12 pixels high on a screen that gives the picture 900.
CELL = 0.62  # side of an image
PITCH = 0.74  # from one image to the next in a row
ROW = 0.96  # from one row to the next: the image and one line below it
LINE = 0.16  # a second line below it, where long labels need one
GAP, TEST_GAP = 0.36, 0.62  # between groups, and after the target, whose caption is wider than it
GROUP = 2.0  # the least width of a group, so that its heading fits
MARGIN, TITLE, HEADER, FOOTER = 0.24, 0.46, 0.64, 0.36
PAD = 0.1  # of a group's tinted panel around its images
SMALL, NORMAL, LARGE = 8.5, 10.5, 14  # points
LONGEST_LABEL = 11  # characters that fit below an image


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
        labels: True classes [t], integer.
        predictions: Predicted classes [t]; None means that nothing is known to be wrong.
        count: How many to pick; fewer come back if there are fewer samples.

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
    attributions: Attributions,
    *,
    rows: int = 7,
    title: str = "Which training images made the model say this?",
    dpi: int = 200,
) -> None:
    """Draw a row for each of the first targets: itself, its top proponents and its top opponents.

    Under each training image stand its label and its score; a label other than the target's is
    bold, since those are the surprising ones. The file's type follows the path's ending.

    Args:
        path: Where to write the picture; its folder must exist.
        attributions: Of targets and training samples with pictures.
        rows: Targets to show, at least 1; fewer where there are fewer.
        title: Above everything.
        dpi: Pixels per inch; 7 rows of 5 + 5 are 1,848 x 1,636 pixels at 200.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError, ValueError: not `Attributions`, or some without pictures.
    """
    _check.instance("attributions", attributions, Attributions, "a trak_ext.report.Attributions")
    targets = attributions.targets[: _check.integer("rows", rows, 1)]
    for item in [*targets, *attributions.train_items.values()]:
        if item.image is None:
            raise ValueError("attributions: expected items with pictures, got one without")
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    scale = number_scale(attributions)
    groups = (
        ("proponents", "Proponents", "raise the true label's score", PROPONENT_COLOUR),
        ("opponents", "Opponents", "lower the true label's score", OPPONENT_COLOUR),
    )
    # Numbers share a line with the score; names get a line of their own.
    labels = [label_text(item.label) for item in [*targets, *attributions.train_items.values()]]
    second_line = LINE if max(map(len, labels)) > 3 else 0.0
    row_height = ROW + second_line
    counts = [getattr(attributions, side).indices.shape[1] for side, *_ in groups]
    widths = [max(GROUP, (count - 1) * PITCH + CELL) for count in counts]
    lefts = [MARGIN + CELL + TEST_GAP]
    lefts.append(lefts[0] + widths[0] + GAP)
    width = lefts[1] + widths[1] + MARGIN
    height = TITLE + HEADER + row_height * len(targets) + FOOTER

    # A Figure of its own with its own canvas: pyplot's global state and backend stay untouched.
    figure = Figure(figsize=(width, height), dpi=dpi, facecolor="white")
    FigureCanvasAgg(figure)

    def write(x: float, y: float, text: str, size: float, **style: Any) -> None:
        """Write text at x, y inches from the top left corner."""
        style = {"color": TEXT_COLOUR} | style
        # Without matplotlib's mathematical notation: a label may hold dollar signs.
        figure.text(x / width, 1 - y / height, text, fontsize=size, parse_math=False, **style)

    def draw(x: float, y: float, item: Item, colour: str) -> None:
        axes = figure.add_axes((x / width, 1 - (y + CELL) / height, CELL / width, CELL / height))
        pixels = item.image if item.image.shape[2] > 1 else item.image[:, :, 0]
        axes.imshow(pixels.numpy(), cmap="gray", vmin=0, vmax=255)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(edgecolor=colour, linewidth=1.3)

    def caption(x: float, y: float, item: Item, colour: str, mark: str = "", **style: Any) -> None:
        label = label_text(item.label)
        label = label if len(label) <= LONGEST_LABEL else label[: LONGEST_LABEL - 1] + "…"
        write(x, y, label + mark, NORMAL, color=colour, **style)

    def beside(x: float, y: float, text: str, colour: str) -> None:
        """Write at the right end of a caption, or below it where long labels take its line."""
        at, align = (x, "left") if second_line else (x + CELL, "right")
        write(at, y + second_line, text, SMALL, color=colour, ha=align)

    write(MARGIN, 0.32, title, LARGE, weight="bold")
    write(MARGIN, TITLE + 0.24, "Test image", NORMAL, weight="bold")
    write(MARGIN, TITLE + 0.44, "✓ if predicted", SMALL, color=MUTED_COLOUR)
    top, bottom = TITLE + HEADER, height - FOOTER
    for (_, heading, note, colour), x, wide in zip(groups, lefts, widths, strict=True):
        write(x, TITLE + 0.24, heading, NORMAL + 1, weight="bold", color=colour)
        write(x, TITLE + 0.44, note, SMALL, color=MUTED_COLOUR)
        corner = ((x - PAD) / width, 1 - bottom / height)
        size = ((wide + 2 * PAD) / width, (bottom - TITLE) / height)
        panel = Rectangle(corner, *size, facecolor=colour, alpha=0.08, zorder=-1)
        panel.set_transform(figure.transFigure)
        figure.add_artist(panel)
    for i, target in enumerate(targets):
        y = top + i * row_height
        below = y + CELL + 0.17
        draw(MARGIN, y, target, TEXT_COLOUR)
        colour, mark = TEXT_COLOUR, "" if target.prediction is None else " ✓"
        if attributions.is_wrong(i):
            colour, mark = OPPONENT_COLOUR, " ✗"
            beside(MARGIN + 0.3, below, f"model: {label_text(target.prediction)}", colour)
        caption(MARGIN, below, target, colour, mark, weight="bold")
        for (side, _, _, colour), left in zip(groups, lefts, strict=True):
            for place, ranked in enumerate(ranked_samples(attributions, side, i)):
                x = left + place * PITCH
                draw(x, y, ranked.item, colour)
                same = label_text(ranked.item.label) == label_text(target.label)
                weight = "normal" if same else "bold"
                caption(x, below, ranked.item, TEXT_COLOUR, weight=weight)
                beside(x, below, scale.text(ranked.score), colour)
    unit = f", in units of {scale.unit}" if scale.unit else ""
    note = f"Under each training image: its label (bold where it differs) and its score{unit}"
    write(MARGIN, height - 0.13, note, SMALL, color=MUTED_COLOUR)
    figure.savefig(path, dpi=dpi)
