"""What a task prepares from the training data for a checkpoint: made, required, put on a device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..gradients import GradientComputer
from ..inputs import loaders
from ..inputs.batches import batch_tensors
from ..store import Context, StoreError
from ..store.digest import SampleDigest


def prepare_context(
    computer: GradientComputer,
    weights: Mapping[str, Tensor],
    loader: Iterable[Any],
    device: torch.device,
    checkpoint: int,
) -> tuple[Context, int]:
    """Return what the computer's task prepares from all of a loader's samples, and their number.

    The tensors are on the CPU.
    """
    batches = _DigestedBatches(loader, device)
    remaining = iter(batches)
    made = computer.prepare(weights, remaining, checkpoint)
    for _ in remaining:  # the digest is of all samples, however many were looked at
        pass
    on_cpu = {name: tensor.cpu() for name, tensor in made.items()}
    return Context(on_cpu, batches.digest.hexdigest()), batches.count


def data_digest(loader: Iterable[Any], device: torch.device) -> str:
    """Return the digest of a loader's samples that `prepare_context` keeps."""
    batches = _DigestedBatches(loader, device)
    for _ in batches:
        pass
    return batches.digest.hexdigest()


class _DigestedBatches:
    """(position of the first sample, batch), in order, with the digest and number of samples."""

    def __init__(self, loader: Iterable[Any], device: torch.device) -> None:
        self._loader = loader
        self._device = device
        self.digest = SampleDigest()
        self.count = 0

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        for segment in loaders.segments(self._loader, self._device, 2**62):
            self.digest.update(batch_tensors(segment.batch), segment.ids)
            self.count = segment.stop
            yield segment.start, segment.batch


def require_context(context: Context | None, m: int) -> dict[str, Tensor]:
    """Return the tensors of a stored context, which must be there."""
    if context is None:
        raise StoreError(
            f"store: expected what the task prepared for checkpoint {m}, got none (fit part 0 "
            "first)"
        )
    return context.tensors


def on_device(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return tensors on a device."""
    return {name: tensor.to(device) for name, tensor in tensors.items()}
