"""A CUDA device played on the host: what the self-test is handed in its own tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
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
        scoring = {"float": False, "double": True}
        for name, wide in scoring.items():
            for call in ("score", "top_k"):
                run = partial(self._score, getattr(self._scoring, f"cuda_{call}"), wide)
                setattr(self, f"cuda_{call}_{name}", run)

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

    def cuda_workspace_bytes(self, views: Any, *arguments: Any) -> int:
        """As `_C.cuda_workspace_bytes`: every tensor has the parts of those that were built."""
        rows, proj_dim, _, limit = arguments
        float32 = [(view[0], 1, *view[2:]) for view in views]
        passes = max(FEW_PASSES.values())
        return _C.cuda_workspace_bytes(float32, rows, proj_dim, passes, limit)

    def cuda_project(self, *arguments: Any) -> None:
        """As `_C.cuda_project`."""
        with self._faulty(self._projection, arguments[-5]):
            self._projection.cuda_project(*arguments)

    def cuda_fill_matrix(self, *arguments: Any) -> None:
        """As `_C.cuda_fill_matrix`."""
        with self._faulty(self._projection, "matrix"):
            self._projection.cuda_fill_matrix(*arguments)

    def cuda_project_sjlt(self, *arguments: Any) -> None:
        """As `_C.cuda_project_sjlt`."""
        with self._faulty(self.sparse, "sparse"):
            self.sparse.cuda_project_sjlt(*arguments)

    def cuda_fill_sjlt_matrix(self, *arguments: Any) -> None:
        """As `_C.cuda_fill_sjlt_matrix`."""
        with self._faulty(self.sparse, "sparse matrix"):
            self.sparse.cuda_fill_sjlt_matrix(*arguments)

    def _score(self, run: Any, wide: bool, *arguments: Any) -> None:
        path = next(argument for argument in arguments if isinstance(argument, str))
        with self._faulty(self._scoring, f"scoring {path}"):
            run(*arguments, wide=wide)


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

    def queue(self) -> tuple[int, int]:
        return 0, 0


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
