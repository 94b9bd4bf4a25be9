"""Scores of measured features under one choice of the estimator's options."""

from __future__ import annotations

import torch
from torch import Tensor

from accuracy_settings import Measured
from trak_ext import kernel_matrix, score
from trak_ext.estimator.damping import ImpliedRidge, choose_damping, fitted_above, ridge_of_sums

FIXED = tuple(2.0**j for j in range(-3, 6))  # dampings that "auto" is compared with


def attribute(
    measured: Measured,
    *,
    damping: float | str = "auto",
    curvature: str = "mean",
    leverage: bool = False,
    blocks: int = 1,
    proj_dim: int | None = None,
    num_checkpoints: int | None = None,
) -> Tensor:
    """Return scores [n, t].

    Args:
        measured: What they are made of; its first `blocks * proj_dim` columns are used.
        damping: "auto" for `choose_damping` on each kernel matrix, else a multiple of tr(K)/k.
        curvature: "none", "own" for each checkpoint's R, or "mean" for R averaged over checkpoints.
        leverage: As in `trak_ext.score`.
        blocks: Projection blocks of proj_dim columns per checkpoint, averaged.
        proj_dim: None for all columns.
        num_checkpoints: None for all.
    """
    return attribute_many(
        measured,
        [damping],
        curvature=curvature,
        leverage=leverage,
        blocks=blocks,
        proj_dim=proj_dim,
        num_checkpoints=num_checkpoints,
    )[0]


def attribute_many(
    measured: Measured,
    dampings: list[float | str],
    *,
    curvature: str = "mean",
    leverage: bool = False,
    blocks: int = 1,
    proj_dim: int | None = None,
    num_checkpoints: int | None = None,
) -> list[Tensor]:
    """Return scores [n, t] for each damping, the kernel matrices made once."""
    train, targets, q, _, r, *_ = measured
    train, targets, q, r = (x[:num_checkpoints] for x in (train, targets, q, r))
    width = train.shape[2] // blocks if proj_dim is None else proj_dim
    weights = {"none": torch.ones_like(r), "own": r, "mean": r.mean(0).expand_as(r)}[curvature]
    mean_q = q.double().mean(0).float()
    terms = [
        (m, slice(b * width, (b + 1) * width)) for m in range(len(train)) for b in range(blocks)
    ]
    implied = implied_ridge(measured, terms, curvature=curvature != "none")
    totals = [torch.zeros(train.shape[1], targets.shape[1]) for _ in dampings]
    for m, columns in terms:
        features, target_features = train[m][:, columns], targets[m][:, columns]
        kernel = kernel_matrix(features, weights[m])
        for total, given in zip(totals, dampings, strict=True):
            chosen = choose_damping(kernel, len(features), implied) if given == "auto" else given
            total += score(
                features, target_features, mean_q, damping=float(chosen), kernel=kernel,
                curvature=weights[m], leverage=leverage,
            ) / len(terms)  # fmt: skip
    return totals


def implied_ridge(
    measured: Measured, terms: list[tuple[int, slice]], *, curvature: bool
) -> float | None:
    """Return the ridge that fits imply, over checkpoints and the columns taken of each."""
    sums = []
    for m, columns in terms:
        features = measured.train[m][:, columns]
        ridge = ImpliedRidge(features.shape[1], fitted_above(measured.f[m]))
        ridge.add(features, measured.q[m], measured.f[m], measured.r[m])
        sums.append(ridge.sums)
    return ridge_of_sums(torch.stack(sums), curvature=curvature)


def attribute_dual(measured: Measured, num_checkpoints: int | None = None) -> Tensor:
    """Return what `attribute` does, by a matrix of the size of the training set.

    (A'A + l I)^-1 = (I - A' (A A' + l I)^-1 A) / l with A = R^1/2 Phi (Woodbury's identity): for
    proj_dim above n.
    """
    train, targets, q, _, r, *_ = measured
    train, targets, q, r = (x[:num_checkpoints] for x in (train, targets, q, r))
    num_checkpoints, n, width = train.shape
    every = [(m, slice(0, width)) for m in range(num_checkpoints)]
    implied = implied_ridge(measured, every, curvature=True)
    root = r.double().mean(0).sqrt()
    total = torch.zeros(n, targets.shape[1], dtype=torch.float64)
    for m in range(num_checkpoints):
        gram = (train[m] @ train[m].T).double()
        trace = (root.square() * gram.diagonal()).sum()
        ridge = choose_damping(trace.reshape(1, 1), n, implied) * trace
        products = (train[m] @ targets[m].T).double()
        curved = root[:, None] * gram * root
        curved.diagonal().add_(ridge)
        inner = torch.cholesky_solve(root[:, None] * products, torch.linalg.cholesky(curved))
        total += (products - gram @ (root[:, None] * inner)) / ridge
    return (total / num_checkpoints * q.double().mean(0)[:, None]).float()


def gradient_product(measured: Measured) -> Tensor:
    """Return scores [n, t] with the kernel matrix left out: Q_i phi_i . phi_z, averaged."""
    train, targets, q = measured.train, measured.targets, measured.q
    parts = (q[m][:, None] * (train[m] @ targets[m].T) for m in range(len(train)))
    return sum(parts, torch.zeros(train.shape[1], targets.shape[1])) / len(train)
