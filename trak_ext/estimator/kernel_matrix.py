"""The kernel matrix of each checkpoint, its damped Cholesky factor, and what is solved with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _check

_ROWS_AT_ONCE = 4096  # rows of features that are held in fp64 at a time


class KernelAccumulator:
    """The kernel matrix of one checkpoint, in fp64, from features that come a few rows at a time.

    The bits depend on how rows are cut into calls.

    Args:
        proj_dim: Features a sample, k.
        device: Of the matrix.
        matrix: fp64 [k, k] to add to instead, on any device.
    """

    def __init__(
        self,
        proj_dim: int,
        device: torch.device | str = "cpu",
        matrix: Tensor | None = None,
    ) -> None:
        if matrix is None:
            matrix = torch.zeros((proj_dim, proj_dim), dtype=torch.float64, device=device)
        self.matrix = matrix

    def add(self, features: Tensor, curvature: Tensor | None = None) -> None:
        """Add the samples of `features` [n, k], weighted by `curvature` [n]."""
        for start in range(0, features.shape[0], _ROWS_AT_ONCE):
            rows = features[start : start + _ROWS_AT_ONCE].double()
            if curvature is None:
                self.matrix.addmm_(rows.T, rows)
            else:
                weights = curvature[start : start + _ROWS_AT_ONCE].double()
                self.matrix.addmm_((rows * weights[:, None]).T, rows)


def as_features(name: str, value: Any) -> Tensor:
    """Return features as [M, n, k]."""
    tensor = _check.float_tensor(name, value, "[M, n, k] or [n, k]", (2, 3))
    _check.on_device_with_kernels(name, tensor)
    tensor = tensor.detach().resolve_neg()  # kernels read memory, not the negative bit
    return tensor if tensor.dim() == 3 else tensor[None]


def as_per_sample(name: str, value: Any, features: Tensor) -> Tensor | None:
    """Return weights or curvature as [M, n], which must be where features are."""
    if value is None:
        return None
    tensor = _check.float_tensor(name, value, "[M, n] (or [n] where M = 1)", (1, 2))
    tensor = tensor.detach().resolve_neg()
    _check.on_device_of(name, tensor, "features", features)
    if tensor.dim() == 1 and features.shape[0] == 1:
        tensor = tensor[None]
    _check.shape_is(name, tensor, tuple(features.shape[:2]), "[M, n]")
    return tensor


def kernel_matrix(features: Tensor, curvature: Tensor | None = None) -> Tensor:
    """Return the kernel matrix of each checkpoint, with rows weighted by the loss's curvature R.

    Args:
        features: [M, n, k], or [n, k] for one checkpoint.
        curvature: R = d^2 loss / df^2 of each sample, [M, n] (or [n]); None for ones.

    Returns:
        fp64 [M, k, k] ([k, k] for features [n, k]): the sum over samples of R_i phi_i phi_i^T.
    """
    stacked = as_features("features", features)
    weights = as_per_sample("curvature", curvature, stacked)
    kernels = []
    for m in range(stacked.shape[0]):
        accumulator = KernelAccumulator(stacked.shape[2], stacked.device)
        accumulator.add(stacked[m], None if weights is None else weights[m])
        kernels.append(accumulator.matrix)
    if features.dim() == 2:
        return kernels[0]
    return torch.stack(kernels) if kernels else stacked.new_zeros((0,) + stacked.shape[2:] * 2)


def factor_kernel(kernel: Tensor, damping: float, ridge: float) -> Tensor:
    """Return the Cholesky factor L [k, k] of K + lambda I, fp64, lambda = damping tr(K)/k + ridge.

    Raises ValueError, naming damping and K's condition, where that matrix is not positive definite.
    """
    kernel = kernel.double()
    if not torch.isfinite(kernel).all():
        raise ValueError("kernel: expected finite entries, got NaN or Inf")
    size = kernel.shape[0]
    shift = damping * (float(kernel.trace()) / max(size, 1)) + ridge
    damped = kernel.clone()
    damped.diagonal().add_(shift)
    factor, info = torch.linalg.cholesky_ex(damped)
    # A factor that rounding alone kept positive is no inverse: its smallest pivot would be noise.
    pivots = factor.diagonal().square()
    noise = size * torch.finfo(torch.float64).eps * damped.diagonal().max() if size else 0.0
    if info != 0 or (size and pivots.min() <= noise):
        eigenvalues = torch.linalg.eigvalsh(damped)
        raise ValueError(
            f"damping: expected a value that makes the kernel matrix positive definite, got "
            f"damping={damping:g} and ridge={ridge:g} with eigenvalues from "
            f"{float(eigenvalues[0]):.3g} to {float(eigenvalues[-1]):.3g} (too few samples for "
            f"proj_dim={size}, or features that depend on each other; damping=1.0 is a good start)"
        )
    return factor


def solve_targets(factor: Tensor, targets: Tensor) -> Tensor:
    """Return (L L^T)^-1 applied to every row of `targets` [t, k]: fp64 [t, k]."""
    return torch.cholesky_solve(targets.double().T, factor).T


def leverages(factor: Tensor, features: Tensor, curvature: Tensor | None) -> Tensor:
    """Return h_i = R_i phi_i^T (L L^T)^-1 phi_i for rows phi_i of `features` [n, k]: fp64 [n]."""
    parts = [features.new_zeros(0, dtype=torch.float64)]
    for start in range(0, features.shape[0], _ROWS_AT_ONCE):
        rows = features[start : start + _ROWS_AT_ONCE].double()
        half = torch.linalg.solve_triangular(factor, rows.T, upper=False)
        parts.append(half.square().sum(0))
    result = torch.cat(parts)
    return result if curvature is None else result * curvature.double()


def leverage_coefficients(leverage: Tensor, start: int = 0) -> Tensor:
    """Return 1 / (1 - h), refusing leverages so near 1 that rounding decides what comes out.

    Args:
        leverage: h of samples, [n].
        start: Number of the first sample, for the error.
    """
    if bool((leverage > 1 - 1e-6).any()):
        worst = int(leverage.argmax())
        raise ValueError(
            f"leverage: expected every leverage below 1 - 1e-6, got {float(leverage[worst]):.8g} "
            f"for sample {start + worst} (raise damping or ridge)"
        )
    return 1 / (1 - leverage)
