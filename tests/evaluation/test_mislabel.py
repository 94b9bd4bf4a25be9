"""Mislabel detection: the exact AUC, its interval's coverage, flipped labels, and the digits."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from trak_ext import Attributor
from trak_ext.evaluation import flip_labels, mislabel_auc


def slow_auc(scores, wrong):
    pairs = [
        1.0 if a > b else 0.5 if a == b else 0.0
        for a in scores[wrong].tolist()
        for b in scores[~wrong].tolist()
    ]
    return sum(pairs) / len(pairs)


@pytest.mark.parametrize("levels", [None, 2, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_auc_counts_pairs_exactly(levels, dtype):
    g = torch.Generator().manual_seed(0)
    scores = torch.randn(60, generator=g)
    scores = ((scores * levels).round() if levels else scores).to(dtype)
    wrong = torch.rand(60, generator=g) < 0.2
    assert mislabel_auc(scores, wrong).value == pytest.approx(slow_auc(scores, wrong), abs=1e-14)


def test_auc_agrees_with_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    scores, wrong = torch.randn(500).round(decimals=1), torch.rand(500) < 0.05
    expected = metrics.roc_auc_score(wrong.numpy(), scores.numpy())
    assert mislabel_auc(scores, wrong).value == pytest.approx(expected, abs=1e-12)


def test_perfect_reversed_and_constant_scores():
    wrong = torch.tensor([False, True, False, True])
    assert mislabel_auc(wrong.float(), wrong) == (1.0, (1.0, 1.0))
    assert mislabel_auc(-wrong.float(), wrong) == (0.0, (0.0, 0.0))
    assert mislabel_auc(torch.ones(4), wrong).value == 0.5


def test_order_alone_counts():
    scores, wrong = torch.randn(80, dtype=torch.float64), torch.rand(80) < 0.3
    result = mislabel_auc(scores, wrong)
    assert mislabel_auc(scores.exp() * 7, wrong) == result
    assert mislabel_auc(-scores, wrong).value == pytest.approx(1 - result.value, abs=1e-14)


@pytest.mark.parametrize("shift", [0.0, 1.0, 2.0])
def test_interval_covers_the_true_area(shift):
    # Normal scores, mislabelled ones higher by `shift`: the area is Phi(shift / sqrt 2). 60 of
    # 1,200 samples, as in the digits' test; 500 draws, 92 % is 3 standard errors below 95 %.
    truth = 0.5 * (1 + math.erf(shift / 2))
    wrong = torch.arange(1200) < 60
    held = 0
    for _ in range(500):
        low, high = mislabel_auc(torch.randn(1200) + shift * wrong, wrong).interval
        held += low <= truth <= high
    assert held >= 460


def test_flip_labels_flips_the_stated_share_to_other_classes():
    labels = torch.randint(0, 10, (1000,))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    flipped, wrong = flip_labels(labels, num_classes=10, share=0.05, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    assert int(wrong.sum()) == 50
    assert torch.equal(flipped != labels, wrong)
    assert flipped.dtype == labels.dtype
    assert 0 <= int(flipped.min()) <= int(flipped.max()) <= 9
    again, other = (flip_labels(labels, num_classes=10, seed=s)[0] for s in (3, 4))
    assert torch.equal(flipped, again)
    assert not torch.equal(flipped, other)


def test_flipped_labels_are_each_other_class_as_often():
    flipped, _ = flip_labels(torch.ones(90_000, dtype=torch.int32), num_classes=4, share=1.0)
    counts = flipped.bincount(minlength=4).tolist()
    assert counts[1] == 0
    assert all(abs(count - 30_000) < 4 * 142 for count in counts[:1] + counts[2:])


@pytest.mark.parametrize(
    ("dtype", "num_classes"), [(torch.uint8, 200), (torch.uint8, 256), (torch.int8, 128)]
)
def test_flips_of_narrow_labels_do_not_wrap(dtype, num_classes):
    labels = torch.randint(0, num_classes, (2000,), dtype=torch.int64)
    flipped, _ = flip_labels(labels.to(dtype), num_classes=num_classes, share=1.0)
    assert flipped.dtype == dtype
    assert torch.equal(flipped.long(), flip_labels(labels, num_classes=num_classes, share=1.0)[0])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([0.1], torch.ones(1) > 0), TypeError, "scores: expected a torch.Tensor, got a list"),
        ((torch.ones(2, 2), torch.ones(2) > 0), ValueError, "scores: expected 1 dimension"),
        ((torch.ones(2).long(), torch.ones(2) > 0), TypeError, "scores: expected a floating"),
        ((torch.ones(2) / 0, torch.ones(2) > 0), ValueError, "scores: expected finite values"),
        ((torch.ones(2), torch.ones(3) > 0), ValueError, r"mislabelled: expected .* = \[2\], got"),
        ((torch.ones(2), torch.ones(2)), TypeError, "mislabelled: expected dtype torch.bool"),
        ((torch.ones(2), torch.ones(2) > 0), ValueError, "mislabelled: .* got 2 and 0"),
    ],
)
def test_bad_arguments_get_one_sentence(arguments, error, message):
    with pytest.raises(error, match=message) as caught:
        mislabel_auc(*arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": torch.ones(3)}, TypeError, "labels: expected an integer dtype"),
        ({"labels": torch.tensor([[1]])}, ValueError, "labels: expected 1 dimension"),
        (
            {"labels": torch.tensor([4])},
            ValueError,
            r"labels: expected integers in 0\.\.3, got 4\.\.4",
        ),
        ({"num_classes": 1}, ValueError, "num_classes: expected an integer of at least 2, got 1"),
        (
            {"labels": torch.tensor([1], dtype=torch.uint8), "num_classes": 300},
            ValueError,
            "num_classes: expected no more than labels of torch.uint8 can tell apart, got 300",
        ),
        ({"share": 1.5}, ValueError, r"share: expected a number in \[0, 1\], got 1.5"),
    ],
)
def test_bad_flips_get_one_sentence(change, error, message):
    with pytest.raises(error, match=message) as caught:
        flip_labels(**({"labels": torch.tensor([0, 1]), "num_classes": 4} | change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_self_influence_finds_mislabelled_digits(seed):
    # The gate: 5 % flipped, AUC of at least .90, by the default estimator. Seeds 0 to 5 gave
    # .997 to .999.
    pytest.importorskip("sklearn")
    from trak_ext.demo import digits

    split = digits.load_digits_split(seed=seed)
    labels, wrong = flip_labels(split.train_labels, num_classes=10, share=0.05, seed=seed)
    everything = torch.arange(len(labels)).expand(3, -1)
    states = digits.train_models(
        split.train_inputs, labels, everything, [100 * seed + i for i in range(3)]
    )
    attributor = Attributor(
        digits.make_model(), "image_classification", checkpoints=digits.unstack_states(states),
        proj_dim=512, seed=seed, progress=False,
    )  # fmt: skip
    attributor.fit(DataLoader(TensorDataset(split.train_inputs, labels), batch_size=256))
    result = mislabel_auc(attributor.self_influence(), wrong)
    assert result.value >= 0.90
    assert result.interval[0] >= 0.90
