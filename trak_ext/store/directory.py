"""Features kept in a folder, as safetensors.

`manifest.json` has the settings that made the store, and the digests of the checkpoint summaries
that are finished; each checkpoint has a folder of shards, a summary once all samples are in, and
kernel matrices. Training samples that were added later, additions 1, 2, ..., have folders of their
own inside it. What bears its own name is whole (`files.py`); its digest covers every byte, and its
place, and the settings and weights that it belongs to.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import _check
from . import base
from .base import Store, settings_digest
from .codec import decode, encode
from .files import clear_temporaries, read_whole, write_whole
from .owner import NAME as OWNER_NAME
from .owner import Owner
from .records import KnownData, Record, StoreError, compare_settings

FORMAT_VERSION = 3

# What a manifest says beside settings.
_STATE = ("additions", "agreed", "digest", "shard_rows", "versions")

_SETTLED = 0.1  # seconds after which another run's write of the manifest is seen

_RECORD = (
    r"(features-\d{12}|journal-\d{12}|finished|context|probe|kernel-(plain|own|mean-\d{4}))"
    r"\.safetensors"
)
_CHECKPOINT = re.compile(r"checkpoint-\d{4,}")
_ADDITION = re.compile(r"part-(\d{4})")


class DirectoryStore(Store):
    """A `Store` in a folder; made by the first write, refused where it was made otherwise."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(os.path.abspath(path))  # whatever folder the process is in later
        if self.path.exists() and not self.path.is_dir():
            raise StoreError(f"store: expected a folder, got the file {str(self.path)!r}")
        self._settings: dict[str, Any] | None = None
        self._state: dict[str, Any] = {}
        self._agreed: dict[str, int | None] = {}
        self._versions: dict[str, str] = {}
        self._owner: Owner | None = None
        self._written_checkpoints = 0  # of the manifest that is there
        self._warned = False

    def __repr__(self) -> str:
        return f"features in {str(self.path)!r}"

    # --- the manifest -----------------------------------------------------------------------------

    @property
    def manifest(self) -> str:
        """Where settings are kept and what is finished, for errors."""
        return repr(str(self._manifest))

    @property
    def _manifest(self) -> Path:
        return self.path / "manifest.json"

    def open(
        self,
        settings: dict[str, Any],
        *,
        create: bool,
        addition: int = 0,
        versions: Mapping[str, str] | None = None,
    ) -> None:
        """Compare the manifest with `settings`; where there is none yet, take them on.

        The checkpoints may be some of the manifest's, from the first on, or continue them.

        Raises StoreError where another configuration made the store, or where there is no store
        and `create` is False.
        """
        self._settings = json.loads(json.dumps({"format_version": FORMAT_VERSION, **settings}))
        self._versions = dict(versions or {})
        self._state, self._agreed = {}, {}
        found = self._read_manifest()
        if found is None:
            if any(self._folders()):
                raise StoreError(f"store: expected {self.manifest} beside its features, got none")
            if not create:
                raise StoreError(
                    "Attributor is not fitted: call fit() first (there is no store at "
                    f"{str(self.path)!r})"
                )
        else:
            made = {key: value for key, value in found.items() if key not in _STATE}
            compare_settings(self._settings, made, self.manifest)
            self._take_on(found)
            self._warn_of_versions()
        if create and not (self._owner is not None and self._owner.shared):
            self._clear_temporaries()

    def recorded(self) -> dict[str, Any]:
        """Return what the manifest says, empty where there is none that can be read."""
        try:
            return self._read_manifest() or {}
        except (StoreError, OSError):
            return {}  # `open` says why

    def _take_on(self, manifest: dict[str, Any]) -> None:
        self._state = {key: manifest[key] for key in _STATE if key != "digest"}
        self._written_checkpoints = len(manifest["checkpoints"])

    def _read_manifest(self) -> dict[str, Any] | None:
        """Return the manifest, or None; refuse one that is damaged or of another format."""
        path = self.manifest
        data = read_whole(self._manifest)
        if data is None:
            return None
        try:
            found = json.loads(data)
        except ValueError:
            found = None
        if not isinstance(found, dict) or "format_version" not in found:
            raise StoreError(f"store: expected a store's manifest in {path}, got another file")
        if found["format_version"] != FORMAT_VERSION:
            raise StoreError(
                f"store: expected one of format {FORMAT_VERSION}, got format "
                f"{found['format_version']} in {path}, whose files this version cannot vouch for "
                "(fit again into another folder)"
            )
        if _manifest_bytes(found) != bytes(data):
            raise StoreError(
                f"store: expected {path} as it was written there, got other bytes (put it back, or "
                "fit again into another folder)"
            )
        return found

    def _warn_of_versions(self) -> None:
        """Say once which software is not what made the store."""
        made = self._state["versions"]
        now = self._versions
        other = [name for name in sorted({*made} & {*now}) if made[name] != now[name]]
        changed = [f"{name} {made[name]}, now {now[name]}" for name in other]
        if changed and not self._warned:
            self._warned = True
            _check.warn(
                f"store: {str(self.path)!r} was made with {'; '.join(changed)}: its features may "
                "differ from new ones in their last bits"
            )

    def _write_manifest(self) -> None:
        """Write the manifest, with no fewer checkpoints and summaries than the one there has."""
        assert self._settings is not None, "open() comes first"
        written = self._read_manifest()
        checkpoints = self._settings["checkpoints"]
        if written is not None and len(written["checkpoints"]) > len(checkpoints):
            checkpoints = written["checkpoints"]
        manifest = {**self._settings, "checkpoints": checkpoints, **self._state}
        data = _manifest_bytes(manifest)
        if written is None or _manifest_bytes(written) != data:
            write_whole(self._manifest, [data])
        self._written_checkpoints = len(checkpoints)

    def _begin(self) -> None:
        """Have a manifest of these settings, before the first record of a fit is written."""
        assert self._settings is not None, "open() comes first"
        if not self._state:
            width = self._settings.get("proj_dim", 1) * self._settings.get("blocks", 1)
            self._state = {
                "additions": [],
                "agreed": self._agreed,
                "shard_rows": base.shard_rows(width),
                "versions": self._versions,
            }
            self._write_manifest()
        elif len(self._settings["checkpoints"]) > self._written_checkpoints:
            self._write_manifest()

    # --- records ----------------------------------------------------------------------------------

    def get(self, checkpoint: int, name: str) -> Record | None:
        """Return the record of this name, or None; refuse a damaged or foreign file."""
        path = self._path(checkpoint, name)
        data = read_whole(path)
        if data is None:
            return None
        try:
            tensors, metadata, said, found = decode(data)
        except ValueError as error:
            raise StoreError(
                f"store: expected a whole safetensors file of this package in {str(path)!r}, got "
                f"{error} (delete it to have it made again)"
            ) from error
        if said != found:
            raise StoreError(
                f"store: expected {str(path)!r} as it was written there, got other bytes (delete "
                "it to have it made again)"
            )
        place = path.relative_to(self.path).as_posix()
        if metadata.pop("place", None) != place:
            raise StoreError(
                f"store: expected {str(path)!r} to have been written in this place, got a file "
                "from another (delete it to have it made again)"
            )
        if metadata.pop("fingerprint", None) != self._fingerprint(checkpoint):
            raise StoreError(
                f"store: expected {str(path)!r} to belong to this store's manifest, got a file of "
                "another configuration (delete it to have it made again)"
            )
        return Record(tensors, metadata, found)

    def put(self, checkpoint: int, name: str, record: Record) -> str:
        """Write a record under its own name, whole or not at all; return its digest."""
        if self._owner is not None:
            self._owner.check()
        self._begin()
        path = self._path(checkpoint, name)
        metadata = {
            **record.metadata,
            "place": path.relative_to(self.path).as_posix(),
            "fingerprint": self._fingerprint(checkpoint),
        }
        pieces, digest = encode(record.tensors, metadata)
        write_whole(path, pieces)
        return digest

    def remove(self, checkpoint: int, name: str) -> None:
        """Delete a record's file, if there is one."""
        self._path(checkpoint, name).unlink(missing_ok=True)

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

    # --- what is finished -------------------------------------------------------------------------

    def begun(self) -> int:
        """Return the number of additions of which there is anything."""
        entries = enumerate(self._additions)
        numbers = [number for number, entry in entries if any(entry["summaries"])]
        return max([-1, *numbers, *(addition for addition, _ in self._folders())]) + 1

    def known_data(self, addition: int) -> KnownData | None:
        """Return the data of an addition that is finished for any checkpoint, or None."""
        entry = self._entry(addition)
        return KnownData(entry["samples"], entry["data"]) if any(entry["summaries"]) else None

    def finished(self, checkpoint: int, addition: int) -> str | None:
        """Return the digest of a finished checkpoint's summary, or None."""
        summaries = self._entry(addition)["summaries"]
        return summaries[checkpoint] if checkpoint < len(summaries) else None

    def finish(self, checkpoint: int, addition: int, data: KnownData, digest: str) -> None:
        """Vouch for a checkpoint's summary."""
        while self.finished(checkpoint, addition) != digest:
            self._finish(checkpoint, addition, data, digest)
            if self._owner is None or not self._owner.shared:
                break
            # Another run of this token may have written what it had read before.
            time.sleep(_SETTLED)
            written = self._read_manifest()
            if written is not None:
                self._take_on(written)

    def _finish(self, checkpoint: int, addition: int, data: KnownData, digest: str) -> None:
        written = self._read_manifest()
        if written is not None:
            self._take_on(written)
        additions = self._additions
        while len(additions) <= addition:
            additions.append({"data": [], "samples": 0, "summaries": []})
        entry = additions[addition]
        if any(entry["summaries"]) and entry["data"] != data.data_digests:
            raise StoreError(
                f"store: expected the data that {self.manifest} vouches for, got other data (use "
                "another folder)"
            )
        entry["samples"], entry["data"] = data
        summaries = entry["summaries"]
        summaries.extend([None] * (checkpoint + 1 - len(summaries)))
        summaries[checkpoint] = digest
        self._write_manifest()

    def rows(self, width: int) -> int:
        """Return the samples of a shard: as the manifest says."""
        return self._state["shard_rows"] if self._state else base.shard_rows(width)

    def agree(self, name: str, value: int | None) -> int | None:
        """Return the number that the manifest has, or `value`, which a new manifest will have."""
        noted = self._state["agreed"] if self._state else self._agreed
        if name not in noted and not self._state:
            self._agreed[name] = value
        return noted.get(name, value)

    @property
    def _additions(self) -> list[dict[str, Any]]:
        return self._state.get("additions", [])

    def _entry(self, addition: int) -> dict[str, Any]:
        known = self._additions
        return known[addition] if addition < len(known) else {"summaries": []}

    # --- the folder -------------------------------------------------------------------------------

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Be the one run that writes to the store, or raise StoreError where another one is."""
        owner = Owner(self.path)
        with owner.hold():
            self._owner = owner
            try:
                yield
            finally:
                self._owner = None

    def _folders(self) -> Iterator[tuple[int, Path]]:
        """Yield (addition, folder) of all folders that have records."""
        record = re.compile(_RECORD)
        for checkpoint in _matching(self.path, _CHECKPOINT, links=True):
            additions = _matching(checkpoint, _ADDITION, links=True)
            inner = ((int(folder.name[5:]), folder) for folder in additions)
            for addition, folder in ((0, checkpoint), *inner):
                if any(record.fullmatch(name) for name in os.listdir(folder)):
                    yield addition, folder

    def _clear_temporaries(self) -> None:
        """Delete what killed writes of this store left behind, and nothing of anyone else's."""
        clear_temporaries(self.path, re.compile(rf"manifest\.json|{re.escape(OWNER_NAME)}"))
        for checkpoint in _matching(self.path, _CHECKPOINT):
            for folder in (checkpoint, *_matching(checkpoint, _ADDITION)):
                clear_temporaries(folder, re.compile(_RECORD))


def _matching(folder: Path, name: re.Pattern[str], *, links: bool = False) -> list[Path]:
    """Return the folders of such a name in a folder, in order; whether links to folders are."""
    try:
        with os.scandir(folder) as listed:
            entries = list(listed)
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = [e for e in entries if name.fullmatch(e.name) and e.is_dir(follow_symlinks=links)]
    return sorted(Path(entry.path) for entry in found)


def _manifest_bytes(manifest: dict[str, Any]) -> bytes:
    """Return a manifest's text, with the digest of all else that it says."""
    said = {key: value for key, value in manifest.items() if key != "digest"}
    return json.dumps({**said, "digest": settings_digest(said)}, indent=2, sort_keys=True).encode()
