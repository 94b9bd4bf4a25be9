"""Checks of arguments that the measures share; each raises one sentence naming the argument."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from .. import _check


def check_float_matrix(name: str, value: Any) -> None:
    """Refuse what is not a floating-point tensor of 2 dimensions with finite values."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.ndim != 2:
        raise ValueError(f"{name}: expected 2 dimensions, got shape {list(value.shape)}")
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point dtype, got {value.dtype}")
    check_finite(name, value)


def check_finite(name: str, value: Tensor) -> None:
    """Refuse NaN and Inf."""
    finite = value.isfinite()
    if not finite.all():
        raise ValueError(
            f"{name}: expected finite values, got {int((~finite).sum())} that are NaN or "
            f"infinite, the first at {(~finite).nonzero()[0].tolist()}"
        )


def check_scores(name: str, scores: Any, masks: Any) -> None:
    """Refuse scores that are no [n_train, t], or masks that are no [m, n_train] with m >= 2."""
    check_float_matrix(name, scores)
    if scores.shape[1] == 0:
        raise ValueError(
            f"{name}: expected at least 1 target as [n_train, t], got shape {list(scores.shape)}"
        )
    if not isinstance(masks, Tensor):
        raise TypeError(f"masks: expected a torch.Tensor, got {type(masks).__name__}")
    if masks.ndim != 2:
        raise ValueError(f"masks: expected 2 dimensions, got shape {list(masks.shape)}")
    if masks.dtype != torch.bool:
        raise TypeError(f"masks: expected dtype torch.bool, got {masks.dtype}")
    if len(masks) < 2:
        raise ValueError(f"masks: expected at least 2 subsets (rows), got {len(masks)}")
    if masks.shape[1] != len(scores):
        raise ValueError(
            f"masks: expected shape [m, {len(scores)}] to go with {name} {list(scores.shape)}, "
            f"got {list(masks.shape)}"
        )


def check_outputs(outputs: Any, num_subsets: int, num_targets: int) -> None:
    """Refuse outputs that are no [m, t]."""
    check_float_matrix("outputs", outputs)
    if outputs.shape != (num_subsets, num_targets):
        raise ValueError(
            f"outputs: expected shape [{num_subsets}, {num_targets}] (subsets, targets), got "
            f"{list(outputs.shape)}"
        )


def check_positive(name: str, value: Any, least: int = 1) -> int:
    """Return `value` as an int; refuse what is not an integer of at least 1 (or `least`)."""
    number = as_integer(value)
    if number is None or number < least:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
    return number


def check_resamples(num_resamples: Any) -> int:
    """Return a number of resamples; refuse what is not an integer of at least 1."""
    return check_positive("num_resamples", num_resamples)


def check_seed(name: str, seed: Any) -> int:
    """Return a seed that torch's generators take; NumPy integers are welcome, bools not."""
    return _check.integer(name, seed, -(2**63), 2**64 - 1)


def as_integer(value: Any) -> int | None:
    """Return an integer, NumPy's too, as an int; None for what is none, such as a bool."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def check_vector(name: str, value: Any, length: int | None, meaning: str) -> None:
    """Refuse what is not a tensor of 1 dimension and the given length."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.ndim != 1 or (length is not None and len(value) != length):
        expected = "1 dimension" if length is None else f"shape [{length}]"
        raise ValueError(f"{name}: expected {expected}, {meaning}, got shape {list(value.shape)}")
