"""The estimator's options, and the damped factors that they make of kernel matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _check
from .damping import ImpliedRidge, choose_damping
from .kernel import factor_kernel, leverage_coefficients, leverages


@dataclass(frozen=True)
class Estimator:
    """How kernel matrices are damped and samples weighted; see `trak_ext.score`.

    Args:
        damping: Multiple of the kernel's mean eigenvalue that is added to its diagonal, or "auto"
            for the one that `choose_damping` gives.
        ridge: Absolute amount added to the diagonal.
        curvature: Whether kernel matrices weight samples by R.
        leverage: Whether a sample's term is divided by 1 - h.
    """

    damping: float | str = "auto"
    ridge: float = 0.0
    curvature: bool = False
    leverage: bool = False

    def __post_init__(self) -> None:
        if self.damping != "auto":
            if isinstance(self.damping, str):
                raise ValueError(f"damping: expected a number or 'auto', got {self.damping!r}")
            object.__setattr__(self, "damping", _check.nonnegative("damping", self.damping))
        object.__setattr__(self, "ridge", _check.nonnegative("ridge", self.ridge))
        for name in ("curvature", "leverage"):
            _check.flag(name, getattr(self, name))

    def factors(self, kernels: Tensor, num_samples: int, implied: Tensor) -> list[Tensor]:
        """Return the Cholesky factor of each damped kernel.

        Args:
            kernels: fp64 [blocks, k, k].
            num_samples: That were summed, at least 1.
            implied: `ImpliedRidge.sums` of them, [blocks, k + 4].
        """
        return [
            factor_kernel(kernel, self._damping(kernel, num_samples, sums), self.ridge)
            for kernel, sums in zip(kernels, implied, strict=True)
        ]

    def _damping(self, kernel: Tensor, num_samples: int, sums: Tensor) -> float:
        if not isinstance(self.damping, str):
            return self.damping
        fit = ImpliedRidge(len(kernel))
        fit.sums = sums
        return choose_damping(kernel, num_samples, fit.value(curvature=self.curvature))

    def leverage_and_coefficients(
        self, factor: Tensor, features: Tensor, curvature: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return phi_i^T K^-1 phi_i and c_i of samples, both fp64 [n].

        c_i = 1 / (1 - h_i), h_i = R_i phi_i^T K^-1 phi_i (R_i = 1 without `curvature`), if
        `leverage`; else 1.
        """
        plain = leverages(factor, features, None)
        if not self.leverage:
            return plain, torch.ones_like(plain)
        weighted = plain * curvature.double() if self.curvature else plain
        return plain, leverage_coefficients(weighted)

    def settings(self) -> dict[str, Any]:
        """Return the options as JSON."""
        return {
            "damping": self.damping,
            "ridge": self.ridge,
            "curvature": self.curvature,
            "leverage": self.leverage,
        }
