"""Calling a user's retraining function, a bounded number of models at a time, and checking it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Retrain = Callable[[Tensor, Sequence[int]], Tensor]


def run_retraining(
    retrain: Retrain, masks: Tensor, seeds: list[int], num_targets: int | None, at_once: int
) -> Tensor:
    """Return retrain(masks, seeds) [c, t], called on up to `at_once` models at a time."""
    if not callable(retrain):
        raise TypeError(
            f"retrain: expected a function of (masks, seeds), got a {type(retrain).__name__}"
        )
    parts = []
    for start in range(0, len(masks), at_once):
        chosen = slice(start, start + at_once)
        result: Any = retrain(masks[chosen], seeds[chosen])
        count = len(masks[chosen])
        expected = f"a tensor [{count}, {'t' if num_targets is None else num_targets}]"
        if not isinstance(result, Tensor):
            raise TypeError(
                f"retrain: expected it to return {expected}, one row a model, got a "
                f"{type(result).__name__}"
            )
        fits = result.ndim == 2 and len(result) == count
        if not fits or (num_targets is not None and result.shape[1] != num_targets):
            raise ValueError(
                f"retrain: expected it to return {expected}, one row a model, got shape "
                f"{list(result.shape)}"
            )
        num_targets = result.shape[1]
        parts.append(result.detach().cpu())
    return torch.cat(parts)
