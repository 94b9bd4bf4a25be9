"""Builds the CUDA sources of the sparse kind with the host's C++ compiler; calls by ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from trak_ext import _C

from .builds import HOST, SOURCES, build_runner, compile_host, shared_build
from .library import DTYPES, NOTE, Gradient, Launch, native_gradient

LIBRARY = "sjlt_host.so"


class Law(ctypes.Structure):
    _fields_ = [
        ("seed_low", ctypes.c_uint32),
        ("seed_high", ctypes.c_uint32),
        ("model_id", ctypes.c_uint32),
        ("width", ctypes.c_uint64),
        ("repetitions", ctypes.c_int64),
    ]


class Problem(ctypes.Structure):
    _fields_ = [
        ("law", Law),
        ("grads", ctypes.POINTER(Gradient)),
        ("num_grads", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        ("out_row_stride", ctypes.c_int64),
        ("out_column_stride", ctypes.c_int64),
    ]


class HostProblem(ctypes.Structure):
    _fields_ = [
        ("problem", Problem),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_int64),
        ("order_seed", ctypes.c_uint64),
        ("blocks_wanted", ctypes.c_int64),
    ]


class Matrix(ctypes.Structure):
    _fields_ = [
        ("law", Law),
        ("param_offset", ctypes.c_uint64),
        ("params", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("out", ctypes.c_void_p),
    ]


def make_law(proj_dim: int, nnz: int, seed: int, model_id: int) -> Law:
    return Law(seed & 0xFFFFFFFF, seed >> 32, model_id, proj_dim // nnz, nnz)


def native_law(matrix: _C.SparseMatrix) -> Law:
    """Take a matrix as `_C` does."""
    seed = (matrix.seed_low, matrix.seed_high)
    return Law(*seed, matrix.model_id, matrix.width, matrix.repetitions)


def make_views(tensors: Sequence[Tensor], param_offset: int) -> ctypes.Array[Gradient]:
    views = []
    for grad in tensors:
        size, row, param = grad.shape[1], grad.stride(0), grad.stride(1)
        views.append(Gradient(grad.data_ptr(), DTYPES[grad.dtype], size, row, param, param_offset))
        param_offset += size
    return (Gradient * len(views))(*views)


class SjltHostLibrary:
    """The sparse kind's kernels of one source tree; of the one that is tested without a folder."""

    def __init__(
        self,
        folder: Path | None = None,
        sources: Path = SOURCES,
        runner: list[str] | None = None,
    ) -> None:
        def compile_to(folder: Path) -> None:
            objects = runner or build_runner()
            source = str(HOST / "sjlt_host.cpp")
            compile_host([f"-I{sources / 'cuda'}", source, *objects, "-o", str(folder / LIBRARY)])

        if folder is None:
            folder = shared_build("sjlt", compile_to)
        else:
            compile_to(folder)
        library = folder / LIBRARY
        self._library = ctypes.CDLL(str(library))
        self._library.host_project.restype = ctypes.c_char_p
        self._library.host_fill_matrix.restype = ctypes.c_char_p
        self._library.host_sizeof_problem.restype = ctypes.c_int64
        self._library.host_workspace_bytes.restype = ctypes.c_int64
        self._library.host_blocks_wanted.restype = ctypes.c_int64
        assert self._library.host_sizeof_problem() == ctypes.sizeof(HostProblem)

    def project(
        self,
        grads: Tensor | Sequence[Tensor],
        proj_dim: int,
        *,
        nnz: int = 1,
        seed: int = 0,
        model_id: int = 0,
        param_offset: int = 0,
        out: Tensor | None = None,
        workspace_bytes: int | None = None,
        order_seed: int = 1,
        blocks_wanted: int = 0,
    ) -> Tensor:
        """Return the features by the CUDA kernels; a fault is a RuntimeError."""
        tensors = [grads] if isinstance(grads, Tensor) else list(grads)
        rows = tensors[0].shape[0]
        if out is None:
            out = torch.zeros(rows, proj_dim)
        views = make_views(tensors, param_offset)
        law = make_law(proj_dim, nnz, seed, model_id)
        strides = (out.stride(0), out.stride(1))
        problem = Problem(law, views, len(tensors), rows, out.data_ptr(), *strides)
        if workspace_bytes is None:
            workspace_bytes = self.workspace_bytes(problem, 2**26)
        workspace = torch.full((max(workspace_bytes // 4, 1),), float("nan"))
        host = HostProblem(
            problem, workspace.data_ptr(), workspace_bytes, order_seed, blocks_wanted
        )
        error = self._library.host_project(ctypes.byref(host))
        if error is not None:
            raise RuntimeError(error.decode())
        return out

    def workspace_bytes(self, problem: Problem, limit: int) -> int:
        """Return what a projection can use of the limit."""
        found = self._library.host_workspace_bytes(ctypes.byref(problem), ctypes.c_int64(limit))
        return int(found)

    def tile_columns(self, width: int) -> int:
        """Return how many columns a block takes."""
        return int(self._library.host_tile_columns(ctypes.c_uint64(width)))

    def matrix(
        self,
        num_params: int,
        proj_dim: int,
        nnz: int = 1,
        seed: int = 0,
        model_id: int = 0,
        param_offset: int = 0,
    ) -> Tensor:
        """Return rows of R by the CUDA kernels that fill them in."""
        out = torch.full((num_params, proj_dim), float("nan"))
        law = make_law(proj_dim, nnz, seed, model_id)
        problem = Matrix(law, param_offset, num_params, 0.0, out.data_ptr())
        error = self._library.host_fill_matrix(ctypes.byref(problem))
        if error is not None:
            raise RuntimeError(error.decode())
        return out

    @contextmanager
    def noting_launches(self) -> Iterator[list[Launch]]:
        """Note launches in the list instead of running them."""
        found: list[Launch] = []
        note = NOTE(lambda shown: found.append(Launch.of(shown.contents)))
        self._library.host_note_launches(note)
        try:
            yield found
        finally:
            self._library.host_note_launches(None)

    def plant(self, fault: int) -> None:
        """Plant a fault of runner.h in what is run from now on; 0 for none."""
        ctypes.c_int.in_dll(self._library, "host_planted").value = fault

    def cuda_project(
        self,
        projection: _C.SparseProjection,
        *,
        full_blocks: bool,
        workspace: int,
        workspace_bytes: int,
        **_: int,
    ) -> None:
        """Take what `_C.cuda_project` takes."""
        views, out = projection.grads, projection.out
        grads = (Gradient * len(views))(*map(native_gradient, views))
        law = native_law(projection.matrix)
        strides = (out.row_stride, out.column_stride)
        problem = Problem(law, grads, len(views), projection.rows, out.address, *strides)
        blocks_wanted = 0 if full_blocks else self._library.host_blocks_wanted()
        host = HostProblem(problem, workspace, workspace_bytes, 1, blocks_wanted)
        error = self._library.host_project(ctypes.byref(host))
        if error is not None:
            raise RuntimeError(error.decode())

    def cuda_fill_matrix(
        self, matrix: _C.SparseMatrix, *, param_offset: int, params: int, out: int, **_: int
    ) -> None:
        """Take what `_C.cuda_fill_matrix` takes."""
        problem = Matrix(native_law(matrix), param_offset, params, 0.0, out)
        error = self._library.host_fill_matrix(ctypes.byref(problem))
        if error is not None:
            raise RuntimeError(error.decode())
