"""Builds the CUDA scoring's sources with the host's C++ compiler and calls them with ctypes."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trak_ext import _C

from .builds import HOST, SOURCES, build_runner, compile_host, shared_build
from .library import DTYPES, PASSES, PATHS, WARPGROUP

# What precisions are prefixed with to name the other path.
MMA = ""
SCORER = """
#include "scoring/scorers.h"
trak_ext::cuda::Scorer<float> trak_ext::cuda::{name}_scorer(int parts, int64_t targets) {{
  (void)parts, (void)targets;
  return {scorer};
}}
"""
# A few kernels for fp32 features alone, to build sooner: "highest", and of the warpgroup's "high".
ONE_PATH = {
    MMA: "tile_scorer<DType::kFloat32, 3>(targets)",
    WARPGROUP: """parts == 2
      ? scorer_of_warpgroup_tile<WarpgroupScoringTile<DType::kFloat32, 2, 32, 2, 2>>()
      : scorer_of_warpgroup_tile<WarpgroupScoringTile<DType::kFloat32, 3, 32, 2, 2>>()""",
}
LIBRARY = "scoring_host.so"
AMPLE = 2**22  # bytes of workspace


class Scoring(ctypes.Structure):
    _fields_ = [
        ("num_checkpoints", ctypes.c_int64),
        ("num_train", ctypes.c_int64),
        ("num_targets", ctypes.c_int64),
        ("proj_dim", ctypes.c_int64),
        ("features", ctypes.c_void_p),
        ("feature_dtype", ctypes.c_int),
        ("row_strides", ctypes.c_void_p),
        ("solved", ctypes.c_void_p),
        ("coefficients", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("parts", ctypes.c_int),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_int64),
        ("features_bytes", ctypes.c_int64),
        ("tile_for_targets", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        ("out_row_stride", ctypes.c_int64),
        ("out_target_stride", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("indices", ctypes.c_void_p),
        ("not_a_number", ctypes.c_void_p),
        ("wide", ctypes.c_int),
        ("path", ctypes.c_int),
        ("multiprocessors", ctypes.c_int),
        ("order_seed", ctypes.c_uint64),
    ]


def _compile(folder: Path, sources: Path, only: str | None, runner: list[str] | None) -> None:
    """Compile the kernels of a source tree into a folder."""
    files = [HOST / "scoring_host.cpp"]
    for dtype in ("float32", "float16", "bfloat16"):
        for path in (MMA, WARPGROUP):
            name = dtype + ("_warpgroup" if path == WARPGROUP else "")
            if only is None or only == dtype:
                files.append(sources / "cuda" / "scoring" / f"scoring_{name}_tiles.cu")
            else:
                scorer = ONE_PATH[path] if (dtype, path) == ("float32", only) else "{}"
                files.append(folder / f"one_path_{name}.cpp")
                files[-1].write_text(SCORER.format(name=name, scorer=scorer))
    flags = [f"-I{sources / 'cuda'}", "-O2" if only is None else "-O1", "-x", "c++"]
    objects = runner or build_runner()
    compile_host([*flags, *map(str, files), "-x", "none", *objects, "-o", str(folder / LIBRARY)])


class ScoringLibrary:
    """The kernels of one source tree, those of one dtype, or a few of one path (see ONE_PATH).

    Of the tree that is tested where no folder is named.
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
            folder = shared_build(f"scoring_{'all' if only is None else only}", compile_to)
        else:
            compile_to(folder)
        library = folder / LIBRARY
        self._library = ctypes.CDLL(str(library))
        self._library.host_score.restype = ctypes.c_char_p
        self._library.host_sizeof_scoring.restype = ctypes.c_int64
        assert self._library.host_sizeof_scoring() == ctypes.sizeof(Scoring)

    def show_to(self, witness: Any) -> None:
        """Show every matrix instruction to a callback of witness.py, or to nobody (None)."""
        self._library.host_show_to(witness)

    def _run(
        self,
        features: Sequence[Tensor],
        solved: Tensor,
        *,
        precision: str,
        workspace_bytes: int,
        coefficients: Tensor | None = None,
        weights: Tensor | None = None,
        tile_for_targets: int | None = None,
        multiprocessors: int = 1,
        order_seed: int = 1,
        **rest: Any,
    ) -> None:
        path = "wgmma" if precision.startswith(WARPGROUP) else "mma"
        path = "plain" if precision == "plain" else path
        num_checkpoints, num_targets, proj_dim = solved.shape
        num_train = features[0].shape[0] if features else 0
        assert all(phi.shape == (num_train, proj_dim) for phi in features)
        assert all(phi.stride(1) == 1 or proj_dim <= 1 for phi in features)
        workspace = torch.full((workspace_bytes // 8 + 2,), float("nan"), dtype=torch.float64)
        shift = -workspace.data_ptr() % 16
        pointers = (ctypes.c_void_p * num_checkpoints)(*(phi.data_ptr() for phi in features))
        strides = (ctypes.c_int64 * num_checkpoints)(*(phi.stride(0) for phi in features))
        reach = max((phi.stride(0) for phi in features), default=0) * (num_train - 1) + proj_dim
        optional = {"coefficients": coefficients, "weights": weights}
        problem = Scoring(
            num_checkpoints=num_checkpoints,
            num_train=num_train,
            num_targets=num_targets,
            proj_dim=proj_dim,
            features=ctypes.cast(pointers, ctypes.c_void_p),
            feature_dtype=DTYPES[features[0].dtype] if features else 1,
            row_strides=ctypes.cast(strides, ctypes.c_void_p),
            solved=solved.data_ptr(),
            parts=PASSES[precision.removeprefix(WARPGROUP)],
            workspace=workspace.data_ptr() + shift,
            workspace_bytes=workspace_bytes,
            features_bytes=max(reach, 0) * features[0].element_size() if features else 0,
            tile_for_targets=num_targets if tile_for_targets is None else tile_for_targets,
            wide=solved.dtype == torch.float64,
            path=PATHS.index(path),
            multiprocessors=multiprocessors,
            order_seed=order_seed,
            **{name: tensor.data_ptr() for name, tensor in optional.items() if tensor is not None},
            **rest,
        )
        error = self._library.host_score(ctypes.byref(problem))
        if error is not None:
            raise RuntimeError(error.decode())

    def score(
        self,
        features: Sequence[Tensor],
        solved: Tensor,
        *,
        precision: str = "highest",
        out: Tensor | None = None,
        workspace_bytes: int = AMPLE,
        **arguments: Any,
    ) -> Tensor:
        """Return scores [n, t] by the CUDA kernels; a fault is a RuntimeError."""
        if out is None:
            shape = (features[0].shape[0], solved.shape[1])
            out = torch.full(shape, float("nan"), dtype=solved.dtype)
        self._run(
            features,
            solved,
            precision=precision,
            workspace_bytes=workspace_bytes,
            out=out.data_ptr(),
            out_row_stride=out.stride(0),
            out_target_stride=out.stride(1),
            count=-1,
            **arguments,
        )
        return out

    def top_k(
        self,
        features: Sequence[Tensor],
        solved: Tensor,
        count: int,
        *,
        precision: str = "highest",
        workspace_bytes: int = AMPLE,
        **arguments: Any,
    ) -> tuple[Tensor, Tensor, bool]:
        """Return values and indices [t, count], and whether a score was NaN."""
        values = torch.full((solved.shape[1], count), float("nan"), dtype=solved.dtype)
        indices = torch.full((solved.shape[1], count), -1)
        not_a_number = torch.zeros(1, dtype=torch.int32)
        self._run(
            features,
            solved,
            precision=precision,
            workspace_bytes=workspace_bytes,
            out=values.data_ptr(),
            count=count,
            indices=indices.data_ptr(),
            not_a_number=not_a_number.data_ptr(),
            **arguments,
        )
        return values, indices, bool(not_a_number)

    def plant(self, fault: int) -> None:
        """Plant a fault of runner.h in what is run from now on; 0 for none."""
        ctypes.c_int.in_dll(self._library, "host_planted").value = fault

    def cuda_score(self, scoring: _C.Scoring, **rest: Any) -> None:
        """Take what `_C.cuda_score` takes."""
        self._call(scoring, count=-1, **rest)

    def cuda_top_k(self, scoring: _C.Scoring, *, values: int, **rest: Any) -> None:
        """Take what `_C.cuda_top_k` takes."""
        self._call(scoring, out=values, **rest)

    def _call(
        self, scoring: _C.Scoring, *, path: str, device: int, stream: int, **rest: Any
    ) -> None:
        num_checkpoints = len(scoring.features)
        pointers = (ctypes.c_void_p * num_checkpoints)(*scoring.features)
        strides = (ctypes.c_int64 * num_checkpoints)(*scoring.row_strides)
        reach = max(scoring.row_strides) * (scoring.num_train - 1) + scoring.proj_dim
        problem = Scoring(
            num_checkpoints=num_checkpoints,
            num_train=scoring.num_train,
            num_targets=scoring.num_targets,
            proj_dim=scoring.proj_dim,
            features=ctypes.cast(pointers, ctypes.c_void_p),
            feature_dtype=scoring.feature_dtype,
            row_strides=ctypes.cast(strides, ctypes.c_void_p),
            solved=scoring.solved,
            coefficients=scoring.coefficients or None,
            weights=scoring.weights or None,
            parts=scoring.precision,
            features_bytes=reach * {0: 8, 1: 4}.get(scoring.feature_dtype, 2),
            tile_for_targets=scoring.num_targets,
            wide=scoring.dtype == 0,
            path=PATHS.index(path),
            multiprocessors=1,
            **rest,
        )
        error = self._library.host_score(ctypes.byref(problem))
        if error is not None:
            raise RuntimeError(error.decode())
