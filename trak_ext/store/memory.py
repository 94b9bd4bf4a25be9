"""Features kept in memory."""

from __future__ import annotations

from typing import Any

from .base import Record, Store, compare_settings


class MemoryStore(Store):
    """A `Store` of features that live as long as the process."""

    def __init__(self) -> None:
        self._records: dict[tuple[int, str], Record] = {}
        self._settings: dict[str, Any] | None = None

    def __repr__(self) -> str:
        return "features in memory"

    def open(self, settings: dict[str, Any], *, create: bool, addition: int = 0) -> None:
        """Begin anew at the training set, having nothing to resume; else compare settings."""
        if create and addition == 0:
            self._records.clear()
            self._settings = settings
        elif self._settings is not None:
            compare_settings(settings, self._settings, "memory")

    def get(self, checkpoint: int, name: str) -> Record | None:
        """Return the record of this name, or None."""
        return self._records.get((checkpoint, name))

    def put(self, checkpoint: int, name: str, record: Record) -> None:
        """Keep a record."""
        self._records[checkpoint, name] = record

    def where(self, checkpoint: int, name: str) -> str:
        """Return where a record is kept, for errors."""
        return f"{name!r} of checkpoint {checkpoint} in memory"
