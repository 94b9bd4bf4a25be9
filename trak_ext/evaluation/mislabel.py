"""Mislabel detection: do wrongly labelled training samples influence themselves the most?"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _check
from .bootstrap import Interval

__all__ = ["MislabelAUC", "flip_labels", "mislabel_auc"]

_Z = 1.959963984540054  # of a 95 % interval of the normal distribution


class MislabelAUC(NamedTuple):
    """Area under the ROC curve, in [0, 1]; .5 is chance."""

    value: float
    interval: Interval  # 95 %, for other samples of both kinds


def mislabel_auc(scores: Tensor, mislabelled: Tensor) -> MislabelAUC:
    """Measure how well high scores tell mislabelled training samples from the others.

    The area under the ROC curve is the Mann-Whitney statistic: the chance that a mislabelled
    sample has the higher score of a random pair, ties counting one half. It is computed exactly
    from average ranks. The interval is that of DeLong, DeLong & Clarke-Pearson 1988 ("Comparing
    the Areas under Two or More Correlated Receiver Operating Characteristic Curves") on the scale
    of log(AUC / (1 - AUC)), which keeps it within [0, 1]; it is the point itself where all pairs
    are ordered alike (AUC 0 or 1), as no spread can be seen then.

    Args:
        scores: one per training sample, such as `Attributor.self_influence()`: [n], floating point
            and finite.
        mislabelled: [n], bool, with at least one True and one False.

    Raises:
        TypeError, ValueError: arguments that do not fit.
    """
    _check.tensor("scores", scores, 1)
    _check.tensor("mislabelled", mislabelled, 1, "bool")
    _check.shape_is("mislabelled", mislabelled, tuple(scores.shape), "[scores]")
    wrong = mislabelled.cpu()
    values = scores.detach().to("cpu", torch.float64)
    positive, negative = values[wrong], values[~wrong]
    if len(positive) == 0 or len(negative) == 0:
        raise ValueError(
            "mislabelled: expected at least one True and one False, got "
            f"{len(positive)} and {len(negative)}"
        )
    above = _share_below(positive, negative)  # [n1]: of the rest, ties one half
    below = 1 - _share_below(negative, positive)  # [n0]
    area = above.mean().item()
    variance = _variance_of_mean(above) + _variance_of_mean(below)
    if not 0 < area < 1 or variance == 0:
        return MislabelAUC(area, (area, area))
    centre = math.log(area / (1 - area))
    reach = _Z * math.sqrt(variance) / (area * (1 - area))
    low, high = (1 / (1 + math.exp(-bound)) for bound in (centre - reach, centre + reach))
    return MislabelAUC(area, (low, high))


def flip_labels(
    labels: Tensor, *, num_classes: int, share: float = 0.05, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Give a random share of samples a wrong label, each other class as likely.

    Args:
        labels: [n], integers in 0..num_classes - 1.
        num_classes: at least 2.
        share: of the samples to mislabel, in [0, 1]; round(share * n) of them are.
        seed: of the draw; the global generator is left alone.

    Returns:
        The labels [n], of the same dtype, and where they are wrong [n], bool.

    Raises:
        TypeError, ValueError: arguments that do not fit.
    """
    num_classes = _check.integer("num_classes", num_classes, 2)
    classes = _check.indices("labels", labels, 1, num_classes)  # int64 is wide enough for sums
    if num_classes - 1 > torch.iinfo(labels.dtype).max:
        raise ValueError(
            f"num_classes: expected no more than labels of {labels.dtype} can tell apart, got "
            f"{num_classes}"
        )
    share = _check.share("share", share)
    generator = torch.Generator("cpu").manual_seed(_check.seed("seed", seed))
    order = torch.randperm(len(labels), generator=generator, device="cpu")
    chosen = order[: round(share * len(labels))]
    steps = torch.randint(1, num_classes, (len(chosen),), generator=generator, device="cpu")
    steps, chosen = steps.to(labels.device), chosen.to(labels.device)
    flipped = labels.clone()
    flipped[chosen] = ((classes[chosen] + steps) % num_classes).to(labels.dtype)
    wrong = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
    wrong[chosen] = True
    return flipped, wrong


def _share_below(values: Tensor, others: Tensor) -> Tensor:
    """For each value, the share of the others that lie below it, equal ones counting one half."""
    ordered = others.sort().values
    below = torch.searchsorted(ordered, values)
    up_to = torch.searchsorted(ordered, values, right=True)
    return (below + up_to).double() / (2 * len(others))


def _variance_of_mean(values: Tensor) -> float:
    if len(values) < 2:
        return 0.0  # nothing is known of the spread
    return (values.var() / len(values)).item()
