"""Counterfactual brittleness against a model whose flips can be counted by hand, and on digits."""

from __future__ import annotations

import pytest
import torch

from trak_ext.evaluation import Brittleness, counterfactual_brittleness


class Votes:
    """A target's class is whether votes of the samples that are kept sum to more than 0."""

    def __init__(self, votes):  # [n, t]
        self.votes, self.calls = votes, []

    def __call__(self, masks, seeds):
        assert masks.dtype == torch.bool
        assert len(masks) == len(seeds)
        self.calls.append((masks.clone(), list(seeds)))
        return (masks.to(self.votes.dtype) @ self.votes > 0).long()


def make_votes():
    """Target 0 flips without one sample, target 1 without three, target 2 never, 3 has a tie."""
    votes = torch.zeros(10, 4)
    votes[0, 0] = 1.0
    votes[1:4, 1] = torch.tensor([1.0, 1.1, 1.2])
    votes[:, 2] = 1.0
    votes[[8, 9], 3] = 1.0
    return votes


def test_flips_are_counted_as_by_hand():
    votes = make_votes()
    retrain = Votes(votes)
    result = counterfactual_brittleness(votes, retrain, [1, 2, 3], num_seeds=2)
    assert isinstance(result, Brittleness)
    expected = torch.tensor([[1.0, 0, 0, 0], [1, 0, 0, 1], [1, 1, 0, 1]], dtype=torch.float64)
    assert torch.equal(result.per_target, expected)
    assert torch.equal(result.flipped, expected.mean(1))
    assert result.counts == [1, 2, 3]
    for (low, high), share in zip(result.intervals, result.flipped.tolist(), strict=True):
        assert 0 <= low <= share <= high <= 1


def test_models_get_the_promised_masks_and_seeds():
    votes = make_votes()
    retrain = Votes(votes)
    counterfactual_brittleness(votes, retrain, [2], num_seeds=3, models_at_once=3, seed=7)
    whole, *rest = retrain.calls
    assert whole[0].all()
    assert whole[1] == [7, 8, 9]
    assert max(len(masks) for masks, _ in rest) == 3
    masks = torch.cat([masks for masks, _ in rest])
    assert len(masks) == 3 * 4 + 3  # a target and seed each, and the control
    assert (masks.sum(1) == 8).all()
    for seed in range(3):
        for target in range(4):
            top = votes[:, target].sort(descending=True, stable=True).indices[:2]
            row = masks[4 * seed + target]
            assert sorted((~row).nonzero()[:, 0].tolist()) == sorted(top.tolist())
    assert len({tuple(row.tolist()) for row in masks[-3:]}) > 1  # other random samples each time


def test_control_flips_less_and_is_paired():
    g = torch.Generator().manual_seed(0)
    votes = torch.randn(60, 40, generator=g) + 0.3
    result = counterfactual_brittleness(votes, Votes(votes), [5, 15], num_seeds=4)
    assert (result.flipped > result.flipped_random).all()
    low, high = result.intervals_difference[1]
    assert 0 < low < high
    gaps = (result.per_target - result.per_target_random).mean(1).tolist()
    for (low, high), gap in zip(result.intervals_difference, gaps, strict=True):
        assert low <= gap <= high
    again = counterfactual_brittleness(votes, Votes(votes), [5, 15], num_seeds=4)
    assert again.intervals_difference == result.intervals_difference
    assert torch.equal(again.per_target_random, result.per_target_random)


def test_random_scores_flip_as_the_control_does():
    g = torch.Generator().manual_seed(0)
    votes = torch.randn(60, 200, generator=g) + 0.3
    scores = torch.randn(votes.shape, generator=g)
    result = counterfactual_brittleness(scores, Votes(votes), [20], num_seeds=8)
    assert abs((result.flipped - result.flipped_random).item()) < 0.05


def test_trak_finds_what_digits_hang_on():
    pytest.importorskip("sklearn")
    from torch.utils.data import DataLoader, TensorDataset

    from trak_ext import Attributor
    from trak_ext.demo import digits

    split = digits.load_digits_split(200, 20, seed=0)
    recipe = {"epochs": 20, "models_at_once": 64}

    def retrain(masks, seeds):
        members = masks.nonzero()[:, 1].view(len(masks), -1)
        states = digits.train_models(
            split.train_inputs, split.train_labels, members, seeds, **recipe
        )
        model = digits.make_model()
        logits = torch.func.vmap(
            lambda state: torch.func.functional_call(model, state, (split.test_inputs,))
        )(states)
        return logits.argmax(2)

    everything = torch.arange(200).expand(4, -1)
    states = digits.train_models(
        split.train_inputs, split.train_labels, everything, [10, 11, 12, 13], **recipe
    )
    attributor = Attributor(
        digits.make_model(), "image_classification", checkpoints=digits.unstack_states(states),
        proj_dim=256, progress=False,
    )  # fmt: skip
    attributor.fit(DataLoader(TensorDataset(split.train_inputs, split.train_labels)))
    scores = attributor.attribute(
        DataLoader(TensorDataset(split.test_inputs, split.test_labels), batch_size=64)
    )
    result = counterfactual_brittleness(scores, retrain, [15], num_seeds=2)
    assert result.flipped.item() > result.flipped_random.item() + 0.1
    assert result.intervals_difference[0][0] > 0


VOTES = make_votes()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scores": VOTES[0]}, ValueError, "scores: expected 2 dimensions"),
        ({"scores": VOTES[:, :0]}, ValueError, "scores: expected at least 1 target"),
        ({"counts": []}, ValueError, "counts: expected at least one, got none"),
        ({"counts": [0]}, ValueError, r"counts\[0\]: expected an integer from 1 to 9, got 0"),
        ({"counts": [10]}, ValueError, r"counts\[0\]: expected an integer from 1 to 9, got 10"),
        ({"num_seeds": 0}, ValueError, "num_seeds: expected an integer of at least 1, got 0"),
        ({"models_at_once": 0}, ValueError, "models_at_once: expected an integer of at least 1"),
        ({"retrain": 3}, TypeError, r"retrain: expected a function of \(masks, seeds\), got 3"),
        ({"retrain": lambda m, s: None}, TypeError, r"retrain: .* \[3, 4\].* got None"),
        ({"retrain": lambda m, s: m[:1].long()}, ValueError, r"retrain: .* got a .*\[1, 10\]"),
        ({"retrain": lambda m, s: m[:, :4] * 0.5}, TypeError, "retrain: .* integer dtype"),
    ],
)
def test_bad_arguments_get_one_sentence(change, error, message):
    arguments = {"scores": VOTES, "retrain": Votes(VOTES), "counts": [1]} | change
    with pytest.raises(error, match=message) as caught:
        counterfactual_brittleness(**arguments)
    assert "\n" not in str(caught.value)
