"""What removing training samples really does: leave-one-out, and brittleness without proponents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _check
from .bootstrap import Interval, central, mean_with_intervals, resampled_means, weighted_spearman
from .datamodeling import by_target, check_scores, varies

__all__ = [
    "Brittleness",
    "LeaveOneOut",
    "counterfactual_brittleness",
    "leave_one_out_changes",
    "leave_one_out_correlation",
]

Retrain = Callable[[Tensor, Sequence[int]], Tensor]


# --- leave-one-out --------------------------------------------------------------------------------


class LeaveOneOut(NamedTuple):
    """Rank correlation with leaving one out, with 95 % bootstrap intervals, all in [-1, 1]."""

    mean: float  # over the targets with a defined correlation; NaN if there are none
    per_target: Tensor  # [t], fp64; NaN where scores or changes are constant over the samples
    interval_targets: Interval  # of the mean, had other targets been drawn
    interval_samples: Interval  # of what the mean tends to with many training samples


def leave_one_out_correlation(
    scores: Tensor,
    changes: Tensor,
    *,
    samples: Tensor | None = None,
    num_resamples: int = 1000,
    seed: int = 0,
) -> LeaveOneOut:
    """Correlate attributions with the change of the output when a sample is left out.

    For each target z, Spearman's rank correlation over training samples i of τ(z, i) and
    f(z; S) − f(z; S∖{i}) (Koh & Liang 2017, "Understanding Black-box Predictions via Influence
    Functions", section 4.1, with ranks); then the mean over targets. Of a network trained with
    noise the change is mostly noise unless many retrainings are averaged: a low correlation then
    says little of the scores. The intervals are made as those of `lds`, with training samples in
    the place of subsets.

    Args:
        scores: attributions τ [n_train, t], floating point and finite.
        changes: f(z; S) − f(z; S∖{i}) [s, t], as `leave_one_out_changes` returns them.
        samples: the samples i that were left out [s], integers, none twice; None for all in order.
        num_resamples, seed: of both bootstraps.

    Raises:
        TypeError, ValueError: arguments that do not fit; fewer than 2 samples.
    """
    check_scores("scores", scores)
    _check.tensor("changes", changes, 2)
    chosen = scores.detach()
    if samples is not None:
        chosen = chosen[_checked_samples(samples, len(scores)).to(scores.device)]
    _check.shape_is("changes", changes, tuple(chosen.shape), "[samples left out, targets]")
    if len(changes) < 2:
        raise ValueError(f"changes: expected at least 2 samples (rows), got {len(changes)}")
    predicted, truth = by_target(chosen), by_target(changes)
    undefined = (
        "leave_one_out_correlation: {} targets have scores or changes that are constant over the "
        "samples, so their correlation is undefined and left out"
    )
    values, defined = (predicted, truth), varies(predicted) & varies(truth)
    found = mean_with_intervals(
        weighted_spearman, values, defined, undefined, 1.0, num_resamples, seed
    )
    return LeaveOneOut(*found)


def leave_one_out_changes(
    retrain: Retrain,
    num_train: int,
    *,
    samples: Tensor | None = None,
    seeds: Sequence[int] = (0,),
    models_at_once: int = 64,
) -> Tensor:
    """Retrain without each sample in turn: the change f(z; S) − f(z; S∖{i}) it makes.

    Both models of a pair have the same seed; the change is the mean over seeds.

    Args:
        retrain: called as retrain(masks, seeds) with masks [c, n_train], bool, True where a sample
            is to be trained on, and a list of c seeds; returns model outputs f of all targets,
            floating point [c, t]. All rows of a call keep the same number of samples.
        num_train: training samples n.
        samples: the samples to leave out [s], integers, none twice; None for all in order.
        seeds: of the retrainings, at least one.
        models_at_once: rows of masks in a call.

    Returns:
        [s, t], fp64.

    Raises:
        TypeError, ValueError: arguments that do not fit, or such a result of retrain.
    """
    num_train = _check.integer("num_train", num_train, 1)
    models = _Models(retrain, num_train, None, models_at_once, classes=False)
    seeds = [_check.seed(f"seeds[{i}]", seed) for i, seed in enumerate(seeds)]
    if not seeds:
        raise ValueError("seeds: expected at least one, got none")
    left_out = torch.arange(num_train, device="cpu")
    if samples is not None:
        left_out = _checked_samples(samples, num_train)
    whole = models.of_everything(seeds).double()  # [r, t]
    total = torch.zeros((len(left_out), whole.shape[1]), dtype=torch.float64, device="cpu")
    for full, seed in zip(whole, seeds, strict=True):
        total += full - models(left_out[:, None], [seed] * len(left_out)).double()
    return total / len(seeds)


def _checked_samples(samples: Tensor, num_train: int) -> Tensor:
    samples = _check.indices("samples", samples, 1, num_train).cpu()
    if len(samples.unique()) != len(samples):
        raise ValueError("samples: expected each sample once, got one twice")
    return samples


# --- counterfactual brittleness -------------------------------------------------------------------


class Brittleness(NamedTuple):
    """Shares of predictions that flip, with 95 % bootstrap intervals over targets.

    K removal counts, t targets; each share is a mean over targets and retrainings.
    """

    counts: list[int]  # K: training samples removed
    flipped: Tensor  # [K], fp64: with the target's top proponents removed
    flipped_random: Tensor  # [K], fp64: with as many random samples removed
    intervals: list[Interval]  # of `flipped`
    intervals_random: list[Interval]  # of `flipped_random`
    intervals_difference: list[Interval]  # of flipped - flipped_random, paired by target
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
    check_scores("scores", scores)
    num_train, num_targets = scores.shape
    counts = [
        _check.integer(f"counts[{i}]", count, 1, num_train - 1) for i, count in enumerate(counts)
    ]
    if not counts:
        raise ValueError("counts: expected at least one, got none")
    num_seeds = _check.integer("num_seeds", num_seeds, 1)
    seed = _check.seed("seed", seed)
    num_resamples = _check.integer("num_resamples", num_resamples, 1)
    models = _Models(retrain, num_train, num_targets, models_at_once, classes=True)

    seeds = [seed + i for i in range(num_seeds)]
    # Stable, so that a target's removals are nested and equal scores have an order.
    order = scores.detach().cpu().argsort(dim=0, descending=True, stable=True).T  # [t, n]
    before = models.of_everything(seeds)  # [s, t]
    generator = torch.Generator("cpu").manual_seed(seed)
    shuffled = torch.stack(
        [torch.randperm(num_train, generator=generator, device="cpu") for _ in seeds]
    )
    flips, flips_random = [], []
    for count in counts:
        share = torch.zeros(num_targets, dtype=torch.float64, device="cpu")
        for i, model_seed in enumerate(seeds):
            after = models(order[:, :count], [model_seed] * num_targets).diagonal()
            share += after != before[i]
        flips.append(share / num_seeds)
        flips_random.append((models(shuffled[:, :count], seeds) != before).double().mean(0))

    def intervals(values: list[Tensor]) -> list[Interval]:
        draws = torch.Generator("cpu").manual_seed(seed)
        return [central(resampled_means(value, num_resamples, draws)) for value in values]

    paired = [a - b for a, b in zip(flips, flips_random, strict=True)]
    per_target, per_target_random = torch.stack(flips), torch.stack(flips_random)
    return Brittleness(
        counts,
        per_target.mean(1),
        per_target_random.mean(1),
        intervals(flips),
        intervals(flips_random),
        intervals(paired),
        per_target,
        per_target_random,
    )


# --- retraining -----------------------------------------------------------------------------------


class _Models:
    """A user's retraining function, called for a bounded number of models, and its results checked.

    Args:
        retrain: As in `leave_one_out_changes`.
        num_targets: Columns of what it returns; None for as many as the first call brings.
        classes: Whether it must return integers.
    """

    def __init__(
        self, retrain: Retrain, num_train: int, num_targets: int | None, at_once: int, classes: bool
    ) -> None:
        if not callable(retrain):
            expected = "a function of (masks, seeds)"
            raise TypeError(f"retrain: expected {expected}, got {_check.describe(retrain)}")
        self._retrain = retrain
        self._num_train, self._num_targets = num_train, num_targets
        self._at_once = _check.integer("models_at_once", at_once, 1)
        self._classes = classes

    def of_everything(self, seeds: list[int]) -> Tensor:
        """Return what models [len(seeds), t] say that are trained on all samples."""
        return self(torch.empty((len(seeds), 0), dtype=torch.int64, device="cpu"), seeds)

    def __call__(self, removed: Tensor, seeds: list[int]) -> Tensor:
        """Return what models say [c, t] that are trained without the samples removed[i], [c, r]."""
        results = []
        for start in range(0, len(seeds), self._at_once):
            without = removed[start : start + self._at_once]
            size = (len(without), self._num_train)
            masks = torch.ones(size, dtype=torch.bool, device="cpu").scatter_(1, without, False)
            results.append(
                self._checked(self._retrain(masks, seeds[start:][: self._at_once]), size)
            )
        nothing = torch.empty((0, self._num_targets or 0), dtype=torch.float64, device="cpu")
        return torch.cat(results) if results else nothing

    def _checked(self, result: Any, size: tuple[int, int]) -> Tensor:
        expected = f"one that returns [{size[0]}, {self._num_targets or 't'}], one row per model"
        _check.instance("retrain", result, Tensor, expected)
        width = self._num_targets or (result.shape[1] if result.dim() == 2 else None)
        if tuple(result.shape) != (size[0], width):
            raise ValueError(f"retrain: expected {expected}, got {_check.describe(result)}")
        if self._classes and (result.is_floating_point() or result.is_complex()):
            raise TypeError(
                f"retrain: expected it to return classes of an integer dtype, got {result.dtype}"
            )
        self._num_targets = width
        return result.detach().cpu()
