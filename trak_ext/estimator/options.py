"""The estimator's options, and the damped factors that they make of kernel matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _check
from .damping import choose_damping, ridge_of_sums
from .kernel_matrix import factor_kernel, leverage_coefficients, leverages


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
        _check.flag("leverage", self.leverage)

    def factors(self, kernels: Tensor, num_samples: int, implied: Tensor) -> list[Tensor]:
        """Return the Cholesky factor of each damped kernel.

        Args:
            kernels: fp64 [blocks, k, k].
            num_samples: That were summed, at least 1.
            implied: `ImpliedRidge.sums` of all checkpoints and blocks, [M b, k + 3].
        """
        return [
            factor_kernel(kernel, self._damping(kernel, num_samples, implied), self.ridge)
            for kernel in kernels
        ]

    def _damping(self, kernel: Tensor, num_samples: int, sums: Tensor) -> float:
        if not isinstance(self.damping, str):
            return self.damping
        implied = ridge_of_sums(sums, curvature=self.curvature is not None)
        return choose_damping(kernel, num_samples, implied)

    def leverage_and_coefficients(
        self, factor: Tensor, features: Tensor, curvature: Tensor | None, start: int
    ) -> tuple[Tensor, Tensor]:
        """Return phi_i^T K^-1 phi_i and c_i of samples, both fp64 [n].

        c_i = 1 / (1 - h_i), h_i = R_i phi_i^T K^-1 phi_i, if `leverage`; else 1.

        Args:
            curvature: R, the weight of each sample in K, [n]; None for ones.
            start: Number of the first sample, for errors.
        """
        plain = leverages(factor, features, None)
        if not self.leverage:
            return plain, torch.ones_like(plain)
        weighted = plain if curvature is None else plain * curvature.double()
        return plain, leverage_coefficients(weighted, start)

    def settings(self) -> dict[str, Any]:
        """Return the options as JSON."""
        return {
            "damping": self.damping,
            "ridge": self.ridge,
            "curvature": self.curvature,
            "leverage": self.leverage,
        }
