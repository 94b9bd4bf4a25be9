"""Sparse projections, and rows of their matrix, with known answers: to the bit, in any dtype."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _C
from ..kernels import operators
from ..kernels.runtime import get_num_threads
from . import projections
from .buffers import BASE_ROWS, CPU, Memory, Slot, spread
from .cases import GUARD, describe_difference
from .projections import FIRST_PARAM, MODEL_ID, SEED_HIGH, SEED_LOW, VALUES, base_rows


def law_of(proj_dim: int, nnz: int) -> tuple[int, int, int, int, int]:
    """Return the matrix's arguments as `_C` takes them."""
    return operators.sjlt_law(proj_dim, nnz, SEED_LOW, SEED_HIGH, MODEL_ID)


def answers(name: str, proj_dim: int, nnz: int) -> Tensor:
    """Return 32 + base rows @ R, [8, proj_dim]: the CPU's, or the NumPy oracle's where asked."""
    return _answers(name, proj_dim, nnz, projections.by_reference())


@functools.cache
def _answers(name: str, proj_dim: int, nnz: int, by_reference: bool) -> Tensor:
    base = base_rows(name)
    params, offset = VALUES[name]
    out = torch.full((BASE_ROWS, proj_dim), 32.0, dtype=torch.float32, device=CPU)
    if by_reference:
        from .. import reference

        law = {"seed": SEED_HIGH << 32 | SEED_LOW, "model_id": MODEL_ID, "param_offset": offset}
        made = reference.project_sjlt(base.numpy(), proj_dim, nnz=nnz, out=out.numpy(), **law)
        return torch.from_numpy(made)
    views = [(base.data_ptr(), operators.DTYPE_CODES[base.dtype], params, params, 1, offset)]
    output = (BASE_ROWS, out.data_ptr(), proj_dim, 1)
    _C.project_sjlt(views, *output, law_of(proj_dim, nnz), get_num_threads())
    return out


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
        law = law_of(self.proj_dim, self.nnz)
        kernels.project_sparse(grads, out, law, self.least_workspace, self.full_blocks)

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


@dataclass
class SparseMatrixCase:
    """Rows of the sparse matrix."""

    param_offset: int
    params: int
    proj_dim: int
    nnz: int
    _out: Slot | None = None

    def reserve(self, inputs: Memory, outputs: Memory) -> None:
        """Take the place of the rows."""
        self._out = outputs.place((self.params, self.proj_dim), torch.float32, 7.0)

    def launch(self, kernels: Any, path: str, inputs: Tensor, outputs: Tensor) -> None:
        """Start filling them in."""
        assert self._out is not None
        law = law_of(self.proj_dim, self.nnz)
        kernels.fill_sparse_matrix(law, self.param_offset, self._out.view(outputs))

    def judge(self, outputs: Tensor) -> str | None:
        """Compare with the CPU's, or the oracle's."""
        assert self._out is not None
        if projections.by_reference():
            from .. import reference

            law = {"seed": SEED_HIGH << 32 | SEED_LOW, "model_id": MODEL_ID}
            made = reference.projection_matrix(
                *(self.params, self.proj_dim),
                kind="sjlt",
                nnz=self.nnz,
                param_offset=self.param_offset,
                **law,
            )
            expected = torch.from_numpy(made)
        else:
            expected = torch.empty(self.params, self.proj_dim, dtype=torch.float32, device=CPU)
            part = (self.param_offset, self.params, expected.data_ptr())
            _C.fill_sjlt_matrix(law_of(self.proj_dim, self.nnz), *part, get_num_threads())
        return describe_difference(str(self), self._out.view(outputs), expected)

    def __str__(self) -> str:
        return f"{self.params} rows of the sjlt matrix from {self.param_offset} on, nnz {self.nnz}"


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
        SparseMatrixCase(FIRST_PARAM, 301, 276, 3),
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
        cases.append(SparseMatrixCase(offset, 130, 33, 1))
    return cases
