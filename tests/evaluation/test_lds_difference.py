"""The paired bootstrap of the difference of two methods' LDS: value, pairing, coverage, errors."""

from __future__ import annotations

import math

import pytest
import torch

from trak_ext.evaluation import LDSDifference, bootstrap, lds, lds_difference
from trak_ext.evaluation.bootstrap import resample_counts, resampled_means
from trak_ext.evaluation.datamodeling import spearman_difference


def make_case(num_targets=30, num_subsets=40, *, seed=0, noise=(0.7, 1.5), n_train=40):
    """True effects, two methods that know them up to noise, subsets, and noisy outputs."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    effects = normal(n_train, num_targets)
    a, b = (effects + spread * normal(n_train, num_targets) for spread in noise)
    masks = torch.rand(num_subsets, n_train, generator=g).argsort(1) < n_train // 2
    outputs = masks.double() @ effects + 0.5 * math.sqrt(n_train) * normal(num_subsets, num_targets)
    return a, b, masks, outputs


def test_mean_is_the_difference_of_both_scores():
    a, b, masks, outputs = make_case()
    result = lds_difference(a, b, masks, outputs)
    expected = lds(a, masks, outputs).per_target - lds(b, masks, outputs).per_target
    assert isinstance(result, LDSDifference)
    torch.testing.assert_close(result.per_target, expected, atol=1e-13, rtol=0)
    assert result.mean == pytest.approx(expected.mean().item(), abs=1e-13)
    assert result.a_is_better
    assert not lds_difference(b, a, masks, outputs).a_is_better


def test_exchanging_the_methods_mirrors_everything():
    a, b, masks, outputs = make_case(num_targets=9, num_subsets=15)
    one, other = lds_difference(a, b, masks, outputs), lds_difference(b, a, masks, outputs)
    assert one.mean == pytest.approx(-other.mean, abs=1e-13)
    for name in ("interval_targets", "interval_subsets"):
        low, high = getattr(other, name)
        assert getattr(one, name) == pytest.approx((-high, -low), abs=1e-12)


def test_a_method_compared_with_itself_has_no_width():
    a, _, masks, outputs = make_case()
    result = lds_difference(a, 3 * a + 1, masks, outputs)
    assert result.mean == 0
    assert result.interval_targets == result.interval_subsets == (0, 0)
    assert not result.a_is_better


def test_both_methods_meet_the_same_resamples():
    a, b, masks, outputs = make_case(num_targets=12, num_subsets=20)
    result = lds_difference(a, b, masks, outputs, num_resamples=50, seed=4)
    generator = torch.Generator().manual_seed(4)
    resampled_means(result.per_target, 50, generator)  # as much of the generator as it takes
    counts = resample_counts(20, 50, generator)
    means = []
    for r in range(50):
        rows = torch.arange(20).repeat_interleave(counts[:, r].long())
        parts = [lds(scores, masks[rows], outputs[rows], num_resamples=1) for scores in (a, b)]
        means.append(parts[0].mean - parts[1].mean)
    low, high = torch.tensor(means, dtype=torch.float64).quantile(
        torch.tensor([0.025, 0.975], dtype=torch.float64)
    )
    expected = (2 * result.mean - high.item(), 2 * result.mean - low.item())
    assert result.interval_subsets == pytest.approx(expected, abs=1e-12)


def test_pairing_narrows_the_interval():
    # Two methods with the same errors but for a little: each LDS is uncertain, their gap is not.
    a, _, masks, outputs = make_case()
    g = torch.Generator().manual_seed(1)
    b = a + 0.2 * torch.randn(a.shape, generator=g, dtype=a.dtype)
    gap = lds_difference(a, b, masks, outputs)
    own = lds(a, masks, outputs)
    for name in ("interval_targets", "interval_subsets"):
        (low, high), (own_low, own_high) = getattr(gap, name), getattr(own, name)
        assert high - low < 0.5 * (own_high - own_low)


@pytest.mark.parametrize("noise", [(0.7, 1.5), (1.0, 1.0)])
def test_intervals_cover_the_difference_of_a_population(noise):
    # 100 draws of 40 subsets from a population of 4,000, and of 40 targets from one of 4,000:
    # about 95 of 100 intervals should hold the population's difference. 85 is over 4 standard
    # errors below. `bench/lds_coverage.py` measures it with more draws and sizes.
    a, b, masks, outputs = make_case(num_subsets=4000, noise=noise)
    truth = lds_difference(a, b, masks, outputs, num_resamples=1).mean
    held = 0
    for part in torch.arange(4000).split(40):
        low, high = lds_difference(
            a, b, masks[part], outputs[part], num_resamples=200
        ).interval_subsets
        held += low <= truth <= high
    assert held >= 85

    a, b, masks, outputs = make_case(num_targets=4000, num_subsets=20, noise=noise)
    truth = lds_difference(a, b, masks, outputs, num_resamples=1).mean
    held = 0
    for part in torch.arange(4000).split(40):
        low, high = lds_difference(
            a[:, part], b[:, part], masks, outputs[:, part], num_resamples=200
        ).interval_targets
        held += low <= truth <= high
    assert held >= 87


def test_equal_methods_are_seldom_told_apart():
    better = sum(
        lds_difference(*make_case(seed=seed, noise=(1.0, 1.0)), num_resamples=100).a_is_better
        for seed in range(100)
    )
    assert better <= 8  # 2.5 expected of each interval alone


def test_result_does_not_depend_on_the_block_size(monkeypatch):
    case = make_case(num_targets=7, num_subsets=12)
    whole = lds_difference(*case, num_resamples=64)
    monkeypatch.setattr(bootstrap, "BLOCK_ELEMENTS", 300)
    blocks = lds_difference(*case, num_resamples=64)
    assert blocks.interval_subsets == pytest.approx(whole.interval_subsets, abs=1e-12)


def test_targets_undefined_for_either_method_are_left_out():
    a, b, masks, outputs = make_case(num_targets=5)
    kept = lds_difference(*(x[:, 2:] for x in (a, b)), masks, outputs[:, 2:]).mean
    a, b = a.clone(), b.clone()
    a[:, 0] = b[:, 1] = 0.1
    with pytest.warns(UserWarning, match="lds_difference: 2 of 5 targets"):
        result = lds_difference(a, b, masks, outputs)
    assert result.per_target.isnan().tolist() == [True, True, False, False, False]
    assert result.mean == pytest.approx(kept, abs=1e-13)
    with pytest.warns(UserWarning, match="5 of 5 targets"):
        result = lds_difference(a, torch.ones_like(b), masks, outputs)
    assert math.isnan(result.mean)
    assert not result.a_is_better


def test_difference_of_one_resample_is_scipys():
    from scipy.stats import spearmanr

    a, b, masks, outputs = make_case(num_targets=1, num_subsets=9)
    predictions = [(masks.double() @ scores).T.contiguous() for scores in (a, b)]
    got = spearman_difference(
        *predictions, outputs.T.contiguous(), torch.ones(9, 1, dtype=torch.float64)
    )
    expected = [spearmanr(p[0], outputs[:, 0]).statistic for p in predictions]
    assert got.item() == pytest.approx(expected[0] - expected[1], abs=1e-13)


S, M, Y = torch.randn(6, 3), torch.ones(4, 6, dtype=torch.bool), torch.randn(4, 3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scores_a": S.numpy()}, TypeError, "scores_a: expected a torch.Tensor, got a ndarray"),
        ({"scores_b": S.long()}, TypeError, "scores_b: expected a floating-point dtype"),
        (
            {"scores_b": S[:, :2]},
            ValueError,
            r"scores_b: expected the shape of scores_a = \[6, 3\]",
        ),
        ({"scores_b": S / 0}, ValueError, "scores_b: expected finite values"),
        ({"masks": M[:1]}, ValueError, "masks: expected at least 2 subsets"),
        ({"outputs": Y.T}, ValueError, r"outputs: expected .* = \[4, 3\], got"),
        ({"num_resamples": 0}, ValueError, "num_resamples: expected an integer of at least 1"),
    ],
)
def test_bad_arguments_get_one_sentence(change, error, message):
    arguments = {"scores_a": S, "scores_b": S, "masks": M, "outputs": Y} | change
    with pytest.raises(error, match=message) as caught:
        lds_difference(**arguments)
    assert "\n" not in str(caught.value)
