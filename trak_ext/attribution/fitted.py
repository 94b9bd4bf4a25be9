"""Reading a fitted store: samples in order over its parts, and the kernel of each checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import store as stores
from ..store import DirectoryStore, Mark, MemoryStore, SampleId, StoreError
from ..store.digest import settings_digest
from .block_sums import kernel_matrices


class SampleBlock(NamedTuple):
    """Consecutive training samples from number `start` on, as a store holds them."""

    start: int
    features: list[Tensor]  # of each checkpoint and projection block: fp32 [rows, k]
    weight: Tensor  # fp64 [rows], mean Q over all checkpoints
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
        self.blocks = blocks
        self.num_checkpoints = num_checkpoints
        self._marks: list[list[Mark]] = []  # of each part and checkpoint
        while parts is None or len(self._marks) < parts:
            part = len(self._marks)
            marks = [store.read_mark(m, part) for m in range(num_checkpoints)]
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
            self._marks.append(done)

    @property
    def part_sizes(self) -> list[int]:
        """Training samples of each part."""
        return [marks[0].num_samples for marks in self._marks]

    @property
    def data_digests(self) -> list[list[str]]:
        """Digests of each part's shards."""
        return [marks[0].data_digests for marks in self._marks]

    @property
    def num_samples(self) -> int:
        """Training samples of all parts."""
        return sum(self.part_sizes)

    def kernels(self, m: int, curvature: str | None) -> Tensor:
        """Return checkpoint m's kernel matrices over all parts, fp64 [blocks, k, k].

        Those that the store lacks are made from the features.

        Args:
            curvature: The weight of a sample: None for 1, "own" for the checkpoint's R, "mean" for
                the mean of R over the checkpoints.
        """
        shape = (self.blocks, self._proj_dim, self._proj_dim)
        total = torch.zeros(shape, dtype=torch.float64, device="cpu")
        for part in range(len(self._marks)):
            kernel = self._store.read_kernel(
                m, self._weighting(curvature), part, self._part_digest(part)
            )
            total += self._make_kernels(m, curvature, part) if kernel is None else kernel
        return total

    def write_kernels(self, curvature: str | None, part: int) -> None:
        """Make and keep the kernel matrices of a part that the store lacks."""
        key = (self._weighting(curvature), part, self._part_digest(part))
        for m in range(self.num_checkpoints):
            if self._store.read_kernel(m, *key) is None:
                self._store.write_kernel(m, *key, self._make_kernels(m, curvature, part))

    def weight(self) -> Tensor:
        """Return the mean of Q over the checkpoints: fp64 [n]."""
        parts = [
            torch.stack([mark.weight for mark in marks]).double().mean(0) for marks in self._marks
        ]
        return torch.cat(parts)

    def implied(self) -> Tensor:
        """Return `ImpliedRidge.sums` over all parts of each checkpoint and block, [M b, k + 3]."""
        parts = [torch.cat([mark.implied for mark in marks]) for marks in self._marks]
        return torch.stack(parts).sum(0)

    def curvature(self, m: int, kind: str | None) -> Tensor | None:
        """Return the weight of each sample for checkpoint m, [n]; None for ones. See `kernels`."""
        parts = [self._curvature(m, kind, part) for part in range(len(self._marks))]
        return None if kind is None else torch.cat([part for part in parts if part is not None])

    def _curvature(self, m: int, kind: str | None, part: int) -> Tensor | None:
        marks = self._marks[part]
        if kind is None:
            return None
        if kind == "own":
            return marks[m].curvature
        return torch.stack([mark.curvature for mark in marks]).double().mean(0)

    def _part_digest(self, part: int) -> str:
        return settings_digest({"data": self._marks[part][0].data_digests})

    def _weighting(self, curvature: str | None) -> str:
        """Return a name for the weights; stores agree in their first checkpoints."""
        if curvature == "mean":
            return f"mean-{self.num_checkpoints:04d}"
        return curvature or "plain"

    def _make_kernels(self, m: int, curvature: str | None, part: int) -> Tensor:
        size = self._marks[part][m].num_samples
        shards = (self._read(m, start, stop, part) for start, stop in self._ranges(size))
        weights = self._curvature(m, curvature, part)
        return kernel_matrices(shards, self._proj_dim, self.blocks, weights)

    def samples(self, checkpoints: Sequence[int] | None = None) -> Iterator[SampleBlock]:
        """Yield all samples in order, with the features of the checkpoints (None for all)."""
        chosen = range(self.num_checkpoints) if checkpoints is None else checkpoints
        weight = self.weight()
        offset = 0
        for part, size in enumerate(self.part_sizes):
            for start, stop in self._ranges(size):
                shards = [self._read(m, start, stop, part) for m in chosen]
                yield SampleBlock(
                    offset + start,
                    [block for shard in shards for block in self._split(shard.features)],
                    weight[offset + start : offset + stop],
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
        rows = stores.shard_rows(self.blocks * self._proj_dim)
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
