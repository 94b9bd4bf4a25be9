"""Features kept by checkpoint, part and range of samples, in memory or as safetensors on disk."""

from .directory import DirectoryStore, open_store
from .in_memory import MemoryStore
from .records import Context, Mark, SampleId, Shard, StoreError, shard_rows

__all__ = [
    "Context",
    "DirectoryStore",
    "Mark",
    "MemoryStore",
    "SampleId",
    "Shard",
    "StoreError",
    "open_store",
    "shard_rows",
]
