"""What a loader must be: in one order, from its first batch on, as often as it is asked."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from .batches import map_tensors, split_ids, take_apart, tensor_bytes

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
    if isinstance(loader, Iterator):
        if passes > 1:
            raise ValueError(
                f"{name}: expected an iterable that can be gone over {passes} times (once a "
                f"checkpoint), got a one-time {type(loader).__name__}"
            )
    elif type(loader) not in (list, tuple):
        _look_twice(name, loader)


_MOST_INDICES = 2**20  # of a sampler, that are looked at


def _look_twice(name: str, loader: Iterable[Any]) -> None:
    """Refuse a loader whose order, or first batch, is another one on a second look.

    A data set with positions is not asked for samples: the sampler tells. Generators of random
    numbers are afterwards where they were.
    """
    with _generators_kept(loader):
        if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
            sampler: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
            if _is_sequential(sampler):
                return
            looks = [[str(item) for item in islice(sampler, _MOST_INDICES)] for _ in range(2)]
            if looks[0] != looks[1]:
                raise ValueError(
                    f"{name}: expected a loader that keeps the order, since a sample's position is "
                    f"its identity, got one with a {type(sampler).__name__} that gives another "
                    "order on a second look (give it a fixed seed, or use shuffle=False)"
                )
            return
        first, again = (_first_batch(loader) for _ in range(2))
    if first != again:
        raise ValueError(
            f"{name}: expected an iterable that begins with the same batch every time, got a "
            f"{type(loader).__name__} that began with another on a second look"
        )


def _is_sequential(sampler: Any) -> bool:
    inner = sampler.sampler if type(sampler) is BatchSampler else sampler
    return type(inner) is SequentialSampler


def _first_batch(loader: Iterable[Any]) -> Any:
    """Return what tells a loader's first batch from others; None where it is no batch."""
    for batch in loader:
        rest, ids = split_ids(batch)
        try:
            structure, tensors = take_apart(map_tensors(lambda tensor: tensor, rest))
        except TypeError:  # is refused by name when it is computed with
            return None
        parts = [(str(t.dtype), tuple(t.shape), tensor_bytes(t).tobytes()) for t in tensors]
        return structure, parts, ids
    return None


@contextmanager
def _generators_kept(loader: Any) -> Iterator[None]:
    """Put back the generators that a loader may draw from: the global ones and its samplers'."""
    holders = [loader]
    for holder in holders:
        for key in ("sampler", "batch_sampler"):
            inner = getattr(holder, key, None)
            if inner is not None and all(inner is not known for known in holders):
                holders.append(inner)
    own = [g for h in holders if isinstance(g := getattr(h, "generator", None), torch.Generator)]
    states = [generator.get_state() for generator in own]
    outer = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(outer[0])
        random.setstate(outer[1])
        np.random.set_state(outer[2])
        for generator, state in zip(own, states, strict=True):
            generator.set_state(state)


def refuse_none(name: str, count: int) -> None:
    """Refuse a loader that brought no sample."""
    if count == 0:
        raise ValueError(
            f"{name}: expected at least one sample, got none (is the iterable used up, or its "
            "batch_size with drop_last larger than the data?)"
        )


def num_samples(loader: Iterable[Any]) -> int | None:
    """Return the number of samples a pass will bring, where the loader tells beforehand."""
    if isinstance(loader, DataLoader) and isinstance(loader.sampler, SequentialSampler):
        whole = loader.batch_size is not None and not loader.drop_last
        return len(loader.sampler) if whole else None
    return None
