"""The rule for damping where its answer is known, and what it must not depend on."""

from __future__ import annotations

import pytest
import torch

import trak_ext
from trak_ext.estimator.damping import (
    LEAST,
    MOST,
    USUAL,
    ImpliedRidge,
    choose_damping,
    fitted_above,
    ridge_of_sums,
)


def ridge_of(kernel, num_samples, **options):
    """Lambda itself, which `damping` is a multiple of tr(K)/k of."""
    return choose_damping(kernel, num_samples, **options) * float(kernel.trace()) / len(kernel)


def implied(features, q, f, r, *, curvature=True):
    ridge = ImpliedRidge(features.shape[1], fitted_above(f))
    ridge.add(features, q, f, r)
    return ridge_of_sums(ridge.sums, curvature=curvature)


def random_fit(n=40, k=8):
    features = torch.randn(n, k, dtype=torch.float64)
    f = torch.randn(n, dtype=torch.float64) + 1
    q = torch.sigmoid(-f)
    return features, q, f, q * (1 - q)


def trained_with_ridge(ridge, n=200, d=6, steps=60, noise=0.2):
    """Logistic regression from zero, sum log(1 + exp(-s f)) + ridge/2 |w|^2, by Newton steps."""
    inputs = torch.randn(n, d, dtype=torch.float64)
    signs = torch.sign(inputs[:, 0] + noise * torch.randn(n, dtype=torch.float64))
    inputs[:, 0] += signs * (0.0 if noise else 1.0)  # a gap between the classes
    rows = inputs * signs[:, None]  # the gradients of f = s x . w
    w = torch.zeros(d, dtype=torch.float64)
    for _ in range(steps):
        q = torch.sigmoid(-(rows @ w))
        hessian = (rows * (q * (1 - q))[:, None]).T @ rows + ridge * torch.eye(d)
        w = w + torch.linalg.solve(hessian, rows.T @ q - ridge * w)
    f = rows @ w
    q = torch.sigmoid(-f)
    return rows, q, f, q * (1 - q)


@pytest.mark.parametrize("ridge", [0.1, 1.0, 30.0])
def test_the_ridge_of_a_linear_model_is_found(ridge):
    """Where every sample is fitted, |sum Q g|^2 / sum Q f is the ridge it was trained with."""
    features, q, f, r = trained_with_ridge(ridge, noise=0.0)
    spread = ImpliedRidge(features.shape[1], 0.0)
    spread.add(features, q, f, r)
    assert (f > 0).all()
    assert ridge_of_sums(spread.sums, curvature=True) == pytest.approx(ridge, rel=1e-9)


def test_the_ridge_of_fitted_samples_follows_the_training_ridge():
    found = [implied(*trained_with_ridge(ridge)) for ridge in (0.1, 1.0, 10.0)]
    assert found[0] < found[1] < found[2]


def test_without_curvature_the_ridge_grows_as_the_kernel_does():
    features, q, f, r = random_fit()
    squares = features.square().sum(1)
    ratio = float(squares.sum() / (squares @ r))
    with_r = implied(features, q, f, r)
    assert implied(features, q, f, r, curvature=False) == pytest.approx(with_r * ratio)


def test_rows_may_come_in_parts_and_poorly_fitted_ones_do_not_count():
    features, q, f, r = random_fit()
    parts = ImpliedRidge(8, fitted_above(f))
    for a, b in ((0, 3), (3, 3), (3, 40)):
        parts.add(features[a:b], q[a:b], f[a:b], r[a:b])
    assert ridge_of_sums(parts.sums, curvature=True) == pytest.approx(implied(features, q, f, r))
    kept = f > 0.25 * f.median()
    assert 0 < int(kept.sum()) < 40
    gradient = q[kept] @ features[kept]
    alone = float(gradient @ gradient / (q[kept] @ f[kept]))
    assert implied(features, q, f, r) == pytest.approx(alone)


def test_nothing_is_implied_by_no_samples_or_by_none_that_is_fitted():
    features, q, f, r = random_fit()
    assert fitted_above(f[:0]) == 0.0
    assert ridge_of_sums(ImpliedRidge(8, 0.0).sums, curvature=True) is None
    low = -f.abs()
    assert fitted_above(low) == 0.0
    assert implied(features, torch.sigmoid(-low), low, r) is None
    assert implied(torch.zeros_like(features), q, f, r) is None


def test_checkpoints_are_pooled():
    sums = []
    for _ in range(3):
        features, q, f, r = random_fit()
        ridge = ImpliedRidge(8, fitted_above(f))
        ridge.add(features, q, f, r)
        sums.append(ridge.sums)
    gradients = sum(float(part[:8] @ part[:8]) for part in sums)
    alignments = sum(float(part[8]) for part in sums)
    found = ridge_of_sums(torch.stack(sums), curvature=True)
    assert found == pytest.approx(gradients / alignments)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_damping_does_not_depend_on_the_scale_of_features(scale):
    features, q, f, r = random_fit()
    kernel = trak_ext.kernel_matrix(features, r)
    expected = choose_damping(kernel, 40, implied(features, q, f, r))
    scaled = features * scale
    found = choose_damping(trak_ext.kernel_matrix(scaled, r), 40, implied(scaled, q, f, r))
    assert found == pytest.approx(expected)


def test_lambda_follows_what_is_implied_within_bounds():
    kernel = torch.diag(torch.tensor([6.0, 3.0, 1.0], dtype=torch.float64))  # tr(K)/n = 2
    assert ridge_of(kernel, 5, implied=7.0) == pytest.approx(7.0)
    for value, multiple in ((0.0, LEAST), (1e-300, LEAST), (1e9, MOST), (float("inf"), MOST)):
        assert ridge_of(kernel, 5, implied=value) == pytest.approx(2 * multiple)
    assert ridge_of(kernel, 5) == pytest.approx(2 * USUAL)
    values = [ridge_of(kernel, 5, implied=x) for x in (0.5, 2.0, 3.0, 8.0, 20.0, 50.0)]
    assert values == sorted(values)


@pytest.mark.parametrize("proj_dim", [4, 64, 300])  # below, near and above the samples' number
def test_more_columns_of_a_projection_keep_the_ridge_a_gradient_sees(proj_dim):
    """lambda / k is an estimate of one number, the ridge on unprojected gradients."""
    gradients = torch.randn(50, 400)
    features = trak_ext.project(gradients, proj_dim)
    kernel = trak_ext.kernel_matrix(features)
    truth = USUAL * float(gradients.double().square().sum()) / 50
    assert ridge_of(kernel, 50) / proj_dim == pytest.approx(truth, rel=4 / proj_dim**0.5)


def test_any_rank_gives_a_factor():
    features, q, f, r = random_fit(n=5, k=30)
    features[3:] = features[:2]  # rank 3 of 30
    kernel = trak_ext.kernel_matrix(features, r)
    damping = choose_damping(kernel, 5, implied(features, q, f, r))
    scores = trak_ext.score(features, features, q, damping=damping, curvature=r)
    assert scores.isfinite().all()


def test_a_kernel_of_zeros_has_a_damping():
    zeros = torch.zeros(3, 3, dtype=torch.float64)
    assert choose_damping(zeros, 6) == pytest.approx(USUAL * 3 / 6)
    assert choose_damping(zeros, 6, implied=1.0) == pytest.approx(USUAL * 3 / 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 3), 4), r"kernel: expected a square matrix .*got \[2, 3\]"),
        ((torch.ones(0, 0), 4), r"kernel: expected a square matrix .*got \[0, 0\]"),
        ((torch.ones(3), 4), r"kernel: expected a dense .*\[k, k\]"),
        ((-torch.eye(2), 4), "kernel: expected a finite trace >= 0, got -2"),
        ((torch.eye(2) * torch.nan, 4), "kernel: expected a finite trace >= 0, got nan"),
        ((torch.eye(2), 0), "num_samples: expected an integer from 1 "),
        ((torch.eye(2), 4, -1.0), "implied: expected a number that is at least 0, got -1.0"),
        ((torch.eye(2), 4, float("nan")), "implied: expected a number .*got nan"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        choose_damping(*arguments)
