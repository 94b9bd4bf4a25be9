"""Damping chosen from what fitting has seen anyway, without retraining.

Attribution needs (K + lambda I)^-1, and the right lambda is a property of the training run: weight
decay and early stopping both act as a ridge. Where training with a ridge has come to rest, the
loss gradient equals the pull of the ridge, sum_i Q_i g_i = lambda theta, and outputs are close to
their linear part, f_i = g_i . theta (exact for a linear model that starts at zero). Multiplying the
first by theta gives lambda sum_i Q_i f_i = |sum_i Q_i g_i|^2, in which everything is known. This is
the representer theorem (Kimeldorf & Wahba 1971) read backwards, and features stand for gradients,
of which they keep inner products on average.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check

__all__ = ["ImpliedRidge", "choose_damping", "fitted_above", "ridge_of_sums"]

LEAST, MOST = 1.0, 10.0  # bounds of lambda, in mean squared feature norms tr(K)/n
USUAL = 3.0  # where nothing is known of the fit: near the bounds' geometric mean
FITTED_SHARE = 0.25  # outputs above this share of their median count as fitted

# After sum Q phi, over fitted samples, in `ImpliedRidge.sums`.
_FIGURES = ("sum Q f", "sum |phi|^2", "sum R |phi|^2")


class ImpliedRidge:
    """The ridge that a trained checkpoint's outputs and loss gradients imply, in kernel units.

    Only samples that the model has fitted are used, since a sample that the checkpoint did not
    train on, as with checkpoints trained on subsets, is not in balance with its weights, and shows
    it by a large loss. It holds where f is the log odds of one label (`Task.log_odds`). Features
    come a few rows at a time.

    Args:
        proj_dim: Features a sample, k.
        threshold: Samples with outputs f above it count as fitted; see `fitted_above`.

    Attributes:
        sums: fp64 [k + 3], all that is kept; those of two sets of samples add up.
    """

    def __init__(self, proj_dim: int, threshold: float) -> None:
        self._threshold = threshold
        self.sums = torch.zeros(proj_dim + len(_FIGURES), dtype=torch.float64, device="cpu")

    def add(self, features: Tensor, weight: Tensor, output: Tensor, curvature: Tensor) -> None:
        """Add samples: features [n, k], and Q, f and R of each, [n]."""
        rows = features.double()
        norms = rows.square().sum(1)
        q = weight.double()
        fitted = q * (output > self._threshold)
        figures = [
            fitted @ output.double(),
            norms.sum(),
            norms @ curvature.double(),
        ]
        self.sums += torch.cat([fitted @ rows, torch.stack(figures)]).cpu()


def fitted_above(outputs: Tensor) -> float:
    """Return a quarter of the median of the outputs f [n], 0 where that is negative or n is 0."""
    median = float(outputs.double().median()) if outputs.numel() else 0.0
    return FITTED_SHARE * max(median, 0.0)


def ridge_of_sums(sums: Tensor, *, curvature: bool) -> float | None:
    """Return lambda >= 0 from `ImpliedRidge.sums`; None where nothing is implied.

    Checkpoints of one recipe have one ridge: numerator and denominator are summed over them, which
    matters where samples are few.

    Args:
        sums: [k + 3], or [c, k + 3] of several checkpoints or projection blocks.
        curvature: Whether lambda is for kernels with curvature weights, or for those without, which
            are larger by sum |phi|^2 / sum R |phi|^2, and so is their ridge.
    """
    rows = sums.reshape(-1, sums.shape[-1])
    gradient, figures = rows[:, : -len(_FIGURES)], rows[:, -len(_FIGURES) :].sum(0)
    alignment, squares, curved_squares = figures.tolist()
    if not (alignment > 0 and curved_squares > 0):
        return None
    ridge = float(gradient.square().sum()) / alignment
    return ridge if curvature else ridge * squares / curved_squares


def choose_damping(kernel: Tensor, num_samples: int, implied: float | None = None) -> float:
    """Return the damping, a multiple of tr(K)/k, for a kernel matrix.

    lambda is what the fit implies (`ImpliedRidge`), kept within 1 and 10 times tr(K)/n, the mean
    squared norm of a (weighted) feature vector; 3 times where nothing is implied. As tr(K)/n and
    the eigenvalues that matter both grow with proj_dim in proportion, the same lambda / (tr(K)/n)
    serves every proj_dim, where a fixed multiple of tr(K)/k would not: best multiples of tr(K)/k
    on digits rise fourfold from proj_dim 512 to 2048.

    Args:
        kernel: K, [k, k], without lambda.
        num_samples: n, the samples it was summed over, at least 1.
        implied: lambda of `ImpliedRidge.value`, in K's units, if known.

    Returns:
        lambda / (tr(K)/k), positive and finite. It depends on K by its trace alone, and not on the
        scale of the features.

    Raises:
        ValueError: a kernel that is not square, or has a trace that is negative or not finite.
    """
    _check.float_tensor("kernel", kernel, "[k, k]", (2,))
    num_samples = _check.integer("num_samples", num_samples, 1, 2**62)
    size = kernel.shape[0]
    if kernel.shape[1] != size or size == 0:
        raise ValueError(
            f"kernel: expected a square matrix [k, k] with k >= 1, got {list(kernel.shape)}"
        )
    trace = float(kernel.double().trace())
    if not 0 <= trace < float("inf"):
        raise ValueError(f"kernel: expected a finite trace >= 0, got {trace}")
    multiple = USUAL
    if implied is not None and not implied >= 0:
        raise ValueError(f"implied: expected a number that is at least 0, got {implied}")
    if implied is not None and trace > 0:
        multiple = min(max(implied / (trace / num_samples), LEAST), MOST)
    return multiple * size / num_samples
