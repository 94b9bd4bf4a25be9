"""Problems of scoring for the host build of the CUDA kernels, and what they are compared with."""

from __future__ import annotations

import torch

from cuda_host.library import WARPGROUP

MMA = ["medium", "high", "highest"]
PRECISIONS = ["plain", *MMA, *(WARPGROUP + precision for precision in MMA)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WIDE = torch.float64

# Parts of sum_m |c| |weight| |features| |solved| that a score may be off. Two roundings to bf16 of
# 2^-9 each; what two parts leave (2^-17) and the product that they drop (2^-16); fp32 arithmetic
# with matrix instructions that truncate.
TOLERANCE = {"plain": 2**-21, "medium": 2**-7.9, "high": 2**-15, "highest": 2**-21, WIDE: 2**-50}
TOLERANCE |= {WARPGROUP + precision: TOLERANCE[precision] for precision in MMA}


def make(checkpoints, rows, targets, proj_dim, dtype=torch.float32, scaled=True):
    """Return features, solved targets, and coefficients and weights or nothing."""
    compute = WIDE if dtype == WIDE else torch.float32
    features = [torch.randn(rows, proj_dim).to(dtype) for _ in range(checkpoints)]
    solved = torch.randn(checkpoints, targets, proj_dim, dtype=compute)
    if not scaled:
        return features, solved, {}
    scales = {
        "coefficients": 1 + torch.rand(checkpoints, rows, dtype=compute),
        "weights": torch.randn(rows, dtype=compute),
    }
    return features, solved, scales


def exact(features, solved, coefficients=None, weights=None):
    """Return scores, and what their errors are measured by: fp64 [n, t]."""
    stacked = torch.stack(features).double()
    c = torch.ones(()) if coefficients is None else coefficients.double()[:, :, None]
    w = torch.ones(()) if weights is None else weights.double()[:, None]
    scores = (c * (stacked @ solved.double().mT)).sum(0) * w
    bound = (c.abs() * (stacked.abs() @ solved.double().abs().mT)).sum(0) * w.abs()
    return scores, bound


def check(library, features, solved, scales, precision):
    got = library.score(features, solved, precision=precision, **scales)
    scores, bound = exact(features, solved, **scales)
    tolerance = TOLERANCE[WIDE if solved.dtype == WIDE else precision]
    assert got.dtype == solved.dtype
    assert ((got.double() - scores).abs() <= tolerance * bound).all()
    return ((got.double() - scores).abs() / bound).max()


def best(scores: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    values, indices = scores.T.sort(dim=1, descending=True, stable=True)
    return values[:, :count], indices[:, :count]
