"""Means over targets with bootstrap intervals, and rank correlation in many resamples at once."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from .. import _check

COVERAGE = 0.95  # of all intervals
BLOCK_ELEMENTS = 1 << 17  # fp64 numbers in an array of the bootstrap: 1 MiB, which stays in cache

Interval = tuple[float, float]


def mean_with_intervals(
    statistic: Callable[..., Tensor],
    values: tuple[Tensor, ...],
    defined: Tensor,
    undefined: str,
    bound: float,
    num_resamples: int,
    seed: int,
) -> tuple[float, Tensor, Interval, Interval]:
    """Return a statistic's mean over targets, itself [t], and intervals over targets and over m.

    The interval over targets is the percentile interval, that over the m things each target's
    statistic is made of (subsets, samples) the basic interval; see `lds`.

    Args:
        statistic: As in `mean_over_targets`.
        values: Tensors [t, m], fp64 on the CPU.
        defined: Of which targets the statistic is defined, bool [t]; the others are NaN, left out
            of the rest, and counted in a warning.
        undefined: That warning's text, what is constant for such targets.
        bound: The largest absolute value of the statistic, which the intervals are cut to.
        num_resamples, seed: Of both bootstraps.
    """
    num_resamples = _check.integer("num_resamples", num_resamples, 1)
    seed = _check.seed("seed", seed)
    num_undefined = int((~defined).sum())
    if num_undefined:
        # At the caller of the measure.
        warnings.warn(undefined.format(f"{num_undefined} of {len(defined)}"), stacklevel=3)
    per_target = torch.full((len(defined),), torch.nan, dtype=torch.float64, device="cpu")
    if num_undefined == len(defined):
        nothing = (torch.nan, torch.nan)
        return torch.nan, per_target, nothing, nothing
    values = tuple(value[defined] for value in values)
    size = values[0].shape[1]
    once = torch.ones(size, 1, dtype=torch.float64, device="cpu")
    found = statistic(*values, once)[:, 0]
    per_target[defined] = found
    generator = torch.Generator("cpu").manual_seed(seed)
    target_means = resampled_means(found, num_resamples, generator)
    counts = resample_counts(size, num_resamples, generator)
    other_means = mean_over_targets(statistic, values, counts)
    mean = found.mean().item()
    return mean, per_target, central(target_means), basic_interval(mean, other_means, bound)


def resample_counts(size: int, num_resamples: int, generator: torch.Generator) -> Tensor:
    """How often each of `size` things is drawn in each resample with replacement: [size, R]."""
    draws = torch.randint(size, (size, num_resamples), generator=generator, device="cpu")
    ones = torch.ones(1, dtype=torch.float64, device="cpu").expand(size, num_resamples)
    counts = torch.zeros(size, num_resamples, dtype=torch.float64, device="cpu")
    return counts.scatter_add_(0, draws, ones)


def resampled_means(values: Tensor, num_resamples: int, generator: torch.Generator) -> Tensor:
    """Means of resamples with replacement: values [t] → [R]."""
    width = max(1, BLOCK_ELEMENTS // len(values))
    means = []
    for start in range(0, num_resamples, width):
        size = (min(width, num_resamples - start), len(values))
        draws = torch.randint(len(values), size, generator=generator, device="cpu")
        means.append(values[draws].mean(1))
    return torch.cat(means)


def mean_over_targets(
    statistic: Callable[..., Tensor], values: tuple[Tensor, ...], counts: Tensor
) -> Tensor:
    """The mean of a statistic over the targets in every resample → [R].

    Args:
        statistic: called with a block [c, m] of each of the values and counts [m, r]; returns
            [c, r], NaN where it is undefined: that target is left out of that resample's mean.
        values: tensors [t, m], one row per target.
        counts: how often each of the m things is drawn in each resample, [m, R].
    """
    means = []
    for counts_block in counts.split(max(1, BLOCK_ELEMENTS // len(counts)), dim=1):
        width = max(1, BLOCK_ELEMENTS // counts_block.numel())
        total, number = counts.new_zeros(2, counts_block.shape[1])
        for blocks in zip(*(value.split(width) for value in values), strict=True):
            figures = statistic(*blocks, counts_block)  # [c, r]
            total += figures.nansum(0)
            number += (~figures.isnan()).sum(0)
        means.append(total / number)
    return torch.cat(means)


def central(samples: Tensor) -> Interval:
    """The central 95 % of the defined samples [R]; (NaN, NaN) if there are none."""
    tail = (1.0 - COVERAGE) / 2
    bounds = torch.tensor([tail, 1.0 - tail], dtype=samples.dtype, device=samples.device)
    low, high = samples.nanquantile(bounds).tolist()
    return low, high


def basic_interval(estimate: float, samples: Tensor, bound: float) -> Interval:
    """The basic bootstrap interval, [2·estimate − q₉₇.₅, 2·estimate − q₂.₅], cut to ±bound."""
    low, high = central(samples)
    return max(2 * estimate - high, -bound), min(2 * estimate - low, bound)


# --- rank correlation, without sorting any resample -----------------------------------------------


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
