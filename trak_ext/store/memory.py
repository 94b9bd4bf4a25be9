"""Features kept in memory."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .base import CheckpointSummary, Context, Shard, compare_settings


class MemoryStore:
    """A `Store` of features that live as long as the process."""

    def __init__(self) -> None:
        self._shards: dict[tuple[int, int, int], Shard] = {}
        self._summaries: dict[tuple[int, int], CheckpointSummary] = {}
        self._kernels: dict[tuple[int, int, str, str], Tensor] = {}
        self._contexts: dict[int, Context] = {}
        self._settings: dict[str, Any] | None = None

    def __repr__(self) -> str:
        return "features in memory"

    def open(self, settings: dict[str, Any], *, create: bool, addition: int = 0) -> None:
        """Begin anew at the training set, having nothing to resume; else compare settings."""
        if create and addition == 0:
            self._shards.clear()
            self._summaries.clear()
            self._kernels.clear()
            self._contexts.clear()
            self._settings = settings
        elif self._settings is not None:
            compare_settings(settings, self._settings, "memory")

    def read(
        self, checkpoint: int, start: int, stop: int | None = None, addition: int = 0
    ) -> Shard | None:
        """Return the shard that begins with sample `start` of an addition, or None."""
        return self._shards.get((checkpoint, addition, start))

    def write(self, checkpoint: int, start: int, shard: Shard, addition: int = 0) -> None:
        """Keep a shard."""
        self._shards[checkpoint, addition, start] = shard

    def read_summary(self, checkpoint: int, addition: int = 0) -> CheckpointSummary | None:
        """Return what is known of a finished checkpoint, or None where it is not finished."""
        return self._summaries.get((checkpoint, addition))

    def write_summary(self, checkpoint: int, summary: CheckpointSummary, addition: int = 0) -> None:
        """Say that a checkpoint's features are all there."""
        self._summaries[checkpoint, addition] = summary

    def read_kernel(
        self, checkpoint: int, weighting: str, addition: int, data_digest: str
    ) -> Tensor | None:
        """Return kernel matrices fp64 [blocks, k, k] with this data, or None."""
        return self._kernels.get((checkpoint, addition, weighting, data_digest))

    def write_kernel(
        self, checkpoint: int, weighting: str, addition: int, data_digest: str, kernel: Tensor
    ) -> None:
        """Keep kernel matrices."""
        self._kernels[checkpoint, addition, weighting, data_digest] = kernel

    def read_context(self, checkpoint: int) -> Context | None:
        """Return what the task prepared for a checkpoint, or None."""
        return self._contexts.get(checkpoint)

    def write_context(self, checkpoint: int, context: Context) -> None:
        """Keep what the task prepared for a checkpoint."""
        self._contexts[checkpoint] = context
