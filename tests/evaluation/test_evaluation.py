"""trak_ext.evaluation: rank correlation against scipy, the bootstraps, properties, errors."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from trak_ext.evaluation import LDS, bootstrap, lds
from trak_ext.evaluation.bootstrap import central, mean_over_targets, weighted_spearman


def make_case(n_train=40, num_targets=7, num_subsets=25, *, seed=0, noise=1.0, levels=None):
    """Scores, half-size subsets and outputs that the scores predict up to noise.

    `levels` rounds scores and outputs to a grid, which makes many ties.
    """
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(n_train, num_targets, generator=g, dtype=torch.float64)
    order = torch.rand(num_subsets, n_train, generator=g).argsort(1)
    masks = order < n_train // 2
    spread = math.sqrt(n_train) / 2
    outputs = masks.double() @ scores
    outputs += noise * spread * torch.randn(outputs.shape, generator=g, dtype=torch.float64)
    if levels:
        scores, outputs = (scores * levels).round(), (outputs / spread * levels).round()
    return scores, masks, outputs


def slow_per_target(scores, masks, outputs):
    predictions = masks.double().numpy() @ scores.double().numpy()
    pairs = zip(predictions.T, outputs.double().numpy().T, strict=True)
    return np.array([spearmanr(p, o).statistic for p, o in pairs])


@pytest.mark.parametrize("num_subsets", [2, 3, 25, 60])
@pytest.mark.parametrize("levels", [None, 1, 2])
def test_agrees_with_scipy_with_and_without_ties(num_subsets, levels):
    case = make_case(num_subsets=num_subsets, levels=levels, seed=num_subsets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few subsets on a coarse grid can be constant
        result = lds(*case)
        expected = slow_per_target(*case)
    np.testing.assert_allclose(result.per_target.numpy(), expected, atol=1e-12, equal_nan=True)
    np.testing.assert_allclose(result.mean, np.nanmean(expected), atol=1e-12)


def test_hand_computed_case():
    # Predictions 1, 3, 3, 7 have ranks 1, 2.5, 2.5, 4; outputs 0, 2, 1, 9 have 1, 3, 2, 4.
    # Centred: (-1.5, 0, 0, 1.5) and (-1.5, .5, -.5, 1.5): 4.5 / sqrt(4.5 · 5) = sqrt(.9).
    masks = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1]], dtype=torch.bool)
    scores = torch.tensor([[1.0], [3.0], [7.0]])
    outputs = torch.tensor([[0.0], [2.0], [1.0], [9.0]])
    assert lds(scores, masks, outputs).mean == pytest.approx(math.sqrt(0.9), abs=1e-14)


def test_perfect_and_reversed_scores_have_exact_ends():
    scores, masks, outputs = make_case(noise=0.0)
    result = lds(scores, masks, outputs)
    assert result.mean == 1.0
    assert result.interval_targets == (1.0, 1.0)
    assert result.interval_subsets == pytest.approx((1.0, 1.0), abs=1e-12)
    assert lds(-scores, masks, outputs).mean == -1.0


def test_random_scores_are_near_zero():
    _, masks, outputs = make_case(num_targets=200, num_subsets=100)
    scores = torch.randn(40, 200, generator=torch.Generator().manual_seed(9))
    assert abs(lds(scores, masks, outputs, num_resamples=1).mean) < 0.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_any_float_dtype_and_stride_is_taken_at_its_own_values(dtype):
    scores, masks, outputs = make_case()
    scores, outputs = scores.to(dtype), outputs.to(dtype)
    strided = torch.empty(7, 80, dtype=dtype).T[::2].copy_(scores)
    result = lds(strided.requires_grad_(), masks, outputs)
    expected = slow_per_target(scores, masks, outputs)
    np.testing.assert_allclose(result.per_target.numpy(), expected, atol=1e-12)
    assert result.per_target.dtype == torch.float64
    assert not result.per_target.requires_grad


@pytest.mark.parametrize("levels", [None, 1])
@pytest.mark.parametrize("block", [1, 500, bootstrap.BLOCK_ELEMENTS])
def test_bootstrap_of_subsets_equals_literal_resampling(levels, block, monkeypatch):
    monkeypatch.setattr(bootstrap, "BLOCK_ELEMENTS", block)
    _, masks, outputs = case = make_case(num_targets=4, num_subsets=12, levels=levels)
    predictions = (masks.double() @ case[0]).T.contiguous()
    truth = outputs.T.contiguous()
    draws = torch.randint(12, (12, 30), generator=torch.Generator().manual_seed(3))
    counts = torch.stack([draws[:, r].bincount(minlength=12) for r in range(30)], 1).double()

    got = weighted_spearman(predictions, truth, counts)
    for r in range(30):
        rows = draws[:, r]
        expected = [
            spearmanr(p[rows], o[rows]).statistic for p, o in zip(predictions, truth, strict=True)
        ]
        np.testing.assert_allclose(got[:, r].numpy(), expected, atol=1e-12)
    means = mean_over_targets(weighted_spearman, (predictions, truth), counts)
    torch.testing.assert_close(means, got.mean(0), atol=1e-12, rtol=0)


def test_resample_of_one_subset_alone_is_undefined_and_left_out():
    x = torch.tensor([[1.0, 2.0], [1.0, 2.0]], dtype=torch.float64)
    counts = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0]], dtype=torch.float64)
    means = mean_over_targets(weighted_spearman, (x, x), counts)
    assert means.isnan().tolist() == [True, False, True]
    assert central(means) == (1.0, 1.0)


def test_result_does_not_depend_on_the_block_size(monkeypatch):
    case = make_case(levels=2)
    whole = lds(*case, num_resamples=64)
    monkeypatch.setattr(bootstrap, "BLOCK_ELEMENTS", 700)
    blocks = lds(*case, num_resamples=64)
    torch.testing.assert_close(blocks.per_target, whole.per_target, atol=1e-14, rtol=0)
    assert blocks.interval_subsets == pytest.approx(whole.interval_subsets, abs=1e-12)


def test_interval_widths_match_their_sampling_error():
    scores, masks, outputs = make_case(num_targets=300, num_subsets=50, n_train=200)
    result = lds(scores, masks, outputs)
    for low, high in (result.interval_targets, result.interval_subsets):
        assert low < result.mean < high
    standard_error = result.per_target.std().item() / math.sqrt(300)
    low, high = result.interval_targets
    assert (high - low) / (2 * 1.96 * standard_error) == pytest.approx(1.0, abs=0.1)


def test_target_interval_covers_the_mean_of_many_targets():
    # One large population of targets; intervals from 40 of them should hold its mean about
    # 95 times in 100. 88 of 100 is 3 standard errors below.
    scores, masks, outputs = make_case(num_targets=4000, num_subsets=20)
    truth = lds(scores, masks, outputs, num_resamples=1).mean
    held = 0
    for part in torch.arange(4000).split(40):
        result = lds(scores[:, part], masks, outputs[:, part], num_resamples=300)
        low, high = result.interval_targets
        held += low <= truth <= high
    assert held >= 88


def test_subset_interval_covers_the_score_of_many_subsets():
    # A population of subsets whose score is known; intervals from 40 of them should hold it about
    # 95 times in 100 (85 of 100 is over 4 standard errors below). The percentile interval of the
    # same resamples holds it about 65 times: a resample's repeats bias a rank correlation to zero.
    scores, masks, outputs = make_case(num_targets=30, num_subsets=4000)
    truth = lds(scores, masks, outputs, num_resamples=1).mean
    held = 0
    for part in torch.arange(4000).split(40):
        result = lds(scores, masks[part], outputs[part], num_resamples=200)
        low, high = result.interval_subsets
        held += low <= truth <= high
    assert held >= 85


def test_seed_decides_the_intervals_alone_and_torch_state_is_untouched():
    case = make_case()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = lds(*case, seed=1), lds(*case, seed=1), lds(*case, seed=2)
    assert torch.equal(before, torch.get_rng_state())
    assert first.interval_targets == again.interval_targets
    assert first.interval_subsets == again.interval_subsets
    assert first.interval_subsets != other.interval_subsets
    assert first.interval_targets != other.interval_targets
    assert first.mean == other.mean


def test_undefined_targets_are_nan_warned_of_and_left_out():
    scores, masks, outputs = make_case()
    whole = lds(scores, masks, outputs).per_target
    scores, outputs = scores.clone(), outputs.clone()
    outputs[:, 1] = 3.5
    scores[:, 4] = 0.1  # equal subsets: sums tie in theory, up to rounding in practice
    with pytest.warns(UserWarning, match="2 of 7 targets"):
        result = lds(scores, masks, outputs)
    assert result.per_target.isnan().nonzero()[:, 0].tolist() == [1, 4]
    kept = whole[[0, 2, 3, 5, 6]]
    assert result.mean == pytest.approx(kept.mean().item(), abs=1e-14)
    assert all(math.isfinite(v) for v in (*result.interval_targets, *result.interval_subsets))


@pytest.mark.parametrize("n_train", [0, 5])
def test_no_defined_target_gives_nan_throughout(n_train):
    masks = torch.zeros(4, n_train, dtype=torch.bool)
    with pytest.warns(UserWarning, match="2 of 2 targets"):
        result = lds(torch.ones(n_train, 2), masks, torch.randn(4, 2))
    numbers = (result.mean, *result.interval_targets, *result.interval_subsets)
    assert isinstance(result, LDS)
    assert all(math.isnan(v) for v in numbers)
    assert result.per_target.isnan().all()


SCORES, MASKS, OUTPUTS = torch.randn(6, 3), torch.ones(4, 6, dtype=torch.bool), torch.randn(4, 3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scores": SCORES.numpy()}, TypeError, "scores: expected a torch.Tensor, got a ndarray"),
        ({"scores": SCORES[0]}, ValueError, r"scores: expected 2 dimensions, got .* \[3\]"),
        ({"scores": SCORES.long()}, TypeError, "scores: expected a floating-point dtype, got"),
        ({"masks": MASKS.long()}, TypeError, "masks: expected dtype torch.bool, got a torch.int64"),
        ({"masks": MASKS[:1]}, ValueError, "masks: expected at least 2 subsets .*, got 1"),
        (
            {"masks": MASKS[:, :5]},
            ValueError,
            r"masks: expected .*rows of scores\] = \[4, 6\], got .*\[4, 5\]",
        ),
        ({"outputs": OUTPUTS.T}, ValueError, r"outputs: expected .* = \[4, 3\], got .*\[3, 4\]"),
        ({"outputs": OUTPUTS.bool()}, TypeError, "outputs: expected a floating-point dtype, got"),
        ({"scores": SCORES[:, :0]}, ValueError, r"scores: expected at least 1 target .*\[6, 0\]"),
        (
            {"scores": SCORES.clone().index_fill_(1, torch.tensor(2), math.nan)},
            ValueError,
            r"scores: expected finite values, got 6 .* first at \[0, 2\]",
        ),
        ({"outputs": OUTPUTS / 0}, ValueError, "outputs: expected finite values, got 12"),
        ({"num_resamples": 0}, ValueError, "num_resamples: expected an integer .*, got 0"),
        ({"num_resamples": 2.5}, TypeError, "num_resamples: expected an integer, got 2.5"),
    ],
)
def test_bad_arguments_get_one_sentence(change, error, message):
    arguments = {"scores": SCORES, "masks": MASKS, "outputs": OUTPUTS} | change
    with pytest.raises(error, match=message) as caught:
        lds(**arguments)
    assert "\n" not in str(caught.value)


cases = st.builds(
    make_case,
    n_train=st.integers(2, 30),
    num_targets=st.integers(1, 5),
    num_subsets=st.integers(3, 20),
    seed=st.integers(0, 2**32),
    noise=st.floats(0.0, 3.0),
    levels=st.sampled_from([1, 2, 8]),  # integers: every transform below is exact
)


def per_target(scores, masks, outputs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return lds(scores, masks, outputs, num_resamples=2).per_target


def assert_same(a, b):
    torch.testing.assert_close(a, b, atol=1e-12, rtol=0, equal_nan=True)


@settings(max_examples=40, deadline=None)
@given(cases)
def test_property_monotone_transforms_of_outputs_change_nothing(case):
    scores, masks, outputs = case
    expected = per_target(*case)
    assert ((expected.abs() <= 1) | expected.isnan()).all()
    assert_same(per_target(scores, masks, outputs**3), expected)
    assert_same(per_target(scores, masks, (outputs / 64).atan()), expected)


@settings(max_examples=40, deadline=None)
@given(cases)
def test_property_flipping_a_sign_flips_the_correlation(case):
    scores, masks, outputs = case
    expected = per_target(*case)
    assert_same(per_target(-scores, masks, outputs), -expected)
    assert_same(per_target(scores, masks, -outputs), -expected)


@settings(max_examples=40, deadline=None)
@given(cases, st.lists(st.integers(1, 1000), min_size=5, max_size=5), st.integers(-50, 50))
def test_property_scaling_a_target_changes_nothing(case, factors, shift):
    scores, masks, outputs = case
    factors = torch.tensor(factors[: scores.shape[1]], dtype=torch.float64)
    expected = per_target(*case)
    assert_same(per_target(scores * factors, masks, outputs), expected)
    assert_same(per_target(scores, masks, outputs * factors + shift), expected)
    # Subsets of equal size: a constant added to a target's scores moves all predictions alike.
    assert_same(per_target(scores + shift, masks, outputs), expected)


@settings(max_examples=40, deadline=None)
@given(cases, st.randoms(use_true_random=False))
def test_property_order_of_samples_subsets_and_targets_is_free(case, random):
    scores, masks, outputs = case
    expected = per_target(*case)
    rows, subsets, targets = (
        torch.tensor(random.sample(range(size), size)) for size in (*masks.T.shape, scores.shape[1])
    )
    got = per_target(
        scores[rows][:, targets], masks[subsets][:, rows], outputs[subsets][:, targets]
    )
    assert_same(got, expected[targets])
