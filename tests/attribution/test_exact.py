"""Exact checks on logistic regression, where retraining and Newton steps can be written out.

Labels s = +1/-1, bias as a penalised column, objective sum log(1 + exp(-s f)) + ridge/2 |w|^2;
with f_i = s_i w.x_i the gradient of the output is phi_i = s_i x_i, Q = 1 - p and R = p (1 - p).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression

import trak_ext

NUM_TRAIN, NUM_TARGETS, RIDGE = 400, 60, 10.0


class Problem:
    def __init__(self) -> None:
        data = load_breast_cancer()
        order = np.random.default_rng(0).permutation(len(data.target))
        inputs = data.data[order]
        inputs = (inputs - inputs[:NUM_TRAIN].mean(0)) / inputs[:NUM_TRAIN].std(0)
        inputs = np.hstack([inputs, np.ones((len(inputs), 1))])
        labels = 2 * data.target[order] - 1
        self.inputs, self.labels = inputs[:NUM_TRAIN], labels[:NUM_TRAIN]
        self.weights = self.fit(np.arange(NUM_TRAIN))
        self.phi = self.labels[:, None] * self.inputs
        held_out = slice(NUM_TRAIN, NUM_TRAIN + NUM_TARGETS)
        self.targets = labels[held_out, None] * inputs[held_out]
        p = 1 / (1 + np.exp(-self.phi @ self.weights))
        self.q, self.r = 1 - p, p * (1 - p)

    def fit(self, kept: np.ndarray) -> np.ndarray:
        model = LogisticRegression(
            C=1 / RIDGE, fit_intercept=False, solver="newton-cholesky", tol=1e-14, max_iter=1000
        )
        return model.fit(self.inputs[kept], self.labels[kept]).coef_[0]

    def score(self, **options) -> np.ndarray:
        features, targets, q, r = map(torch.from_numpy, (self.phi, self.targets, self.q, self.r))
        return trak_ext.score(
            features, targets, q, damping=0.0, ridge=RIDGE, curvature=r, **options
        ).numpy()


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem()


def test_identity_projection_is_the_closed_form(problem):
    phi = problem.phi
    kernel = phi.T @ phi
    shift = np.trace(kernel) / phi.shape[1]
    expected = phi @ np.linalg.solve(kernel + shift * np.eye(phi.shape[1]), problem.targets.T)
    expected *= problem.q[:, None]
    features, targets, q = map(torch.from_numpy, (phi, problem.targets, problem.q))
    got = trak_ext.score(features, targets, q, damping=1.0).numpy()
    assert abs(got - expected).max() <= 1e-13 * abs(expected).max()


def test_influence_function_is_exact(problem):
    hessian = (problem.phi * problem.r[:, None]).T @ problem.phi + RIDGE * np.eye(31)
    expected = problem.phi @ np.linalg.solve(hessian, problem.targets.T) * problem.q[:, None]
    assert abs(problem.score() - expected).max() <= 1e-12 * abs(expected).max()


def test_leverage_is_one_newton_step_of_leaving_one_out(problem):
    scores = problem.score(leverage=True)
    worst = 0.0
    for i in range(NUM_TRAIN):
        kept = np.arange(NUM_TRAIN) != i
        phi, q, r = problem.phi[kept], problem.q[kept], problem.r[kept]
        gradient = -phi.T @ q + RIDGE * problem.weights
        hessian = (phi * r[:, None]).T @ phi + RIDGE * np.eye(31)
        step = -np.linalg.solve(hessian, gradient)  # from the full optimum, without sample i
        worst = max(worst, abs(scores[i] - problem.targets @ -step).max())
    # The optimum itself is known to about 1e-13, hence not to the last bit.
    assert worst <= 1e-12 * max(1.0, abs(scores).max())


def test_leverage_scores_are_leave_one_out_retraining(problem):
    scores = problem.score(leverage=True)
    truth = np.empty_like(scores)
    for i in range(NUM_TRAIN):
        kept = np.flatnonzero(np.arange(NUM_TRAIN) != i)
        truth[i] = problem.targets @ (problem.weights - problem.fit(kept))
    assert np.corrcoef(scores.ravel(), truth.ravel())[0, 1] > 0.999
    assert np.linalg.norm(scores - truth) / np.linalg.norm(truth) < 0.05
