"""What is summed over a checkpoint's samples, for each projection block."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..estimator.damping import ImpliedRidge
from ..estimator.kernel_matrix import KernelAccumulator
from ..store import Shard


def kernel_matrices(
    shards: Iterable[Shard], proj_dim: int, blocks: int, curvature: Tensor | None
) -> Tensor:
    """Return the kernel matrices of samples that come as shards, fp64 [blocks, k, k].

    Args:
        shards: In order.
        proj_dim: Features k of a block.
        blocks: Projection blocks.
        curvature: The weight of each sample, [n]; None for ones.
    """
    matrices = torch.zeros((blocks, proj_dim, proj_dim), dtype=torch.float64, device="cpu")
    kernels = [KernelAccumulator(proj_dim, matrix=matrix) for matrix in matrices]
    start = 0
    for shard in shards:
        stop = start + len(shard.weight)
        weights = None if curvature is None else curvature[start:stop]
        for kernel, features in zip(kernels, shard.features.split(proj_dim, 1), strict=True):
            kernel.add(features, weights)
        start = stop
    return matrices


def implied_sums(shards: Iterable[Shard], proj_dim: int, blocks: int, threshold: float) -> Tensor:
    """Return `ImpliedRidge.sums` of samples that come as shards, fp64 [blocks, k + 3].

    Args:
        shards, proj_dim, blocks: As above.
        threshold: Of fitted samples' outputs.
    """
    ridges = [ImpliedRidge(proj_dim, threshold) for _ in range(blocks)]
    for shard in shards:
        for ridge, features in zip(ridges, shard.features.split(proj_dim, 1), strict=True):
            ridge.add(features, shard.weight, shard.output, shard.curvature)
    return torch.stack([ridge.sums for ridge in ridges])
