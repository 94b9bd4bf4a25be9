"""The single pass over training features: scores of samples for targets that are solved for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _C
from . import cuda_paths, operators
from .runtime import get_num_threads

_NAN_SCORES = "train_features: expected scores that can be ordered, got NaN"


class _Pair(NamedTuple):
    values: Tensor
    indices: Tensor


class TopK(_Pair):
    """The best training samples of each target: values and indices, both [t, k], best first.

    `Attributor` adds what the loaders say: `ids`, t lists of k sample ids, and `target_ids`, t ids;
    None where a loader gives none. A pair all the same: `values, indices = top_k`.
    """

    ids: list[list[int | str]] | None = None
    target_ids: list[int | str] | None = None


class SolvedTargets:
    """Targets with the inverse kernel applied, ready to meet training features block by block.

    Args:
        solved: K_m^-1 phi_m(z) / M of each checkpoint and target, [M, t, k], fp64.
        dtype: fp64, or fp32 for everything else; of the scores and of the arithmetic.
        precision: Of fp32 on a CUDA device, see `score`.
    """

    def __init__(self, solved: Tensor, dtype: torch.dtype, precision: str = "highest") -> None:
        self.dtype = dtype
        self._solved = solved.to(dtype).contiguous()
        self._parts = operators.PRECISIONS[precision]  # bf16 parts of an fp32 number

    @property
    def device(self) -> torch.device:
        """Where the targets are, and their scores will be."""
        return self._solved.device

    @property
    def num_targets(self) -> int:
        """How many targets there are."""
        return self._solved.shape[1]

    def _kernel(self, name: str) -> Any:
        return getattr(_C, name + ("_double" if self.dtype == torch.float64 else "_float"))

    def _cuda_path(self) -> str:
        return cuda_paths.scoring_path(self._solved.device, self.dtype)

    def _cuda_queue(self) -> tuple[int, int]:
        return operators.cuda_queue(self._solved.device)

    def _cuda_workspace_limit(self) -> int:
        return operators.CUDA_WORKSPACE_BYTES

    def _cuda_workspace(self, num_train: int, code: int, count: int) -> Tensor:
        """Return what scores (count 0) or a running top-k need on the device, 16-byte aligned."""
        num_checkpoints, num_targets, proj_dim = self._solved.shape
        size = self._kernel("cuda_scoring_workspace_bytes")(
            num_checkpoints,
            num_train,
            num_targets,
            proj_dim,
            code,
            self._parts,
            count,
            self._cuda_workspace_limit(),
        )
        return torch.empty(size, dtype=torch.uint8, device=self._solved.device)

    def _arguments(
        self, features: Sequence[Tensor], weights: Tensor, coefficients: Tensor | None
    ) -> tuple[list[Any], list[Any]]:
        """Return the kernel's leading arguments, and what must outlive the call."""
        _, num_targets, proj_dim = self._solved.shape
        num_train = features[0].shape[0]
        rows = list(features)
        # The kernel reads one dtype as stored: its own, or a half type where its own is fp32.
        stored = rows[0].dtype
        readable = stored == self.dtype or (self.dtype == torch.float32 and stored.itemsize == 2)
        if not readable or any(phi.dtype != stored for phi in rows):
            rows = [phi.to(self.dtype) for phi in rows]
        rows = [phi if phi.stride(1) == 1 or proj_dim == 1 else phi.contiguous() for phi in rows]
        weights = weights.to(self.dtype).contiguous()
        keep: list[Any] = [rows, weights]
        coefficient_address = 0
        if coefficients is not None:
            coefficients = coefficients.to(self.dtype).contiguous()
            keep.append(coefficients)
            coefficient_address = coefficients.data_ptr()
        arguments = [
            [phi.data_ptr() for phi in rows],
            [phi.stride(0) for phi in rows],
            operators.DTYPE_CODES[rows[0].dtype],
            num_train,
            num_targets,
            proj_dim,
            self._solved.data_ptr(),
            coefficient_address,
            weights.data_ptr(),
        ]
        return arguments, keep

    def score(
        self, features: Sequence[Tensor], weights: Tensor, coefficients: Tensor | None = None
    ) -> Tensor:
        """Return scores [n, t] of samples with features M x [n, k] and weights [n].

        `coefficients` [M, n] scale each checkpoint's term.
        """
        num_train, num_targets = features[0].shape[0], self._solved.shape[1]
        out = self._solved.new_empty((num_train, num_targets))
        if out.device.type == "cuda":
            self._cuda_score(features, weights, coefficients, out)
            return out
        arguments, keep = self._arguments(features, weights, coefficients)
        self._kernel("score")(*arguments, out.data_ptr(), get_num_threads())
        del keep
        return out

    def _cuda_score(
        self,
        features: Sequence[Tensor],
        weights: Tensor,
        coefficients: Tensor | None,
        out: Tensor,
    ) -> None:
        path = self._cuda_path()
        arguments, keep = self._arguments(features, weights, coefficients)
        workspace = self._cuda_workspace(features[0].shape[0], arguments[2], 0)
        self._kernel("cuda_score")(
            *arguments,
            self._parts,
            path,
            out.data_ptr(),
            *out.stride(),
            workspace.data_ptr(),
            workspace.numel(),
            *self._cuda_queue(),
        )
        del keep

    def top_k(
        self,
        features: Sequence[Tensor],
        weights: Tensor,
        k: int,
        largest: bool = True,
        coefficients: Tensor | None = None,
    ) -> TopK:
        """Return the best k of the same scores for each target without holding them all."""
        weights = weights if largest else -weights
        if self._solved.device.type == "cuda":
            values, indices = self._cuda_top_k(features, weights, k, coefficients)
            return TopK(values if largest else -values, indices)
        arguments, keep = self._arguments(features, weights, coefficients)
        num_targets = self._solved.shape[1]
        values = self._solved.new_empty((num_targets, k))
        indices = self._solved.new_empty((num_targets, k), dtype=torch.int64)
        addresses = (values.data_ptr(), indices.data_ptr())
        finite = self._kernel("top_k")(*arguments, k, *addresses, get_num_threads())
        del keep
        if not finite:
            raise ValueError(_NAN_SCORES)
        return TopK(values if largest else -values, indices)

    def _cuda_top_k(
        self, features: Sequence[Tensor], weights: Tensor, k: int, coefficients: Tensor | None
    ) -> TopK:
        """Return the k largest; waits for the device to know that no score is NaN."""
        if k > _C.CUDA_TOP_K_MAX:
            return self._cuda_top_k_in_blocks(features, weights, k, coefficients)
        best, not_a_number = self._launch_cuda_top_k(features, weights, k, coefficients)
        if bool(not_a_number):
            raise ValueError(_NAN_SCORES)
        return best

    def _launch_cuda_top_k(
        self, features: Sequence[Tensor], weights: Tensor, k: int, coefficients: Tensor | None
    ) -> tuple[TopK, Tensor]:
        """Start looking for the k largest; return them and a flag [1], not 0 if a score is NaN."""
        num_targets, device = self._solved.shape[1], self._solved.device
        path = self._cuda_path()
        arguments, keep = self._arguments(features, weights, coefficients)
        values = self._solved.new_empty((num_targets, k))
        indices = torch.empty((num_targets, k), dtype=torch.int64, device=device)
        not_a_number = torch.zeros(1, dtype=torch.int32, device=device)
        workspace = self._cuda_workspace(features[0].shape[0], arguments[2], k)
        self._kernel("cuda_top_k")(
            *arguments,
            self._parts,
            path,
            k,
            values.data_ptr(),
            indices.data_ptr(),
            not_a_number.data_ptr(),
            workspace.data_ptr(),
            workspace.numel(),
            *self._cuda_queue(),
        )
        del keep
        return TopK(values, indices), not_a_number

    def _cuda_top_k_in_blocks(
        self, features: Sequence[Tensor], weights: Tensor, k: int, coefficients: Tensor | None
    ) -> TopK:
        """Return the k largest for a k above the kernel's: scores of some samples at a time."""
        num_train, num_targets = features[0].shape[0], self._solved.shape[1]
        row_bytes = max(1, num_targets * self._solved.element_size())
        step = max(k, operators.CUDA_WORKSPACE_BYTES // row_bytes)
        best = TopK(
            self._solved.new_empty((num_targets, 0)),
            torch.empty((num_targets, 0), dtype=torch.int64, device=self._solved.device),
        )
        for start in range(0, num_train, step):
            rows = slice(start, start + step)
            part = None if coefficients is None else coefficients[:, rows]
            scores = self.score([phi[rows] for phi in features], weights[rows], part).T
            if bool(scores.isnan().any()):
                raise ValueError(_NAN_SCORES)
            end = start + scores.shape[1]
            indices = torch.arange(start, end, device=scores.device).expand(num_targets, -1)
            best = merge_top_k(best, TopK(scores, indices), k)
        return best


def merge_top_k(first: TopK, second: TopK, k: int, largest: bool = True) -> TopK:
    """Return the best k of two lists, of which `first` holds the lower indices."""
    values = torch.cat([first.values, second.values], 1)
    indices = torch.cat([first.indices, second.indices], 1)
    # Stable, and equal values already stand with the lower index first.
    values, order = values.sort(dim=1, descending=largest, stable=True)
    return TopK(values[:, :k].contiguous(), indices.gather(1, order[:, :k]))
