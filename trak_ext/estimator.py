"""The estimator's options, and the damped factors that they make of kernel matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _check
from .kernel import factor_kernel, leverage_coefficients, leverages


@dataclass(frozen=True)
class Estimator:
    """How kernel matrices are damped and samples weighted; see `trak_ext.score`.

    Args:
        damping: Multiple of the kernel's mean eigenvalue that is added to its diagonal.
        ridge: Absolute amount added to the diagonal.
        curvature: Whether kernel matrices weight samples by R.
        leverage: Whether a sample's term is divided by 1 - h.
    """

    damping: float = 1.0
    ridge: float = 0.0
    curvature: bool = False
    leverage: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "damping", _check.nonnegative("damping", self.damping))
        object.__setattr__(self, "ridge", _check.nonnegative("ridge", self.ridge))
        for name in ("curvature", "leverage"):
            _check.flag(name, getattr(self, name))

    def factors(self, kernels: Tensor) -> list[Tensor]:
        """Return the Cholesky factor of each damped kernel of [blocks, k, k]."""
        return [factor_kernel(kernel, self.damping, self.ridge) for kernel in kernels]

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
