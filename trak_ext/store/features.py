"""How fitted features are read back from a store, whatever it keeps them in."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

import torch
from torch import Tensor

from ..estimator.formula import KernelAccumulator, SampleBlock
from ..inputs.batches import SampleId
from .base import Store, settings_digest, shard_name
from .records import CheckpointSummary, Shard, StoreError


class StoredFeatures:
    """The features of checkpoints 0 .. M - 1 in a store that is fitted for all of them.

    As `trak_ext.estimator.formula.TrainingFeatures`: samples in order over all additions.

    Args:
        store: Opened for the settings.
        num_checkpoints: M.
        proj_dim: Features k of a projection block.
        blocks: Projection blocks b.
        weighting: What kernel matrices weight samples by: None for 1, "own" for each checkpoint's
            R, "mean" for the mean of R over the checkpoints.
        additions: How many are looked at, the training set itself being the first; None for all.

    Raises:
        StoreError: additions that are not finished for every checkpoint, or differ in their data.
    """

    def __init__(
        self,
        store: Store,
        num_checkpoints: int,
        proj_dim: int,
        blocks: int,
        weighting: str | None = None,
        additions: int | None = None,
    ) -> None:
        self._store = store
        self._proj_dim = proj_dim
        self._weighting = weighting
        self.blocks = blocks
        self.num_checkpoints = num_checkpoints
        self._summaries: list[list[CheckpointSummary]] = []  # of each addition and checkpoint
        while additions is None or len(self._summaries) < additions:
            addition = len(self._summaries)
            if addition and additions is None and addition >= store.begun():
                break
            found = [store.read_summary(m, addition) for m in range(num_checkpoints)]
            self._summaries.append(_complete(store, found, addition))

    @property
    def sizes(self) -> list[int]:
        """Training samples of each addition."""
        return [summaries[0].num_samples for summaries in self._summaries]

    @property
    def data_digests(self) -> list[list[str]]:
        """Digests of each addition's shards."""
        return [summaries[0].data_digests for summaries in self._summaries]

    def summaries(self, m: int) -> list[CheckpointSummary]:
        """Return what is known of a checkpoint, of each addition."""
        return [summaries[m] for summaries in self._summaries]

    @property
    def num_samples(self) -> int:
        """Training samples of all additions."""
        return sum(self.sizes)

    def weight(self) -> Tensor:
        """Return the mean of Q over the checkpoints: fp64 [n]."""
        return torch.cat(
            [
                torch.stack([summary.weight for summary in summaries]).double().mean(0)
                for summaries in self._summaries
            ]
        )

    def curvature(self, m: int) -> Tensor | None:
        """Return the weight of each sample in checkpoint m's kernel, [n]; None for ones."""
        if self._weighting is None:
            return None
        return torch.cat([self._curvature(m, a) for a in range(len(self._summaries))])

    def _curvature(self, m: int, addition: int) -> Tensor:
        summaries = self._summaries[addition]
        if self._weighting == "own":
            return summaries[m].curvature
        return torch.stack([summary.curvature for summary in summaries]).double().mean(0)

    def implied(self) -> Tensor:
        """Return `ImpliedRidge.sums` of each checkpoint and projection block, fp64 [M b, k + 3]."""
        sums = [torch.cat([summary.implied for summary in each]) for each in self._summaries]
        return torch.stack(sums).sum(0)

    # --- kernel matrices --------------------------------------------------------------------------

    def kernels(self, m: int) -> Tensor:
        """Return checkpoint m's kernel matrices over all samples, fp64 [blocks, k, k].

        Those that the store lacks are made from the features.
        """
        shape = (self.blocks, self._proj_dim, self._proj_dim)
        total = torch.zeros(shape, dtype=torch.float64, device="cpu")
        for addition in range(len(self._summaries)):
            kernel = self._store.read_kernel(m, *self._kernel_key(m, addition))
            total += self._make_kernels(m, addition) if kernel is None else kernel
        return total

    def kernels_key(self, m: int) -> Hashable:
        """Return the digests of what checkpoint m's kernel matrices are made of."""
        return tuple(self._kernel_key(m, addition) for addition in range(len(self._summaries)))

    def write_kernels(self, addition: int) -> None:
        """Make and keep the kernel matrices of an addition that the store lacks."""
        for m in range(self.num_checkpoints):
            key = self._kernel_key(m, addition)
            if self._store.read_kernel(m, *key) is None:
                self._store.write_kernel(m, *key, self._make_kernels(m, addition))

    def _kernel_key(self, m: int, addition: int) -> tuple[str, int, str]:
        """Return the weights' name, the addition, and the digest of what the matrix is made of."""
        summaries = self._summaries[addition]
        weighting, sources = self._weighting or "plain", [summaries[m]]
        if weighting == "mean":
            weighting, sources = f"mean-{self.num_checkpoints:04d}", [summaries[m], *summaries]
        said = {"data": summaries[m].data_digests, "summaries": [s.digest for s in sources]}
        return weighting, addition, settings_digest(said)

    def _make_kernels(self, m: int, addition: int) -> Tensor:
        kernels = [KernelAccumulator(self._proj_dim) for _ in range(self.blocks)]
        weights = None if self._weighting is None else self._curvature(m, addition)
        for start, stop in self._ranges(self.sizes[addition]):
            features = self._read(m, start, stop, addition).features.split(self._proj_dim, 1)
            own = None if weights is None else weights[start:stop]
            for kernel, part in zip(kernels, features, strict=True):
                kernel.add(part, own)
        return torch.stack([kernel.matrix for kernel in kernels])

    # --- samples ----------------------------------------------------------------------------------

    def samples(self, checkpoints: Sequence[int] | None = None) -> Iterator[SampleBlock]:
        """Yield all samples in order, with the features of the checkpoints (None for all)."""
        chosen = range(self.num_checkpoints) if checkpoints is None else checkpoints
        weight = self.weight()
        offset = 0
        for addition, size in enumerate(self.sizes):
            for start, stop in self._ranges(size):
                shards = [self._read(m, start, stop, addition) for m in chosen]
                features = [part for s in shards for part in s.features.split(self._proj_dim, 1)]
                rows = slice(offset + start, offset + stop)
                yield SampleBlock(rows.start, features, weight[rows], shards[0].ids)
            offset += size

    def sample_ids(self) -> list[SampleId] | None:
        """Return the ids of all samples in order; None where not every addition has them."""
        ids: list[SampleId] = []
        for block in self.samples([0]):
            ids.extend(block.ids or [])
        return ids if ids and len(ids) == self.num_samples else None

    def _ranges(self, size: int) -> Iterator[tuple[int, int]]:
        rows = self._store.rows(self.blocks * self._proj_dim)
        for start in range(0, size, rows):
            yield start, min(start + rows, size)

    def _read(self, m: int, start: int, stop: int, addition: int) -> Shard:
        rows = self._store.rows(self.blocks * self._proj_dim)
        vouched = self._summaries[addition][m].shards[start // rows]
        shard = self._store.read(m, start, stop, addition, vouched)
        if shard is None:
            raise self._store.missing(m, shard_name(addition, start))
        return shard


def _complete(
    store: Store, found: Sequence[CheckpointSummary | None], addition: int
) -> list[CheckpointSummary]:
    """Return the summaries of all checkpoints, which must be there and agree in their data."""
    done = [summary for summary in found if summary is not None]
    call = f"fit(addition={addition})" if addition else "fit()"
    if not done:
        begun = addition < store.begun()
        raise StoreError(
            f"Attributor is not fitted: call {call} first"
            + (f" (it was begun, and is not finished in {store.manifest})" if begun else "")
        )
    if len(done) < len(found):
        missing = next(m for m, summary in enumerate(found) if summary is None)
        raise StoreError(
            f"Attributor is not fitted for all {len(found)} checkpoints: call {call} first (the "
            f"store has no finished features of checkpoint {missing} in {store.manifest})"
        )
    if any(summary.data_digests != done[0].data_digests for summary in done):
        raise StoreError(
            "store: expected the same data for every checkpoint"
            + (f" in addition {addition}" if addition else "")
            + f", got {[summary.num_samples for summary in done]} samples by checkpoint in "
            + store.manifest
        )
    return done
