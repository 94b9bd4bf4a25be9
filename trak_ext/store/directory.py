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
from .base import Record, Store, StoreError, compare_settings, settings_digest

FORMAT_VERSION = 2


class DirectoryStore(Store):
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

    def get(self, checkpoint: int, name: str) -> Record | None:
        """Return the record of this name, or None; refuse a damaged or foreign file."""
        from safetensors import SafetensorError, safe_open

        path = self._path(checkpoint, name)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise StoreError(
                f"store: expected a whole safetensors file in {str(path)!r}, got {error}"
            ) from error
        if metadata.get("checksum") != self._checksum(path, tensors, metadata):
            raise StoreError(
                f"store: expected {str(path)!r} as it was written there, got other bytes (delete "
                "it to have it made again)"
            )
        if metadata.get("fingerprint") != self._fingerprint(checkpoint):
            raise StoreError(
                f"store: expected {str(path)!r} to belong to this store's manifest, got a file of "
                "another configuration"
            )
        return Record(tensors, metadata)

    def put(self, checkpoint: int, name: str, record: Record) -> None:
        """Write a record under its own name, whole or not at all."""
        from safetensors.torch import save

        self._write_manifest()
        path = self._path(checkpoint, name)
        tensors = {key: tensor.contiguous() for key, tensor in record.tensors.items()}
        metadata = {**record.metadata, "fingerprint": self._fingerprint(checkpoint)}
        metadata["checksum"] = self._checksum(path, tensors, metadata)
        _write_whole(path, save(tensors, metadata))

    def where(self, checkpoint: int, name: str) -> str:
        """Return where a record is kept, for errors."""
        return repr(str(self._path(checkpoint, name)))

    def _path(self, checkpoint: int, name: str) -> Path:
        return self.path / f"checkpoint-{checkpoint:04d}" / f"{name}.safetensors"

    def _fingerprint(self, checkpoint: int) -> str:
        """Return a digest of all that a checkpoint's features depend on but the data."""
        assert self._settings is not None, "open() comes first"
        own = dict(self._settings)
        own["checkpoints"] = own["checkpoints"][checkpoint]
        return settings_digest(own)

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
