"""The kernels of a CUDA device as the self-test calls them: on a path that it names, in a workspace
that is full of NaN, on a stream of their own.

The self-test is handed a `DeviceKernels` and asks nothing else for a device, so the tests hand it
one whose `native` functions run the kernels' source on the host.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from .. import _C
from ..kernels import operators
from ..kernels.runtime import cuda_version
from ..kernels.score_pass import SolvedTargets

# Of a block, on the device that lets it have most: `tiles` then names every tile that there is.
_SHARED_LIMIT = 227 * 1024
_STALE = 0xFF  # in every byte: NaN as a float of any width, and -1 as an index


def is_sparse(matrix: Any) -> bool:
    """Return whether a matrix is of the sparse kind."""
    return isinstance(matrix, _C.SparseMatrix)


class DeviceKernels:
    """What is tested on a CUDA device.

    Args:
        device: With its number.
        native: The functions of `_C` whose names begin with "cuda_", or the like of them.
        stream: "own", so that nobody's work is waited for; "late", the same behind work that takes
            a while; or "default".
    """

    # Features that scores are tested with, besides fp64.
    feature_dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)

    def __init__(self, device: torch.device, native: Any = _C, stream: str = "own") -> None:
        self.device = device
        self.native = native
        self._stream = stream

    def describe(self) -> str:
        """Return device, compute capability, driver and build, for a sentence."""
        build = _C.cuda_build()
        assert build is not None
        properties = torch.cuda.get_device_properties(self.device)
        driver, runtime = (
            cuda_version(build[name]) for name in ("driver_version", "runtime_version")
        )
        return (
            f"{self.device} ({properties.name}, compute capability {properties.major}."
            f"{properties.minor}, driver for CUDA {driver}; trak_ext "
            f"{metadata.version('trak-ext')}, built with CUDA {runtime} for "
            f"{build['architectures']})"
        )

    def is_capturing(self) -> bool:
        """Return whether work is being captured into a graph, and nothing may be waited for."""
        with torch.cuda.device(self.device):
            return torch.cuda.is_current_stream_capturing()

    def tiles(self, path: str) -> list[dict[str, Any]]:
        """Return a path's kernels as `_C.cuda_kernels` names them.

        The plain kernel, one a kind, stands there once for each precision.
        """
        if path == "plain":
            return [
                {"kind": kind, "passes": passes, "tile_rows": 8, "tile_columns": 256}
                for kind in ("rademacher", "normal")
                for passes in operators.PRECISIONS.values()
            ]
        kernels: list[dict[str, Any]] = self.native.cuda_kernels(path, _SHARED_LIMIT)
        return kernels

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Have the work go to the stream that was asked for."""
        make: Any = torch.cuda.default_stream if self._stream == "default" else torch.cuda.Stream
        with torch.cuda.device(self.device), torch.cuda.stream(make(self.device)):
            if self._stream == "late":
                torch.cuda._sleep(20_000_000)  # cycles
            yield

    def queue(self) -> dict[str, int]:
        """Return the device's number and the current stream's address, as `_C` takes them."""
        return operators.cuda_queue(self.device)

    def send(self, buffer: Tensor) -> Tensor:
        """Return a host buffer's copy on the device."""
        return buffer.to(self.device)

    def fetch(self, buffer: Tensor) -> Tensor:
        """Return a device buffer's copy on the host, when all work is done."""
        return buffer.cpu()

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
        """Add projections of gradients [B, P_i], each at its param_offset, to `out` [B, k].

        full_blocks: Of a sparse matrix, by the kernels of as many rows as there are, which large
        problems get; it has one path.
        """
        projection = operators.native_projection(matrix, grads, out, precision)
        limit = 0 if least_workspace else operators.CUDA_WORKSPACE_BYTES
        size = self.native.cuda_workspace_bytes(projection, limit)
        workspace = torch.full((size,), _STALE, dtype=torch.uint8, device=self.device)
        how = {"full_blocks": full_blocks} if is_sparse(matrix) else {"path": path}
        self.native.cuda_project(
            projection,
            **how,
            workspace=workspace.data_ptr(),
            workspace_bytes=size,
            **self.queue(),
        )

    def fill_matrix(self, matrix: Any, param_offset: int, out: Tensor) -> None:
        """Fill in rows of the matrix [P, k]."""
        rows = operators.matrix_rows(matrix, param_offset, out)
        self.native.cuda_fill_matrix(matrix, **rows, **self.queue())

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
        """Write scores [n, t] of features M x [n, k] for solved targets [M, t, k] to `out`."""
        targets = _StaleTargets(self, path, solved, precision, least_workspace)
        targets._cuda_score(features, weights, coefficients, out)

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
        """Write the best values and indices [t, count], and whether one is NaN [1], to `out`."""
        targets = _StaleTargets(self, path, solved, precision, least_workspace)
        count = out[0].shape[1]
        best, not_a_number = targets._launch_cuda_top_k(features, weights, count, coefficients)
        for to, made in zip(out, (*best, not_a_number), strict=True):
            to.copy_(made)


class _StaleTargets(SolvedTargets):
    """Targets whose scores take a given path through stale workspace."""

    def __init__(
        self,
        kernels: DeviceKernels,
        path: str,
        solved: Tensor,
        precision: str,
        least_workspace: bool,
    ) -> None:
        super().__init__(solved, solved.dtype, precision)
        self._kernels = kernels
        self._path = path
        self._least_workspace = least_workspace

    def _native(self) -> Any:
        return self._kernels.native

    def _cuda_path(self) -> str:
        return self._path

    def _cuda_queue(self) -> dict[str, int]:
        return self._kernels.queue()

    def _cuda_workspace(self, scoring: _C.Scoring, count: int) -> Tensor:
        limit = 0 if self._least_workspace else operators.CUDA_WORKSPACE_BYTES
        size = self._native().cuda_workspace_bytes(scoring, limit, count=count)
        return torch.full((size,), _STALE, dtype=torch.uint8, device=self._kernels.device)
