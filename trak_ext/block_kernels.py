"""What fitting sums over samples: kernel matrices, and what damping is chosen from."""

from __future__ import annotations

import torch
from torch import Tensor

from .damping import ImpliedRidge
from .kernel import KernelAccumulator
from .store import Shard


class BlockKernels:
    """The kernel matrix and the implied ridge of each projection block.

    Args:
        proj_dim: Features k of a block.
        blocks: Projection blocks.
        weighted: Whether kernel matrices weight samples by curvature.
    """

    def __init__(self, proj_dim: int, blocks: int, weighted: bool) -> None:
        self._proj_dim = proj_dim
        self._weighted = weighted
        self._kernels = [KernelAccumulator(proj_dim) for _ in range(blocks)]
        self._ridges = [ImpliedRidge(proj_dim) for _ in range(blocks)]

    def add(self, shard: Shard) -> None:
        """Add the samples of a shard."""
        parts = shard.features.split(self._proj_dim, 1)
        for kernel, ridge, features in zip(self._kernels, self._ridges, parts, strict=True):
            kernel.add(features, shard.curvature if self._weighted else None)
            ridge.add(features, shard.weight, shard.output, shard.curvature)

    def matrices(self) -> Tensor:
        """Return the kernel matrices, fp64 [blocks, k, k]."""
        return torch.stack([kernel.matrix for kernel in self._kernels])

    def implied(self) -> Tensor:
        """Return the sums of `ImpliedRidge`, fp64 [blocks, k + 4]."""
        return torch.stack([ridge.sums for ridge in self._ridges])
