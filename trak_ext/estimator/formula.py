"""The formula of TRAK, from features to scores, whether they lie in tensors or in a store.

Kernel matrix -> damping -> Cholesky factor -> solved targets -> leverage -> score pass; Park et al.
2023 ("TRAK: Attributing Model Behavior at Scale", section 3) with the damping, curvature and
leverage that `Estimator` states:

    score[i, z] = (1/M sum_m c_mi phi_m(z)^T (K_m + lambda_m I)^-1 phi_mi) (1/M sum_m Q_mi)
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .. import _check
from ..kernels.score_pass import RunningTopK, SolvedTargets, TopK
from .damping import choose_damping, ridge_of_sums

_ROWS_AT_ONCE = 4096  # rows of features that are held in fp64 at a time
_KERNEL_COLUMNS = 512  # of a kernel matrix, that are made at a time: from the diagonal down


@dataclass(frozen=True)
class Estimator:
    """How kernel matrices are damped and samples weighted; see `trak_ext.score`.

    Args:
        damping: Multiple of the kernel's mean eigenvalue that is added to its diagonal, or "auto"
            for the one that `choose_damping` gives.
        ridge: Absolute amount added to the diagonal.
        curvature: What kernel matrices weight samples by: None for 1, "own" for each checkpoint's
            R, "mean" for the mean of R over the checkpoints.
        leverage: Whether a sample's term is divided by 1 - h.
    """

    damping: float | str = "auto"
    ridge: float = 0.0
    curvature: str | None = "mean"
    leverage: bool = False

    def __post_init__(self) -> None:
        if self.damping != "auto":
            if isinstance(self.damping, str):
                raise ValueError(f"damping: expected a number or 'auto', got {self.damping!r}")
            object.__setattr__(self, "damping", _check.nonnegative("damping", self.damping))
        object.__setattr__(self, "ridge", _check.nonnegative("ridge", self.ridge))
        if self.curvature is not None:
            _check.choice("curvature", self.curvature, ("own", "mean"))
        object.__setattr__(self, "leverage", _check.flag("leverage", self.leverage))

    def settings(self) -> dict[str, Any]:
        """Return the options as JSON."""
        return {
            "damping": self.damping,
            "ridge": self.ridge,
            "curvature": self.curvature,
            "leverage": self.leverage,
        }


class SampleBlock(NamedTuple):
    """Consecutive training samples from number `start` on."""

    start: int
    features: list[Tensor]  # of each checkpoint and projection block: [rows, k]
    weight: Tensor  # [rows], mean Q over all checkpoints
    ids: list[int | str] | None = None


class TrainingFeatures(Protocol):
    """The training samples' features of M checkpoints with b projection blocks, wherever they lie.

    `trak_ext.estimator.scoring.TensorFeatures` holds tensors, `trak_ext.store.StoredFeatures` reads
    a store.
    """

    @property
    def num_samples(self) -> int:
        """Training samples, n."""

    @property
    def num_checkpoints(self) -> int:
        """Checkpoints, M."""

    @property
    def blocks(self) -> int:
        """Projection blocks, b."""

    def kernels(self, m: int) -> Tensor:
        """Return checkpoint m's kernel matrices, fp64 [b, k, k], where they are to be factored."""

    def kernels_key(self, m: int) -> Hashable:
        """Return what tells those matrices from others without making them; None for nothing."""

    def curvature(self, m: int) -> Tensor | None:
        """Return the weight of each sample in checkpoint m's kernel, [n]; None for ones."""

    def implied(self) -> Tensor:
        """Return `ImpliedRidge.sums` of each checkpoint and projection block, fp64 [M b, k + 3]."""

    def weight(self) -> Tensor:
        """Return each sample's mean Q over the checkpoints, [n]."""

    def samples(self, checkpoints: Sequence[int] | None = None) -> Iterator[SampleBlock]:
        """Yield all samples in order, with the features of the checkpoints (None for all)."""


# --- kernel matrix, factor, solve, leverage -------------------------------------------------------


class KernelAccumulator:
    """The kernel matrix of one checkpoint, in fp64, from features that come a few rows at a time.

    The bits depend on how rows are cut into calls.

    Args:
        proj_dim: Features per sample, k.
        device: Of the matrix.
    """

    def __init__(self, proj_dim: int, device: torch.device | str = "cpu") -> None:
        self._lower = torch.zeros((proj_dim, proj_dim), dtype=torch.float64, device=device)

    @property
    def matrix(self) -> Tensor:
        """The kernel matrix so far, [k, k]: symmetric to the bit."""
        whole = self._lower.clone()
        for start in range(0, len(whole), _KERNEL_COLUMNS):
            stop = start + _KERNEL_COLUMNS
            corner = whole[start:stop, start:stop].tril()
            whole[start:stop, start:stop] = corner + corner.tril(-1).T
            whole[start:stop, stop:] = whole[stop:, start:stop].T
        return whole

    def add(self, features: Tensor, curvature: Tensor | None = None) -> None:
        """Add the samples of `features` [n, k], weighted by `curvature` [n]."""
        for start in range(0, features.shape[0], _ROWS_AT_ONCE):
            rows = features[start : start + _ROWS_AT_ONCE].double()
            weighted = rows
            if curvature is not None:
                weighted = rows * curvature[start : start + _ROWS_AT_ONCE].double()[:, None]
            for column in range(0, rows.shape[1], _KERNEL_COLUMNS):
                columns = slice(column, column + _KERNEL_COLUMNS)
                self._lower[column:, columns].addmm_(weighted[:, column:].T, rows[:, columns])


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


class FactorCache:
    """Factors of damped kernel matrices, kept from one call to the next in bounded memory.

    Args:
        limit: Bytes that are kept at most; what does not fit is made anew each time.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept: dict[int, tuple[Hashable, list[Tensor]]] = {}

    def get(self, m: int, key: Hashable, make: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Return checkpoint m's factors for a key: those that were kept for it, or made ones."""
        if m in self._kept and self._kept[m][0] == key:
            return self._kept[m][1]
        self._kept.pop(m, None)
        factors = make()
        size = sum(factor.nbytes for _, kept in self._kept.values() for factor in kept)
        if size + sum(factor.nbytes for factor in factors) <= self._limit:
            self._kept[m] = (key, factors)
        return factors

    def clear(self) -> None:
        """Keep nothing."""
        self._kept.clear()


def solve_targets(factor: Tensor, targets: Tensor) -> Tensor:
    """Return (L L^T)^-1 applied to every row of `targets` [t, k]: fp64 [t, k]."""
    return torch.cholesky_solve(targets.double().T, factor).T


def leverages(factor: Tensor, features: Tensor, curvature: Tensor | None) -> Tensor:
    """Return h_i = R_i phi_i^T (L L^T)^-1 phi_i for rows phi_i of `features` [n, k]: fp64 [n].

    Features and the result may be on another device than the factor.
    """
    found = [features.new_zeros(0, dtype=torch.float64)]
    for start in range(0, features.shape[0], _ROWS_AT_ONCE):
        rows = features[start : start + _ROWS_AT_ONCE].to(factor.device).double()
        half = torch.linalg.solve_triangular(factor, rows.T, upper=False)
        found.append(half.square().sum(0).to(features.device))
    result = torch.cat(found)
    return result if curvature is None else result * curvature.double()


def leverage_coefficients(leverage: Tensor, start: int = 0) -> Tensor:
    """Return 1 / (1 - h), refusing leverages so near 1 that rounding decides what comes out.

    Args:
        leverage: h of samples, [n].
        start: Number of the first sample, for the error.
    """
    if not bool((leverage <= 1 - 1e-6).all()):  # NaN neither
        worst = int(leverage.nan_to_num(torch.inf).argmax())
        raise ValueError(
            f"leverage: expected every leverage below 1 - 1e-6, got {float(leverage[worst]):.8g} "
            f"for sample {start + worst} (raise damping or ridge)"
        )
    return 1 / (1 - leverage)


# --- from features to scores ----------------------------------------------------------------------


class Scorer:
    """Scores of training features by an estimator's options.

    Targets are solved for one checkpoint after the other; then one pass over the features gives all
    scores, or the best k.

    Args:
        training: The training samples' features.
        estimator: The options.
        device: Where the score pass runs: the CPU, or a CUDA device that features are streamed to.
        dtype: fp32 or fp64; of the scores.
        precision: Of fp32 on a CUDA device, as in `trak_ext.score`.
        damping: Chosen before, by checkpoint and projection block; None to choose here.
        cache: Keeps factors for the next scorer; None for none.
    """

    def __init__(
        self,
        training: TrainingFeatures,
        estimator: Estimator,
        device: torch.device,
        *,
        dtype: torch.dtype = torch.float32,
        precision: str = "highest",
        damping: Sequence[Sequence[float]] | None = None,
        cache: FactorCache | None = None,
    ) -> None:
        self._cache = cache
        self._training = training
        self._estimator = estimator
        self._device = device
        self._dtype = dtype
        self._precision = precision
        self._chosen = damping
        self._solved: list[Tensor] = []  # K^-1 phi(z), by checkpoint and projection block
        self._coefficients: list[Tensor] = []  # c_i, likewise, where leverage is asked for

    # --- targets, one checkpoint after the other --------------------------------------------------

    def damping(self, m: int, kernels: Tensor | None = None) -> list[float]:
        """Return the damping of checkpoint m's kernel matrices [b, k, k], as given or chosen."""
        if self._chosen is not None:
            return list(self._chosen[m])
        if not isinstance(self._estimator.damping, str):
            return [self._estimator.damping] * self._training.blocks
        kernels = self._training.kernels(m) if kernels is None else kernels
        weighted = self._estimator.curvature is not None
        implied = ridge_of_sums(self._training.implied(), curvature=weighted)
        return [choose_damping(kernel, self._training.num_samples, implied) for kernel in kernels]

    def factors(self, m: int) -> list[Tensor]:
        """Return the factor of each of checkpoint m's damped kernel matrices: fp64 [k, k]."""
        key = self._training.kernels_key(m)
        if self._cache is None or key is None:
            return self._make_factors(m)
        # "auto" chooses by the same features that the kernel matrices are made of.
        chosen = None if self._chosen is None else tuple(self._chosen[m])
        return self._cache.get(m, (key, self._estimator, chosen), lambda: self._make_factors(m))

    def _make_factors(self, m: int) -> list[Tensor]:
        kernels = self._training.kernels(m)
        pairs = zip(kernels, self.damping(m, kernels), strict=True)
        return [factor_kernel(kernel, d, self._estimator.ridge) for kernel, d in pairs]

    def solve(self, targets: Sequence[Tensor]) -> None:
        """Take the next checkpoint's targets, features [t, k] of each projection block.

        Raises ValueError where a damped kernel matrix is not positive definite (names damping), or
        where a leverage is 1.
        """
        if self._training.num_samples == 0:  # no kernel matrix, nor a score to make
            self._solved.extend(part.double() for part in targets)
            return
        m = len(self._solved) // self._training.blocks
        factors = self.factors(m)
        self._solved.extend(solve_targets(f, t) for f, t in zip(factors, targets, strict=True))
        if self._estimator.leverage:
            found: list[list[Tensor]] = [[] for _ in factors]
            for _, coefficients in self._leverages(m, factors):
                for kept, c in zip(found, coefficients, strict=True):
                    kept.append(c.to(self._dtype))
            self._coefficients.extend(torch.cat(parts) for parts in found)

    def _leverages(
        self, m: int, factors: list[Tensor]
    ) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """Yield phi_i^T K^-1 phi_i and c_i by projection block, for samples in order: fp64 [n].

        c_i = 1 / (1 - h_i), h_i = R_i phi_i^T K^-1 phi_i, with leverage; else 1.
        """
        curvature = self._training.curvature(m)
        for block in self._training.samples([m]):
            pairs = zip(factors, block.features, strict=True)
            plain = [leverages(factor, features, None) for factor, features in pairs]
            if not self._estimator.leverage:
                yield plain, [torch.ones_like(part) for part in plain]
                continue
            h = plain
            if curvature is not None:
                own = curvature[block.start : block.start + len(block.weight)].double()
                h = [part * own for part in plain]
            yield plain, [leverage_coefficients(part, block.start) for part in h]

    # --- the pass over the training samples -------------------------------------------------------

    def score(self, out_device: torch.device) -> Tensor:
        """Return the scores [n, t] of the solved targets, on a device."""
        targets = self._targets()
        shape = (self._training.num_samples, targets.num_targets)
        scores: Tensor | None = None
        for rows, features, weight, coefficients in self._blocks():
            found = targets.score(features, weight, coefficients)
            if len(found) == shape[0]:
                return found.to(out_device, self._dtype)
            if scores is None:
                scores = torch.empty(shape, dtype=self._dtype, device=out_device)
            scores[rows] = found
        return (
            torch.empty(shape, dtype=self._dtype, device=out_device) if scores is None else scores
        )

    def top_k(self, k: int, largest: bool, out_device: torch.device) -> TopK:
        """Return the best k of the same scores of each target, with ids if there are any."""
        targets = self._targets()
        running = RunningTopK(targets.num_targets, k, largest, self._dtype, out_device)
        ids: list[int | str] = []
        for rows, features, weight, coefficients in self._blocks(ids):
            count = min(k, rows.stop - rows.start)
            found = targets.top_k(features, weight, count, largest, coefficients)
            running.add(TopK(found.values.to(self._dtype), found.indices), rows.start)
        best = running.best
        if ids and len(ids) == self._training.num_samples:
            best.ids = [[ids[i] for i in row] for row in best.indices.tolist()]
        return best

    def _targets(self) -> SolvedTargets:
        solved = torch.stack(self._solved) / len(self._solved)
        dtype = self._dtype
        # Features so small or large that fp32 loses what solves for them; their scores fit again.
        if any(size > 0 and not 2.0**-100 < size < 2.0**100 for size in _largest(solved)):
            dtype = torch.float64
        return SolvedTargets(solved.to(self._device), dtype, self._precision)

    def _blocks(
        self, ids: list[int | str] | None = None
    ) -> Iterator[tuple[slice, list[Tensor], Tensor, Tensor | None]]:
        """Yield rows, features, weight and coefficients of samples in order; note their ids."""
        coefficients = torch.stack(self._coefficients) if self._coefficients else None
        for block in self._training.samples():
            rows = slice(block.start, block.start + len(block.weight))
            if ids is not None:
                ids.extend(block.ids or [])
            part = None if coefficients is None else coefficients[:, rows]
            yield rows, block.features, block.weight, part

    def self_influence(self) -> Tensor:
        """Return each sample's score for itself: fp32 [n]."""
        training = self._training
        total = torch.zeros(training.num_samples, dtype=torch.float64, device="cpu")
        if training.num_samples == 0:
            return total.float()
        for m in range(training.num_checkpoints):
            start = 0
            for plain, coefficients in self._leverages(m, self.factors(m)):
                rows = slice(start, start + len(plain[0]))
                for part, c in zip(plain, coefficients, strict=True):
                    total[rows] += part * c
                start = rows.stop
        num_terms = training.num_checkpoints * training.blocks
        return (total / num_terms * training.weight()).float()


def _largest(solved: Tensor) -> list[float]:
    """Return the largest magnitude of each checkpoint's solved targets [M, t, k]."""
    if solved.numel() == 0:
        return []
    sizes: list[float] = solved.abs().amax((1, 2)).tolist()
    return sizes
