"""Leave-one-out correlation: scores against what retraining without one sample really does."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import check_float_matrix, check_positive, check_resamples, check_seed, check_vector
from .bootstrap import basic_interval, central, mean_over_targets, resample_counts, resampled_means
from .ranks import weighted_spearman
from .retraining import Retrain, run_retraining

__all__ = ["LeaveOneOut", "leave_one_out_changes", "leave_one_out_correlation"]


class LeaveOneOut(NamedTuple):
    """Rank correlation with leaving one out, with 95 % bootstrap intervals, all in [-1, 1]."""

    mean: float  # over the targets with a defined correlation; NaN if there are none
    per_target: Tensor  # [t], fp64; NaN where scores or changes are constant over the samples
    interval_targets: tuple[float, float]  # of the mean, had other targets been drawn
    interval_samples: tuple[float, float]  # of what the mean tends to with many training samples


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
    check_float_matrix("scores", scores)
    check_float_matrix("changes", changes)
    num_resamples = check_resamples(num_resamples)
    seed = check_seed("seed", seed)
    num_train, num_targets = scores.shape
    if num_targets == 0:
        raise ValueError(
            f"scores: expected at least 1 target as [n_train, t], got shape {list(scores.shape)}"
        )
    chosen = scores.detach()
    if samples is not None:
        chosen = chosen[_check_samples(samples, num_train).to(scores.device)]
    if changes.shape != chosen.shape:
        raise ValueError(
            f"changes: expected shape {list(chosen.shape)} (samples left out, targets), got "
            f"{list(changes.shape)}"
        )
    if len(changes) < 2:
        raise ValueError(f"changes: expected at least 2 samples (rows), got {len(changes)}")
    predicted = chosen.to("cpu", torch.float64).T.contiguous()  # [t, s]
    truth = changes.detach().to("cpu", torch.float64).T.contiguous()

    once = torch.ones(len(changes), 1, dtype=torch.float64, device="cpu")
    per_target = weighted_spearman(predicted, truth, once)[:, 0]
    defined = ~per_target.isnan()
    if not defined.all():
        warnings.warn(
            f"leave_one_out_correlation: {int((~defined).sum())} of {num_targets} targets have "
            "scores or changes that are constant over the samples, so their correlation is "
            "undefined and left out",
            stacklevel=2,
        )
    if not defined.any():
        nothing = (torch.nan, torch.nan)
        return LeaveOneOut(torch.nan, per_target, nothing, nothing)
    generator = torch.Generator("cpu").manual_seed(seed)
    correlations = per_target[defined]
    target_means = resampled_means(correlations, num_resamples, generator)
    counts = resample_counts(len(changes), num_resamples, generator)
    values = (predicted[defined], truth[defined])
    sample_means = mean_over_targets(weighted_spearman, values, counts)
    mean = correlations.mean().item()
    interval_samples = basic_interval(mean, sample_means, bound=1.0)
    return LeaveOneOut(mean, per_target, central(target_means), interval_samples)


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
    num_train = check_positive("num_train", num_train)
    models_at_once = check_positive("models_at_once", models_at_once)
    seeds = [check_seed("seeds", seed) for seed in seeds]
    if not seeds:
        raise ValueError("seeds: expected at least one, got none")
    left_out = torch.arange(num_train, device="cpu")
    if samples is not None:
        left_out = _check_samples(samples, num_train)
    everything = torch.ones((len(seeds), num_train), dtype=torch.bool, device="cpu")
    whole = run_retraining(retrain, everything, seeds, None, models_at_once).double()  # [r, t]
    total = torch.zeros((len(left_out), whole.shape[1]), dtype=torch.float64, device="cpu")
    for full, seed in zip(whole, seeds, strict=True):
        for start in range(0, len(left_out), models_at_once):
            chosen = left_out[start : start + models_at_once]
            masks = torch.ones((len(chosen), num_train), dtype=torch.bool, device="cpu")
            masks.scatter_(1, chosen[:, None], False)
            outputs = run_retraining(
                retrain, masks, [seed] * len(chosen), len(full), models_at_once
            )
            total[start : start + len(chosen)] += full - outputs.double()
    return total / len(seeds)


def _check_samples(samples: Tensor, num_train: int) -> Tensor:
    check_vector("samples", samples, None, "one a sample left out")
    if samples.is_floating_point() or samples.is_complex() or samples.dtype == torch.bool:
        raise TypeError(f"samples: expected an integer dtype, got {samples.dtype}")
    if len(samples) and not 0 <= int(samples.min()) <= int(samples.max()) < num_train:
        raise ValueError(
            f"samples: expected indices in 0..{num_train - 1}, got {int(samples.min())}.."
            f"{int(samples.max())}"
        )
    if len(samples.unique()) != len(samples):
        raise ValueError("samples: expected each sample once, got one twice")
    return samples.long().cpu()
