"""Bootstrap resamples and the intervals made of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

COVERAGE = 0.95  # of all intervals
BLOCK_ELEMENTS = 1 << 17  # fp64 numbers in an array of the bootstrap: 1 MiB, which stays in cache


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
        values: tensors [t, m], one row a target.
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


def central(samples: Tensor) -> tuple[float, float]:
    """The central 95 % of the defined samples [R]; (NaN, NaN) if there are none."""
    tail = (1.0 - COVERAGE) / 2
    bounds = torch.tensor([tail, 1.0 - tail], dtype=samples.dtype, device=samples.device)
    low, high = samples.nanquantile(bounds).tolist()
    return low, high


def basic_interval(estimate: float, samples: Tensor, bound: float) -> tuple[float, float]:
    """The basic bootstrap interval, [2·estimate − q₉₇.₅, 2·estimate − q₂.₅], cut to ±bound."""
    low, high = central(samples)
    return max(2 * estimate - high, -bound), min(2 * estimate - low, bound)
