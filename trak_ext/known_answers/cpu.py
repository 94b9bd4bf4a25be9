"""The CPU's kernels as the self-test calls them, at the level that this process has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .. import _C
from ..kernels import operators
from ..kernels.score_pass import SolvedTargets
from .kernels import DeviceKernels


class CpuKernels(DeviceKernels):
    """What is tested on the CPU; paths and workspaces mean nothing there."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))

    def describe(self) -> str:
        """Return the level."""
        return f"cpu {_C.cpu_level()}"

    def is_capturing(self) -> bool:
        """Return that no graph is captured."""
        return False

    def tiles(self, path: str) -> list[dict[str, Any]]:
        """Return batches and columns as if there were tiles of them."""
        return [
            {"kind": kind, "passes": passes, "tile_rows": rows, "tile_columns": 64}
            for kind in ("rademacher", "normal")
            for passes in operators.PRECISIONS.values()
            for rows in (8, 32)
        ]

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Do nothing: there are no streams."""
        yield

    def project(
        self,
        matrix: Any,
        path: str,
        grads: Sequence[tuple[Tensor, int]],
        out: Tensor,
        precision: str = "high",
        least_workspace: bool = False,
        full_blocks: bool = False,
    ) -> None:
        """Add projections of gradients [B, P_i], each at its param_offset, to `out` [B, k]."""
        projection = operators.native_projection(matrix, grads, out, precision)
        _C.project(projection, operators.get_num_threads())

    def fill_matrix(self, matrix: Any, param_offset: int, out: Tensor) -> None:
        """Fill in rows of the matrix [P, k]."""
        rows = operators.matrix_rows(matrix, param_offset, out)
        _C.fill_matrix(matrix, **rows, num_threads=operators.get_num_threads())

    def score(
        self,
        path: str,
        features: Sequence[Tensor],
        solved: Tensor,
        weights: Tensor,
        coefficients: Tensor | None,
        precision: str,
        out: Tensor,
        least_workspace: bool = False,
    ) -> None:
        """Write scores [n, t] to `out`."""
        targets = SolvedTargets(solved, solved.dtype, precision)
        out.copy_(targets.score(features, weights, coefficients))

    def top_k(
        self,
        path: str,
        features: Sequence[Tensor],
        solved: Tensor,
        weights: Tensor,
        coefficients: Tensor | None,
        precision: str,
        out: tuple[Tensor, Tensor, Tensor],
        least_workspace: bool = False,
    ) -> None:
        """Write the best values and indices [t, count] to `out`; NaN raises."""
        targets = SolvedTargets(solved, solved.dtype, precision)
        best = targets.top_k(features, weights, out[0].shape[1], coefficients=coefficients)
        for to, made in zip(out, best, strict=False):
            to.copy_(made)
