"""Features kept in a folder, as safetensors.

`manifest.json` has the settings that made the store; each checkpoint has a folder of shards, a
summary once all samples are in, and kernel matrices. Training samples that were added later,
additions 1, 2, ..., have folders of their own inside it. Every file is written under a temporary
name, synced and renamed, so what bears its own name is whole; a checksum finds what was damaged
later.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

from torch import Tensor

from ..inputs.loaders import tensor_bytes
from .base import (
    CheckpointSummary,
    Context,
    Shard,
    StoreError,
    compare_settings,
    settings_digest,
)

FORMAT_VERSION = 2


class DirectoryStore:
    """A `Store` in a folder; made by the first write, refused where it was made otherwise."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise StoreError(f"store: expected a folder, got the file {str(self.path)!r}")
        self._settings: dict[str, Any] | None = None

    def __repr__(self) -> str:
        return f"features in {str(self.path)!r}"

    def open(self, settings: dict[str, Any], *, create: bool, addition: int = 0) -> None:
        """Compare the manifest with `settings`; where there is none yet, take them on.

        The checkpoints may be some of the manifest's, from the first on, or continue them.

        Raises StoreError where another configuration made the store, or where there is no store
        and `create` is False.
        """
        settings = json.loads(json.dumps({"format_version": FORMAT_VERSION, **settings}))
        self._settings = settings
        manifest = self.path / "manifest.json"
        if not manifest.exists():
            if self.path.is_dir() and any(self.path.glob("checkpoint-*/**/*.safetensors")):
                raise StoreError(f"store: expected {str(manifest)!r} beside its features, got none")
            if not create:
                raise StoreError(
                    "Attributor is not fitted: call fit() first (there is no store at "
                    f"{str(self.path)!r})"
                )
            self._clear_leftovers()
            return
        try:
            found = json.loads(manifest.read_text())
        except (ValueError, UnicodeDecodeError):
            found = None
        if not isinstance(found, dict) or "format_version" not in found:
            raise StoreError(
                f"store: expected a store's manifest in {str(manifest)!r}, got another file"
            )
        compare_settings(settings, found, repr(str(manifest)))
        if create:
            self._clear_leftovers()

    def _clear_leftovers(self) -> None:
        """Delete what killed writes of this store left behind, and nothing of anyone else's."""
        for pattern in (
            "manifest.json.*.tmp",
            "checkpoint-*/*.safetensors.*.tmp",
            "checkpoint-*/part-*/*.safetensors.*.tmp",
        ):
            for leftover in self.path.glob(pattern):
                leftover.unlink()

    def read(
        self, checkpoint: int, start: int, stop: int | None = None, addition: int = 0
    ) -> Shard | None:
        """Return the shard that begins with sample `start` of an addition, or None.

        Args:
            stop: Where the samples end, if known: a shard of another length is refused.
        """
        path = self._folder(checkpoint, addition) / _shard_name(start)
        if not path.exists():
            return None
        tensors, metadata = self._load(checkpoint, path, Shard._fields[:4])
        rows = tensors["features"].shape[0]
        if stop is not None and rows != stop - start:
            raise StoreError(f"store: expected {stop - start} samples in {str(path)!r}, got {rows}")
        ids = json.loads(metadata["ids"]) if "ids" in metadata else None
        return Shard(**tensors, data_digest=metadata["data_digest"], ids=ids)

    def write(self, checkpoint: int, start: int, shard: Shard, addition: int = 0) -> None:
        """Write a shard under its own name, whole or not at all."""
        tensors = {name: getattr(shard, name) for name in Shard._fields[:4]}
        metadata = {"data_digest": shard.data_digest}
        if shard.ids is not None:
            metadata["ids"] = json.dumps(shard.ids)
        path = self._folder(checkpoint, addition) / _shard_name(start)
        self._save(checkpoint, path, tensors, metadata)

    def read_summary(self, checkpoint: int, addition: int = 0) -> CheckpointSummary | None:
        """Return what is known of a finished checkpoint, or None where it is not finished."""
        path = self._folder(checkpoint, addition) / "finished.safetensors"
        if not path.exists():
            return None
        tensors, metadata = self._load(checkpoint, path, CheckpointSummary._fields[3:])
        figures: list[Any] = [json.loads(metadata[name]) for name in CheckpointSummary._fields[:3]]
        return CheckpointSummary(
            *figures, *(tensors[name] for name in CheckpointSummary._fields[3:])
        )

    def write_summary(self, checkpoint: int, summary: CheckpointSummary, addition: int = 0) -> None:
        """Say that a checkpoint's features are all there."""
        metadata = {
            name: json.dumps(getattr(summary, name)) for name in CheckpointSummary._fields[:3]
        }
        tensors = {name: getattr(summary, name) for name in CheckpointSummary._fields[3:]}
        path = self._folder(checkpoint, addition) / "finished.safetensors"
        self._save(checkpoint, path, tensors, metadata)

    def read_kernel(
        self, checkpoint: int, weighting: str, addition: int, data_digest: str
    ) -> Tensor | None:
        """Return kernel matrices fp64 [blocks, k, k]; None where they are not there, or of others.

        Args:
            weighting: How samples are weighted in it, as a file's name may say it.
            data_digest: Of the samples' data.
        """
        path = self._folder(checkpoint, addition) / f"kernel-{weighting}.safetensors"
        if not path.exists():
            return None
        tensors, metadata = self._load(checkpoint, path, ("kernel",))
        return tensors["kernel"] if metadata.get("data_digest") == data_digest else None

    def write_kernel(
        self, checkpoint: int, weighting: str, addition: int, data_digest: str, kernel: Tensor
    ) -> None:
        """Write kernel matrices fp64 [blocks, k, k]."""
        path = self._folder(checkpoint, addition) / f"kernel-{weighting}.safetensors"
        self._save(checkpoint, path, {"kernel": kernel}, {"data_digest": data_digest})

    def read_context(self, checkpoint: int) -> Context | None:
        """Return what the task prepared for a checkpoint, or None where it is not there."""
        path = self._folder(checkpoint) / "context.safetensors"
        if not path.exists():
            return None
        tensors, metadata = self._load(checkpoint, path, None)
        return Context(tensors, metadata["data_digest"])

    def write_context(self, checkpoint: int, context: Context) -> None:
        """Write what the task prepared for a checkpoint."""
        path = self._folder(checkpoint) / "context.safetensors"
        self._save(checkpoint, path, context.tensors, {"data_digest": context.data_digest})

    def _folder(self, checkpoint: int, addition: int = 0) -> Path:
        folder = self.path / f"checkpoint-{checkpoint:04d}"
        return folder / f"part-{addition:04d}" if addition else folder

    def _fingerprint(self, checkpoint: int) -> str:
        """Return a digest of all that a checkpoint's features depend on but the data."""
        assert self._settings is not None, "open() comes first"
        own = dict(self._settings)
        own["checkpoints"] = own["checkpoints"][checkpoint]
        return settings_digest(own)

    def _save(
        self, checkpoint: int, path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]
    ) -> None:
        from safetensors.torch import save

        self._write_manifest()
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        metadata = {**metadata, "fingerprint": self._fingerprint(checkpoint)}
        metadata["checksum"] = self._checksum(path, tensors, metadata)
        _write_whole(path, save(tensors, metadata))

    def _write_manifest(self) -> None:
        """Write the manifest where there is none, or one with fewer checkpoints than now."""
        assert self._settings is not None, "open() comes first"
        manifest = self.path / "manifest.json"
        if manifest.exists():
            written = json.loads(manifest.read_text())["checkpoints"]
            if len(written) >= len(self._settings["checkpoints"]):
                return
        text = json.dumps(self._settings, indent=2, sort_keys=True)
        _write_whole(manifest, text.encode())

    def _checksum(self, path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
        """Return a checksum of all that a file says, and of its place in the store."""
        said = sorted((key, value) for key, value in metadata.items() if key != "checksum")
        value = zlib.crc32(f"{path.relative_to(self.path).as_posix()}{said}".encode())
        for name in sorted(tensors):
            tensor = tensors[name]
            value = zlib.crc32(f"{name}{tensor.dtype}{list(tensor.shape)}".encode(), value)
            value = zlib.crc32(tensor_bytes(tensor), value)
        return f"{value:08x}"

    def _load(
        self, checkpoint: int, path: Path, names: tuple[str, ...] | None
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return a file's tensors, which have these names if any are given, and its metadata."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise StoreError(
                f"store: expected a whole safetensors file in {str(path)!r}, got {error}"
            ) from error
        whole = metadata.get("checksum") == self._checksum(path, tensors, metadata)
        if not whole or (names is not None and sorted(tensors) != sorted(names)):
            raise StoreError(
                f"store: expected {str(path)!r} as it was written there, got other bytes (delete "
                "it to have it made again)"
            )
        if metadata.get("fingerprint") != self._fingerprint(checkpoint):
            raise StoreError(
                f"store: expected {str(path)!r} to belong to this store's manifest, got a file of "
                "another configuration"
            )
        return tensors, metadata


def _shard_name(start: int) -> str:
    return f"features-{start:012d}.safetensors"


def _write_whole(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    if hasattr(os, "O_DIRECTORY"):
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
