"""Sparse projections with known answers: to the bit, in any dtype."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels.projection import project
from . import projections
from .buffers import BASE_ROWS, CPU, Memory, Slot, spread
from .cases import GUARD, describe_difference
from .projections import FIRST_PARAM, MODEL_ID, SEED, VALUES, MatrixCase, base_rows, matrix_of


def answers(name: str, proj_dim: int, nnz: int) -> Tensor:
    """Return 32 + base rows @ R, [8, proj_dim]: the CPU's, or the NumPy oracle's where asked."""
    return _answers(name, proj_dim, nnz, projections.by_reference())


@functools.cache
def _answers(name: str, proj_dim: int, nnz: int, by_reference: bool) -> Tensor:
    base = base_rows(name)
    out = torch.full((BASE_ROWS, proj_dim), 32.0, dtype=torch.float32, device=CPU)
    matrix: Any = {"nnz": nnz, "seed": SEED, "model_id": MODEL_ID}
    matrix["param_offset"] = VALUES[name].param_offset
    if by_reference:
        from .. import reference

        made = reference.project_sjlt(base.numpy(), proj_dim, **matrix, out=out.numpy())
        return torch.from_numpy(made)
    return project(base, proj_dim, kind="sjlt", **matrix, out=out)


@dataclass
class SparseCase:
    """A sparse projection of one tensor into a result with a border, which begins as 32.

    Rows are the base rows times powers of two: so are all their sums, whatever was rounded.
    """

    name: str  # of the values
    dtype: torch.dtype
    layout: str
    rows: int
    proj_dim: int
    nnz: int
    least_workspace: bool = False
    full_blocks: bool = False
    _grads: Slot | None = None
    _out: Slot | None = None

    def reserve(self, inputs: Memory, outputs: Memory) -> None:
        """Take places."""
        self._grads = projections.place_gradients(
            inputs, self.name, self.dtype, self.layout, self.rows
        )
        before = torch.full((BASE_ROWS, 1), 32.0, dtype=torch.float32, device=CPU)
        shape = (self.rows, self.proj_dim + GUARD)
        self._out = outputs.place(shape, torch.float32, before, is_base=True)

    def launch(self, kernels: Any, path: str, inputs: Tensor, outputs: Tensor) -> None:
        """Start the projection."""
        assert self._grads is not None
        assert self._out is not None
        grads = [(self._grads.view(inputs), VALUES[self.name].param_offset)]
        out = self._out.view(outputs)[:, : self.proj_dim]
        matrix = matrix_of("sjlt", self.proj_dim, self.nnz)
        how = {"least_workspace": self.least_workspace, "full_blocks": self.full_blocks}
        kernels.project(matrix, path, grads, out, **how)

    def judge(self, outputs: Tensor) -> str | None:
        """Compare with the answer."""
        assert self._out is not None
        border = torch.full((BASE_ROWS, GUARD), 32.0, dtype=torch.float32, device=CPU)
        expected = torch.cat([answers(self.name, self.proj_dim, self.nnz), border], dim=1)
        return describe_difference(str(self), self._out.view(outputs), spread(expected, self.rows))

    def __str__(self) -> str:
        return (
            f"sjlt, {self.rows} rows, {self.proj_dim} columns, nnz {self.nnz}, "
            f"of {str(self.dtype)[6:]} {self.layout}"
        )


def sparse_cases(kernels: Any, path: str) -> list[Any]:
    """Return the quick cases: every kernel, chunks of many lengths, two levels of the tree.

    Of each dtype blocks of one row, of eight and four, and of two. The one of 32 repetitions goes
    through the least workspace in two batches of rows and two windows of nodes.
    """
    float64, float32 = torch.float64, torch.float32
    float16, bfloat16 = torch.float16, torch.bfloat16
    return [
        SparseCase("two parts", float32, "aligned in the matrix", 1, 1024, 1),
        SparseCase("three parts", float32, "odd", 11, 32, 32, True, True),
        SparseCase("two parts", float32, "strided", 2, 34, 2, full_blocks=True),
        SparseCase("fp16", float16, "aligned", 6, 12, 4),
        SparseCase("fp16", float16, "odd", 11, 257, 1, full_blocks=True),
        SparseCase("fp16", float16, "strided", 2, 12, 4, full_blocks=True),
        SparseCase("one part", bfloat16, "strided", 3, 257, 1),
        SparseCase("one part", bfloat16, "aligned", 11, 34, 2, full_blocks=True),
        SparseCase("one part", bfloat16, "odd", 2, 12, 4, full_blocks=True),
        SparseCase("one part", float64, "odd", 3, 34, 2),
        SparseCase("one part", float64, "aligned in the matrix", 11, 257, 1, full_blocks=True),
        SparseCase("one part", float64, "strided", 2, 1024, 1, full_blocks=True),
        MatrixCase("sjlt", FIRST_PARAM, 301, 276, 3),
    ]


def thorough_sparse_cases(kernels: Any, path: str) -> list[Any]:
    """Return more batches, widths and dtypes."""
    cases = sparse_cases(kernels, path)
    for rows in (1, 2, 4, 8, 13, 40):
        for proj_dim, nnz in ((1, 1), (64, 64), (130, 2), (1000, 1), (5000, 1)):
            for name, dtype in (("two parts", torch.float32), ("one part", torch.float64)):
                layout = ("aligned", "odd")[rows % 2]
                case = SparseCase(name, dtype, layout, rows, proj_dim, nnz)
                case.full_blocks = nnz == 1
                cases.append(case)
    for offset in (0, 77, 2**62):
        cases.append(MatrixCase("sjlt", offset, 130, 33, 1))
    return cases
