"""Features kept in memory."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .records import Context, Mark, Shard, compare_settings


class MemoryStore:
    """The same interface as DirectoryStore, for features that live as long as the process."""

    def __init__(self) -> None:
        self._shards: dict[tuple[int, int, int], Shard] = {}
        self._marks: dict[tuple[int, int], Mark] = {}
        self._kernels: dict[tuple[int, int, str, str], Tensor] = {}
        self._contexts: dict[int, Context] = {}
        self._settings: dict[str, Any] | None = None

    def open(self, settings: dict[str, Any], *, create: bool, part: int = 0) -> None:
        """Begin anew where `create` and part 0, having nothing to resume; else compare settings."""
        if create and part == 0:
            self._shards.clear()
            self._marks.clear()
            self._kernels.clear()
            self._contexts.clear()
            self._settings = settings
        elif self._settings is not None:
            compare_settings(settings, self._settings, "memory")

    def read(
        self, checkpoint: int, start: int, stop: int | None = None, part: int = 0
    ) -> Shard | None:
        """Return the shard that begins with sample `start` of a part, or None."""
        return self._shards.get((checkpoint, part, start))

    def write(self, checkpoint: int, start: int, shard: Shard, part: int = 0) -> None:
        """Keep a shard."""
        self._shards[checkpoint, part, start] = shard

    def read_mark(self, checkpoint: int, part: int = 0) -> Mark | None:
        """Return the mark of a checkpoint's part, or None where it is not finished."""
        return self._marks.get((checkpoint, part))

    def write_mark(self, checkpoint: int, mark: Mark, part: int = 0) -> None:
        """Mark a checkpoint's part as finished."""
        self._marks[checkpoint, part] = mark

    def read_kernel(
        self, checkpoint: int, weighting: str, part: int, data_digest: str
    ) -> Tensor | None:
        """Return the kernel matrices of a part with this data, or None where they are not there."""
        return self._kernels.get((checkpoint, part, weighting, data_digest))

    def write_kernel(
        self, checkpoint: int, weighting: str, part: int, data_digest: str, kernel: Tensor
    ) -> None:
        """Keep the kernel matrices of a checkpoint's part."""
        self._kernels[checkpoint, part, weighting, data_digest] = kernel

    def read_context(self, checkpoint: int) -> Context | None:
        """Return what the task prepared for a checkpoint, or None."""
        return self._contexts.get(checkpoint)

    def write_context(self, checkpoint: int, context: Context) -> None:
        """Keep what the task prepared for a checkpoint."""
        self._contexts[checkpoint] = context
