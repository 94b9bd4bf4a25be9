"""Features kept in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from . import base
from .base import Store
from .records import KnownData, Record, compare_settings


class MemoryStore(Store):
    """A `Store` of features that live as long as the process; its records have no digests."""

    durable = False

    def __init__(self) -> None:
        self._records: dict[tuple[int, str], Record] = {}
        self._settings: dict[str, Any] | None = None
        self._finished: dict[tuple[int, int], KnownData] = {}  # by checkpoint and addition

    def __repr__(self) -> str:
        return "features in memory"

    def open(
        self,
        settings: dict[str, Any],
        *,
        create: bool,
        addition: int = 0,
        versions: Mapping[str, str] | None = None,
    ) -> None:
        """Begin anew at the training set, having nothing to resume; else compare settings."""
        if create and addition == 0:
            self._records.clear()
            self._finished.clear()
            self._settings = settings
        elif self._settings is not None:
            compare_settings(settings, self._settings, "memory")

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Nobody else knows of it."""
        yield

    def get(self, checkpoint: int, name: str) -> Record | None:
        """Return the record of this name, or None."""
        return self._records.get((checkpoint, name))

    def put(self, checkpoint: int, name: str, record: Record) -> str:
        """Keep a record."""
        self._records[checkpoint, name] = record
        return ""

    def remove(self, checkpoint: int, name: str) -> None:
        """Forget a record."""
        self._records.pop((checkpoint, name), None)

    def where(self, checkpoint: int, name: str) -> str:
        """Return where a record is kept, for errors."""
        return f"{name!r} of checkpoint {checkpoint} in memory"

    def recorded(self) -> dict[str, Any]:
        """Return nothing: features in memory belong to the run that made them."""
        return {}

    @property
    def manifest(self) -> str:
        """Where it is kept what is finished, for errors."""
        return "memory"

    def begun(self) -> int:
        """Return the number of additions of which there is anything."""
        names = [name for _, name in self._records]
        parts = [int(n.split("/")[0].removeprefix("part-")) if "/" in n else 0 for n in names]
        return max([-1, *parts, *(addition for _, addition in self._finished)]) + 1

    def known_data(self, addition: int) -> KnownData | None:
        """Return the data of an addition that is finished for any checkpoint, or None."""
        found = (data for (_, own), data in self._finished.items() if own == addition)
        return next(found, None)

    def finished(self, checkpoint: int, addition: int) -> str | None:
        """Return "" for a finished checkpoint, or None."""
        return "" if (checkpoint, addition) in self._finished else None

    def finish(self, checkpoint: int, addition: int, data: KnownData, digest: str) -> None:
        """Vouch for a checkpoint's summary."""
        self._finished[checkpoint, addition] = data

    def rows(self, width: int) -> int:
        """Return the samples of a shard."""
        return base.shard_rows(width)

    def agree(self, name: str, value: int | None) -> int | None:
        """Return `value`: there is no run before this one."""
        return value
