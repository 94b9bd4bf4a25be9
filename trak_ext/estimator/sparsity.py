"""Soft-thresholding: scores near zero become zero, and the rest move towards it by as much."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _check


def soft_threshold(
    scores: Tensor, threshold: float | Tensor | None = None, *, keep: int | None = None
) -> Tensor:
    """Return sign(s) max(|s| - threshold, 0) of scores s.

    Donoho 1995, "De-noising by soft-thresholding", which Park et al. 2023 (section 3.2) end with.

    Args:
        scores: [n_train, n_targets], floating point.
        threshold: A number of at least 0, or one for each target [n_targets].
        keep: Instead of a threshold, how many samples of each target may stay apart from zero, 0 to
            n_train: the threshold is the largest magnitude that is left out.

    Returns:
        [n_train, n_targets], of the scores' dtype and device.

    Raises:
        ValueError, TypeError: one sentence naming the argument; both or none of threshold and keep.
    """
    _check.float_tensor("scores", scores, "[n_train, n_targets]", (2,))
    if (threshold is None) == (keep is None):
        raise ValueError(
            "threshold: expected either threshold or keep, got "
            + ("neither" if keep is None else "both")
        )
    bound = _bound_of_kept(scores, keep) if threshold is None else _bound(scores, threshold)
    return torch.sign(scores) * (scores.abs() - bound).clamp_min(0)


def _bound_of_kept(scores: Tensor, keep: Any) -> Tensor:
    """Return the largest magnitude of each target that is not among its `keep` largest."""
    num_train = scores.shape[0]
    keep = _check.integer("keep", keep, 0, num_train)
    if keep == num_train:
        return scores.new_zeros(scores.shape[1])
    return scores.abs().kthvalue(num_train - keep, 0).values


def _bound(scores: Tensor, threshold: Any) -> Tensor:
    if not isinstance(threshold, Tensor):
        return scores.new_tensor(_check.nonnegative("threshold", threshold))
    _check.float_tensor("threshold", threshold, "[n_targets]", (0, 1))
    _check.on_device_of("threshold", threshold, "scores", scores)
    if threshold.dim() == 1:
        _check.shape_is("threshold", threshold, (scores.shape[1],), "[n_targets]")
    if not bool((threshold >= 0).all()):
        raise ValueError("threshold: expected numbers of at least 0, got one below it or NaN")
    return threshold.to(scores.dtype)
