"""Going over a loader when a sample's position is its identity."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import (
    DataLoader,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from .gradients import batch_size, map_tensors

_RANDOM_SAMPLERS = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


def check_loader(name: str, loader: Any, passes: int) -> None:
    """Refuse a loader that shuffles or that cannot be gone over `passes` times."""
    if not isinstance(loader, Iterable) or isinstance(loader, (torch.Tensor, str, dict)):
        raise TypeError(
            f"{name}: expected an iterable of batches (such as a DataLoader), "
            f"got a {type(loader).__name__}"
        )
    if isinstance(loader, DataLoader):
        # Batch samplers hold samplers, and may stand in the place of either.
        sampler: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        while sampler is not None:
            if isinstance(sampler, _RANDOM_SAMPLERS) or getattr(sampler, "shuffle", False):
                raise ValueError(
                    f"{name}: expected a loader that keeps the order (shuffle=False), since a "
                    f"sample's position is its identity, got one with a {type(sampler).__name__}"
                )
            sampler = getattr(sampler, "sampler", None)
    if passes > 1 and isinstance(loader, Iterator):
        raise ValueError(
            f"{name}: expected an iterable that can be gone over {passes} times (once a "
            f"checkpoint), got a one-time {type(loader).__name__}"
        )


def num_samples(loader: Iterable[Any]) -> int | None:
    """Return the number of samples a pass will bring, where the loader tells beforehand."""
    if isinstance(loader, DataLoader) and isinstance(loader.sampler, SequentialSampler):
        whole = loader.batch_size is not None and not loader.drop_last
        return len(loader.sampler) if whole else None
    return None


def segments(
    loader: Iterable[Any], device: torch.device, boundary: int
) -> Iterator[tuple[int, int, Any]]:
    """Yield (start, stop, batch) in order, cut where a sample's number is a multiple of `boundary`.

    Batches are cut, never joined: samples of two batches may differ in length.
    """
    position = 0
    for batch in loader:
        size = batch_size(batch)
        taken = 0
        while taken < size:
            room = boundary - position % boundary
            count = min(room, size - taken)
            part = map_tensors(lambda t, a=taken, b=taken + count: t[a:b].to(device), batch)  # type: ignore[misc]
            yield position, position + count, part
            position += count
            taken += count
