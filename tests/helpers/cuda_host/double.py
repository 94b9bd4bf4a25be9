"""A CUDA device played on the host: what the self-test is handed in its own tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from trak_ext import _C
from trak_ext.known_answers.kernels import DeviceKernels

from .library import FEW_PASSES, HostLibrary
from .scoring_library import ScoringLibrary
from .sjlt_library import SjltHostLibrary

# As in runner.h.
FAULTS = {
    "swapped halves": 1,
    "wrong stride": 2,
    "missing tail": 3,
    "wrong sign": 4,
    "dropped last chunk": 5,
    "stale workspace": 6,
}


class HostNative:
    """The functions of `_C` for CUDA, of which those that launch run on the host.

    Faults are planted in some of the paths of a family only: `faults["wgmma"]` in the projection,
    `faults["scoring mma"]` in scores, `faults["sparse"]` in the sparse kind's projection,
    `faults["matrix"]` and `faults["sparse matrix"]` in what fills matrices in.
    """

    def __init__(self) -> None:
        self._projection = HostLibrary(only="few")
        self._scoring = ScoringLibrary(only="float32")
        self.sparse = SjltHostLibrary()
        self.faults: dict[str, int | Exception] = {}
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(_C, name)

    @contextmanager
    def _faulty(self, library: Any, path: str) -> Iterator[None]:
        self.calls.append(path)
        fault = self.faults.get(path, 0)
        if isinstance(fault, Exception):
            raise fault
        library.plant(fault)
        try:
            yield
        finally:
            library.plant(0)

    def cuda_kernels(self, path: str, shared_limit: int) -> list[dict[str, Any]]:
        """Return those that were built."""
        kernels = _C.cuda_kernels(path, shared_limit)
        return [kernel for kernel in kernels if FEW_PASSES[kernel["kind"]] == kernel["passes"]]

    def cuda_workspace_bytes(self, problem: Any, limit: int, **rest: Any) -> int:
        """As `_C.cuda_workspace_bytes`: every tensor has the parts of those that were built."""
        if isinstance(problem, _C.Projection):
            problem = _C.Projection(
                matrix=problem.matrix,
                grads=[_as_float32(grad) for grad in problem.grads],
                rows=problem.rows,
                proj_dim=problem.proj_dim,
                out=problem.out,
                precision=max(FEW_PASSES.values()),
            )
        return _C.cuda_workspace_bytes(problem, limit, **rest)

    def cuda_project(self, projection: Any, **how: Any) -> None:
        """As `_C.cuda_project`."""
        sparse = isinstance(projection, _C.SparseProjection)
        library: Any = self.sparse if sparse else self._projection
        with self._faulty(library, "sparse" if sparse else how["path"]):
            library.cuda_project(projection, **how)

    def cuda_fill_matrix(self, matrix: Any, **rows: Any) -> None:
        """As `_C.cuda_fill_matrix`."""
        sparse = isinstance(matrix, _C.SparseMatrix)
        library: Any = self.sparse if sparse else self._projection
        with self._faulty(library, "sparse matrix" if sparse else "matrix"):
            library.cuda_fill_matrix(matrix, **rows)

    def cuda_score(self, scoring: _C.Scoring, **how: Any) -> None:
        """As `_C.cuda_score`."""
        with self._faulty(self._scoring, f"scoring {how['path']}"):
            self._scoring.cuda_score(scoring, **how)

    def cuda_top_k(self, scoring: _C.Scoring, **how: Any) -> None:
        """As `_C.cuda_top_k`."""
        with self._faulty(self._scoring, f"scoring {how['path']}"):
            self._scoring.cuda_top_k(scoring, **how)


def _as_float32(grad: _C.Gradient) -> _C.Gradient:
    names = ("address", "params", "row_stride", "param_stride", "param_offset")
    return _C.Gradient(dtype=1, **{name: getattr(grad, name) for name in names})


class HostKernels(DeviceKernels):
    """The kernels of a device with a number, played on the host."""

    feature_dtypes = (torch.float32,)

    def __init__(self, native: Any, index: int = 0) -> None:
        super().__init__(torch.device("cpu"), native)
        self.index = index
        self.capturing = False

    def describe(self) -> str:
        return f"cuda:{self.index} (played on the host)"

    def is_capturing(self) -> bool:
        return self.capturing

    def stream(self) -> Any:
        return nullcontext()

    def queue(self) -> dict[str, int]:
        return {"device": 0, "stream": 0}


class FewTiles(HostKernels):
    """Of a path only the smallest tile of one kind, and what its remainder gets: sooner done."""

    kind = "rademacher"

    def tiles(self, path):
        return [
            tile
            for tile in super().tiles(path)
            if (tile["kind"], tile["tile_rows"]) == (self.kind, 8)
            and tile["passes"] == FEW_PASSES[self.kind]
        ]
