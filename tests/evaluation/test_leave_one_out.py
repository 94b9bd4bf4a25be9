"""Leave-one-out correlation: against scipy, against exact leave-one-out of ridge regression."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import spearmanr

from trak_ext.evaluation import LeaveOneOut, leave_one_out_changes, leave_one_out_correlation


def ridge_case(num_train=30, num_targets=6, penalty=2.0):
    """Data, a retraining function, and the closed form of leaving one out: f(z;S) - f(z;S-i)."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(num_train, 4, generator=g, dtype=torch.float64)
    y = x @ torch.randn(4, generator=g, dtype=torch.float64)
    y += torch.randn(num_train, generator=g, dtype=torch.float64)
    z = torch.randn(num_targets, 4, generator=g, dtype=torch.float64)

    def retrain(masks, seeds):
        rows = []
        for mask, _ in zip(masks, seeds, strict=True):
            gram = x[mask].T @ x[mask] + penalty * torch.eye(4, dtype=x.dtype)
            rows.append(z @ torch.linalg.solve(gram, x[mask].T @ y[mask]))
        return torch.stack(rows)

    inverse = torch.linalg.inv(x.T @ x + penalty * torch.eye(4, dtype=x.dtype))
    residual = y - x @ inverse @ x.T @ y
    leverage = ((x @ inverse) * x).sum(1)
    exact = (x @ inverse @ z.T) * (residual / (1 - leverage))[:, None]
    return retrain, exact


def test_changes_equal_the_closed_form_of_ridge_regression():
    retrain, exact = ridge_case()
    changes = leave_one_out_changes(retrain, 30, models_at_once=7)
    torch.testing.assert_close(changes, exact, atol=1e-10, rtol=0)
    some = torch.tensor([4, 29, 0])
    torch.testing.assert_close(
        leave_one_out_changes(retrain, 30, samples=some), exact[some], atol=1e-10, rtol=0
    )


def test_exact_influence_correlates_perfectly():
    _, exact = ridge_case()
    result = leave_one_out_correlation(exact * 3, exact)
    assert isinstance(result, LeaveOneOut)
    assert result.mean == 1.0
    assert result.interval_targets == (1.0, 1.0)
    assert result.interval_samples == pytest.approx((1.0, 1.0), abs=1e-12)
    assert leave_one_out_correlation(-exact, exact).mean == -1.0


def test_changes_are_paired_and_averaged_over_seeds():
    seen = []

    def retrain(masks, seeds):
        seen.extend(seeds)
        noise = torch.tensor(seeds)[:, None] * 100.0  # the same for both models of a pair
        return noise + masks.double() @ torch.arange(12.0).view(6, 2).double()

    changes = leave_one_out_changes(retrain, 6, seeds=[3, 8], models_at_once=4)
    torch.testing.assert_close(changes, torch.arange(12.0).view(6, 2).double())
    assert seen.count(3) == seen.count(8) == 7


@pytest.mark.parametrize("samples", [None, [1, 5, 2, 19, 7, 11]])
def test_agrees_with_scipy(samples):
    scores = torch.randn(20, 3).round(decimals=1)
    index = None if samples is None else torch.tensor(samples)
    chosen = scores if index is None else scores[index]
    changes = chosen + torch.randn(chosen.shape)
    result = leave_one_out_correlation(scores, changes, samples=index)
    expected = [spearmanr(chosen[:, t], changes[:, t]).statistic for t in range(3)]
    assert result.per_target.tolist() == pytest.approx(expected, abs=1e-12)
    assert result.mean == pytest.approx(sum(expected) / 3, abs=1e-12)


def test_sample_interval_covers_the_correlation_of_many_samples():
    g = torch.Generator().manual_seed(2)
    scores = torch.randn(6000, 20, generator=g)
    changes = scores + 1.5 * torch.randn(scores.shape, generator=g)
    truth = leave_one_out_correlation(scores, changes, num_resamples=1).mean
    held = 0
    for part in torch.arange(6000).split(60):
        low, high = leave_one_out_correlation(
            scores, changes[part], samples=part, num_resamples=200
        ).interval_samples
        held += low <= truth <= high
    assert held >= 85  # of 100; 95 expected


def test_undefined_targets_are_left_out_with_a_warning():
    scores, changes = torch.randn(8, 3), torch.randn(8, 3)
    kept = leave_one_out_correlation(scores[:, 1:], changes[:, 1:]).mean
    changes[:, 0] = 2.0
    with pytest.warns(UserWarning, match="leave_one_out_correlation: 1 of 3 targets"):
        result = leave_one_out_correlation(scores, changes)
    assert math.isnan(result.per_target[0])
    assert result.mean == pytest.approx(kept, abs=1e-12)
    with pytest.warns(UserWarning, match="3 of 3"):
        assert math.isnan(leave_one_out_correlation(torch.ones(8, 3), changes).mean)


S, C = torch.randn(6, 3), torch.randn(6, 3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scores": S.long()}, TypeError, "scores: expected a floating-point dtype"),
        ({"scores": S[:, :0]}, ValueError, "scores: expected at least 1 target"),
        ({"changes": C[:5]}, ValueError, r"changes: expected .* = \[6, 3\], got .*\[5, 3\]"),
        ({"changes": C / 0}, ValueError, "changes: expected finite values"),
        ({"samples": torch.tensor([1, 1])}, ValueError, "samples: expected each sample once"),
        ({"samples": torch.tensor([6])}, ValueError, r"samples: expected integers in 0\.\.5"),
        ({"samples": torch.tensor([1.0])}, TypeError, "samples: expected an integer dtype"),
        (
            {"samples": torch.tensor([1]), "changes": C[:1]},
            ValueError,
            "changes: expected at least 2 samples",
        ),
        ({"num_resamples": 0}, ValueError, "num_resamples: expected an integer"),
    ],
)
def test_bad_arguments_get_one_sentence(change, error, message):
    with pytest.raises(error, match=message) as caught:
        leave_one_out_correlation(**({"scores": S, "changes": C} | change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_train": 0}, ValueError, "num_train: expected an integer of at least 1"),
        ({"seeds": []}, ValueError, "seeds: expected at least one, got none"),
        ({"retrain": lambda m, s: m[:, 0]}, ValueError, r"retrain: .* \[1, t\].* got a .*\[1\]"),
    ],
)
def test_bad_retraining_gets_one_sentence(change, error, message):
    retrain, _ = ridge_case()
    with pytest.raises(error, match=message) as caught:
        leave_one_out_changes(**({"retrain": retrain, "num_train": 30} | change))
    assert "\n" not in str(caught.value)
