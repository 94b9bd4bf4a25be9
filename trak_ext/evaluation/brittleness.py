"""Counterfactual brittleness: does a prediction change when its proponents are taken away?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import as_integer, check_float_matrix, check_positive, check_resamples, check_seed
from .bootstrap import central, resampled_means
from .retraining import Retrain, run_retraining

__all__ = ["Brittleness", "counterfactual_brittleness"]


class Brittleness(NamedTuple):
    """Shares of predictions that flip, with 95 % bootstrap intervals over targets.

    K removal counts, t targets; each share is a mean over targets and retrainings.
    """

    counts: list[int]  # K: training samples removed
    flipped: Tensor  # [K], fp64: with the target's top proponents removed
    flipped_random: Tensor  # [K], fp64: with as many random samples removed
    intervals: list[tuple[float, float]]  # of `flipped`
    intervals_random: list[tuple[float, float]]  # of `flipped_random`
    intervals_difference: list[tuple[float, float]]  # of flipped - flipped_random, paired by target
    per_target: Tensor  # [K, t], fp64, the mean over retrainings
    per_target_random: Tensor  # [K, t]


def counterfactual_brittleness(
    scores: Tensor,
    retrain: Retrain,
    counts: Sequence[int],
    *,
    num_seeds: int = 3,
    models_at_once: int = 64,
    num_resamples: int = 1000,
    seed: int = 0,
) -> Brittleness:
    """Remove each target's top proponents, retrain, and count the predictions that flip.

    For a target z and a count c, models are trained without the c training samples of the highest
    scores τ(z, ·). A retraining flips z where it predicts another class than the model of the same
    seed that was trained on everything. The control removes c random samples, the same ones for
    all targets and others for every seed: what flips there is due to less data and to the noise of
    retraining. The idea is that of Ilyas et al. 2022 ("Datamodels: Predicting Predictions from
    Training Data", section 4), with a mean over seeds in the place of a search for the smallest
    set.

    Takes num_seeds · (1 + K · (t + 1)) retrainings.

    Args:
        scores: attributions τ [n_train, t], floating point and finite; equal scores are removed
            with the lower index first.
        retrain: called as retrain(masks, seeds) with masks [c, n_train], bool, True where a sample
            is to be trained on, the same number in every row, and a list of c seeds; returns the
            predicted classes of all targets, an integer tensor [c, t]. A model must be a function
            of its mask and seed.
        counts: how many training samples to remove, each 1 to n_train - 1.
        num_seeds: retrainings of each kind.
        models_at_once: rows of masks in a call.
        num_resamples: of the bootstrap over targets.
        seed: of the first model, the control and the bootstrap; models have seed .. seed +
            num_seeds - 1.

    Raises:
        TypeError, ValueError: arguments that do not fit, or such a result of retrain.
    """
    check_float_matrix("scores", scores)
    num_train, num_targets = scores.shape
    if num_targets == 0:
        raise ValueError(
            f"scores: expected at least 1 target as [n_train, t], got shape {list(scores.shape)}"
        )
    removed: list[int] = []
    for given in counts:
        count = as_integer(given)
        if count is None or not 0 < count < num_train:
            raise ValueError(f"counts: expected integers from 1 to {num_train - 1}, got {given!r}")
        removed.append(count)
    if not removed:
        raise ValueError("counts: expected at least one, got none")
    num_seeds = check_positive("num_seeds", num_seeds)
    models_at_once = check_positive("models_at_once", models_at_once)
    num_resamples = check_resamples(num_resamples)
    seed = check_seed("seed", seed)

    seeds = [seed + i for i in range(num_seeds)]
    # Stable, so that a target's removals are nested and equal scores have an order.
    order = scores.detach().cpu().argsort(dim=0, descending=True, stable=True)  # [n, t]
    everything = torch.ones((num_seeds, num_train), dtype=torch.bool, device="cpu")
    before = _predict(retrain, everything, seeds, num_targets, models_at_once)  # [s, t]

    generator = torch.Generator("cpu").manual_seed(seed)
    shuffled = torch.stack(
        [torch.randperm(num_train, generator=generator, device="cpu") for _ in seeds]
    )
    own = torch.arange(num_targets, device="cpu")
    flips, flips_random = [], []
    for count in removed:
        without = torch.ones((num_targets, num_train), dtype=torch.bool, device="cpu")
        without.scatter_(1, order[:count].T, False)
        share = torch.zeros(num_targets, dtype=torch.float64, device="cpu")
        for i, model_seed in enumerate(seeds):
            after = _predict(
                retrain, without, [model_seed] * num_targets, num_targets, models_at_once
            )
            share += after[own, own] != before[i]
        flips.append(share / num_seeds)
        control = everything.clone().scatter_(1, shuffled[:, :count], False)
        after = _predict(retrain, control, seeds, num_targets, models_at_once)
        flips_random.append((after != before).double().mean(0))

    def intervals(values: list[Tensor]) -> list[tuple[float, float]]:
        draws = torch.Generator("cpu").manual_seed(seed)
        return [central(resampled_means(value, num_resamples, draws)) for value in values]

    paired = [a - b for a, b in zip(flips, flips_random, strict=True)]
    per_target, per_target_random = torch.stack(flips), torch.stack(flips_random)
    return Brittleness(
        removed,
        per_target.mean(1),
        per_target_random.mean(1),
        intervals(flips),
        intervals(flips_random),
        intervals(paired),
        per_target,
        per_target_random,
    )


def _predict(
    retrain: Retrain, masks: Tensor, seeds: list[int], num_targets: int, at_once: int
) -> Tensor:
    predicted = run_retraining(retrain, masks, seeds, num_targets, at_once)
    if predicted.is_floating_point() or predicted.is_complex():
        raise TypeError(
            f"retrain: expected it to return classes of an integer dtype, got {predicted.dtype}"
        )
    return predicted
