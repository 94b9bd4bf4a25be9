"""TRAK scores from features: the kernel matrix, its damped inverse, and one pass over the samples.

The formulas are those of Park et al. 2023 ("TRAK: Attributing Model Behavior at Scale", section 3)
with the damping, curvature and leverage terms that docs of each function state.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _check
from ..kernels import operators
from ..kernels.score_pass import SolvedTargets, TopK
from ..kernels.streaming import score_streamed, stream_blocks, top_k_streamed
from .kernel_matrix import (
    KernelAccumulator,
    as_features,
    as_per_sample,
    factor_kernel,
    leverage_coefficients,
    leverages,
    solve_targets,
)


class _Prepared(NamedTuple):
    train: Tensor  # [M, n, k]
    targets: SolvedTargets
    weights: Tensor  # [n]
    coefficients: Tensor | None  # [M, n]
    streamed: bool  # whether features are on the CPU and targets on a CUDA device


def _prepare(
    train_features: Tensor,
    target_features: Tensor,
    weights: Tensor | None,
    damping: float,
    ridge: float,
    curvature: Tensor | None,
    leverage: bool,
    kernel: Tensor | None,
    precision: str,
) -> _Prepared:
    """Check every argument of `score` and do all of it but the pass over the samples."""
    damping = _check.nonnegative("damping", damping)
    ridge = _check.nonnegative("ridge", ridge)
    train = as_features("train_features", train_features)
    targets = as_features("target_features", target_features)
    streamed = train.device.type == "cpu" and targets.device.type == "cuda"
    if not streamed:
        _check.on_device_of("target_features", targets, "train_features", train)
    _check.choice("precision", precision, operators.PRECISIONS)
    checkpoints, num_train, proj_dim = train.shape
    if (
        train_features.dim() != target_features.dim()
        or targets.shape[0] != checkpoints
        or targets.shape[2] != proj_dim
    ):
        raise ValueError(
            f"target_features: expected [M, t, k] with M and k of train_features "
            f"{list(train_features.shape)}, got {_check.describe(target_features)}"
        )
    if checkpoints == 0 or proj_dim == 0:
        raise ValueError(
            f"train_features: expected at least one checkpoint and one feature, got "
            f"{_check.describe(train_features)}"
        )
    q = as_per_sample("weights", weights, train)
    r = as_per_sample("curvature", curvature, train)
    if not torch.isfinite(targets).all():
        raise ValueError("target_features: expected finite values, got NaN or Inf")
    if q is not None and not torch.isfinite(q).all():
        raise ValueError("weights: expected finite values, got NaN or Inf")
    given = (train.dtype, targets.dtype)
    dtype = torch.float64 if torch.float64 in given else torch.float32
    mean_q = train.new_ones(num_train, dtype=dtype) if q is None else q.double().mean(0)

    if kernel is not None:
        _check.float_tensor("kernel", kernel, "[M, k, k]", (2, 3))
        if kernel.device != targets.device:
            _check.on_device_of("kernel", kernel, "train_features", train)
        kernel = kernel.detach() if kernel.dim() == 3 else kernel.detach()[None]
        _check.shape_is("kernel", kernel, (checkpoints, proj_dim, proj_dim), "[M, k, k]")
    if num_train == 0:
        solved = torch.zeros_like(targets)
        return _Prepared(train, SolvedTargets(solved, dtype), mean_q, None, streamed)

    solved = targets.new_empty(targets.shape, dtype=torch.float64)
    coefficients = train.new_empty((checkpoints, num_train), dtype=dtype) if leverage else None
    for m in range(checkpoints):
        if kernel is None:
            accumulator = KernelAccumulator(proj_dim, targets.device)
            for features, curvature_rows in _rows_on(targets.device, train[m], r, m):
                accumulator.add(features, curvature_rows)
            matrix = accumulator.matrix
            if not torch.isfinite(matrix).all():
                raise ValueError(
                    "train_features: expected finite features (and curvature), got NaN or Inf"
                )
        else:
            matrix = kernel[m].to(targets.device)
        factor = factor_kernel(matrix, damping, ridge)
        solved[m] = solve_targets(factor, targets[m]) / checkpoints
        if coefficients is not None:
            parts = [leverages(factor, *rows) for rows in _rows_on(targets.device, train[m], r, m)]
            coefficients[m] = leverage_coefficients(torch.cat(parts))
    return _Prepared(train, SolvedTargets(solved, dtype, precision), mean_q, coefficients, streamed)


def _rows_on(
    device: torch.device, train: Tensor, curvature: Tensor | None, m: int
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield features [rows, k] of checkpoint m and their curvature on a device, some at a time."""
    if train.device == device:
        yield train, None if curvature is None else curvature[m]
        return
    for rows, (features,) in stream_blocks([train], device):
        yield features, None if curvature is None else curvature[m, rows].to(device)


def score(
    train_features: Tensor,
    target_features: Tensor,
    weights: Tensor | None = None,
    *,
    damping: float = 1.0,
    ridge: float = 0.0,
    curvature: Tensor | None = None,
    leverage: bool = False,
    kernel: Tensor | None = None,
    precision: str = "highest",
) -> Tensor:
    """Return how much each training sample speaks for each target.

    score[i, z] = (1/M sum_m c_mi phi_m(z)^T K_m^-1 phi_mi) (1/M sum_m Q_mi), with
    K_m = sum_i R_mi phi_mi phi_mi^T + lambda I and lambda = damping tr(K_m)/k + ridge (before it is
    added); Park et al. 2023, equation 17, is damping = 0 without curvature or leverage.

    Args:
        train_features: [M, n, k], or [n, k] for one checkpoint.
        target_features: [M, t, k], or [t, k].
        weights: Q = -d loss / df of each sample, [M, n] (or [n]); None for ones.
        damping: Multiple of the kernel's mean eigenvalue that is added to its diagonal, >= 0.
        ridge: Absolute amount added to the diagonal, >= 0.
        curvature: R = d^2 loss / df^2, [M, n] (or [n]); None for ones.
        leverage: Whether c_mi = 1 / (1 - h_mi), h_mi = R_mi phi_mi^T K_m^-1 phi_mi (the exact
            Newton step of leaving one out; Pregibon 1981), rather than 1.
        kernel: [M, k, k] (or [k, k]) from `kernel_matrix`, if known; without lambda.
        precision: On a CUDA device, how many bf16 parts fp32 features and solved targets are
            multiplied as: "medium" 1, "high" 2, "highest" 3, which is as accurate as fp32. Half
            features need no more parts than they have. Of no effect on fp64 and on the CPU.

    Returns:
        [n, t], fp64 (and fp64 throughout) if features are fp64, else fp32; n = 0 gives [0, t]. On
        the device of the targets, which is that of the other tensors. Only where targets are on a
        CUDA device may train_features, weights and curvature stay on the CPU: they are brought over
        some rows at a time.

    Raises:
        ValueError, TypeError: one sentence naming the argument; a kernel matrix that is not
            positive definite names damping.
    """
    prepared = _prepare(
        train_features,
        target_features,
        weights,
        damping,
        ridge,
        curvature,
        leverage,
        kernel,
        precision,
    )
    arguments = (list(prepared.train), prepared.weights, prepared.coefficients)
    if prepared.streamed:
        return score_streamed(prepared.targets, *arguments)
    return prepared.targets.score(*arguments)


def top_k(
    train_features: Tensor,
    target_features: Tensor,
    k: int,
    weights: Tensor | None = None,
    *,
    largest: bool = True,
    damping: float = 1.0,
    ridge: float = 0.0,
    curvature: Tensor | None = None,
    leverage: bool = False,
    kernel: Tensor | None = None,
    precision: str = "highest",
) -> TopK:
    """Return the k training samples with the largest (or smallest) scores of each target.

    The scores are those of `score`, but [n, t] is never held: memory grows with t * k a thread and
    with M * t * proj_dim.

    Args:
        k: 0 to n.
        largest: Whether to look for proponents (the largest scores) or opponents (the smallest).
        train_features, target_features, weights, damping, ridge, curvature, leverage, kernel,
            precision: As in `score`.

    Returns:
        TopK(values [t, k], indices [t, k]), best first, ties by lower index.
    """
    num_train = as_features("train_features", train_features).shape[1]
    k = _check.integer("k", k, 0, num_train)
    prepared = _prepare(
        train_features,
        target_features,
        weights,
        damping,
        ridge,
        curvature,
        leverage,
        kernel,
        precision,
    )
    arguments = (list(prepared.train), prepared.weights, k, largest, prepared.coefficients)
    if prepared.streamed:
        return top_k_streamed(prepared.targets, *arguments)
    return prepared.targets.top_k(*arguments)
