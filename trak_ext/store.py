"""Features kept by checkpoint and range of samples, in memory or as safetensors on disk.

On disk: `manifest.json` (the settings that made the store), and for each checkpoint a folder of
shards and, once all samples are in, `kernel.safetensors`. Every file is written under a temporary
name, synced and renamed, so what bears its own name is whole; a checksum finds what was damaged
later.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from .digest import settings_digest, tensor_bytes

FORMAT_VERSION = 1
_SHARD_VALUES = 2**23  # features a shard: 32 MiB


class Shard(NamedTuple):
    """A checkpoint's features of consecutive samples, with Q, R and the digest of their data."""

    features: Tensor  # fp32 [rows, k]
    weight: Tensor  # fp32 [rows]
    curvature: Tensor  # fp32 [rows]
    data_digest: str


class Kernel(NamedTuple):
    """A finished checkpoint's kernel matrix, and what it was made of."""

    matrix: Tensor  # fp64 [k, k]
    num_samples: int
    data_digests: list[str]  # of each shard, in order


class StoreError(ValueError):
    """A store that is damaged, incomplete, or made with other settings, weights or data."""


def shard_rows(proj_dim: int) -> int:
    """Return the samples a shard holds: a function of proj_dim alone, so that runs agree."""
    return max(1, min(8192, _SHARD_VALUES // proj_dim))


class MemoryStore:
    """The same interface as DirectoryStore, for features that live as long as the process."""

    def __init__(self) -> None:
        self._shards: dict[tuple[int, int], Shard] = {}
        self._kernels: dict[int, Kernel] = {}
        self._settings: dict[str, Any] | None = None

    def open(self, settings: dict[str, Any], *, create: bool) -> None:
        """Begin anew where `create`, having nothing to resume; else compare the settings."""
        if create:
            self._shards.clear()
            self._kernels.clear()
            self._settings = settings
        elif self._settings is not None:
            _compare(settings, self._settings, "memory")

    def read(self, checkpoint: int, start: int, stop: int | None = None) -> Shard | None:
        """Return the shard that begins with sample `start`, or None."""
        return self._shards.get((checkpoint, start))

    def write(self, checkpoint: int, start: int, shard: Shard) -> None:
        """Keep a shard."""
        self._shards[checkpoint, start] = shard

    def read_kernel(self, checkpoint: int) -> Kernel | None:
        """Return the kernel of a checkpoint, or None where it is not finished."""
        return self._kernels.get(checkpoint)

    def write_kernel(self, checkpoint: int, kernel: Kernel) -> None:
        """Mark a checkpoint as finished."""
        self._kernels[checkpoint] = kernel


class DirectoryStore:
    """A store in a folder; made by the first write, refused where it was made otherwise."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise StoreError(f"store: expected a folder, got the file {str(self.path)!r}")
        self._settings: dict[str, Any] | None = None

    def open(self, settings: dict[str, Any], *, create: bool) -> None:
        """Compare the manifest with `settings`; where there is none yet, take them on.

        Raises StoreError where another configuration made the store, or where there is no store
        and `create` is False.
        """
        settings = json.loads(json.dumps({"format_version": FORMAT_VERSION, **settings}))
        self._settings = settings
        manifest = self.path / "manifest.json"
        if not manifest.exists():
            if self.path.is_dir() and any(self.path.glob("checkpoint-*/*.safetensors")):
                raise StoreError(f"store: expected {str(manifest)!r} beside its features, got none")
            if not create:
                raise StoreError(f"store: expected a fitted store, got none at {str(self.path)!r}")
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
        _compare(settings, found, repr(str(manifest)))
        if create:
            self._clear_leftovers()

    def _clear_leftovers(self) -> None:
        """Delete what killed writes of this store left behind, and nothing of anyone else's."""
        for pattern in ("manifest.json.*.tmp", "checkpoint-*/*.safetensors.*.tmp"):
            for leftover in self.path.glob(pattern):
                leftover.unlink()

    def read(self, checkpoint: int, start: int, stop: int | None = None) -> Shard | None:
        """Return the shard that begins with sample `start`, or None where it is not there.

        Args:
            stop: Where the samples end, if known: a shard of another length is refused.
        """
        path = self._folder(checkpoint) / _shard_name(start)
        if not path.exists():
            return None
        tensors, metadata = self._load(path, ("features", "weight", "curvature"))
        rows = tensors["features"].shape[0]
        if stop is not None and rows != stop - start:
            raise StoreError(f"store: expected {stop - start} samples in {str(path)!r}, got {rows}")
        return Shard(
            tensors["features"],
            tensors["weight"],
            tensors["curvature"],
            metadata["data_digest"],
        )

    def write(self, checkpoint: int, start: int, shard: Shard) -> None:
        """Write a shard under its own name, whole or not at all."""
        tensors = {
            "features": shard.features,
            "weight": shard.weight,
            "curvature": shard.curvature,
        }
        path = self._folder(checkpoint) / _shard_name(start)
        self._save(path, tensors, {"data_digest": shard.data_digest})

    def read_kernel(self, checkpoint: int) -> Kernel | None:
        """Return the kernel of a checkpoint, or None where it is not finished."""
        path = self._folder(checkpoint) / "kernel.safetensors"
        if not path.exists():
            return None
        tensors, metadata = self._load(path, ("kernel",))
        return Kernel(
            tensors["kernel"],
            int(metadata["num_samples"]),
            json.loads(metadata["data_digests"]),
        )

    def write_kernel(self, checkpoint: int, kernel: Kernel) -> None:
        """Write the kernel matrix: the mark of a finished checkpoint."""
        metadata = {
            "num_samples": str(kernel.num_samples),
            "data_digests": json.dumps(kernel.data_digests),
        }
        path = self._folder(checkpoint) / "kernel.safetensors"
        self._save(path, {"kernel": kernel.matrix}, metadata)

    def _folder(self, checkpoint: int) -> Path:
        return self.path / f"checkpoint-{checkpoint:04d}"

    def _fingerprint(self) -> str:
        assert self._settings is not None, "open() comes first"
        return settings_digest(self._settings)

    def _save(self, path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        from safetensors.torch import save

        manifest = self.path / "manifest.json"
        if not manifest.exists():
            text = json.dumps(self._settings, indent=2, sort_keys=True)
            _write_whole(manifest, text.encode())
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        metadata = {**metadata, "fingerprint": self._fingerprint()}
        metadata["checksum"] = self._checksum(path, tensors, metadata)
        _write_whole(path, save(tensors, metadata))

    def _checksum(self, path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
        """Return a checksum of all that a file says, and of its place in the store."""
        said = sorted((key, value) for key, value in metadata.items() if key != "checksum")
        value = zlib.crc32(f"{path.relative_to(self.path).as_posix()}{said}".encode())
        for name in sorted(tensors):
            tensor = tensors[name]
            value = zlib.crc32(f"{name}{tensor.dtype}{list(tensor.shape)}".encode(), value)
            value = zlib.crc32(tensor_bytes(tensor), value)
        return f"{value:08x}"

    def _load(self, path: Path, names: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, str]]:
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
        if not whole or sorted(tensors) != sorted(names):
            raise StoreError(
                f"store: expected {str(path)!r} as it was written there, got other bytes (delete "
                "it to have it made again)"
            )
        if metadata.get("fingerprint") != self._fingerprint():
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


def _compare(expected: dict[str, Any], found: dict[str, Any], where: str) -> None:
    """Refuse a store whose settings are not the ones expected."""
    for key in sorted({*expected, *found}):
        if expected.get(key) != found.get(key):
            raise StoreError(
                f"store: expected one made with {key} = {_short(expected.get(key))}, got "
                f"{_short(found.get(key))} in {where} (use another folder)"
            )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def open_store(store: str | os.PathLike[str] | None) -> MemoryStore | DirectoryStore:
    """Return the store of a path, or one in memory."""
    if store is not None and not isinstance(store, (str, os.PathLike)):
        raise TypeError(f"store: expected a path or None, got {store!r}")
    if store is not None and not os.fspath(store):
        raise ValueError("store: expected the path of a folder, got ''")
    return MemoryStore() if store is None else DirectoryStore(store)
