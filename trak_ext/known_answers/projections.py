"""Projections, and rows of the matrix, with known answers."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import operators, projection
from .buffers import BASE_ROWS, CPU, Memory, Slot, integers, spread
from .cases import GUARD, describe_difference

SEED, MODEL_ID = 0x7F4A7C15_9E3779B9, 5
# Of the first parameter: odd, inside a block of every kernel, and with a high word in the counter.
FIRST_PARAM = 2**40 + 333


class _Values(NamedTuple):
    """Base rows [8, params] of a tensor of gradients, and where in the matrix it begins."""

    params: int
    param_offset: int


# Side by side, so that most begin at odd parameters. "two parts" has several chunks of superblocks;
# all have tails. The sum of |g| is below 2^22 in each.
VALUES = {
    "one part": _Values(1100, FIRST_PARAM),
    "two parts": _Values(2301, FIRST_PARAM + 1100),
    "three parts": _Values(1101, FIRST_PARAM + 3401),
    "fp16": _Values(517, FIRST_PARAM + 4502),
}
# What an fp32 tensor holds in each precision; and a tensor of another dtype in the same call.
FP32_VALUES = {"medium": "one part", "high": "two parts", "highest": "three parts"}
OTHER = {
    "medium": ("one part", torch.bfloat16),
    "high": ("fp16", torch.float16),
    "highest": ("one part", torch.float64),
}
# Of a tensor in memory: rows at multiples of 16 bytes, the matrix's row 0 at one, neither, and
# parameters that do not follow one another.
LAYOUTS = ("aligned", "aligned in the matrix", "odd", "strided")
NORMAL_TOLERANCE = 2.0**-20  # of |g_b| |R_j|, both 2-norms


@functools.cache
def base_rows(name: str) -> Tensor:
    """Return the integers [8, params]."""
    params = VALUES[name].params
    if name == "one part":
        return integers(1, (BASE_ROWS, params), 127)
    if name == "two parts":
        return integers(2, (BASE_ROWS, params), 2**11)
    if name == "fp16":
        return integers(3, (BASE_ROWS, params), 2**11 - 1)
    rows = integers(4, (BASE_ROWS, params), 127)
    rows[:, ::16] = integers(5, (BASE_ROWS, params), 2**17)[:, ::16]
    return rows


@functools.cache
def tolerances(name: str) -> Tensor:
    """Return what a normal projection of each base row may be off, [8, 1]."""
    norms = base_rows(name).norm(dim=1, keepdim=True)
    return NORMAL_TOLERANCE * math.sqrt(VALUES[name].params) * norms


_answers: dict[tuple[str, str, bool], Tensor] = {}
_by_reference = False


@contextmanager
def answers_by_reference() -> Iterator[None]:
    """Take answers from the NumPy oracle instead of the CPU's kernels; slow."""
    global _by_reference
    before, _by_reference = _by_reference, True
    try:
        yield
    finally:
        _by_reference = before


def by_reference() -> bool:
    """Return whether answers come from the NumPy oracle."""
    return _by_reference


def matrix_rows(kind: str, param_offset: int, params: int, proj_dim: int, nnz: int = 1) -> Tensor:
    """Return rows of the matrix, [params, proj_dim], as the answers have them."""
    source: Any = projection
    if _by_reference:
        from .. import reference as source
    place = {"param_offset": param_offset, "nnz": nnz}
    return torch.as_tensor(
        source.projection_matrix(params, proj_dim, kind=kind, **place, seed=SEED, model_id=MODEL_ID)
    )


def base_answers(name: str, kind: str, proj_dim: int) -> Tensor:
    """Return base rows @ R, [8, proj_dim], by the CPU's kernels; made once a process."""
    key = (name, kind, _by_reference)
    known = _answers.get(key)
    if known is None or known.shape[1] < proj_dim:
        base = base_rows(name)
        params, offset = VALUES[name]
        if _by_reference:
            known = (base.double() @ matrix_rows(kind, offset, params, proj_dim).double()).float()
        else:
            matrix: Any = {"kind": kind, "seed": SEED, "model_id": MODEL_ID}
            known = projection.project(
                base, proj_dim, **matrix, param_offset=offset, precision="highest"
            )
        _answers[key] = known
    return known[:, :proj_dim]


def matrix_of(kind: str, proj_dim: int, nnz: int = 1) -> Any:
    """Return the matrix as the kernels take it."""
    return operators.native_matrix(kind, SEED & 0xFFFFFFFF, SEED >> 32, MODEL_ID, proj_dim, nnz)


def place_gradients(memory: Memory, name: str, dtype: torch.dtype, layout: str, rows: int) -> Slot:
    """Reserve a place for `rows` rows of gradients, [rows, params]."""
    params, offset = VALUES[name]
    size = dtype.itemsize
    values = base_rows(name)
    if layout == "strided":
        return memory.place((rows, params), dtype, values, (1, rows + 1), is_base=True)
    pitch = -(-params // 16) * 16 + 16
    start = 0 if layout == "aligned" else offset * size % 16
    if layout == "odd":
        pitch, start = pitch + 1, start + size
    return memory.place((rows, params), dtype, values, (pitch, 1), start, is_base=True)


@functools.cache
def _before() -> Tensor:
    """Return what base rows of a result hold before, [8, 1]."""
    return torch.full((BASE_ROWS, 1), 32.0, dtype=torch.float32, device=CPU)


@dataclass
class ProjectionCase:
    """A projection of tensors, each (values, dtype, layout), into a result with a border."""

    kind: str
    precision: str
    rows: int
    proj_dim: int
    grads: list[tuple[str, torch.dtype, str]]
    least_workspace: bool = False
    transposed: bool = False  # the result
    rows_in_memory: int = 0  # of the tensors, which cases share
    _grads: list[Slot] = field(default_factory=list)
    _out: Slot | None = None

    def reserve(self, inputs: Memory, outputs: Memory) -> None:
        """Take places; the result begins as 32 in every base row."""
        rows = max(self.rows, self.rows_in_memory)
        self._grads = [
            inputs.shared((*grad, rows), functools.partial(place_gradients, inputs, *grad, rows))
            for grad in self.grads
        ]
        width = self.proj_dim + GUARD
        strides = (1, self.rows) if self.transposed else (width, 1)
        self._out = outputs.place(
            (self.rows, width), torch.float32, _before(), strides, is_base=True
        )

    def launch(self, kernels: Any, path: str, inputs: Tensor, outputs: Tensor) -> None:
        """Start the projection."""
        assert self._out is not None
        grads = [
            (slot.view(inputs)[: self.rows], VALUES[grad[0]].param_offset)
            for slot, grad in zip(self._grads, self.grads, strict=True)
        ]
        out = self._out.view(outputs)[:, : self.proj_dim]
        matrix = matrix_of(self.kind, self.proj_dim)
        kernels.project(matrix, path, grads, out, self.precision, self.least_workspace)

    def judge(self, outputs: Tensor) -> str | None:
        """Compare with the CPU's projection."""
        assert self._out is not None
        expected = _before().repeat(1, self.proj_dim + GUARD)
        bound = None
        for name, _, _ in self.grads:
            expected[:, : self.proj_dim] += base_answers(name, self.kind, self.proj_dim)
            if self.kind == "normal":
                bound = tolerances(name) if bound is None else bound + tolerances(name)
        return describe_difference(
            str(self),
            self._out.view(outputs),
            spread(expected, self.rows),
            None if bound is None else spread(bound, self.rows).abs(),
        )

    def __str__(self) -> str:
        dtypes = ", ".join(f"{str(dtype)[6:]} {layout}" for _, dtype, layout in self.grads)
        return (
            f"{self.kind} {self.precision}, {self.rows} rows, {self.proj_dim} columns, of {dtypes}"
        )


def tiles_of(kernels: Any, path: str) -> list[dict[str, Any]]:
    """Return the tiles of a path, smaller ones first."""
    return sorted(
        kernels.tiles(path), key=lambda tile: (tile["kind"], tile["passes"], tile["tile_rows"])
    )


def projection_cases(kernels: Any, path: str) -> list[ProjectionCase]:
    """Return the quick cases: every kernel once, and a batch of two tiles in the least workspace.

    A kernel gets as many rows as it takes, or 1 or 3 less; more columns than any tile; and an fp32
    tensor in two layouts beside one of another dtype.
    """
    precisions = {passes: name for name, passes in operators.PRECISIONS.items()}
    cases: list[ProjectionCase] = []
    tiles = tiles_of(kernels, path)
    for i, tile in enumerate(tiles):
        kind, passes = tile["kind"], tile["passes"]
        precision = precisions[passes]
        is_first = i == 0 or (tiles[i - 1]["kind"], tiles[i - 1]["passes"]) != (kind, passes)
        is_last = i + 1 == len(tiles) or tiles[i + 1]["kind"] != kind
        least_rows = 1 if is_first else tiles[i - 1]["tile_rows"] + 1
        rows = max(least_rows, tile["tile_rows"] - (0, 3, 1)[passes - 1])
        columns = 21 + max(t["tile_columns"] for t in tiles if t["kind"] == kind)
        values = FP32_VALUES[precision]
        grads = [(values, torch.float32, LAYOUTS[(i + shift) % 4]) for shift in (0, 2)]
        grads.append((*OTHER[precision], LAYOUTS[(i + 1) % 4]))
        cases.append(ProjectionCase(kind, precision, rows, columns, grads))
        if is_last:
            rows = tile["tile_rows"] + 5
            cases.append(ProjectionCase(kind, precision, rows, columns, grads[:1], True))
    rows = max((case.rows for case in cases), default=0)
    for case in cases:
        case.rows_in_memory = rows
    return cases


@dataclass
class MatrixCase:
    """Rows of the matrix."""

    kind: str
    param_offset: int
    params: int
    proj_dim: int
    nnz: int = 1
    _out: Slot | None = None

    def reserve(self, inputs: Memory, outputs: Memory) -> None:
        """Take the place of the rows."""
        self._out = outputs.place((self.params, self.proj_dim), torch.float32, 7.0)

    def launch(self, kernels: Any, path: str, inputs: Tensor, outputs: Tensor) -> None:
        """Start filling them in."""
        assert self._out is not None
        matrix = matrix_of(self.kind, self.proj_dim, self.nnz)
        kernels.fill_matrix(matrix, self.param_offset, self._out.view(outputs))

    def judge(self, outputs: Tensor) -> str | None:
        """Compare with the CPU's, to the bit."""
        assert self._out is not None
        shape = (self.param_offset, self.params, self.proj_dim)
        expected = matrix_rows(self.kind, *shape, self.nnz)
        return describe_difference(str(self), self._out.view(outputs), expected)

    def __str__(self) -> str:
        nnz = f", nnz {self.nnz}" if self.kind == "sjlt" else ""
        return f"{self.params} rows of the {self.kind} matrix from {self.param_offset} on{nnz}"


def matrix_cases(kernels: Any, path: str) -> list[MatrixCase]:
    """Return the quick cases: rows of either kind with tails at both ends."""
    return [MatrixCase(kind, FIRST_PARAM, 301, 277) for kind in ("rademacher", "normal")]
