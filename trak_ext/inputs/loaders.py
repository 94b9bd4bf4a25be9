"""Going over a loader: batches, samples in order, and the digest that tells data from others.

A sample's position is its identity. A batch is tensors with samples in front, in nested tuples,
lists and mappings.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from .structures import structure_text

SampleId = int | str

ID_KEY = "sample_id"

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


class Segment(NamedTuple):
    """Consecutive samples start .. stop - 1, with their ids where the loader gives them."""

    start: int
    stop: int
    batch: Any
    ids: list[SampleId] | None


def segments(loader: Iterable[Any], device: torch.device, boundary: int) -> Iterator[Segment]:
    """Yield samples in order, cut where a sample's number is a multiple of `boundary`.

    Batches are cut, never joined: samples of two batches may differ in length. A mapping's
    "sample_id" (a tensor or NumPy array [B], or a list, of strings or integers) is taken out of it.
    """
    position = 0
    with_ids: bool | None = None
    for whole in loader:
        batch, ids = split_ids(whole)
        size = batch_size(batch)
        if size == 0:
            continue
        if ids is not None and len(ids) != size:
            raise ValueError(f"{ID_KEY}: expected {size} as the batch's samples, got {len(ids)}")
        if with_ids is not None and with_ids != (ids is not None):
            raise ValueError(f"{ID_KEY}: expected in every batch or in none, got it in some")
        with_ids = ids is not None
        taken = 0
        while taken < size:
            count = min(boundary - position % boundary, size - taken)
            part = map_tensors(lambda t, a=taken, b=taken + count: t[a:b].to(device), batch)  # type: ignore[misc]
            own = None if ids is None else ids[taken : taken + count]
            yield Segment(position, position + count, part, own)
            position += count
            taken += count


def split_ids(batch: Any) -> tuple[Any, list[SampleId] | None]:
    """Return a batch without its ids, and the ids, if it is a mapping that has them."""
    if not isinstance(batch, Mapping) or ID_KEY not in batch:
        return batch, None
    given = batch[ID_KEY]
    if isinstance(given, (torch.Tensor, np.ndarray)):
        if given.ndim != 1:
            raise ValueError(f"{ID_KEY}: expected shape [B], got {list(given.shape)}")
        given = given.tolist()
    if not isinstance(given, (list, tuple)):
        raise TypeError(
            f"{ID_KEY}: expected strings or integers as a list, a tensor or an array, got a "
            f"{type(given).__name__}"
        )
    ids = [_plain_id(value) for value in given]
    other = [type(value).__name__ for value in ids if type(value) not in (int, str)]
    if other:
        raise TypeError(f"{ID_KEY}: expected strings or integers, got a {other[0]}")
    return {key: value for key, value in batch.items() if key != ID_KEY}, ids


def _plain_id(value: Any) -> Any:
    """Return a NumPy or torch integer, or a NumPy string, as Python's."""
    if isinstance(value, np.generic) or (isinstance(value, torch.Tensor) and value.ndim == 0):
        return value.item()
    return value


# --- batches --------------------------------------------------------------------------------------


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


# --- digests --------------------------------------------------------------------------------------


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return a tensor's values in row-major order as bytes."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")


class SampleDigest:
    """A digest of samples in order, the same however they were cut into batches."""

    def __init__(self) -> None:
        self._digest = hashlib.blake2b(digest_size=16)

    def update(
        self,
        tensors: list[Tensor],
        ids: Sequence[int | str] | None = None,
        structure: str = "",
    ) -> None:
        """Add the samples of a batch: tensors with samples in front, and ids if there are any.

        Args:
            structure: Of the batch: its keys and containers, `structures.structure_text`.
        """
        rows = [self._rows(tensor) for tensor in tensors]
        said = f"{structure}|".encode()
        for i in range(tensors[0].shape[0]):
            self._digest.update(said)
            if ids is not None:
                self._digest.update(f"id {json.dumps(ids[i])}|".encode())
            for prefix, data in rows:
                self._digest.update(prefix)
                self._digest.update(data[i])

    def hexdigest(self) -> str:
        """Return the digest of all samples so far."""
        return self._digest.hexdigest()

    def add(self, batch: Any, ids: Sequence[int | str] | None = None) -> None:
        """Add the samples of a batch, with its keys and containers."""
        self.update(batch_tensors(batch), ids, structure_text(batch))

    @staticmethod
    def _rows(tensor: Tensor) -> tuple[bytes, np.ndarray[Any, Any]]:
        prefix = f"{tensor.dtype}|{list(tensor.shape[1:])}|".encode()
        count = tensor.shape[0]
        data = np.frombuffer(tensor_bytes(tensor), dtype=np.uint8)
        return prefix, data.reshape(count, data.size // max(count, 1))
