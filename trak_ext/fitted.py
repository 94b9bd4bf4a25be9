"""Reading a fitted store: samples in order over its parts, and the kernel of each checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import store as stores
from .block_kernels import BlockKernels
from .fitting import read_mark
from .store import DirectoryStore, MemoryStore, SampleId, StoreError


class SampleBlock(NamedTuple):
    """Consecutive training samples from number `start` on, as a store holds them."""

    start: int
    features: list[Tensor]  # of each checkpoint and projection block: fp32 [rows, k]
    weight: Tensor  # fp64 [rows], mean Q over the checkpoints
    curvature: list[Tensor]  # of each checkpoint: fp32 [rows]
    ids: list[SampleId] | None


class FittedFeatures:
    """The features of checkpoints 0 .. M - 1 in a store that is fitted for all of them.

    Args:
        store: Opened for the settings.
        num_checkpoints: M.
        proj_dim: Features k of a projection block.
        blocks: Projection blocks.
        parts: Parts that are looked at; None for all that any checkpoint has.

    Raises:
        StoreError: parts that are not finished for every checkpoint, or differ in their data.
    """

    def __init__(
        self,
        store: MemoryStore | DirectoryStore,
        num_checkpoints: int,
        proj_dim: int,
        blocks: int,
        parts: int | None = None,
    ) -> None:
        self._store = store
        self._proj_dim = proj_dim
        self._blocks = blocks
        self.num_checkpoints = num_checkpoints
        self.part_sizes: list[int] = []
        self.data_digests: list[list[str]] = []
        while parts is None or len(self.part_sizes) < parts:
            part = len(self.part_sizes)
            marks = [read_mark(store, m, part) for m in range(num_checkpoints)]
            done = [mark for mark in marks if mark is not None]
            if not done and part and parts is None:
                break
            if len(done) < num_checkpoints:
                missing = next(m for m, mark in enumerate(marks) if mark is None)
                raise StoreError(
                    f"store: expected features of all {num_checkpoints} checkpoints, got none or a "
                    f"part for checkpoint {missing} (call fit first"
                    + (f" with part={part})" if part else ")")
                )
            digests = [mark.data_digests for mark in done]
            if any(digest != digests[0] for digest in digests):
                raise StoreError(
                    f"store: expected the same data for every checkpoint in part {part}, got "
                    f"{[mark.num_samples for mark in done]} samples by checkpoint"
                )
            self.part_sizes.append(done[0].num_samples)
            self.data_digests.append(digests[0])

    @property
    def num_samples(self) -> int:
        """Training samples of all parts."""
        return sum(self.part_sizes)

    def kernels(self, m: int, weighted: bool) -> tuple[Tensor, Tensor]:
        """Return checkpoint m's kernel matrices over all parts, and `ImpliedRidge.sums`.

        Where the store has no matrix with these weights, it is made from the features.

        Returns:
            fp64 [blocks, k, k] and fp64 [blocks, k + 4].
        """
        sums = BlockKernels(self._proj_dim, self._blocks, weighted)
        matrices, implied = sums.matrices(), sums.implied()
        for part, size in enumerate(self.part_sizes):
            kernel = self._store.read_kernel(m, part, weighted)
            if kernel is not None:
                matrices += kernel.matrix
                implied += kernel.implied
                continue
            sums = BlockKernels(self._proj_dim, self._blocks, weighted)
            for start, stop in self._ranges(size):
                sums.add(self._read(m, start, stop, part))
            matrices += sums.matrices()
            implied += sums.implied()
        return matrices, implied

    def samples(self, checkpoints: Sequence[int] | None = None) -> Iterator[SampleBlock]:
        """Yield all samples in order, with the features of the checkpoints (None for all)."""
        chosen = range(self.num_checkpoints) if checkpoints is None else checkpoints
        offset = 0
        for part, size in enumerate(self.part_sizes):
            for start, stop in self._ranges(size):
                shards = [self._read(m, start, stop, part) for m in chosen]
                weight = torch.zeros(stop - start, dtype=torch.float64)
                for shard in shards:
                    weight += shard.weight.double() / len(shards)
                yield SampleBlock(
                    offset + start,
                    [block for shard in shards for block in self._split(shard.features)],
                    weight,
                    [shard.curvature for shard in shards],
                    shards[0].ids,
                )
            offset += size

    def sample_ids(self) -> list[SampleId] | None:
        """Return the ids of all samples in order; None where not every part has them."""
        ids: list[SampleId] = []
        for block in self.samples([0]):
            ids.extend(block.ids or [])
        return ids if ids and len(ids) == self.num_samples else None

    def _split(self, features: Tensor) -> list[Tensor]:
        return list(features.split(self._proj_dim, 1))

    def _ranges(self, size: int) -> Iterator[tuple[int, int]]:
        rows = stores.shard_rows(self._blocks * self._proj_dim)
        for start in range(0, size, rows):
            yield start, min(start + rows, size)

    def _read(self, m: int, start: int, stop: int, part: int) -> stores.Shard:
        shard = self._store.read(m, start, stop, part)
        if shard is None:
            where = f" of part {part}" if part else ""
            raise StoreError(
                f"store: expected samples {start} to {stop - 1}{where} of checkpoint {m}, got none"
            )
        return shard
