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


def views_of(
    grads: Sequence[tuple[Tensor, int]],
) -> list[tuple[int, int, int, int, int, int]]:
    """Return gradients, each with its param_offset, as `_C` takes them."""
    return [
        (
            *(grad.data_ptr(), operators.DTYPE_CODES[grad.dtype], grad.shape[1]),
            *(grad.stride(0), grad.stride(1), offset),
        )
        for grad, offset in grads
    ]


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

    def queue(self) -> tuple[int, int]:
        """Return the device's number and the current stream's address."""
        return operators.cuda_queue(self.device)

    def send(self, buffer: Tensor) -> Tensor:
        """Return a host buffer's copy on the device."""
        return buffer.to(self.device)

    def fetch(self, buffer: Tensor) -> Tensor:
        """Return a device buffer's copy on the host, when all work is done."""
        return buffer.cpu()

    def project(
        self,
        path: str,
        grads: Sequence[tuple[Tensor, int]],
        out: Tensor,
        law: tuple[int, int, int, int],
        precision: str,
        least_workspace: bool = False,
    ) -> None:
        """Add projections of gradients [B, P_i], each at its param_offset, to `out` [B, k]."""
        views = views_of(grads)
        rows, proj_dim = out.shape
        limit = 0 if least_workspace else operators.CUDA_WORKSPACE_BYTES
        passes = operators.PRECISIONS[precision]
        size = self.native.cuda_workspace_bytes(views, rows, proj_dim, passes, limit)
        workspace = torch.full((size,), _STALE, dtype=torch.uint8, device=self.device)
        self.native.cuda_project(
            views,
            *(rows, out.data_ptr(), proj_dim, *out.stride()),
            *law,
            passes,
            path,
            workspace.data_ptr(),
            size,
            *self.queue(),
        )

    def fill_matrix(self, law: tuple[int, int, int, int], param_offset: int, out: Tensor) -> None:
        """Fill in rows of the matrix [P, k]."""
        self.native.cuda_fill_matrix(*law, param_offset, *out.shape, out.data_ptr(), *self.queue())

    def project_sparse(
        self,
        grads: Sequence[tuple[Tensor, int]],
        out: Tensor,
        law: tuple[int, int, int, int, int],
        least_workspace: bool = False,
        full_blocks: bool = False,
    ) -> None:
        """Add sparse projections of gradients [B, P_i], each at its param_offset, to `out`.

        full_blocks: By the kernels of as many rows as there are, which large problems get.
        """
        views = views_of(grads)
        limit = 0 if least_workspace else operators.CUDA_WORKSPACE_BYTES
        size = self.native.cuda_sjlt_workspace_bytes(views, out.shape[0], law, limit)
        workspace = torch.full((size,), _STALE, dtype=torch.uint8, device=self.device)
        output = (out.shape[0], out.data_ptr(), *out.stride())
        space = (workspace.data_ptr(), size)
        queue = self.queue()
        self.native.cuda_project_sjlt(views, *output, law, full_blocks, *space, *queue)

    def fill_sparse_matrix(
        self, law: tuple[int, int, int, int, int], param_offset: int, out: Tensor
    ) -> None:
        """Fill in rows of the sparse matrix [P, k]."""
        part = (param_offset, out.shape[0], out.data_ptr())
        self.native.cuda_fill_sjlt_matrix(law, *part, *self.queue())

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

    def _kernel(self, name: str) -> Any:
        suffix = "_double" if self.dtype == torch.float64 else "_float"
        return getattr(self._kernels.native, name + suffix)

    def _cuda_path(self) -> str:
        return self._path

    def _cuda_queue(self) -> tuple[int, int]:
        return self._kernels.queue()

    def _cuda_workspace_limit(self) -> int:
        return 0 if self._least_workspace else super()._cuda_workspace_limit()

    def _cuda_workspace(self, num_train: int, code: int, count: int) -> Tensor:
        return super()._cuda_workspace(num_train, code, count).fill_(_STALE)
