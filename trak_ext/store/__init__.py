"""Features kept by checkpoint, addition and range of samples, in memory or as safetensors."""

from __future__ import annotations

import os

from ..inputs.batches import SampleId
from .base import Store, shard_rows
from .directory import DirectoryStore
from .features import StoredFeatures
from .memory import MemoryStore
from .records import CheckpointSummary, Context, Probe, Shard, StoreError

__all__ = [
    "CheckpointSummary",
    "Context",
    "DirectoryStore",
    "MemoryStore",
    "Probe",
    "SampleId",
    "Shard",
    "Store",
    "StoreError",
    "StoredFeatures",
    "open_store",
    "shard_rows",
]


def open_store(store: str | os.PathLike[str] | None) -> Store:
    """Return the store of a path, or one in memory."""
    if store is not None and not isinstance(store, (str, os.PathLike)):
        raise TypeError(f"store: expected a path or None, got {store!r}")
    if store is not None and not os.fspath(store):
        raise ValueError("store: expected the path of a folder, got ''")
    return MemoryStore() if store is None else DirectoryStore(store)
