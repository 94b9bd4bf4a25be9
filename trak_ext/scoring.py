"""TRAK scores from features: the kernel matrix, its damped inverse, and one pass over the samples.

The formulas are those of Park et al. 2023 ("TRAK: Attributing Model Behavior at Scale", section 3)
with the damping, curvature and leverage terms that docs of each function state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _C, _check, ops
from .runtime import get_num_threads

_ROWS_AT_ONCE = 4096  # rows of features that are held in fp64 at a time
_NAN_SCORES = "train_features: expected scores that can be ordered, got NaN"


class TopK(NamedTuple):
    """The best training samples of each target: values and indices, both [t, k], best first."""

    values: Tensor
    indices: Tensor


class KernelAccumulator:
    """The kernel matrix of one checkpoint, in fp64, from features that come a few rows at a time.

    The bits depend on how rows are cut into calls.
    """

    def __init__(self, proj_dim: int, device: torch.device | str = "cpu") -> None:
        self.matrix = torch.zeros((proj_dim, proj_dim), dtype=torch.float64, device=device)

    def add(self, features: Tensor, curvature: Tensor | None = None) -> None:
        """Add the samples of `features` [n, k], weighted by `curvature` [n]."""
        for start in range(0, features.shape[0], _ROWS_AT_ONCE):
            rows = features[start : start + _ROWS_AT_ONCE].double()
            if curvature is None:
                self.matrix.addmm_(rows.T, rows)
            else:
                weights = curvature[start : start + _ROWS_AT_ONCE].double()
                self.matrix.addmm_((rows * weights[:, None]).T, rows)


def _features(name: str, value: Any) -> Tensor:
    """Return features as [M, n, k]."""
    tensor = _check.float_tensor(name, value, "[M, n, k] or [n, k]", (2, 3))
    _check.on_device_with_kernels(name, tensor)
    tensor = tensor.detach().resolve_neg()  # kernels read memory, not the negative bit
    return tensor if tensor.dim() == 3 else tensor[None]


def _per_sample(name: str, value: Any, features: Tensor) -> Tensor | None:
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
    stacked = _features("features", features)
    weights = _per_sample("curvature", curvature, stacked)
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


def leverage_coefficients(leverage: Tensor) -> Tensor:
    """Return 1 / (1 - h), refusing leverages so near 1 that rounding decides what comes out."""
    if bool((leverage > 1 - 1e-6).any()):
        worst = int(leverage.argmax())
        raise ValueError(
            f"leverage: expected every leverage below 1 - 1e-6, got {float(leverage[worst]):.8g} "
            f"for sample {worst} (raise damping or ridge)"
        )
    return 1 / (1 - leverage)


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
        self._parts = ops.PRECISIONS[precision]  # bf16 parts of an fp32 number

    def _kernel(self, name: str) -> Any:
        return getattr(_C, name + ("_double" if self.dtype == torch.float64 else "_float"))

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
            ops.CUDA_WORKSPACE_BYTES,
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
            ops.DTYPE_CODES[rows[0].dtype],
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
        arguments, keep = self._arguments(features, weights, coefficients)
        workspace = self._cuda_workspace(features[0].shape[0], arguments[2], 0)
        self._kernel("cuda_score")(
            *arguments,
            self._parts,
            out.data_ptr(),
            *out.stride(),
            workspace.data_ptr(),
            workspace.numel(),
            *ops.cuda_queue(out.device),
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
        values = torch.empty((num_targets, k), dtype=self.dtype)
        indices = torch.empty((num_targets, k), dtype=torch.int64)
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
        num_targets, device = self._solved.shape[1], self._solved.device
        if k > _C.CUDA_TOP_K_MAX:
            return self._cuda_top_k_in_blocks(features, weights, k, coefficients)
        arguments, keep = self._arguments(features, weights, coefficients)
        values = self._solved.new_empty((num_targets, k))
        indices = torch.empty((num_targets, k), dtype=torch.int64, device=device)
        not_a_number = torch.zeros(1, dtype=torch.int32, device=device)
        workspace = self._cuda_workspace(features[0].shape[0], arguments[2], k)
        self._kernel("cuda_top_k")(
            *arguments,
            self._parts,
            k,
            values.data_ptr(),
            indices.data_ptr(),
            not_a_number.data_ptr(),
            workspace.data_ptr(),
            workspace.numel(),
            *ops.cuda_queue(device),
        )
        del keep
        if bool(not_a_number):
            raise ValueError(_NAN_SCORES)
        return TopK(values, indices)

    def _cuda_top_k_in_blocks(
        self, features: Sequence[Tensor], weights: Tensor, k: int, coefficients: Tensor | None
    ) -> TopK:
        """Return the k largest for a k above the kernel's: scores of some samples at a time."""
        num_train, num_targets = features[0].shape[0], self._solved.shape[1]
        row_bytes = max(1, num_targets * self._solved.element_size())
        step = max(k, ops.CUDA_WORKSPACE_BYTES // row_bytes)
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


class _Prepared(NamedTuple):
    train: Tensor  # [M, n, k]
    targets: SolvedTargets
    weights: Tensor  # [n]
    coefficients: Tensor | None  # [M, n]


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
    train = _features("train_features", train_features)
    targets = _features("target_features", target_features)
    _check.on_device_of("target_features", targets, "train_features", train)
    _check.choice("precision", precision, ops.PRECISIONS)
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
    q = _per_sample("weights", weights, train)
    r = _per_sample("curvature", curvature, train)
    if not torch.isfinite(targets).all():
        raise ValueError("target_features: expected finite values, got NaN or Inf")
    if q is not None and not torch.isfinite(q).all():
        raise ValueError("weights: expected finite values, got NaN or Inf")
    given = (train.dtype, targets.dtype)
    dtype = torch.float64 if torch.float64 in given else torch.float32
    mean_q = train.new_ones(num_train, dtype=dtype) if q is None else q.double().mean(0)

    if kernel is not None:
        _check.float_tensor("kernel", kernel, "[M, k, k]", (2, 3))
        _check.on_device_of("kernel", kernel, "train_features", train)
        kernel = kernel.detach() if kernel.dim() == 3 else kernel.detach()[None]
        _check.shape_is("kernel", kernel, (checkpoints, proj_dim, proj_dim), "[M, k, k]")
    if num_train == 0:
        return _Prepared(train, SolvedTargets(torch.zeros_like(targets), dtype), mean_q, None)

    solved = targets.new_empty(targets.shape, dtype=torch.float64)
    coefficients = train.new_empty((checkpoints, num_train), dtype=dtype) if leverage else None
    for m in range(checkpoints):
        if kernel is None:
            accumulator = KernelAccumulator(proj_dim, train.device)
            accumulator.add(train[m], None if r is None else r[m])
            matrix = accumulator.matrix
            if not torch.isfinite(matrix).all():
                raise ValueError(
                    "train_features: expected finite features (and curvature), got NaN or Inf"
                )
        else:
            matrix = kernel[m]
        factor = factor_kernel(matrix, damping, ridge)
        solved[m] = solve_targets(factor, targets[m]) / checkpoints
        if coefficients is not None:
            h = leverages(factor, train[m], None if r is None else r[m])
            coefficients[m] = leverage_coefficients(h)
    return _Prepared(train, SolvedTargets(solved, dtype, precision), mean_q, coefficients)


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
        the device of the tensors, which is one for all.

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
    return prepared.targets.score(list(prepared.train), prepared.weights, prepared.coefficients)


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
    num_train = _features("train_features", train_features).shape[1]
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
    return prepared.targets.top_k(
        list(prepared.train), prepared.weights, k, largest, prepared.coefficients
    )
