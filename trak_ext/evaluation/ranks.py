"""Spearman's rank correlation in many bootstrap resamples at once, without sorting any of them."""

from __future__ import annotations

import torch
from torch import Tensor


def weighted_ranks(values: Tensor, counts: Tensor) -> Tensor:
    """Average ranks in every resample: values [c, m], counts [m, R] → [c, m, R].

    Where subset i was drawn w_i times, the rank of (every copy of) j is
    Σ_i w_i [x_i < x_j] + (Σ_i w_i [x_i = x_j] + 1) / 2. With the values sorted once, both sums are
    differences of one running sum of the counts, so no resample is ever sorted. Counts of one give
    the usual average rank. Exact: half-integers far below 2⁵².
    """
    num_targets, num_subsets = values.shape
    ordered, order = values.sort(-1)
    running = counts.new_zeros(num_targets, num_subsets + 1, counts.shape[1])
    torch.cumsum(counts[order], 1, out=running[:, 1:])
    # Rows of `running` as one list, so that a lookup copies whole rows of R numbers.
    first = torch.arange(num_targets, device=values.device)[:, None] * (num_subsets + 1)
    below = (first + torch.searchsorted(ordered, values)).flatten()
    up_to = (first + torch.searchsorted(ordered, values, right=True)).flatten()
    running = running.flatten(0, 1)
    ranks = running[below].add_(running[up_to]).add_(1.0).mul_(0.5)
    return ranks.view(num_targets, num_subsets, -1)


def weighted_spearman(x: Tensor, y: Tensor, counts: Tensor) -> Tensor:
    """Rank correlation of x and y [c, m] in every resample of counts [m, R] → [c, R], fp64.

    Pearson's correlation of the ranks, each weighted by its count; the mean of average ranks is
    (Σ w + 1) / 2 whatever the ties. NaN where a resample leaves x or y constant.
    """
    middle = (counts.sum(0) + 1) / 2  # [R]
    rank_x = weighted_ranks(x, counts).sub_(middle)
    rank_y = weighted_ranks(y, counts).sub_(middle)
    weighted = rank_x * counts
    xy = (weighted * rank_y).sum(1)
    xx = weighted.mul_(rank_x).sum(1)
    yy = rank_y.square_().mul_(counts).sum(1)
    # 0 / 0 is the NaN of a constant; rounding must not push a perfect correlation past one.
    return (xy / (xx * yy).sqrt_()).clamp_(-1.0, 1.0)
