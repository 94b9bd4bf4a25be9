"""What fitting sums over samples: kernel matrices, and what damping is chosen from."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..kernel import KernelAccumulator
from ..store import Shard
from .damping import ImpliedRidge


class BlockKernels:
    """The kernel matrix and the implied ridge of each projection block, in two passes.

    Args:
        proj_dim: Features k of a block.
        blocks: Projection blocks.
        weighted: Whether kernel matrices weight samples by curvature.
    """

    def __init__(self, proj_dim: int, blocks: int, weighted: bool) -> None:
        self._proj_dim = proj_dim
        self._weighted = weighted
        self._kernels = [KernelAccumulator(proj_dim) for _ in range(blocks)]
        self._outputs = [torch.zeros(0)]

    def add(self, shard: Shard) -> None:
        """Add the samples of a shard to the kernel matrices."""
        curvature = shard.curvature if self._weighted else None
        parts = shard.features.split(self._proj_dim, 1)
        for kernel, features in zip(self._kernels, parts, strict=True):
            kernel.add(features, curvature)
        self._outputs.append(shard.output)

    def matrices(self) -> Tensor:
        """Return the kernel matrices, fp64 [blocks, k, k]."""
        return torch.stack([kernel.matrix for kernel in self._kernels])

    def implied(self, shards: Iterable[Shard]) -> Tensor:
        """Return the sums of `ImpliedRidge`, fp64 [blocks, k + 4].

        Args:
            shards: Those that were added, once more, since all outputs must be known first.
        """
        outputs = torch.cat(self._outputs)
        ridges = [ImpliedRidge(self._proj_dim, outputs) for _ in self._kernels]
        for shard in shards:
            parts = shard.features.split(self._proj_dim, 1)
            for ridge, features in zip(ridges, parts, strict=True):
                ridge.add(features, shard.weight, shard.output, shard.curvature)
        return torch.stack([ridge.sums for ridge in ridges])
