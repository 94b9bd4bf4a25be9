"""Builds the CUDA projection's sources with the host's C++ compiler and calls them with ctypes."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trak_ext import _C

from .builds import HOST, SOURCES, build_runner, compile_host, shared_build

KINDS = {"rademacher": 0, "normal": 1}
DTYPES = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
PASSES = {"plain": 0, "medium": 1, "high": 2, "highest": 3}
PATHS = ["plain", "mma", "wgmma"]
# The kernels of sm_90a, with the same passes.
WARPGROUP = "warpgroup "
# One path and two parts alone, to build sooner.
ONE_PATH = """
#include "projection/multipliers.h"
namespace trak_ext::cuda {{
Multiplier rademacher_multiplier(int, int64_t rows) {{ return {mma}; }}
Multiplier rademacher_warpgroup_multiplier(int, int64_t rows) {{ return {warpgroup}; }}
Multiplier normal_multiplier(int, int64_t, int64_t) {{ return {{}}; }}
Multiplier normal_warpgroup_multiplier(int, int64_t) {{ return {{}}; }}
Multiplier plain_multiplier(Kind) {{ return {{}}; }}
}}
"""
NOTHING = "(void)rows, Multiplier{}"
# All paths and every tile shape of one precision a kind: Rademacher in two parts, normal in one.
FEW = """
#include "projection/multipliers.h"
namespace trak_ext::cuda {
Multiplier rademacher_multiplier(int, int64_t rows) { return rademacher_tile<2>(rows); }
Multiplier rademacher_warpgroup_multiplier(int, int64_t rows) {
  return rademacher_warpgroup_tile<2>(rows);
}
Multiplier normal_multiplier(int, int64_t rows, int64_t shared_limit) {
  return normal_tile<1>(rows, shared_limit);
}
Multiplier normal_warpgroup_multiplier(int, int64_t rows) { return normal_warpgroup_tile<1>(rows); }
}
"""
LIBRARY = "projection_host.so"
FEW_PASSES = {"rademacher": 2, "normal": 1}


class Law(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_int),
        ("seed_low", ctypes.c_uint32),
        ("seed_high", ctypes.c_uint32),
        ("model_id", ctypes.c_uint32),
    ]


class Gradient(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
        ("params", ctypes.c_int64),
        ("row_stride", ctypes.c_int64),
        ("param_stride", ctypes.c_int64),
        ("param_offset", ctypes.c_uint64),
    ]


class Problem(ctypes.Structure):
    _fields_ = [
        ("law", Law),
        ("grad", Gradient),
        ("rows", ctypes.c_int64),
        ("proj_dim", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        ("out_row_stride", ctypes.c_int64),
        ("out_column_stride", ctypes.c_int64),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_int64),
        ("tile_for_rows", ctypes.c_int64),
        ("passes", ctypes.c_int),
        ("order_seed", ctypes.c_uint64),
        ("shared_limit", ctypes.c_int64),
        ("warpgroups", ctypes.c_int),
        ("multiprocessors", ctypes.c_int64),
    ]


class Matrix(ctypes.Structure):
    _fields_ = [
        ("law", Law),
        ("param_offset", ctypes.c_uint64),
        ("params", ctypes.c_int64),
        ("proj_dim", ctypes.c_int64),
        ("out", ctypes.c_void_p),
    ]


class Noted(ctypes.Structure):
    """Launch of runner.h."""

    _fields_ = [
        ("kernel", ctypes.c_char_p),
        ("argument", ctypes.c_void_p),
        ("argument_bytes", ctypes.c_int64),
        ("blocks", ctypes.c_int64),
        ("threads", ctypes.c_int),
        ("shared_bytes", ctypes.c_int),
    ]


NOTE = ctypes.CFUNCTYPE(None, ctypes.POINTER(Noted))


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel by its mangled name, and what it is launched with."""

    kernel: str
    argument: bytes
    blocks: int
    threads: int
    shared_bytes: int

    @classmethod
    def of(cls, noted: Any) -> Launch:
        """Copy what a note holds for as long as the call."""
        argument = ctypes.string_at(noted.argument, noted.argument_bytes)
        kernel = noted.kernel.decode()
        return cls(kernel, argument, noted.blocks, noted.threads, noted.shared_bytes)


def make_law(kind: str = "rademacher", seed: int = 0, model_id: int = 0) -> Law:
    return Law(KINDS[kind], seed & 0xFFFFFFFF, seed >> 32, model_id)


def native_law(matrix: _C.Matrix) -> Law:
    """Take a matrix as `_C` does."""
    return Law(matrix.kind, matrix.seed_low, matrix.seed_high, matrix.model_id)


def native_gradient(grad: _C.Gradient) -> Gradient:
    """Take a gradient as `_C` does."""
    strides = (grad.row_stride, grad.param_stride)
    return Gradient(grad.address, grad.dtype, grad.params, *strides, grad.param_offset)


def _compile(folder: Path, sources: Path, only: str | None, runner: list[str] | None) -> None:
    """Compile the kernels of a source tree into a folder."""
    files = [HOST / "projection_host.cpp"]
    if only is None:
        tiles = ("plain", "rademacher", "rademacher_warpgroup", "normal", "normal_warpgroup")
        files += [sources / "cuda" / "projection" / f"{name}_tiles.cu" for name in tiles]
    elif only == "few":
        files += [sources / "cuda" / "projection" / "plain_tiles.cu", folder / "few.cpp"]
        files[-1].write_text(FEW)
    else:
        makers = {"mma": NOTHING, "warpgroup": NOTHING}
        makers[only] = {
            "mma": "rademacher_tile<2>(rows)",
            "warpgroup": "rademacher_warpgroup_tile<2>(rows)",
        }[only]
        files.append(folder / "one_path.cpp")
        files[-1].write_text(ONE_PATH.format(**makers))
    flags = [f"-I{sources / 'cuda'}", "-O2" if only is None else "-O1", "-x", "c++"]
    objects = runner or build_runner()
    compile_host([*flags, *map(str, files), "-x", "none", *objects, "-o", str(folder / LIBRARY)])


class HostLibrary:
    """The kernels of one source tree; of the one that is tested where no folder is named.

    Or, to build sooner, `only` those for Rademacher in `high` of one path ("mma", "warpgroup"), or
    a precision a kind of each ("few").
    """

    def __init__(
        self,
        folder: Path | None = None,
        sources: Path = SOURCES,
        only: str | None = None,
        runner: list[str] | None = None,
    ) -> None:
        compile_to = functools.partial(_compile, sources=sources, only=only, runner=runner)
        if folder is None:
            folder = shared_build(f"projection_{'all' if only is None else only}", compile_to)
        else:
            compile_to(folder)
        library = folder / LIBRARY
        self._library = ctypes.CDLL(str(library))
        self._library.host_project.restype = ctypes.c_char_p
        self._library.host_fill_matrix.restype = ctypes.c_char_p
        self._library.host_find_path.restype = ctypes.c_char_p
        self._library.host_sizeof_problem.restype = ctypes.c_int64
        assert self._library.host_sizeof_problem() == ctypes.sizeof(Problem)

    def show_to(self, witness: Any) -> None:
        """Show every matrix instruction to a callback of witness.py, or to nobody (None)."""
        self._library.host_show_to(witness)

    def project(
        self,
        grads: Tensor,
        proj_dim: int,
        *,
        precision: str = "high",
        param_offset: int = 0,
        out: Tensor | None = None,
        workspace_bytes: int = 2**22,
        tile_for_rows: int = 0,
        order_seed: int = 1,
        shared_limit: int = 227 * 1024,
        multiprocessors: int = 2,
        **law: Any,
    ) -> Tensor:
        """Return grads @ R by the CUDA kernels; a fault is a RuntimeError."""
        if out is None:
            out = torch.zeros(grads.shape[0], proj_dim)
        workspace = torch.full((max(workspace_bytes // 4, 1),), float("nan"))
        problem = Problem(
            law=make_law(**law),
            grad=Gradient(
                grads.data_ptr(),
                DTYPES[grads.dtype],
                grads.shape[1],
                grads.stride(0),
                grads.stride(1),
                param_offset,
            ),
            rows=grads.shape[0],
            proj_dim=proj_dim,
            out=out.data_ptr(),
            out_row_stride=out.stride(0),
            out_column_stride=out.stride(1),
            workspace=workspace.data_ptr(),
            workspace_bytes=workspace_bytes,
            tile_for_rows=tile_for_rows,
            passes=PASSES[precision.removeprefix(WARPGROUP)],
            order_seed=order_seed,
            shared_limit=shared_limit,
            warpgroups=int(precision.startswith(WARPGROUP)),
            multiprocessors=multiprocessors,
        )
        error = self._library.host_project(ctypes.byref(problem))
        if error is not None:
            raise RuntimeError(error.decode())
        return out

    def launches(
        self,
        gradient: Gradient,
        rows: int,
        proj_dim: int,
        *,
        precision: str,
        out: int,
        workspace: int,
        workspace_bytes: int,
        tile_for_rows: int = 0,
        shared_limit: int = 227 * 1024,
        multiprocessors: int = 132,
        **law: Any,
    ) -> list[Launch]:
        """Return the launches of a projection, which are not run: addresses may be made up."""
        problem = Problem(
            law=make_law(**law),
            grad=gradient,
            rows=rows,
            proj_dim=proj_dim,
            out=out,
            out_row_stride=proj_dim,
            out_column_stride=1,
            workspace=workspace,
            workspace_bytes=workspace_bytes,
            tile_for_rows=tile_for_rows,
            passes=PASSES[precision.removeprefix(WARPGROUP)],
            order_seed=1,
            shared_limit=shared_limit,
            warpgroups=int(precision.startswith(WARPGROUP)),
            multiprocessors=multiprocessors,
        )
        found: list[Launch] = []
        note = NOTE(lambda shown: found.append(Launch.of(shown.contents)))
        self._library.host_note_launches(note)
        error = self._library.host_project(ctypes.byref(problem))
        self._library.host_note_launches(None)
        if error is not None:
            raise RuntimeError(error.decode())
        return found

    def cuda_project(
        self,
        projection: _C.Projection,
        *,
        path: str,
        workspace: int,
        workspace_bytes: int,
        **_: int,
    ) -> None:
        """Take what `_C.cuda_project` takes."""
        for grad in projection.grads:
            problem = Problem(
                law=native_law(projection.matrix),
                grad=native_gradient(grad),
                rows=projection.rows,
                proj_dim=projection.proj_dim,
                out=projection.out.address,
                out_row_stride=projection.out.row_stride,
                out_column_stride=projection.out.column_stride,
                workspace=workspace,
                workspace_bytes=workspace_bytes,
                tile_for_rows=0,
                passes=0 if path == "plain" else projection.precision,
                order_seed=1,
                shared_limit=227 * 1024,
                warpgroups=int(path == "wgmma"),
                multiprocessors=2,
            )
            error = self._library.host_project(ctypes.byref(problem))
            if error is not None:
                raise RuntimeError(error.decode())

    def cuda_fill_matrix(
        self,
        matrix: _C.Matrix,
        *,
        param_offset: int,
        params: int,
        proj_dim: int,
        out: int,
        **_: int,
    ) -> None:
        """Take what `_C.cuda_fill_matrix` takes."""
        problem = Matrix(native_law(matrix), param_offset, params, proj_dim, out)
        error = self._library.host_fill_matrix(ctypes.byref(problem))
        if error is not None:
            raise RuntimeError(error.decode())

    def plant(self, fault: int) -> None:
        """Plant a fault of runner.h in what is run from now on; 0 for none."""
        ctypes.c_int.in_dll(self._library, "host_planted").value = fault

    def matrix(self, num_params: int, proj_dim: int, param_offset: int = 0, **law: Any) -> Tensor:
        """Return rows of R by the CUDA kernel that fills them in."""
        out = torch.full((num_params, proj_dim), float("nan"))
        problem = Matrix(make_law(**law), param_offset, num_params, proj_dim, out.data_ptr())
        error = self._library.host_fill_matrix(ctypes.byref(problem))
        if error is not None:
            raise RuntimeError(error.decode())
        return out

    def find_path(self, wanted: str, best: str) -> str:
        """Return the path of that name where `best` is there."""
        path = ctypes.c_int()
        index = PATHS.index(best)
        error = self._library.host_find_path(wanted.encode(), index, ctypes.byref(path))
        if error is not None:
            raise RuntimeError(error.decode())
        return PATHS[path.value]
