"""TRAK scores of features that are given as tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _check
from ..kernels import operators
from ..kernels.score_pass import TopK, blocks_on
from .formula import Estimator, KernelAccumulator, SampleBlock, Scorer


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
    estimator = _estimator(damping, ridge, leverage)
    training = TensorFeatures(
        train_features, target_features, weights, curvature, kernel, precision
    )
    return training.solved(estimator).score(training.device)


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

    All other arguments are as in `score`.

    Returns:
        TopK(values [t, k], indices [t, k]), best first, ties by lower index.
    """
    estimator = _estimator(damping, ridge, leverage)
    training = TensorFeatures(
        train_features, target_features, weights, curvature, kernel, precision
    )
    k = _check.integer("k", k, 0, training.num_samples)
    largest = _check.flag("largest", largest)
    return training.solved(estimator).top_k(k, largest, training.device)


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


class TensorFeatures:
    """Training features in tensors, with the targets that are scored: what `score` is given.

    As `trak_ext.estimator.formula.TrainingFeatures`, with one projection block.
    """

    blocks = 1

    def __init__(
        self,
        train_features: Any,
        target_features: Any,
        weights: Any,
        curvature: Any,
        kernel: Any,
        precision: Any,
    ) -> None:
        self._train = train = _features("train_features", train_features)
        self._targets = targets = _features("target_features", target_features)
        if not (train.device.type == "cpu" and targets.device.type == "cuda"):
            _check.on_device_of("target_features", targets, "train_features", train)
        self._precision = _check.choice("precision", precision, operators.PRECISIONS)
        self.num_checkpoints, self.num_samples, proj_dim = train.shape
        if (
            train_features.dim() != target_features.dim()
            or targets.shape[0] != self.num_checkpoints
            or targets.shape[2] != proj_dim
        ):
            raise ValueError(
                f"target_features: expected [M, t, k] with M and k of train_features "
                f"{list(train_features.shape)}, got {_check.describe(target_features)}"
            )
        if self.num_checkpoints == 0 or proj_dim == 0:
            raise ValueError(
                f"train_features: expected at least one checkpoint and one feature, got "
                f"{_check.describe(train_features)}"
            )
        weights = _per_sample("weights", weights, train)
        self._curvature = _per_sample("curvature", curvature, train)
        for name, tensor in (("target_features", targets), ("weights", weights)):
            if tensor is not None and not torch.isfinite(tensor).all():
                raise ValueError(f"{name}: expected finite values, got NaN or Inf")
        self._dtype = (
            torch.float64 if torch.float64 in (train.dtype, targets.dtype) else torch.float32
        )
        self._weight = (
            train.new_ones(self.num_samples, dtype=self._dtype)
            if weights is None
            else weights.double().mean(0)
        )
        self._kernel = None
        if kernel is not None:
            _check.float_tensor("kernel", kernel, "[M, k, k]", (2, 3))
            _check.has_values("kernel", kernel)
            if kernel.device != targets.device:
                _check.on_device_of("kernel", kernel, "train_features", train)
            self._kernel = kernel.detach() if kernel.dim() == 3 else kernel.detach()[None]
            expected = (self.num_checkpoints, proj_dim, proj_dim)
            _check.shape_is("kernel", self._kernel, expected, "[M, k, k]")
            _check_symmetric(self._kernel)
            self._check_finite()  # which the making of a kernel matrix would have told

    def _check_finite(self) -> None:
        for features in self._train:
            # A sum is NaN or Inf where a feature is; one pass, and no copy.
            if not torch.isfinite(features.sum(dtype=torch.float64)):
                raise ValueError("train_features: expected finite features, got NaN or Inf")
        if self._curvature is not None and not torch.isfinite(self._curvature).all():
            raise ValueError("curvature: expected finite values, got NaN or Inf")

    @property
    def device(self) -> torch.device:
        """Of the targets, and of their scores."""
        return self._targets.device

    def solved(self, estimator: Estimator) -> Scorer:
        """Return the scorer of these features, with all targets solved for."""
        scorer = Scorer(self, estimator, self.device, dtype=self._dtype, precision=self._precision)
        for targets in self._targets:
            scorer.solve([targets])
        return scorer

    def kernels(self, m: int) -> Tensor:
        """Return checkpoint m's kernel matrix, as given or made: fp64 [1, k, k]."""
        if self._kernel is not None:
            return self._kernel[m][None].to(self.device)
        accumulator = KernelAccumulator(self._train.shape[2], self.device)
        curvature = self.curvature(m)
        for rows, (features,) in blocks_on(self.device, [self._train[m]]):
            own = None if curvature is None else curvature[rows].to(self.device)
            accumulator.add(features, own)
        if not torch.isfinite(accumulator.matrix).all():
            raise ValueError(
                "train_features: expected finite features (and curvature), got NaN or Inf"
            )
        return accumulator.matrix[None]

    def kernels_key(self, m: int) -> None:
        """Return None: tensors do not tell themselves from others."""
        return None

    def curvature(self, m: int) -> Tensor | None:
        """Return R of each sample for checkpoint m, [n]; None for ones."""
        return None if self._curvature is None else self._curvature[m]

    def implied(self) -> Tensor:
        """Return no sums: tensors of features do not say what damping their fit implies."""
        return torch.zeros((1, self._train.shape[2] + 3), dtype=torch.float64, device="cpu")

    def weight(self) -> Tensor:
        """Return each sample's mean Q, [n]."""
        return self._weight

    def samples(self, checkpoints: Sequence[int] | None = None) -> Iterator[SampleBlock]:
        """Yield all samples at once, with the features of the checkpoints (None for all)."""
        chosen = range(self.num_checkpoints) if checkpoints is None else checkpoints
        if self.num_samples:
            yield SampleBlock(0, [self._train[m] for m in chosen], self._weight)


def _estimator(damping: Any, ridge: Any, leverage: Any) -> Estimator:
    return Estimator(_check.nonnegative("damping", damping), ridge, None, leverage)


def _check_symmetric(kernels: Tensor) -> None:
    """Refuse kernel matrices [M, k, k] that differ from their transpose by more than rounding."""
    tolerance = math.sqrt(torch.finfo(kernels.dtype).eps)
    for m, kernel in enumerate(kernels.double()):
        away = float((kernel - kernel.T).abs().max())
        if away > tolerance * float(kernel.abs().max()):  # NaN is refused where it is factored
            raise ValueError(
                f"kernel: expected a symmetric matrix, as kernel_matrix makes, got one for "
                f"checkpoint {m} that differs from its transpose by {away:.3g}"
            )


def _features(name: str, value: Any) -> Tensor:
    """Return features as [M, n, k]."""
    tensor = _check.float_tensor(name, value, "[M, n, k] or [n, k]", (2, 3))
    _check.has_values(name, tensor)
    _check.on_device_with_kernels(name, tensor)
    tensor = tensor.detach().resolve_neg()  # kernels read memory, not the negative bit
    return tensor if tensor.dim() == 3 else tensor[None]


def _per_sample(name: str, value: Any, features: Tensor) -> Tensor | None:
    """Return weights or curvature as [M, n], which must be where features are."""
    if value is None:
        return None
    tensor = _check.float_tensor(name, value, "[M, n] (or [n] where M = 1)", (1, 2))
    _check.has_values(name, tensor)
    tensor = tensor.detach().resolve_neg()
    _check.on_device_of(name, tensor, "features", features)
    if tensor.dim() == 1 and features.shape[0] == 1:
        tensor = tensor[None]
    _check.shape_is(name, tensor, tuple(features.shape[:2]), "[M, n]")
    return tensor
