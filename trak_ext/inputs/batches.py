"""Batches: tensors with samples in front, in nested tuples, lists and mappings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


def map_tensors(function: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """Return a batch (nested tuples, lists and mappings of tensors) with every tensor mapped."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {key: map_tensors(function, value) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return tuple(map_tensors(function, value) for value in batch)
    raise TypeError(
        f"batch: expected tensors in tuples, lists or mappings, got a {type(batch).__name__}"
    )


def batch_tensors(batch: Any) -> list[Tensor]:
    """Return a batch's tensors in order."""
    tensors: list[Tensor] = []
    map_tensors(lambda tensor: tensors.append(tensor) or tensor, batch)  # type: ignore[func-returns-value]
    return tensors


def batch_size(batch: Any) -> int:
    """Return the number of samples: the first dimension, the same for every tensor."""
    tensors = batch_tensors(batch)
    sizes = {tensor.shape[0] if tensor.dim() else None for tensor in tensors}
    if len(sizes) != 1 or None in sizes:
        raise ValueError(
            "batch: expected tensors with one number of samples in front, got shapes "
            f"{[list(tensor.shape) for tensor in tensors]}"
        )
    size = sizes.pop()
    assert size is not None
    return size
