"""Features of consecutive samples on their way into a store, and what is refused on that way."""

from __future__ import annotations

import torch
from torch import Tensor

from ..gradients import SampleGradients
from ..inputs.batches import batch_tensors
from ..inputs.loaders import Segment
from ..store import SampleId, Shard, StoreError
from ..store.digest import SampleDigest


class ShardBuilder:
    """Collects features, Q, R and f of samples from number `start` on, or checks a stored shard.

    Args:
        start: Number of the first sample.
        width: Features a sample.
        stored: What the store already holds in this place, if anything.
    """

    def __init__(self, start: int, width: int, stored: Shard | None = None) -> None:
        self.start = start
        self.stored = stored
        self._digest = SampleDigest()
        self._ids: list[SampleId] | None = None
        self._features = [torch.zeros((0, width), dtype=torch.float32, device="cpu")]
        self._weight = [torch.zeros(0, dtype=torch.float32, device="cpu")]
        self._curvature = [torch.zeros(0, dtype=torch.float32, device="cpu")]
        self._output = [torch.zeros(0, dtype=torch.float32, device="cpu")]
        self._bad: list[int] = []
        self._count = 0

    @property
    def data_digest(self) -> str:
        """The digest of the samples so far."""
        return self._digest.hexdigest()

    def note_data(self, segment: Segment) -> None:
        """Take the data of samples, and their ids, into the digest."""
        self._digest.update(batch_tensors(segment.batch), segment.ids)
        if segment.ids is not None:
            self._ids = [*(self._ids or []), *segment.ids]

    def append(self, part: SampleGradients, features: Tensor) -> None:
        """Add a chunk's features, noting samples with anything that is not finite."""
        good = torch.isfinite(features).all(1)
        for figure in (part.output, part.weight, part.curvature):
            good &= torch.isfinite(figure)
        bad = torch.nonzero(~good).reshape(-1) + self.start + self._count
        self._bad.extend(bad.tolist())
        self._features.append(features.cpu())
        self._weight.append(part.weight.float().cpu())
        self._curvature.append(part.curvature.float().cpu())
        self._output.append(part.output.float().cpu())
        self._count += features.shape[0]

    def compare_with_stored(self, stop: int) -> Shard | None:
        """Return the stored shard if it holds samples start .. stop - 1 of the same data."""
        if self.stored is None:
            return None
        rows = self.stored.features.shape[0]
        if rows != stop - self.start:
            raise other_count(str(stop), self.start + rows)
        if self.data_digest != self.stored.data_digest:
            raise other_data(self.start, stop)
        return self.stored

    def finish(self, name: str) -> Shard:
        """Return the shard, or refuse it and name the loader's samples that are not finite."""
        if self._bad:
            raise not_finite(name, self._bad)
        return Shard(
            torch.cat(self._features),
            torch.cat(self._weight),
            torch.cat(self._curvature),
            torch.cat(self._output),
            self.data_digest,
            self._ids,
        )


def not_finite(name: str, samples: list[int], what: str = "gradients") -> ValueError:
    """Return the error for a loader's samples, by number, with NaN or Inf in something."""
    shown = ", ".join(map(str, samples[:10])) + (", ..." if len(samples) > 10 else "")
    return ValueError(
        f"{name}: expected samples with finite outputs and {what}, got NaN or Inf for "
        f"{len(samples)} of them: {shown}"
    )


def changed_data(name: str, start: int, stop: int) -> ValueError:
    """Return the error for a loader whose passes differ."""
    return ValueError(
        f"{name}: expected the same samples in the same order for every checkpoint, got other "
        f"data around samples {start} to {stop} (a loader that shuffles or augments?)"
    )


def other_data(start: int, stop: int) -> StoreError:
    """Return the error for a store that was made of other samples."""
    return StoreError(
        "store: expected one made with the data of train_loader, got other data in samples "
        f"{start} to {stop - 1} (use another folder)"
    )


def other_count(found: str, stored: int | str) -> StoreError:
    """Return the error for a store that was made of another number of samples."""
    return StoreError(f"train_loader: expected {stored} samples as the store holds, got {found}")
